"""The Segment Anything Model: loading, accelerating, adapting."""
