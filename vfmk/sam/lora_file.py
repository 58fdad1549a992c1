"""LoRA in a Sam, in the files that peft writes: `peft.PeftModel.from_pretrained` reads them.

They hold what peft put into SAM's layers and, whole, the parts of SAM that were trained beside it,
as peft's `modules_to_save`.
"""

import copy
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from safetensors.torch import save
from torch import Tensor

from vfmk._files import write_whole
from vfmk.sam import base
from vfmk.sam.adapter_file import CONFIG, WEIGHTS

if TYPE_CHECKING:
    from segment_anything.modeling import Sam

PREFIX = "base_model.model."  # of every name in peft's files: the way to the Sam in a PeftModel


def save_lora(folder: Path, sam: "Sam") -> list[str]:
    """Write the folder, made if need be; returns the names of SAM's own tensors in it.

    Raises:
        ValueError: peft has not put exactly one LoRA into `sam`, or what is trained beside it is in
            a module that holds LoRA too.
    """
    config = copy.copy(_only_config(sam))
    config.inference_mode = True
    config.modules_to_save = sorted({*_wrapped_parts(sam), *_trained_parts(sam)}) or None
    own = own_tensors(sam, config.modules_to_save)
    tensors = {**own, **_peft_tensors(sam)}  # of a part that peft wrapped, its copy
    dense = {name: tensor.detach().contiguous().cpu() for name, tensor in tensors.items()}
    folder.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory() as temporary:
        config.save_pretrained(temporary)
        document = (Path(temporary) / CONFIG).read_bytes()
    write_whole(folder / WEIGHTS, save(dense, metadata={"format": "pt"}))
    write_whole(folder / CONFIG, document)
    return [name.removeprefix(PREFIX) for name in own]


def inject_lora(sam: "Sam", folder: Path) -> dict[str, Tensor]:
    """Put new layers into `sam` as the configuration in `folder` says; returns, by the names of its
    weights file, the tensors that these belong in.

    Raises:
        ImportError: peft is not installed.
    """
    try:
        from peft import PeftConfig, inject_adapter_in_model
    except ImportError as error:
        raise ImportError(f"{folder} holds LoRA, which needs peft: {error}") from error

    config: Any = PeftConfig.from_pretrained(str(folder))
    parts, config.modules_to_save = config.modules_to_save, None  # no copies beside the originals
    config.init_lora_weights = True  # no other start, some of which change the layer beneath
    inject_adapter_in_model(config, sam)
    return {**own_tensors(sam, parts), **_peft_tensors(sam)}


def take_out_lora(sam: "Sam") -> None:
    """Undo `inject_lora`, as far as it came."""
    for name in base.peft_layers(sam):
        base.put_module(sam, name, sam.get_submodule(name).base_layer)
    vars(sam).pop("peft_config", None)


def own_tensors(sam: "Sam", parts: list[str] | None) -> dict[str, Tensor]:
    """SAM's own tensors in these parts, by the names that peft's file has for them."""
    prefixes = tuple(f"{part}." for part in parts or ())
    named = base.base_tensors(sam).items()
    return {PREFIX + name: tensor for name, tensor in named if name.startswith(prefixes)}


def _peft_tensors(sam: "Sam") -> dict[str, Tensor]:
    from peft import get_peft_model_state_dict

    (adapter_name,) = sam.peft_config
    state = sam.state_dict(keep_vars=True)
    named = get_peft_model_state_dict(sam, state, adapter_name).items()
    return {PREFIX + name: tensor for name, tensor in named}


def _only_config(sam: "Sam") -> Any:
    configs = getattr(sam, "peft_config", {})
    kinds = {name: config.peft_type.value for name, config in configs.items()}
    if list(kinds.values()) != ["LORA"]:
        raise ValueError(
            "save_lora: the Sam must hold one LoRA, put into the whole of it, not into a part;"
            f" it holds {kinds or 'none'}"
        )
    return next(iter(configs.values()))


def _wrapped_parts(sam: "Sam") -> list[str]:
    """Those that peft was asked to save, and has copies of."""
    return [name for name, module in sam.named_modules() if hasattr(module, "original_module")]


def _trained_parts(sam: "Sam") -> set[str]:
    """Of what is trained beside peft's layers, the outermost modules that hold none of them."""
    layers = base.peft_layers(sam)
    wrapped = tuple(f"{name}." for name in _wrapped_parts(sam))
    parts = set()
    for name, tensor in base.base_tensors(sam).items():
        if not tensor.requires_grad or name.startswith(wrapped):
            continue
        path = name.split(".")
        modules = (".".join(path[:depth]) for depth in range(1, len(path)))
        free = (m for m in modules if not any(f"{layer}.".startswith(f"{m}.") for layer in layers))
        part = next(free, None)
        if part is None:
            raise ValueError(
                f"save_lora: {name} is trained beside LoRA, in a module that holds LoRA too"
            )
        parts.add(part)
    return parts
