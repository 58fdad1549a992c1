"""A task by name, on a Sam with what shall be trained."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any

from torch import nn

from vfmk.data.dataset import TASKS, TaskName
from vfmk.nn.config import VFMAdapterConfig
from vfmk.sam.accelerate import accelerate
from vfmk.sam.adapt import AdaptedSam, get_adapted_model
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
        rank: of adapters.
        dropout: in adapters.
        modules_to_save: submodules of the Sam that "vfm" and "lora" train too, by dotted name.
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
        object.__setattr__(self, "modules_to_save", tuple(self.modules_to_save))
        if self.modules_to_save and self.adapter in ("decoder", "full"):
            raise ValueError(
                f"ModelConfig: modules_to_save goes with the adapters vfm and lora,"
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


def build_task(config: ModelConfig, classes: list[str]) -> Task:
    """The task on an accelerated Sam; what is to be trained, and nothing else, requires grad.

    Args:
        classes: names; those of instance and detection begin with "background".

    Raises:
        ImportError: "lora" without peft.
        ValueError: see `ModelConfig` and `vfmk.load_sam`.
    """
    from vfmk.sam.block import checkpoint_blocks

    sam = accelerate(load_sam(config.model, config.checkpoint))
    task = with_head(config.task, _adapted(sam, config), len(classes))
    if config.gradient_checkpointing:
        checkpoint_blocks(sam.image_encoder, True)
    for module in task.unused:
        module.requires_grad_(False)
    return task


def _adapted(sam: "Sam", config: ModelConfig) -> "Sam | AdaptedSam":
    if config.adapter == "vfm":
        return get_adapted_model(sam, config.vfm_config())
    if config.adapter == "lora":
        _inject_lora(sam, config)
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

    modules = dict(sam.named_modules())
    for name in config.modules_to_save:
        if name not in modules:
            raise ValueError(f"build_task: modules_to_save has {name!r}, sam does not")
    pattern = re.escape("image_encoder.blocks.") + r"\d+\.attn\.qkv"
    lora = LoraConfig(
        r=config.rank,
        lora_alpha=config.rank,
        lora_dropout=config.dropout,
        target_modules=pattern,
    )
    inject_adapter_in_model(lora, sam)
    for name in config.modules_to_save:
        modules[name].requires_grad_(True)


def with_head(name: str, model: "Sam | AdaptedSam", num_classes: int) -> Task:
    if name == "promptable":
        from vfmk.tasks.promptable import PromptableTask

        return PromptableTask(model)
    if name == "semantic":
        from vfmk.tasks.semantic import SemanticTask

        return SemanticTask(model, num_classes)
    from vfmk.tasks.detection import DetectionTask, InstanceTask

    return (InstanceTask if name == "instance" else DetectionTask)(model, num_classes)


def trainable(task: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that require grad, by name."""
    return {name: p for name, p in task.named_parameters() if p.requires_grad}
