"""A saved adapter: a folder with adapter_model.safetensors and adapter_config.json.

The weights file carries the configuration in its metadata, so that one rename replaces both and a
save that is killed leaves the old adapter or the new one, whole. adapter_config.json is a copy, to
read; it may be the one before, if a save was killed between the two files, but nothing else.
"""

import dataclasses
import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from vfmk._files import write_whole
from vfmk.nn.config import VFMAdapterConfig

WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"
METADATA_KEY = "vfmk_adapter"
REPLACES_KEY = "replaces"  # SHA-256 of the adapter_config.json that a save found
ADAPTER_TYPE = "VFM_ADAPTER"


@dataclass(frozen=True)
class SavedAdapter:
    """An adapter and what it goes with.

    Args:
        config: its shape.
        tensors: by name: "adapters.…" and, of modules_to_save, "modules.PATH.…".
        base_fingerprint: of the base that it was trained on.
        peft_layers: the layers of that base that peft had wrapped.
    """

    config: VFMAdapterConfig
    tensors: Mapping[str, Tensor]
    base_fingerprint: str
    peft_layers: Sequence[str]


def save_adapter(directory: str | os.PathLike[str], adapter: SavedAdapter) -> None:
    """Write the folder, made if need be. An adapter already in it is replaced whole."""
    folder = Path(directory)
    folder.mkdir(parents=True, exist_ok=True)
    document = json.dumps(
        {
            "adapter_type": ADAPTER_TYPE,
            "vfmk_version": version("vfmk"),
            "torch_version": torch.__version__,
            "base_fingerprint": adapter.base_fingerprint,
            "peft_layers": adapter.peft_layers,
            "parameters": sum(tensor.numel() for tensor in adapter.tensors.values()),
            "config": dataclasses.asdict(adapter.config),
        },
        indent=2,
    )
    dense = {name: tensor.detach().contiguous().cpu() for name, tensor in adapter.tensors.items()}
    metadata = {METADATA_KEY: document, REPLACES_KEY: _sha256(folder / CONFIG)}
    write_whole(folder / WEIGHTS, save(dense, metadata=metadata))
    write_whole(folder / CONFIG, document.encode())


def load_adapter(directory: str | os.PathLike[str]) -> SavedAdapter:
    """What `save_adapter` wrote.

    Raises:
        FileNotFoundError: a file of the folder is missing.
        ValueError: a file that is cut, foreign, or does not go with the other.
    """
    weights, readable = Path(directory) / WEIGHTS, Path(directory) / CONFIG
    for path in (weights, readable):
        if not path.is_file():
            raise FileNotFoundError(f"load_adapter: {path} is missing")
    try:
        with safe_open(weights, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(
            f"load_adapter: {weights} is cut or no safetensors file: {error}"
        ) from None
    if METADATA_KEY not in metadata:
        raise ValueError(f"load_adapter: {weights} is not an adapter saved by vfmk")
    document = _parsed(weights, metadata[METADATA_KEY])
    is_copy = document == _parsed(readable, readable.read_bytes())
    if not is_copy and metadata.get(REPLACES_KEY) != _sha256(readable):
        raise ValueError(
            f"load_adapter: {readable} was edited, or is of another adapter than {weights}"
        )
    try:
        config = VFMAdapterConfig(**document["config"])
        return SavedAdapter(config, tensors, document["base_fingerprint"], document["peft_layers"])
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"load_adapter: {weights}, of vfmk {document.get('vfmk_version')}, has no configuration"
            f" that this version reads: {error!r}"
        ) from None


def _parsed(path: Path, text: str | bytes) -> dict[str, Any]:
    try:
        document = json.loads(text)
    except ValueError as error:
        raise ValueError(f"load_adapter: {path} is cut or no JSON: {error}") from None
    if not isinstance(document, dict) or document.get("adapter_type") != ADAPTER_TYPE:
        raise ValueError(f"load_adapter: {path} is not an adapter saved by vfmk")
    return document


def _sha256(path: Path) -> str:
    """Of the file's bytes; empty where there is no file."""
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else ""
