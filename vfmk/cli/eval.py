"""`vfmk eval`."""

from pathlib import Path
from typing import Annotated, Literal

from rich.table import Table
from typer import Option

from vfmk.cli.progress import list_skipped, plain_errors, terminal


def eval(
    run: Annotated[Path, Option(help="folder of vfmk train")],
    data: Annotated[Path, Option(help="data set, as vfmk.data.open_dataset takes it")],
    split: Annotated[str | None, Option(help="of the data")] = None,
    out: Annotated[
        Path | None, Option(help="folder for the report; default: RUN/eval/DATA-SPLIT")
    ] = None,
    checkpoint: Annotated[
        Path | None, Option(help="of the model; default: where it was in training")
    ] = None,
    batch_size: Annotated[int | None, Option(help="default: as trained")] = None,
    precision: Annotated[
        Literal["no", "bf16", "fp16"] | None, Option(help="of autocast; default: as trained")
    ] = None,
    workers: Annotated[int, Option(help="processes that load images")] = 0,
    skip_bad: Annotated[bool, Option(help="leave unreadable images out")] = False,
) -> None:
    """Score a run's best weights on a data set.

    Several GPUs: torchrun --nproc-per-node N -m -- vfmk eval ..., where the -- keeps torchrun from
    reading --run as its own.
    """
    name = data.resolve().name
    report = out or run / "eval" / (name if split is None else f"{name}-{split}")
    with plain_errors("eval", "train,lora"):
        from vfmk.train.run import evaluate_run

        scores = evaluate_run(
            run,
            str(data),
            report,
            split=split,
            skip_bad=skip_bad,
            model_checkpoint=checkpoint,
            batch_size=batch_size,
            precision=precision,
            workers=workers,
            on_skipped=list_skipped,
        )
    table = Table("", "score")
    for name, score in scores.items():
        table.add_row(name, f"{score:.4f}")
    console = terminal()
    console.print(table)
    console.print(f"report: {report}")
