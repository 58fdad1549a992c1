"""`vfmk train`."""

from pathlib import Path
from typing import Annotated, Any, Literal

from rich.table import Table
from typer import Option

from vfmk.cli.progress import list_skipped, plain_errors, steps_bar, terminal
from vfmk.tasks.task import TaskName


def train(
    task: Annotated[TaskName, Option(help="what to learn")],
    data: Annotated[Path, Option(help="data set, as vfmk.data.open_dataset takes it")],
    out: Annotated[Path, Option(help="folder for weights and report")],
    model: Annotated[str, Option(help="tiny, vit_b, vit_l or vit_h")] = "tiny",
    checkpoint: Annotated[Path | None, Option(help="of the model")] = None,
    adapter: Annotated[
        Literal["vfm", "lora", "decoder", "full"], Option(help="what is trained in the model")
    ] = "vfm",
    rank: Annotated[int, Option(help="of vfm and lora")] = 32,
    dropout: Annotated[float, Option(help="in vfm and lora")] = 0.1,
    train_module: Annotated[
        list[str] | None,
        Option(help="train this part of SAM too, such as mask_decoder; may be repeated"),
    ] = None,
    conv: Annotated[
        Literal["depthwise", "dense", "static"] | None, Option(help="of vfm: its kernels")
    ] = None,
    kernel_size: Annotated[int | None, Option(help="of vfm's convolution")] = None,
    global_branch: Annotated[
        bool | None, Option(help="of vfm: attention beside the convolution")
    ] = None,
    num_heads: Annotated[int | None, Option(help="of vfm's attention")] = None,
    token_dim: Annotated[int | None, Option(help="of vfm's hypernetwork: its tokens")] = None,
    low_dim: Annotated[int | None, Option(help="of vfm's hypernetwork: its code")] = None,
    num_queries: Annotated[int | None, Option(help="of vfm's hypernetwork")] = None,
    scale: Annotated[float | None, Option(help="of vfm's output")] = None,
    sublayers: Annotated[str | None, Option(help="with vfm: attn,mlp or one of them")] = None,
    layers: Annotated[
        str | None, Option(help="blocks with vfm, such as 2,5,8,11; default: all")
    ] = None,
    gradient_checkpointing: Annotated[
        bool, Option("--gradient-checkpointing", help="less memory, more time")
    ] = False,
    split: Annotated[str | None, Option(help="of the data, to train on")] = None,
    eval_data: Annotated[
        Path | None, Option(help="to evaluate on; default: every fifth image of the data")
    ] = None,
    eval_split: Annotated[str | None, Option(help="to evaluate on")] = None,
    skip_bad: Annotated[bool, Option(help="leave unreadable images out")] = False,
    epochs: float = 12,
    batch_size: Annotated[int, Option(help="for each process")] = 2,
    accumulation: Annotated[int, Option(help="backward passes for each step")] = 1,
    learning_rate: float = 1e-4,
    weight_decay: float = 0.1,
    schedule: Annotated[
        Literal["step", "cosine"], Option(help="step: a tenth after 8/12 and 11/12 of the run")
    ] = "step",
    warmup_steps: int = 0,
    max_grad_norm: float = 1.0,
    precision: Annotated[Literal["no", "bf16", "fp16"], Option(help="of autocast")] = "no",
    ema: Annotated[float, Option(help="decay of averaged weights; 0: none")] = 0.0,
    eval_every: Annotated[float, Option(help="epochs")] = 1.0,
    checkpoint_every: Annotated[int, Option(help="steps")] = 200,
    workers: Annotated[int, Option(help="processes that load images")] = 0,
    seed: int = 0,
    resume: Annotated[
        Literal["auto", "never"], Option(help="auto: go on with the run in OUT if there is one")
    ] = "never",
) -> None:
    """Adapt SAM to a task.

    Options of vfm that are not given are as in vfmk.VFMAdapterConfig.

    Several GPUs: torchrun --nproc-per-node N -m -- vfmk train ..., or with the weights shared out
    between them accelerate launch --use_fsdp --num_processes N -m vfmk train ...
    """
    vfm: dict[str, Any] = {
        "conv": conv,
        "kernel_size": kernel_size,
        "global_branch": global_branch,
        "num_heads": num_heads,
        "token_dim": token_dim,
        "low_dim": low_dim,
        "num_queries": num_queries,
        "scale": scale,
        "sublayers": None if sublayers is None else sublayers.split(","),
    }
    with plain_errors("train", "train,lora", in_all=True):
        from vfmk.tasks.build import ModelConfig
        from vfmk.train.config import TrainConfig
        from vfmk.train.datasets import DataConfig
        from vfmk.train.run import train_run

        if layers is not None:
            vfm["layers_to_transform"] = _indices(layers)
        model_config = ModelConfig(
            task=task,
            model=model,
            checkpoint=None if checkpoint is None else str(checkpoint),
            adapter=adapter,
            rank=rank,
            dropout=dropout,
            modules_to_save=tuple(train_module or ()),
            vfm={name: value for name, value in vfm.items() if value is not None},
            gradient_checkpointing=gradient_checkpointing,
        )
        data_config = DataConfig(
            path=str(data),
            split=split,
            eval_path=None if eval_data is None else str(eval_data),
            eval_split=eval_split,
            skip_bad=skip_bad,
        )
        config = TrainConfig(
            epochs=epochs,
            batch_size=batch_size,
            accumulation=accumulation,
            learning_rate=learning_rate,
            weight_decay=weight_decay,
            schedule=schedule,
            warmup_steps=warmup_steps,
            max_grad_norm=max_grad_norm,
            precision=precision,
            ema=ema,
            eval_every=eval_every,
            checkpoint_every=checkpoint_every,
            workers=workers,
            seed=seed,
        )
    with plain_errors("train", "train,lora"), steps_bar() as bar:
        result = train_run(
            model_config,
            data_config,
            config,
            out,
            resume=resume == "auto",
            progress=bar,
            on_skipped=list_skipped,
        )
    table = Table("", "before", "at the end", f"best, step {result.best_step}")
    for name in result.best:
        scores = (result.before, result.last, result.best)
        table.add_row(name, *(f"{score[name]:.4f}" for score in scores))
    console = terminal()
    console.print(table)
    console.print(f"weights, metrics and pictures: {out}")


def _indices(layers: str) -> list[int]:
    try:
        return [int(index) for index in layers.split(",")]
    except ValueError:
        raise ValueError(f"--layers must be indices such as 2,5,8,11, got {layers!r}") from None
