"""Which candidates to score, where scoring them all would take too long.

The gain of a candidate is taken for α · its first-order estimate + β · its squared distance from
changing nothing, with α and β from the gains known so far, plus a Gaussian process: candidates that
are alike gain alike, and one that changes nothing gains nothing. Scored next are those whose gain
may be highest by the mean and the spread of this model (its upper confidence bound), so that good
guesses and unknown ground both get their turn.

Candidates are not raced, dropping the worse image by image: where gains are small against the
differences between images, a race on few of them kept 3 of the 10 best pairs.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

SPREADS = 1.0  # standard deviations from a candidate's expected gain to its bound
NOISE = 1e-2  # of a gain, in shares of the process's variance: what likeness does not explain
BATCH = 16  # candidates chosen at once; or one for every two groups
RIVALS = 2  # of these, how many of one group, if there are enough groups

Place = tuple[int, int]  # of a candidate: its group, its number in it


class Group(NamedTuple):
    """Candidates 0 … M − 1, of which `origin` changes nothing.

    Two are alike by exp(−d² / 2m); `distances` gives d² / m between all and some, [M, O].
    """

    distances: Callable[[Tensor], Tensor]
    origin: int


def explore(
    score: Callable[[list[Place]], Mapping[Place, float]],
    gains: Tensor,
    estimates: Tensor,
    groups: Sequence[Group],
    budget: int,
) -> None:
    """Put the gains of `budget` promising candidates into `gains`.

    Args:
        score: gives the gains of candidates.
        gains: float64 [groups, M], NaN where not known.
        estimates: of the gains, float64 [groups, M].
    """
    batch = max(BATCH, len(groups) // 2)
    origins = torch.tensor([group.origin for group in groups])
    while budget > 0:
        is_open = gains.isnan()
        is_open[range(len(groups)), origins] = False
        if gains.isnan().all():  # each group's best guess
            batch_now, rivals, bounds = len(groups), 1, estimates
        else:
            batch_now, rivals = batch, max(RIVALS, batch // len(groups))
            bounds = upper_bounds(gains, estimates, groups)
        places = _highest(bounds.masked_fill(~is_open, -torch.inf), rivals)
        chosen = places[: min(batch_now, budget)]
        if not chosen:
            return
        for place, gain in score(chosen).items():
            gains[place] = gain
        budget -= len(chosen)


def upper_bounds(gains: Tensor, estimates: Tensor, groups: Sequence[Group]) -> Tensor:
    """What each candidate may gain, [groups, M]; arguments as of `explore`."""
    known = ~gains.isnan()
    sizes = [group.distances(torch.tensor([group.origin]))[:, 0] for group in groups]
    columns = torch.stack([estimates, torch.stack(sizes)], -1)
    fitted = torch.linalg.lstsq(columns[known], gains[known][:, None]).solution
    means = (columns @ fitted)[..., 0]
    variances, energy = torch.empty_like(means), 0.0
    for number, group in enumerate(groups):
        points = known[number].nonzero()[:, 0]
        values = gains[number, points] - means[number, points]
        mean, variances[number], of_group = _posterior(group, points, values)
        means[number] += mean
        energy += of_group
    return means + SPREADS * (variances * max(energy, 0.0) / known.sum()).sqrt()


def _posterior(group: Group, points: Tensor, values: Tensor) -> tuple[Tensor, Tensor, float]:
    """Mean and variance [M] of a process of unit variance that is 0 at the origin and `values` [O]
    at `points` [O]; and O times the variance that the values speak for."""
    alike = torch.exp(group.distances(torch.cat([points, torch.tensor([group.origin])])) / -2)
    to_points, to_origin = alike[:, :-1], alike[:, -1:]
    covariance = to_points - to_origin - to_origin[points].T + 1
    within = covariance[points] + NOISE * torch.eye(len(points), dtype=values.dtype)
    solved = torch.linalg.solve(within, torch.cat([values[:, None], covariance.T], 1))
    variance = 2 - 2 * to_origin[:, 0] - (covariance * solved[:, 1:].T).sum(1)
    return covariance @ solved[:, 0], variance.clamp(min=0), float(values @ solved[:, 0])


def _highest(bounds: Tensor, rivals: int) -> list[Place]:
    """By bound, at most `rivals` of a group, none without a bound."""
    rivals = min(rivals, bounds.shape[1])
    values, members = bounds.topk(rivals, dim=1)
    order = values.flatten().argsort(descending=True, stable=True)
    order = order[values.flatten()[order].isfinite()]
    return [(n // rivals, int(members[n // rivals, n % rivals])) for n in order.tolist()]
