"""A trained task as a small folder, to load on the same Sam elsewhere.

task.json                 which task, which classes, which base, which versions, and the SHA-256 of
                          every other file; written last
task_model.safetensors    the head, and what was trained of SAM itself
adapter_model.safetensors, adapter_config.json    a VFM-Adapter, for `vfmk.AdaptedSam`
lora/                     LoRA, for `peft.PeftModel`, with the parts of SAM trained beside it
"""

import hashlib
import json
import os
from collections.abc import Mapping, Sequence, Set
from contextlib import AbstractContextManager, ExitStack, nullcontext
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load, save
from torch import Tensor, nn

from vfmk._files import write_whole
from vfmk._state_dict import fill
from vfmk.data.dataset import TASKS
from vfmk.sam import adapter_file, base, lora_file
from vfmk.sam.adapt import AdaptedSam
from vfmk.tasks.build import with_head
from vfmk.tasks.task import Task

if TYPE_CHECKING:
    from segment_anything.modeling import Sam

CARD, WEIGHTS = "task.json", "task_model.safetensors"
ADAPTER = (adapter_file.WEIGHTS, adapter_file.CONFIG)
LORA_FOLDER = "lora"
LORA = tuple(f"{LORA_FOLDER}/{name}" for name in ADAPTER)
OWN = "sam."  # before the names of SAM's own tensors


def save_task(task: Task, directory: str | os.PathLike[str]) -> None:
    """Write what `task` adds to its Sam into `directory`, made if need be.

    That is its head, the active VFM-Adapter, LoRA, and of SAM itself the parameters that require
    grad. What another save left there is replaced or deleted; while that goes on, `load_task` loads
    the old task or refuses the folder.

    Raises:
        ValueError: peft has adapted a part of the Sam and not the whole, more than once, or beside
            trained weights in the same module.
    """
    folder = Path(directory)
    folder.mkdir(parents=True, exist_ok=True)
    sam, model = base.unwrapped(task.sam), task.model
    files, in_lora = [WEIGHTS], set[str]()
    with _base_in_place(model):
        own = base.base_tensors(sam)
        if base.peft_layers(sam):
            in_lora = set(lora_file.save_lora(folder / LORA_FOLDER, sam))
            files += LORA
    if isinstance(model, AdaptedSam):
        model.save_pretrained(folder)
        files += ADAPTER
    trained = {name for name, tensor in own.items() if tensor.requires_grad} - in_lora
    tensors = {**_head(task), **{OWN + name: own[name] for name in trained}}
    dense = {name: tensor.detach().contiguous().cpu() for name, tensor in tensors.items()}
    write_whole(folder / WEIGHTS, save(dense))
    if isinstance(model, AdaptedSam):
        fingerprint = model.base_fingerprint
    else:
        fingerprint = _fingerprint(own, trained | in_lora)
    card = {
        "task": task.name,
        "classes": list(task.classes),
        "vfmk_version": version("vfmk"),
        "torch_version": torch.__version__,
        **({"peft_version": version("peft")} if LORA[0] in files else {}),
        "base_fingerprint": fingerprint,
        "trained_in_sam": sorted(trained),
        "files": {name: _sha256(folder / name) for name in files},
    }
    write_whole(folder / CARD, json.dumps(card, indent=2).encode())
    for name in {*ADAPTER, *LORA} - set(files):
        (folder / name).unlink(missing_ok=True)


def load_task(directory: str | os.PathLike[str], sam: "Sam", is_trainable: bool = False) -> Task:
    """The task that `save_task` wrote, on the base that it was trained on.

    Args:
        sam: that base, in float32, without adapters; it is adapted in place. Accelerate it if the
            task was trained so (`vfmk train` does), for the same predictions bit for bit.
        is_trainable: what was trained requires grad again, and the mode stays; otherwise everything
            is frozen and in eval mode.

    Raises:
        FileNotFoundError: a file of the folder is missing.
        ImportError: it holds LoRA, and peft is not installed.
        TypeError, ValueError: `sam` is no Sam, or not as it came; the folder is cut or of several
            saves; another base; missing, stray or misshapen tensors, by name. `sam` is then as it
            was.
    """
    folder = Path(directory)
    source = f"load_task: {folder}"
    card = _read_card(folder)
    _check_sam(sam)
    tensors = load((folder / WEIGHTS).read_bytes())
    own: dict[str, Tensor] = {}
    required_grad = [(parameter, parameter.requires_grad) for parameter in sam.parameters()]
    with ExitStack() as undo:
        undo.callback(_set_required_grad, required_grad)
        model: Sam | AdaptedSam = sam
        if LORA[0] in card["files"]:
            undo.callback(lora_file.take_out_lora, sam)
            own |= lora_file.inject_lora(sam, folder / LORA_FOLDER)
            tensors |= load((folder / LORA[0]).read_bytes())
        if ADAPTER[0] in card["files"]:
            model = AdaptedSam.from_pretrained(sam, folder, is_trainable=True)
            undo.callback(model.unload)
        with _base_in_place(model):
            of_sam = base.base_tensors(sam)
        if not isinstance(model, AdaptedSam):
            in_lora = {name.removeprefix(lora_file.PREFIX) for name in own}
            found = _fingerprint(of_sam, {*card["trained_in_sam"], *in_lora})
            if found != card["base_fingerprint"]:
                raise ValueError(
                    f"{source} was trained on another base: fingerprint"
                    f" {card['base_fingerprint'][:12]}…, sam has {found[:12]}…"
                )
            sam.requires_grad_(False)
        own |= {OWN + name: of_sam[name] for name in card["trained_in_sam"] if name in of_sam}
        task = with_head(card["task"], model, card["classes"])
        task.to(next(sam.parameters()).device)
        fill({**own, **_head(task)}, tensors, source)
        undo.pop_all()
    if not is_trainable:
        return task.eval().requires_grad_(False)
    for tensor in own.values():
        tensor.requires_grad_(isinstance(tensor, nn.Parameter))
    for module in task.unused:
        module.requires_grad_(False)
    return task.train(sam.training)


def _head(task: Task) -> dict[str, Tensor]:
    """The task's own tensors, which are not the model's."""
    return {n: tensor for n, tensor in task.state_dict().items() if not n.startswith("model.")}


def _base_in_place(model: nn.Module) -> AbstractContextManager[None]:
    """The base's own modules in the places of those that an adapter brings along."""
    return model.disable_adapter() if isinstance(model, AdaptedSam) else nullcontext()


def _fingerprint(own: Mapping[str, Tensor], saved: Set[str]) -> str:
    """Of SAM's own tensors but those in the files."""
    return base.fingerprint_of(
        {n: t for n, t in own.items() if n.startswith(base.PARTS) and n not in saved}
    )


def _check_sam(sam: "Sam") -> None:
    from segment_anything.modeling import Sam

    from vfmk.sam.block import is_adapted

    if not isinstance(sam, Sam):
        raise TypeError(f"load_task: sam must be a segment_anything Sam, got {type(sam).__name__}")
    if base.peft_layers(sam) or is_adapted(base.image_encoder_of(sam)):
        raise ValueError("load_task: sam has adapters already; it must be the base alone")
    if dtypes := {p.dtype for p in sam.parameters()} - {torch.float32}:
        raise ValueError(f"load_task: sam must be in float32, got {', '.join(map(str, dtypes))}")


def _read_card(folder: Path) -> dict[str, Any]:
    """task.json, all other files being those that it was written for."""
    path = folder / CARD
    if not path.is_file():
        raise FileNotFoundError(f"load_task: {path} is missing")
    try:
        card = json.loads(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"load_task: {path} is cut or no JSON: {error}") from None
    types = {
        "task": str,
        "classes": list,
        "base_fingerprint": str,
        "trained_in_sam": list,
        "files": dict,
    }
    if not isinstance(card, dict) or not all(isinstance(card.get(k), t) for k, t in types.items()):
        raise ValueError(f"load_task: {path} was not written by save_task")
    known = [{WEIGHTS, *adapter, *lora} for adapter in ((), ADAPTER) for lora in ((), LORA)]
    if card["task"] not in TASKS or set(card["files"]) not in known:
        raise ValueError(
            f"load_task: {path}, of vfmk {card.get('vfmk_version')}, has a task or files that this"
            f" version does not know: {card['task']}, {', '.join(card['files'])}"
        )
    for name, sha256 in card["files"].items():
        if not (folder / name).is_file():
            raise FileNotFoundError(f"load_task: {folder / name} is missing")
        if _sha256(folder / name) != sha256:
            raise ValueError(
                f"load_task: {folder / name} is not as save_task wrote it with {path}: it was cut,"
                " changed, or replaced by another save"
            )
    return card


def _set_required_grad(required_grad: Sequence[tuple[nn.Parameter, bool]]) -> None:
    for parameter, required in required_grad:
        parameter.requires_grad_(required)


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
