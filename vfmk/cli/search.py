"""`vfmk search`."""

import os
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from rich.console import Console
from rich.markdown import Markdown
from typer import Option

from vfmk.cli.model import load_model
from vfmk.cli.progress import plain_errors
from vfmk.cli.samples import searched_and_test

if TYPE_CHECKING:
    from vfmk.data.sample import Sample


class Strategy(str, Enum):
    exhaustive = "exhaustive"
    screened = "screened"


def search(
    data: Annotated[Path, Option(help="folder or manifest, to search on the first LIMIT samples")],
    out: Annotated[Path, Option(help="folder for scores, map and report; goes on if it exists")],
    split: Annotated[str | None, Option(help="of a manifest, to search on")] = None,
    test_data: Annotated[
        Path | None, Option(help="to evaluate the map on, once; default: the data beyond LIMIT")
    ] = None,
    test_split: Annotated[str | None, Option(help="of a manifest, to evaluate on")] = None,
    model: Annotated[str, Option(help="tiny, vit_b, vit_l or vit_h")] = "tiny",
    checkpoint: Annotated[Path | None, Option(help="of the model")] = None,
    adapter: Annotated[Path | None, Option(help="folder of a saved VFM-Adapter")] = None,
    strategy: Strategy = Strategy.exhaustive,
    limit: Annotated[int, Option(min=1, help="samples to search on")] = 50,
    top_n: int = 10,
    keep: Annotated[float, Option(help="share of the pairs' passes that screening spends")] = 0.09,
    audit: Annotated[int, Option(help="rejected pairs to look at")] = 0,
    sequential: Annotated[bool, Option(help="pairs one after the other")] = False,
    positive_only: Annotated[bool, Option(help="candidates above the frozen model alone")] = False,
) -> None:
    """Find better channels by inference alone. Several processes: torchrun -m vfmk search ..."""
    with plain_errors("search", "demo"):
        import torch

        from vfmk.tasks.remap import run_search

        distributed = "RANK" in os.environ
        if distributed and torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        if distributed:
            torch.distributed.init_process_group()
        first = not distributed or torch.distributed.get_rank() == 0
        searched: list[Sample] = []
        test: list[Sample] = []
        if first:
            searched, test = searched_and_test(data, split, limit, test_data, test_split)
        if distributed:
            shared = [searched]
            torch.distributed.broadcast_object_list(shared)
            (searched,) = shared
        run_search(
            load_model(model, checkpoint, adapter),
            searched,
            test,
            out,
            facts={"dataset": data.stem, "backend": model},
            top_n=top_n,
            strategy=strategy.value,
            keep=keep,
            audit=audit,
            sequential=sequential,
            positive_only=positive_only,
        )
        if distributed:
            torch.distributed.destroy_process_group()
    if first:
        console = Console()
        console.print(Markdown((out / "report.md").read_text()))
        console.print(f"\nmap, scores and pictures: {out}")
