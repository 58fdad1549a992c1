"""One process or several, on Hugging Face accelerate; what the first decides or suffers, all do."""

import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar, cast

import torch
from torch.distributed.fsdp import MixedPrecisionPolicy

if TYPE_CHECKING:
    from accelerate import Accelerator

Value = TypeVar("Value")
REFUSED = {"DEEPSPEED": "DeepSpeed", "MEGATRON_LM": "Megatron-LM"}


def start_accelerator(precision: str) -> "Accelerator":
    """Accelerate's handle on this process and the others, if it was started with others.

    Each process holds the whole model (DistributedDataParallel), or with `accelerate launch
    --use_fsdp`, on GPUs, its share of every tensor (FSDP2, by blocks of the encoder; of its options
    --fsdp_offload_params alone counts). `precision` alone says in what is computed; accelerate
    launch's --mixed_precision is not asked.

    Raises:
        ValueError: "fp16" on a CPU, which accelerate would compute in float32; `accelerate launch`
            asked for DeepSpeed, Megatron-LM, or FSDP without several processes on GPUs.
    """
    from accelerate import (
        Accelerator,
        DistributedType,
        FullyShardedDataParallelPlugin,
        InitProcessGroupKwargs,
    )
    from accelerate.utils import parse_flag_from_env

    for variable, name in REFUSED.items():
        if _is_asked_for(variable):
            raise by_all(
                ValueError(f"train: {name} is not supported; start with torchrun or with FSDP")
            )
    # Without an accelerator it would not join processes, unless told to keep to the CPU.
    cpu = parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.accelerator.is_available()
    if cpu and precision == "fp16":
        raise by_all(ValueError("precision 'fp16' needs a GPU; a CPU computes in 'no' or 'bf16'"))
    options: dict[str, Any] = {}
    if torch.cuda.is_available():  # scores are gathered on the CPU
        options["kwargs_handlers"] = [InitProcessGroupKwargs(backend="cpu:gloo,cuda:nccl")]
    if _is_asked_for("FSDP"):
        options["fsdp_plugin"] = FullyShardedDataParallelPlugin(
            fsdp_version=2,
            reshard_after_forward=True,
            auto_wrap_policy="transformer_based_wrap",
            transformer_cls_names_to_wrap=["VfmkBlock"],
            activation_checkpointing=False,
            mixed_precision_policy=MixedPrecisionPolicy(),  # weights stay; autocast casts
            cpu_ram_efficient_loading=False,
        )
    accelerator = Accelerator(cpu=cpu, mixed_precision=precision, **options)
    if _is_asked_for("FSDP") and accelerator.distributed_type != DistributedType.FSDP:
        raise by_all(
            ValueError(
                "train: accelerate gives FSDP to several processes on GPUs alone, got"
                f" {accelerator.num_processes} on {accelerator.device.type}"
            )
        )
    return accelerator


def by_all(error: Exception) -> Exception:
    """Marked as what every process raises, so that the first alone prints it."""
    error.by_all = True  # type: ignore[attr-defined]
    return error


def from_first(accelerator: "Accelerator", function: Callable[[], Value]) -> Value:
    """What `function` returns, or raises, in the first process, in every process."""
    from accelerate.utils import broadcast_object_list

    outcome: list[Any] = [None, None]
    if accelerator.is_main_process:
        try:
            outcome[0] = function()
        except Exception as error:
            outcome[1] = error
    value, fault = broadcast_object_list(outcome)
    if fault is not None:
        raise by_all(fault)
    return value


def jointly(accelerator: "Accelerator", function: Callable[[], Value]) -> Value:
    """What `function` returns in this process; what it raises in any, in every process."""
    from accelerate.utils import gather_object

    value, faults = None, []
    try:
        value = function()
    except Exception as error:
        faults = [error]
    if faults := gather_object(faults):
        raise by_all(faults[0])
    return cast(Value, value)


def _is_asked_for(way: str) -> bool:
    return os.environ.get(f"ACCELERATE_USE_{way}", "false").lower() == "true"
