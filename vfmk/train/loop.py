"""The training loop, on Hugging Face accelerate: one process or several, each its own batches."""

import contextlib
import dataclasses
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader, Subset

from vfmk._files import write_whole
from vfmk.tasks.build import trainable
from vfmk.tasks.task import Task
from vfmk.train import checkpoint
from vfmk.train.config import TrainConfig
from vfmk.train.stream import EvaluationImages, StreamSampler, TrainingImages

if TYPE_CHECKING:
    from accelerate import Accelerator

LOG = "log.jsonl"
FREE_FIELDS = ("checkpoint_every", "workers")  # of TrainConfig, which may change on resuming


class TrainResult(NamedTuple):
    """Scores before the first step, after the last, and of the best evaluation."""

    before: dict[str, float]
    last: dict[str, float]
    best: dict[str, float]
    best_step: int
    steps: int


def train(
    task: Task,
    training: TrainingImages,
    evaluation: EvaluationImages,
    config: TrainConfig,
    out: Path,
    *,
    resume: bool = False,
    identity: Mapping[str, Any] | None = None,
    progress: Callable[[int, int, float], None] = lambda step, steps, loss: None,
) -> TrainResult:
    """Train what requires grad; `out` gets log.jsonl, last.pt and best.pt.

    A line of the log has "step", "epoch", "loss" and its parts, means over the batch of all
    processes, "lr", "seconds" and "images_per_second"; after an evaluation there is one with
    "step" and "evaluation". A run that was killed and is resumed ends at the same weights, bit for
    bit, as one that was not (on a GPU, where PyTorch's own operators repeat themselves). Start
    several processes with torchrun or accelerate launch.

    Args:
        resume: go on from `out`/last.pt if there is one.
        identity: what else, beside `config`, must be the same on resuming; JSON values.
        progress: called by the first process after every step with steps done, steps in all, and
            the loss.

    Raises:
        FileExistsError: `out` holds a run and it is not to be resumed.
        ValueError: no images; nothing to train; a loss or a parameter that no gradient reaches;
            another run's checkpoint.
        FloatingPointError: a loss or gradient that is not finite, with the step, the files and what
            was not finite. The checkpoint is then the last good one.
    """
    parameters = trainable(task)
    if not parameters:
        raise ValueError("train: there are no parameters that require grad")
    if not len(training.dataset) or not len(evaluation):
        empty = "evaluation" if len(training.dataset) else "training"
        raise ValueError(f"train: there are no images for {empty}")
    out.mkdir(parents=True, exist_ok=True)
    last = out / checkpoint.LAST
    if last.exists() and not resume:
        raise FileExistsError(f"train: {out} holds a run; resume it or choose another folder")

    accelerator = start_accelerator(config.precision)
    batches_per_step = config.accumulation * accelerator.num_processes
    images_per_step = config.batch_size * batches_per_step
    length = len(training.dataset)
    steps = max(1, round(config.epochs * length / images_per_step))
    eval_steps = max(1, round(config.eval_every * length / images_per_step))
    fixed = _fixed(config, {**(identity or {}), "processes": accelerator.num_processes})

    optimizer = torch.optim.AdamW(
        parameters.values(),
        lr=config.learning_rate,
        betas=config.betas,
        weight_decay=config.weight_decay,
    )
    model, optimizer = accelerator.prepare(task, optimizer)
    ema = _moving_average(parameters, config.ema)
    state: dict[str, Any]
    if last.exists():
        state = _resumed(last, fixed)
        checkpoint.load_weights(parameters, state["weights"])
        optimizer.load_state_dict(state["optimizer"])
        if accelerator.scaler is not None:
            accelerator.scaler.load_state_dict(state["scaler"])
        if ema is not None:
            ema.load_state_dict(state["ema"])
    else:
        from accelerate.utils import set_seed

        set_seed(config.seed, device_specific=True)  # of dropout, each process its own
        before = evaluate(task, evaluation, accelerator, config)
        state = {"fixed": fixed, "step": 0, "before": before, "last": before, "best": None}
    start = state["step"]
    loader = DataLoader(
        training,
        batch_sampler=StreamSampler(
            length,
            config.batch_size,
            seed=config.seed,
            first=start * batches_per_step,
            stop=steps * batches_per_step,
            process=accelerator.process_index,
            processes=accelerator.num_processes,
        ),
        num_workers=config.workers,
        collate_fn=_collate(),
        pin_memory=accelerator.device.type == "cuda",
        generator=torch.Generator(),  # the workers' seeds must not move the global generator
    )
    batches = iter(loader)
    if "random" in state:
        checkpoint.set_random_state(state["random"][accelerator.process_index])

    with _Log(out / LOG, start, accelerator.is_main_process) as log:
        for step in range(start, steps):
            began = time.perf_counter()
            rate = config.rate(step, steps)
            for group in optimizer.param_groups:
                group["lr"] = rate
            parts = _step(model, batches, accelerator, optimizer, parameters, config, step)
            if ema is not None:
                ema.update_parameters(nn.ParameterList(parameters.values()))
            done, seconds = step + 1, time.perf_counter() - began
            log.write(
                step=step,
                epoch=step * images_per_step / length,
                **parts,
                lr=rate,
                seconds=seconds,
                images_per_second=images_per_step / seconds,
            )
            if accelerator.is_main_process:
                progress(done, steps, parts["loss"])
            is_evaluated = done % eval_steps == 0 or done == steps
            if is_evaluated:
                with _averaged(parameters, ema):
                    scores = evaluate(task, evaluation, accelerator, config)
                    log.write(step=step, evaluation=scores)
                    state["last"] = scores
                    best = state["best"]
                    if best is None or scores[task.score] > best["scores"][task.score]:
                        state["best"] = {"scores": scores, "step": done}
                        weights = checkpoint.trained_weights(parameters)
                        if accelerator.is_main_process:
                            checkpoint.save_checkpoint(
                                out / checkpoint.BEST,
                                {"weights": weights, "scores": scores, "step": done},
                            )
            if is_evaluated or done % config.checkpoint_every == 0:
                state["step"] = done
                _save(last, state, parameters, accelerator, optimizer, ema)
    return TrainResult(
        state["before"], state["last"], state["best"]["scores"], state["best"]["step"], steps
    )


@torch.no_grad()
def evaluate(
    task: Task, images: EvaluationImages, accelerator: "Accelerator", config: TrainConfig
) -> dict[str, float]:
    """The task's scores, the images shared out between processes; the mode is left as it was."""
    own = range(accelerator.process_index, len(images), accelerator.num_processes)
    loader = DataLoader(
        Subset(images, own),
        batch_size=config.batch_size,
        num_workers=config.workers,
        collate_fn=_collate(),
        generator=torch.Generator(),
    )
    evaluation, was_training = task.evaluation(), task.training
    task.eval()
    try:
        for batch in loader:
            for prediction, truth in zip(*predict(task, batch, accelerator), strict=True):
                evaluation.update(prediction, truth)
    finally:
        task.train(was_training)
    return evaluation.compute()


def predict(
    task: Task, batch: tuple[Tensor, list[dict[str, Any]]], accelerator: "Accelerator"
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Predictions and truths for a batch of `EvaluationImages`, at the images' own sizes."""
    from accelerate.utils import send_to_device

    images, targets = batch
    truths = [target["truth"] for target in targets]
    bare = [{key: value for key, value in t.items() if key != "truth"} for t in targets]
    images, bare = send_to_device((images, bare), accelerator.device)
    with accelerator.autocast():
        return task.predict(images, bare), truths


def start_accelerator(precision: str) -> "Accelerator":
    """Accelerate's handle on this process and the others, if it was started with others."""
    from accelerate import Accelerator, InitProcessGroupKwargs

    handlers = []
    if torch.cuda.is_available():  # scores are gathered on the CPU
        handlers = [InitProcessGroupKwargs(backend="cpu:gloo,cuda:nccl")]
    # Without an accelerator it would not join processes, unless told to keep to the CPU.
    cpu = not torch.accelerator.is_available()
    return Accelerator(cpu=cpu, mixed_precision=precision, kwargs_handlers=handlers)


def _collate() -> Callable[[list[Any]], Any]:
    from vfmk.data import collate

    return collate


def _fixed(config: TrainConfig, identity: Mapping[str, Any]) -> dict[str, Any]:
    fields = dataclasses.asdict(config)
    kept = {name: value for name, value in fields.items() if name not in FREE_FIELDS}
    return json.loads(json.dumps(kept | dict(identity)))


def _resumed(path: Path, fixed: Mapping[str, Any]) -> dict[str, Any]:
    state = checkpoint.load_checkpoint(path)
    changed = [
        f"{name} was {state['fixed'].get(name)!r}, is {fixed.get(name)!r}"
        for name in sorted(fixed.keys() | state["fixed"].keys())
        if state["fixed"].get(name) != fixed.get(name)
    ]
    if changed:
        raise ValueError(f"train: {path} is of another run: {'; '.join(changed)}")
    return state


def _step(
    model: nn.Module,
    batches: Iterator[Any],
    accelerator: "Accelerator",
    optimizer: Any,
    parameters: Mapping[str, nn.Parameter],
    config: TrainConfig,
    step: int,
) -> dict[str, float]:
    """One step of the optimiser; returns "loss" and its parts, means over all processes."""
    from accelerate.utils import send_to_device

    model.train()
    optimizer.zero_grad()
    totals: dict[str, Tensor] = {}
    files: list[str] = []
    for number in range(config.accumulation):
        images, targets = send_to_device(next(batches), accelerator.device)
        files += [str(file) for target in targets for file in target["files"]]
        is_last = number + 1 == config.accumulation
        with contextlib.nullcontext() if is_last else accelerator.no_sync(model):
            with accelerator.autocast():
                parts = model(images, targets)
            loss = torch.stack([part.float() for part in parts.values()]).sum()
            _check_loss(loss, parts, parameters, step, files)
            accelerator.backward(loss / config.accumulation)
        for name, part in {"loss": loss, **parts}.items():
            totals[name] = totals.get(name, 0) + part.detach().float() / config.accumulation
    if not_reached := [name for name, p in parameters.items() if p.grad is None]:
        raise ValueError(
            f"train: at step {step} no gradient reached {_some(not_reached)}; files {_some(files)}"
        )
    norm = accelerator.clip_grad_norm_(parameters.values(), config.max_grad_norm)
    # Loss scaling meets overflows on its way and skips their steps.
    if config.precision != "fp16" and not torch.as_tensor(norm).isfinite():
        wrong = [name for name, p in parameters.items() if not _grad(p).isfinite().all()]
        raise FloatingPointError(
            f"train: gradient of norm {float(norm)} at step {step}, files {_some(files)}:"
            f" not finite for {_some(wrong)}"
        )
    optimizer.step()
    means = accelerator.reduce(torch.stack(list(totals.values())), reduction="mean").tolist()
    return dict(zip(totals, means, strict=True))


def _check_loss(
    loss: Tensor,
    parts: Mapping[str, Tensor],
    parameters: Mapping[str, nn.Parameter],
    step: int,
    files: Sequence[str],
) -> None:
    if not loss.isfinite():
        wrong = [f"{name} is {part.item()}" for name, part in parts.items() if not part.isfinite()]
        weights = [name for name, p in parameters.items() if not p.isfinite().all()]
        cause = f"weights of {_some(weights)} are not finite" if weights else "weights are finite"
        raise FloatingPointError(
            f"train: loss {loss.item()} at step {step}, files {_some(files)}:"
            f" {', '.join(wrong)}; {cause}"
        )
    if not loss.requires_grad:
        raise ValueError(
            f"train: the loss at step {step} does not depend on what is trained,"
            f" {_some(list(parameters))}; files {_some(files)}"
        )


def _grad(parameter: nn.Parameter) -> Tensor:
    assert parameter.grad is not None
    return parameter.grad


def _some(names: Sequence[str], shown: int = 8) -> str:
    more = f" and {len(names) - shown} more" if len(names) > shown else ""
    return ", ".join(names[:shown]) + more


def _moving_average(parameters: Mapping[str, nn.Parameter], decay: float) -> AveragedModel | None:
    """Of the trained parameters alone; the frozen ones would only take memory."""
    if not decay:
        return None
    own = nn.ParameterList(parameters.values())
    return AveragedModel(own, multi_avg_fn=get_ema_multi_avg_fn(decay))


@contextlib.contextmanager
@torch.no_grad()
def _averaged(parameters: Mapping[str, nn.Parameter], ema: AveragedModel | None) -> Iterator[None]:
    """The averaged weights in place of the trained ones, inside the block."""
    if ema is None:
        yield
        return
    own = [parameter.detach().clone() for parameter in parameters.values()]
    for parameter, mean in zip(parameters.values(), ema.parameters(), strict=True):
        parameter.copy_(mean)
    try:
        yield
    finally:
        for parameter, value in zip(parameters.values(), own, strict=True):
            parameter.copy_(value)


def _save(
    path: Path,
    state: Mapping[str, Any],
    parameters: Mapping[str, nn.Parameter],
    accelerator: "Accelerator",
    optimizer: Any,
    ema: AveragedModel | None,
) -> None:
    from accelerate.utils import gather_object

    random_states = gather_object([checkpoint.random_state()])
    if accelerator.is_main_process:
        scaler = accelerator.scaler
        checkpoint.save_checkpoint(
            path,
            {
                **state,
                "weights": checkpoint.trained_weights(parameters),
                "optimizer": optimizer.state_dict(),
                "scaler": None if scaler is None else scaler.state_dict(),
                "ema": None if ema is None else ema.state_dict(),
                "random": random_states,
            },
        )
    accelerator.wait_for_everyone()


class _Log:
    """A JSON document for each line; on resuming, lines after the checkpoint are dropped."""

    def __init__(self, path: Path, start: int, is_writer: bool) -> None:
        self.path, self.start, self.is_writer = path, start, is_writer

    def __enter__(self) -> "_Log":
        if self.is_writer:
            kept = [line for line in read_log(self.path) if line["step"] < self.start]
            write_whole(self.path, "".join(json.dumps(line) + "\n" for line in kept).encode())
            self.file = self.path.open("a")
        return self

    def __exit__(self, *exception: object) -> None:
        if self.is_writer:
            self.file.close()

    def write(self, **line: Any) -> None:
        if self.is_writer:
            self.file.write(json.dumps(line) + "\n")
            self.file.flush()


def read_log(path: Path) -> list[dict[str, Any]]:
    """Its lines; one that a kill cut off is left out, and a file that is not there has none."""
    lines = []
    for text in path.read_text().splitlines() if path.exists() else []:
        with contextlib.suppress(json.JSONDecodeError):
            lines.append(json.loads(text))
    return lines
