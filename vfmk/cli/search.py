"""`vfmk search`."""

import os
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from typer import Option

from vfmk.cli.model import load_model
from vfmk.cli.progress import plain_errors, print_report
from vfmk.cli.samples import searched_and_test

if TYPE_CHECKING:
    from vfmk.data.sample import Sample


class Strategy(str, Enum):
    exhaustive = "exhaustive"
    screened = "screened"


def search(
    data: Annotated[Path, Option(help="folder or manifest, to search on the first LIMIT samples")],
    out: Annotated[Path, Option(help="folder for scores, map and report; goes on if it exists")],
    split: Annotated[str | None, Option(help="of the data, to search on")] = None,
    test_data: Annotated[
        Path | None, Option(help="to evaluate the map on, once; default: the data beyond LIMIT")
    ] = None,
    test_split: Annotated[str | None, Option(help="of the data, to evaluate on")] = None,
    model: Annotated[str, Option(help="tiny, vit_b, vit_l or vit_h")] = "tiny",
    checkpoint: Annotated[Path | None, Option(help="of the model")] = None,
    adapter: Annotated[Path | None, Option(help="folder of a saved VFM-Adapter")] = None,
    strategy: Strategy = Strategy.exhaustive,
    limit: Annotated[int, Option(min=1, help="samples to search on")] = 50,
    top_n: Annotated[int, Option(help="pairs whose subsets are scored, 1 to 16")] = 10,
    keep: Annotated[
        float | None,
        Option(help="share of the pairs' passes that screening spends [default: 0.09]"),
    ] = None,
    audit: Annotated[int, Option(help="rejected pairs to look at")] = 0,
    sequential: Annotated[bool, Option(help="pairs one after the other")] = False,
    positive_only: Annotated[bool, Option(help="candidates above the frozen model alone")] = False,
) -> None:
    """Find better channels by inference alone. Several processes: torchrun -m vfmk search ..."""
    with plain_errors("search", "demo", in_all=True):
        import torch

        from vfmk.channels.processes import agreed, failing_together, rank
        from vfmk.tasks.remap import run_search

        distributed = "RANK" in os.environ
        if distributed and torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        if distributed:
            torch.distributed.init_process_group()
        searched: list[Sample] = []
        test: list[Sample] = []  # of the first process, which alone evaluates
        with failing_together(OSError, ValueError):
            if rank() == 0:
                searched, test = searched_and_test(data, split, limit, test_data, test_split)
        searched = agreed(searched)
    with plain_errors("search", "demo"):
        run_search(
            load_model(model, checkpoint, adapter),
            searched,
            test,
            out,
            facts={"dataset": data.resolve().stem, "backend": model},
            top_n=top_n,
            strategy=strategy.value,
            keep=keep,
            audit=audit,
            sequential=sequential,
            positive_only=positive_only,
        )
        if distributed:
            torch.distributed.destroy_process_group()
    print_report(out)
