"""The moving average of the trained weights."""

import contextlib
from collections.abc import Iterator, Mapping

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn


def moving_average(parameters: Mapping[str, nn.Parameter], decay: float) -> AveragedModel | None:
    """Of the trained parameters alone; the frozen ones would only take memory."""
    if not decay:
        return None
    own = nn.ParameterList(parameters.values())
    return AveragedModel(own, multi_avg_fn=get_ema_multi_avg_fn(decay))


@contextlib.contextmanager
@torch.no_grad()
def averaged(parameters: Mapping[str, nn.Parameter], ema: AveragedModel | None) -> Iterator[None]:
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
