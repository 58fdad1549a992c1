"""`vfmk apply`."""

import json
from pathlib import Path
from typing import Annotated

from typer import Option

from vfmk.cli.model import load_model
from vfmk.cli.progress import plain_errors, print_report, terminal
from vfmk.cli.samples import searched_and_test


def apply(
    map: Annotated[Path, Option(help="map.json of vfmk search, or of the authors' tool")],
    search_data: Annotated[
        Path, Option(help="what the map was searched on: the controls are tuned there")
    ],
    out: Annotated[Path, Option(help="folder for the report")],
    search_split: Annotated[str | None, Option(help="of the search data")] = None,
    limit: Annotated[int, Option(min=1, help="samples that the map was searched on")] = 50,
    data: Annotated[
        Path | None, Option(help="to evaluate on; default: the search data beyond LIMIT")
    ] = None,
    split: Annotated[str | None, Option(help="of the data, to evaluate on")] = None,
    model: Annotated[str, Option(help="tiny, vit_b, vit_l or vit_h")] = "tiny",
    checkpoint: Annotated[Path | None, Option(help="of the model")] = None,
    adapter: Annotated[Path | None, Option(help="folder of a saved VFM-Adapter")] = None,
) -> None:
    """Apply a channel map and score it on a data set, without and with."""
    with plain_errors("apply", "demo"):
        from vfmk.channels import ChannelMap
        from vfmk.tasks.remap import run_apply

        channel_map = ChannelMap.load(map)
        check_backend(map, model)
        searched, test = searched_and_test(search_data, search_split, limit, data, split)
        run_apply(load_model(model, checkpoint, adapter), channel_map, searched, test, out)
    print_report(out)


def check_backend(map: Path, model: str) -> None:
    """Whether the map was searched for this model; the channels of another mean something else.

    Raises:
        ValueError: it was searched for another.
    """
    from vfmk.sam.load import MODELS

    backend = str(json.loads(map.read_text()).get("backend", ""))
    named = [name for name in MODELS if name in backend.lower().replace("-", "_")]
    if named and model not in named:
        raise ValueError(
            f"{map} is a map for {backend!r}, the model is {model!r}: choose it by --model"
        )
    if not named:
        terminal(stderr=True).print(
            f"vfmk apply: {map} does not say for which of {', '.join(MODELS)} it is"
            f" (backend {backend!r}); taken to be for {model!r}"
        )
