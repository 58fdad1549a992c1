"""Samples for promptable segmentation: generated, composed, or read from a folder."""
