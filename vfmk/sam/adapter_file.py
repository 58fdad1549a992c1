"""A saved adapter: a folder with adapter_model.safetensors and adapter_config.json.

The weights file carries the configuration in its metadata, so that one rename replaces both and a
save that is killed leaves the old adapter or the new one, whole. adapter_config.json is a copy, to
read; it may be the one before, if a save was killed between the two files, but nothing else.
"""

import dataclasses
import hashlib
import json
import os
from collections.abc import Mapping
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


def save_adapter(
    directory: str | os.PathLike[str],
    config: VFMAdapterConfig,
    tensors: Mapping[str, Tensor],
    base_fingerprint: str,
) -> None:
    """Write the folder, made if need be. An adapter already in it is replaced whole."""
    folder = Path(directory)
    folder.mkdir(parents=True, exist_ok=True)
    document = json.dumps(
        {
            "adapter_type": ADAPTER_TYPE,
            "vfmk_version": version("vfmk"),
            "base_fingerprint": base_fingerprint,
            "parameters": sum(tensor.numel() for tensor in tensors.values()),
            "config": dataclasses.asdict(config),
        },
        indent=2,
    )
    dense = {name: tensor.detach().contiguous().cpu() for name, tensor in tensors.items()}
    metadata = {METADATA_KEY: document, REPLACES_KEY: _sha256(folder / CONFIG)}
    write_whole(folder / WEIGHTS, save(dense, metadata=metadata))
    write_whole(folder / CONFIG, document.encode())


def load_adapter(
    directory: str | os.PathLike[str],
) -> tuple[VFMAdapterConfig, dict[str, Tensor], str]:
    """Configuration, tensors and the fingerprint of the base they were trained on.

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
        return config, tensors, document["base_fingerprint"]
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"load_adapter: {weights}, of vfmk {document.get('vfmk_version')}, has no configuration"
            f" that this version reads: {error!r}"
        ) from None


def fingerprint(state_dict: Mapping[str, Tensor]) -> str:
    """SHA-256 of the names, shapes and values of a model.

    Values are rounded to bfloat16 first, so a model cast from float32 to bfloat16 is the same base.
    """
    digest = hashlib.sha256()
    for name in sorted(state_dict):
        tensor = state_dict[name]
        digest.update(f"{name}{list(tensor.shape)}".encode())
        rounded = tensor.detach().to("cpu", torch.bfloat16).contiguous()
        digest.update(rounded.flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


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
