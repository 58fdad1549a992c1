"""The image encoder of a run, its adapters in it, as a program of its own.

encoder.pt2     torch.export; runs with `import vfmk` before `torch.export.load`
encoder.onnx    the same with the reference operators, where torch's exporter can write it
"""

import contextlib
import io
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from vfmk import ops, reference
from vfmk._files import write_whole
from vfmk.sam.adapt import AdaptedSam
from vfmk.tasks import pictures
from vfmk.tasks.task import Task
from vfmk.train.processes import start_accelerator
from vfmk.train.run import (
    CONFIG,
    METRICS,
    draw_grid,
    evaluated_images,
    load_run,
    losses,
    write_json,
)

if TYPE_CHECKING:
    from accelerate import Accelerator

TOLERANCE = 1e-3  # of the largest value; other operators and fused kernels round otherwise
PROGRAM, ONNX = "encoder.pt2", "encoder.onnx"


class ExportResult(NamedTuple):
    """Largest differences to the eager encoder, as shares of its largest value."""

    program_error: float
    onnx_error: float | None
    onnx_impossible: str  # why there is no ONNX file; "" where there is one
    grid_impossible: str  # the same of grid.png


class Encoder(nn.Module):
    """Pixels float32 [1, 3, S, S], 0..255, padding PIXEL_MEAN → embedding [1, C, S/p, S/p]."""

    mean: Tensor
    std: Tensor

    def __init__(self, task: Task) -> None:
        super().__init__()
        sam = task.sam
        self.encoder = sam.image_encoder
        # VfmkBlock hides its adapter from `modules()`; here it is one, whose weights are exported.
        self.adapters = task.model.adapters if isinstance(task.model, AdaptedSam) else None
        self.register_buffer("mean", sam.pixel_mean)
        self.register_buffer("std", sam.pixel_std)

    def forward(self, pixels: Tensor) -> Tensor:
        return self.encoder((pixels - self.mean) / self.std)


def export_run(run: Path, out: Path, model_checkpoint: Path | None = None) -> ExportResult:
    """Write the encoder of a run's best weights into `out`, and a report.

    The report is config.json, metrics.json, loss.png and, where the run's data are at hand,
    grid.png. Each program is loaded and run on an image that the tracing did not see, against the
    eager encoder. All is computed in float32.

    Args:
        model_checkpoint: as in `load_run`.

    Raises:
        FileNotFoundError, ValueError: `run` is no training.
        RuntimeError: what was exported gives other embeddings.
    """
    accelerator = start_accelerator("no")
    task, document = load_run(run, model_checkpoint)
    encoder = Encoder(task).eval()
    size = task.sam.image_encoder.img_size
    generator = torch.Generator().manual_seed(0)
    example, image = (255 * torch.rand(1, 3, size, size, generator=generator) for _ in range(2))
    out.mkdir(parents=True, exist_ok=True)
    with torch.no_grad():
        expected = encoder(image)
        buffer = io.BytesIO()
        torch.export.save(torch.export.export(encoder, (example,)), buffer)
        write_whole(out / PROGRAM, buffer.getvalue())
        loaded = torch.export.load(out / PROGRAM).module()
        program_error = _checked_error(loaded(image), expected, PROGRAM)
        with reference_operators():
            plain = torch.export.export(encoder, (example,))
        _checked_error(plain.module()(image), expected, "the program of reference operators")
    impossible, onnx_error = _write_onnx(plain, example, out / ONNX), None
    if not impossible:
        onnx_error = _checked_error(_run_onnx(out / ONNX, image), expected, ONNX)
    no_grid = _draw_grid(out / "grid.png", task, document, accelerator)
    result = ExportResult(program_error, onnx_error, impossible, no_grid)
    write_json(out / CONFIG, document)
    write_json(out / METRICS, result._asdict())
    pictures.draw_loss(out / "loss.png", losses(run))
    return result


@contextlib.contextmanager
def reference_operators() -> Iterator[None]:
    """vfmk.ops computes by plain PyTorch inside the block, so that tracing sees PyTorch's own
    operators; `use_backend("reference")` would leave vfmk's in the program."""
    own: dict[str, Any] = {
        name: getattr(ops, name) for name in reference.__all__ if hasattr(ops, name)
    }
    for name in own:
        setattr(ops, name, getattr(reference, name))
    try:
        yield
    finally:
        for name, operator in own.items():
            setattr(ops, name, operator)


def _write_onnx(program: ExportedProgram, example: Tensor, path: Path) -> str:
    """Write the file; where that is impossible, say why."""
    own = {str(n.target) for n in program.graph.nodes if str(n.target).startswith("vfmk.")}
    if own:
        return f"ONNX does not know {', '.join(sorted(own))}"
    path.unlink(missing_ok=True)
    try:
        import onnxruntime  # noqa: F401  to check the result with

        exported = torch.onnx.export(program, (example,), dynamo=True, verbose=False)
    except ImportError as error:
        return f"{error}; it needs: pip install vfmk[onnx]"
    except torch.onnx.errors.OnnxExporterError as error:
        return f"torch.onnx.export cannot write this encoder: {error}"
    assert exported is not None
    write_whole(path, exported.model_proto.SerializeToString())
    return ""


def _draw_grid(path: Path, task: Task, document: dict[str, Any], accelerator: "Accelerator") -> str:
    """Draw it; where the run's data are gone or changed, say so."""
    try:
        images = evaluated_images(task, document)
    except (OSError, ValueError) as error:
        path.unlink(missing_ok=True)
        return str(error)
    draw_grid(path, task, images, document, accelerator)
    return ""


def _run_onnx(path: Path, image: Tensor) -> Tensor:
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (output,) = session.run(None, {session.get_inputs()[0].name: image.numpy()})
    return torch.from_numpy(output)


def _checked_error(output: Tensor, expected: Tensor, name: str) -> float:
    error = ((output - expected).abs().max() / expected.abs().max()).item()
    if not error <= TOLERANCE:
        raise RuntimeError(
            f"export_run: {name} differs from the eager encoder by {error:.2e} of its largest"
            f" value, more than {TOLERANCE}"
        )
    return error
