"""Scoring a task, the images shared out between processes."""

import contextlib
import itertools
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.utils.data import DataLoader, Subset

from vfmk.tasks.task import Task
from vfmk.train.config import TrainConfig
from vfmk.train.processes import from_first
from vfmk.train.stream import EvaluationImages

if TYPE_CHECKING:
    from accelerate import Accelerator


@torch.no_grad()
def evaluate(
    task: Task, images: EvaluationImages, accelerator: "Accelerator", config: TrainConfig
) -> dict[str, float]:
    """The task's scores, the same in every process; the mode is left as it was."""
    from vfmk.data import collate

    # Neighbours together, so that the shares one after the other are the images in their order.
    shares = np.array_split(np.arange(len(images)), accelerator.num_processes)
    own = shares[accelerator.process_index].tolist()
    # With FSDP processes compute together, so that each needs as many images, if none of its own.
    filled = own + [0] * (len(shares[0]) - len(own))
    loader = DataLoader(
        Subset(images, filled),
        batch_size=config.batch_size,
        num_workers=config.workers,
        collate_fn=collate,
        generator=torch.Generator(),
    )
    evaluation = task.evaluation()
    with _eval_mode(task):
        pairs = (zip(*predict(task, batch, accelerator), strict=True) for batch in loader)
        for position, (prediction, truth) in enumerate(itertools.chain.from_iterable(pairs)):
            if position < len(own):
                evaluation.update(prediction, truth)
    # To the first alone, since the masks of many images fill a memory.
    everyones = [evaluation] * accelerator.num_processes
    if accelerator.num_processes > 1:
        torch.distributed.gather_object(
            evaluation, everyones if accelerator.is_main_process else None
        )

    def scores() -> dict[str, float]:
        first, *others = everyones
        for other in others:
            first.merge(other)
        return first.compute()

    return from_first(accelerator, scores)


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


@contextlib.contextmanager
def _eval_mode(module: nn.Module) -> Iterator[None]:
    was_training = module.training
    module.eval()
    try:
        yield
    finally:
        module.train(was_training)
        if isinstance(module, FSDPModule):
            module.reshard()  # or the next forward computes with these weights again
