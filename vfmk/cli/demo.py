"""`vfmk demo`."""

from pathlib import Path
from typing import Annotated

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from vfmk.cli.progress import print_report


def demo(
    output: Annotated[Path, typer.Option(help="folder for the report")] = Path("report"),
    data: Annotated[
        Path | None, typer.Option(help="folder of images and masks; default: bundled photographs")
    ] = None,
    seed: int = 0,
    steps: Annotated[int, typer.Option(min=1, help="of fine-tuning")] = 150,
) -> None:
    """Adapt the tiny SAM to real images in about a minute and write a report with pictures."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, TimeRemainingColumn()) as bar:
        task = bar.add_task("")

        def progress(stage: str, done: int, total: int) -> None:
            bar.update(task, description=stage, completed=done, total=total)

        try:
            from vfmk.tasks.demo import run_demo

            run_demo(output, data=data, seed=seed, steps=steps, progress=progress)
        except ImportError as error:
            raise SystemExit(f"vfmk demo: {error}; it needs: pip install vfmk[demo]") from None
        except (OSError, ValueError, FloatingPointError) as error:
            raise SystemExit(f"vfmk demo: {error}") from None
    print_report(output)
