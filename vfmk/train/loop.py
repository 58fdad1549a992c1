"""The training loop: one process or several, each its own batches."""

import contextlib
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, register_fsdp_forward_method
from torch.utils.data import DataLoader

from vfmk.tasks.build import trainable
from vfmk.tasks.task import Task
from vfmk.train import checkpoint
from vfmk.train import resume as resuming
from vfmk.train.averaging import averaged, moving_average
from vfmk.train.config import TrainConfig
from vfmk.train.evaluation import evaluate
from vfmk.train.log import LOG, Log
from vfmk.train.processes import by_all, from_first
from vfmk.train.shards import whole
from vfmk.train.stream import EvaluationImages, StreamSampler, TrainingImages

if TYPE_CHECKING:
    from accelerate import Accelerator


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
    accelerator: "Accelerator",
    *,
    resume: bool = False,
    identity: Mapping[str, Any] | None = None,
    on_start: Callable[[], None] = lambda: None,
    progress: Callable[[int, int, float], None] = lambda step, steps, loss: None,
) -> TrainResult:
    """Train what requires grad; `out` gets log.jsonl, last.pt and best.pt.

    A line of the log has "step", "epoch", "loss" and its parts, means over the batch of all
    processes, "lr", "seconds" and "images_per_second"; after an evaluation there is one with
    "step" and "evaluation". A run that was killed and is resumed ends at the same weights, bit for
    bit, as one that was not (on a GPU, where PyTorch's own operators repeat themselves). Start
    several processes with torchrun or accelerate launch (`vfmk.train.processes`); the first alone
    reads and writes `out`, and a reason below that stops one of them stops all with its message.
    Only where no gradient reaches a part in some of them is it left to the launcher to stop the
    others. With FSDP, `task` stays shared out between them.

    Args:
        accelerator: `start_accelerator(config.precision)`.
        resume: go on from `out`/last.pt if there is one.
        identity: what else, beside `config`, must be the same on resuming; JSON values.
        on_start: called by the first process once `out` is found fit for this run.
        progress: called by the first process after every step with steps done, steps in all, and
            the loss.

    Raises:
        FileExistsError: `out` holds a run and it is not to be resumed.
        ValueError: no images; nothing to train; a loss or a parameter that no gradient reaches;
            another run's checkpoint.
        FloatingPointError: a loss or gradient that is not finite, with the step, the files and what
            was not finite; of gradients that loss scaling makes overflow, only one that does so
            without it too. The checkpoint is then the last good one.
    """
    if not trainable(task):
        raise by_all(ValueError("train: there are no parameters that require grad"))
    if not len(training.dataset) or not len(evaluation):
        empty = "evaluation" if len(training.dataset) else "training"
        raise by_all(ValueError(f"train: there are no images for {empty}"))
    fixed = resuming.fixed_of(config, identity or {}, accelerator)
    state = resuming.state_in(out, fixed, resume, accelerator)
    from_first(accelerator, on_start)

    images_per_step = config.batch_size * config.accumulation * accelerator.num_processes
    length = len(training.dataset)
    steps = max(1, round(config.epochs * length / images_per_step))
    eval_steps = max(1, round(config.eval_every * length / images_per_step))
    optimizer = torch.optim.AdamW(
        trainable(task).values(),
        lr=config.learning_rate,
        betas=config.betas,
        weight_decay=config.weight_decay,
    )
    with _prepared(task, optimizer, accelerator) as (model, optimizer):
        if isinstance(task, FSDPModule):
            register_fsdp_forward_method(task, "predict")
        parameters = trainable(task)
        ema = moving_average(parameters, config.ema)
        trained = resuming.Trained(parameters, optimizer, ema, accelerator)
        random_state = None
        if state is None:
            from accelerate.utils import set_seed

            set_seed(config.seed, device_specific=True)  # of dropout, each process its own
            before = evaluate(task, evaluation, accelerator, config)
            state = {"fixed": fixed, "step": 0, "before": before, "last": before, "best": None}
        else:
            trained.restore(state)
            random_state = state["random"][accelerator.process_index]
        start = state["step"]
        batches = iter(_loader(training, config, accelerator, start, steps))
        if random_state is not None:  # after the iterator, which draws
            checkpoint.set_random_state(random_state, accelerator.device)

        with Log(out / LOG, start, accelerator.is_main_process) as log:
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
                    with averaged(parameters, ema):
                        state["last"] = evaluate(task, evaluation, accelerator, config)
                        if _is_best(state["last"], state["best"], task.score):
                            state["best"] = {"scores": state["last"], "step": done}
                            _save_best(out, state["best"], parameters, accelerator)
                    log.write(step=step, evaluation=state["last"])
                if is_evaluated or done % config.checkpoint_every == 0:
                    state["step"] = done
                    trained.save(out, state)
    return TrainResult(
        state["before"], state["last"], state["best"]["scores"], state["best"]["step"], steps
    )


@contextlib.contextmanager
def _prepared(task: Task, optimizer: Any, accelerator: "Accelerator") -> Iterator[tuple[Any, Any]]:
    """Both as accelerate runs them; afterwards `task` no longer autocasts."""
    model, prepared = accelerator.prepare(task, optimizer)
    try:
        yield model, prepared
    finally:
        accelerator.unwrap_model(model, keep_fp32_wrapper=False)
        accelerator.free_memory()


def _is_best(scores: Mapping[str, float], best: Mapping[str, Any] | None, name: str) -> bool:
    """Of equals the earlier; any number is better than NaN."""
    if best is None or math.isnan(best["scores"][name]):
        return True
    return scores[name] > best["scores"][name]


def _save_best(
    out: Path,
    best: Mapping[str, Any],
    parameters: Mapping[str, nn.Parameter],
    accelerator: "Accelerator",
) -> None:
    weights = checkpoint.trained_weights(parameters)
    if accelerator.is_main_process:
        checkpoint.save_checkpoint(out / checkpoint.BEST, {"weights": weights, **best})


def _loader(
    training: TrainingImages, config: TrainConfig, accelerator: "Accelerator", start: int, stop: int
) -> DataLoader[Any]:
    """This process's batches of the steps from `start` to before `stop`."""
    from vfmk.data import collate

    batches_per_step = config.accumulation * accelerator.num_processes
    return DataLoader(
        training,
        batch_sampler=StreamSampler(
            len(training.dataset),
            config.batch_size,
            seed=config.seed,
            first=start * batches_per_step,
            stop=stop * batches_per_step,
            process=accelerator.process_index,
            processes=accelerator.num_processes,
        ),
        num_workers=config.workers,
        collate_fn=collate,
        pin_memory=accelerator.device.type == "cuda",
        generator=torch.Generator(),  # the workers' seeds must not move the global generator
    )


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
            with accelerator.autocast():  # which accelerate does not do itself with FSDP
                parts = model(images, targets)
            loss = torch.stack([part.float() for part in parts.values()]).sum()
            if not loss.requires_grad:
                raise ValueError(
                    f"train: the loss at step {step} does not depend on what is trained,"
                    f" {_some(list(parameters))}; files {_some(files)}"
                )
            accelerator.backward(loss / config.accumulation)
        for name, part in {"loss": loss, **parts}.items():
            totals[name] = totals.get(name, 0) + part.detach().float() / config.accumulation
    if not_reached := [name for name, p in parameters.items() if p.grad is None]:
        raise ValueError(
            f"train: at step {step} no gradient reached {_some(not_reached)}; files {_some(files)}"
        )
    own = torch.stack(list(totals.values()))
    means = accelerator.reduce(own, reduction="mean")
    norm = whole(
        torch.as_tensor(accelerator.clip_grad_norm_(parameters.values(), config.max_grad_norm))
    )
    # A gradient that loss scaling makes overflow is skipped and the scale halved; below 1 it is not
    # the scale that is to blame.
    scaler = accelerator.scaler
    may_overflow = scaler is not None and scaler.get_scale() >= 1
    # Means and norm are of all processes: all stop here or none does.
    if not means.isfinite().all() or not (norm.isfinite() or may_overflow):
        losses = dict(zip(totals, own.tolist(), strict=True))
        message = _what_is_not_finite(losses, norm, parameters, step, files)
        raise by_all(FloatingPointError(message))
    optimizer.step()
    return dict(zip(totals, means.tolist(), strict=True))


def _what_is_not_finite(
    losses: Mapping[str, float],
    norm: Tensor,
    parameters: Mapping[str, nn.Parameter],
    step: int,
    files: Sequence[str],
) -> str:
    """The message, with what is wrong in other processes; all of them call this."""
    from accelerate.utils import gather_object

    faults = []
    weights = [name for name, p in parameters.items() if not whole(p).isfinite().all()]
    if not math.isfinite(losses["loss"]):
        wrong = [f"{name} is {value}" for name, value in losses.items() if not math.isfinite(value)]
        cause = f"weights of {_some(weights)} are not finite" if weights else "weights are finite"
        faults = [
            f"train: loss {losses['loss']} at step {step}, files {_some(files)}:"
            f" {', '.join(wrong[1:])}; {cause}"
        ]
    if faults := gather_object(faults):
        return "\n".join(faults)
    infinite = [name for name, p in parameters.items() if not whole(_grad(p)).isfinite().all()]
    return (
        f"train: gradient of norm {norm.item()} at step {step}, files"
        f" {_some(gather_object(list(files)))}: not finite for {_some(infinite)}"
    )


def _grad(parameter: nn.Parameter) -> Tensor:
    assert parameter.grad is not None
    return parameter.grad


def _some(names: Sequence[str], shown: int = 8) -> str:
    more = f" and {len(names) - shown} more" if len(names) > shown else ""
    return ", ".join(names[:shown]) + more
