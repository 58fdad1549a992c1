"""A task by name, on a Sam with what shall be trained."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any

from torch import nn

from vfmk.data.dataset import TASKS, TaskName
from vfmk.nn.config import VFMAdapterConfig
from vfmk.sam.accelerate import accelerate
from vfmk.sam.adapt import AdaptedSam, get_adapted_model
from vfmk.sam.checks import paths_of
from vfmk.sam.load import load_sam
from vfmk.tasks.task import Task

if TYPE_CHECKING:
    from segment_anything.modeling import Sam

ADAPTERS = ("vfm", "lora", "decoder", "full")


@dataclass(frozen=True)
class ModelConfig:
    """What is trained for which task. A field out of range is a ValueError that names it.

    Args:
        task: "promptable", "semantic", "instance" or "detection".
        model: a name that `vfmk.load_sam` knows.
        checkpoint: its checkpoint.
        adapter: "vfm" and "lora" train adapters in the encoder and the task's head, "decoder" the
            head alone, "full" everything. The promptable task's head is SAM's mask decoder, which
            "vfm" and "lora" leave as it is unless `modules_to_save` names it.
        rank: of "vfm" and "lora".
        dropout: in "vfm" and "lora".
        modules_to_save: submodules of the Sam that "vfm" and "lora" train too, none of them within
            the encoder's blocks: by dotted name or the end of it, such as "neck".
        vfm: further fields of `vfmk.VFMAdapterConfig` for "vfm", by name.
        gradient_checkpointing: keep one tensor for each block of the encoder and compute the rest
            again in the backward; not with "decoder", whose encoder has none.
    """

    task: TaskName
    model: str = "tiny"
    checkpoint: str | None = None
    adapter: str = "vfm"
    rank: int = 32
    dropout: float = 0.1
    modules_to_save: tuple[str, ...] = ()
    vfm: Mapping[str, Any] = field(default_factory=dict)
    gradient_checkpointing: bool = False

    def __post_init__(self) -> None:
        for name, known in (("task", TASKS), ("adapter", ADAPTERS)):
            if getattr(self, name) not in known:
                raise ValueError(
                    f"ModelConfig: {name} must be one of {', '.join(known)},"
                    f" got {getattr(self, name)!r}"
                )
        if self.rank < 1:
            raise ValueError(f"ModelConfig: rank must be at least 1, got {self.rank}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"ModelConfig: dropout must be in [0, 1), got {self.dropout}")
        object.__setattr__(self, "modules_to_save", tuple(self.modules_to_save))
        for name in ("rank", "dropout", "modules_to_save"):
            is_given = getattr(self, name) != getattr(ModelConfig, name)
            if is_given and self.adapter in ("decoder", "full"):
                raise ValueError(
                    f"ModelConfig: {name} goes with the adapters vfm and lora,"
                    f" not with {self.adapter}"
                )
        if self.gradient_checkpointing and self.adapter == "decoder":
            raise ValueError(
                "ModelConfig: gradient_checkpointing is of the encoder, which adapter 'decoder'"
                " does not train"
            )
        if self.adapter == "vfm":
            self.vfm_config()
        elif self.vfm:
            raise ValueError(
                f"ModelConfig: {', '.join(self.vfm)} must go with adapter 'vfm', got"
                f" {self.adapter!r}"
            )

    def vfm_config(self) -> VFMAdapterConfig:
        own = ("rank", "dropout", "modules_to_save")
        known = [f.name for f in fields(VFMAdapterConfig) if f.name not in own]
        if strange := self.vfm.keys() - set(known):
            raise ValueError(
                f"ModelConfig: vfm must have fields among {', '.join(known)},"
                f" got {', '.join(sorted(strange))}"
            )
        return VFMAdapterConfig(**{name: getattr(self, name) for name in own}, **self.vfm)


def build_task(config: ModelConfig, classes: Sequence[str]) -> Task:
    """The task on an accelerated Sam; what is to be trained, and nothing else, requires grad.

    Args:
        classes: names; those of instance and detection begin with "background".

    Raises:
        ImportError: "lora" without peft.
        ValueError: see `vfmk.load_sam`; `modules_to_save` has what the Sam lacks, what holds the
            adapters, or what the task does not use.
    """
    from vfmk.sam.block import checkpoint_blocks

    sam = accelerate(load_sam(config.model, config.checkpoint))
    trained = paths_of("build_task", sam, config.modules_to_save)
    task = with_head(config.task, _adapted(sam, config, trained), classes)
    _check_used(task, trained)
    if config.gradient_checkpointing:
        checkpoint_blocks(sam.image_encoder, True)
    for module in task.unused:
        module.requires_grad_(False)
    return task


def _adapted(sam: "Sam", config: ModelConfig, trained: Sequence[str]) -> "Sam | AdaptedSam":
    if config.adapter == "vfm":
        return get_adapted_model(sam, config.vfm_config())
    if config.adapter == "lora":
        _inject_lora(sam, config)
        for path in trained:
            sam.get_submodule(path).requires_grad_(True)
    elif config.adapter == "decoder":
        sam.requires_grad_(False)
        sam.mask_decoder.requires_grad_(True)
    return sam


def _inject_lora(sam: "Sam", config: ModelConfig) -> None:
    """Low-rank updates of every block's qkv projection (Hu et al., 2022), by peft."""
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise ImportError(f"build_task: adapter 'lora' needs peft: {error}") from error

    pattern = re.escape("image_encoder.blocks.") + r"\d+\.attn\.qkv"
    lora = LoraConfig(
        r=config.rank,
        lora_alpha=config.rank,
        lora_dropout=config.dropout,
        target_modules=pattern,
    )
    inject_adapter_in_model(lora, sam)


def _check_used(task: Task, trained: Sequence[str]) -> None:
    unused = {parameter for module in task.unused for parameter in module.parameters()}
    for path in trained:
        if unused.issuperset(task.sam.get_submodule(path).parameters()):
            raise ValueError(
                f"build_task: modules_to_save has {path!r}, in which the task {task.name!r} has"
                " nothing to train"
            )


def with_head(name: str, model: "Sam | AdaptedSam", classes: Sequence[str]) -> Task:
    if name == "promptable":
        from vfmk.tasks.promptable import PromptableTask

        return PromptableTask(model, classes)
    if name == "semantic":
        from vfmk.tasks.semantic import SemanticTask

        return SemanticTask(model, classes)
    from vfmk.tasks.detection import DetectionTask, InstanceTask

    return (InstanceTask if name == "instance" else DetectionTask)(model, classes)


def trainable(task: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that require grad, by name."""
    return {name: p for name, p in task.named_parameters() if p.requires_grad}
