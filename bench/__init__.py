"""Measurements against eager PyTorch and other peers."""
