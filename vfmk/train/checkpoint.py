"""Checkpoints: what was trained and all that a run needs to go on as if it had not been stopped."""

import io
import pickle
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from vfmk._files import write_whole
from vfmk._state_dict import fill
from vfmk.train.shards import shared_out, whole

LAST, BEST = "last.pt", "best.pt"


def save_checkpoint(path: Path, state: Mapping[str, Any]) -> None:
    """Write it whole; killed at any moment, the file is the old one or the new one."""
    buffer = io.BytesIO()
    torch.save(dict(state), buffer)
    write_whole(path, buffer.getvalue())


def load_checkpoint(path: Path) -> dict[str, Any]:
    """What `save_checkpoint` wrote; tensors, numbers and strings, nothing else is unpickled.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is no checkpoint of a run.
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise ValueError(f"load_checkpoint: {path} is unreadable: {error}") from error
    if not isinstance(state, dict) or "weights" not in state:
        raise ValueError(f"load_checkpoint: {path} is not a checkpoint of vfmk train")
    return state


def trained_weights(parameters: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
    """Copies on the CPU. With FSDP, every process must call this."""
    return {name: whole(p.detach()).cpu().clone() for name, p in parameters.items()}


def load_weights(parameters: Mapping[str, nn.Parameter], weights: Mapping[str, Tensor]) -> None:
    """Copy `weights` into parameters of the same names.

    Raises:
        ValueError: names or shapes differ; they are named.
    """
    own = {
        name: shared_out(weight, parameters[name]) if name in parameters else weight
        for name, weight in weights.items()
    }
    fill(parameters, own, "load_weights: the checkpoint")


def random_state(device: torch.device) -> dict[str, Any]:
    """Of Python, NumPy and torch on the CPU and on this process's device."""
    kind, keys, *rest = np.random.get_state()
    return {
        "python": random.getstate(),
        "numpy": (kind, [int(key) for key in keys], *rest),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
    }


def set_random_state(state: Mapping[str, Any], device: torch.device) -> None:
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    torch.set_rng_state(state["torch"])
    if device.type == "cuda":
        torch.cuda.set_rng_state(state["cuda"], device)
