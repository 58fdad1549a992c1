"""`vfmk export`."""

from pathlib import Path
from typing import Annotated

from typer import Option

from vfmk.cli.progress import plain_errors, terminal


def export(
    run: Annotated[Path, Option(help="folder of vfmk train")],
    out: Annotated[Path | None, Option(help="folder to write; default: RUN/export")] = None,
    checkpoint: Annotated[
        Path | None, Option(help="of the model; default: where it was in training")
    ] = None,
) -> None:
    """Write a run's image encoder, adapters included, as torch.export and ONNX programs."""
    folder = out or run / "export"
    with plain_errors("export", "train,lora"):
        from vfmk.train.export import ONNX, PROGRAM, export_run

        result = export_run(run, folder, checkpoint)
    console = terminal()
    console.print(f"{folder / PROGRAM}: within {result.program_error:.1e} of the eager encoder")
    if result.onnx_error is None:
        console.print(f"no ONNX file: {result.onnx_impossible}")
    else:
        console.print(f"{folder / ONNX}: within {result.onnx_error:.1e}")
    if result.grid_impossible:
        console.print(f"no picture grid: {result.grid_impossible}")
