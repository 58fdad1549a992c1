"""Losses, metrics and training loops for dense prediction."""

from vfmk.tasks.saved import load_task, save_task

__all__ = ["load_task", "save_task"]
