"""Losses, metrics and training loops for dense prediction."""
