"""A saved adapter: a folder with adapter_model.safetensors and adapter_config.json.

The weights file carries the configuration in its metadata, so that one rename replaces both and a
save that is killed leaves the old adapter whole. adapter_config.json is its copy, to read.
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
            "adapter_type": "VFM_ADAPTER",
            "vfmk_version": version("vfmk"),
            "base_fingerprint": base_fingerprint,
            "parameters": sum(tensor.numel() for tensor in tensors.values()),
            "config": dataclasses.asdict(config),
        },
        indent=2,
    )
    dense = {name: tensor.detach().contiguous().cpu() for name, tensor in tensors.items()}
    write_whole(folder / WEIGHTS, save(dense, metadata={METADATA_KEY: document}))
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
    document = json.loads(metadata[METADATA_KEY])
    if document != _read_json(readable):
        raise ValueError(
            f"load_adapter: {readable} does not go with {weights}: it was edited, or a save of"
            f' another adapter was cut; the metadata "{METADATA_KEY}" of the weights file is right'
        )
    try:
        config = VFMAdapterConfig(**document["config"])
    except TypeError as error:
        written_by = document["vfmk_version"]
        raise ValueError(f"load_adapter: {weights} is of vfmk {written_by}: {error}") from None
    return config, tensors, document["base_fingerprint"]


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


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"load_adapter: {path} is cut or no JSON: {error}") from None
