"""Which candidates to score, where scoring them all would take too long.

The gain of a candidate is taken for a linear function of what is known of it beforehand (of its
first-order gains on the samples: their mean and, as a measure of curvature, their mean square) and
of its squared distance from changing nothing, fitted to the gains known so far; plus a Gaussian
process: candidates of a group that are alike gain alike, one that changes nothing gains nothing,
and the function differs somewhat from group to group. Scored next are those that by the mean and
the spread of this model most probably improve on what is known, so that good guesses and unknown
ground both get their turn.

They are raced against what they are to improve on (`vfmk.channels.dropping`), sample by sample: the
bar is fixed for a round. What is learnt of a candidate that is dropped counts as inexact.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from vfmk.channels.records import Raced

TINY = 1e-150  # for 0 in a divisor; what is divided stays finite
SLOPES = 0.1  # variance of a group's own linear function, in shares of the process's
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
    race: Callable[[list[Place], list[float], float], Mapping[Place, Raced]],
    features: Tensor,
    groups: Sequence[Group],
    first: list[Place],
    top: int,
    samples: int,
    budget: int,
) -> Tensor:
    """Gains of promising candidates: float64 [groups, M], NaN where not scored on all samples.

    Args:
        race: scores candidates, each against its bar; takes the factor of their first feature too.
        features: what gains depend on, first an estimate of them: float64 [groups, M, F].
        first: the candidates to begin with.
        top: how many are wanted, one of a group.
        samples: that a candidate is scored on, if it is not dropped.
        budget: candidates times samples.
    """
    origins = [group.origin for group in groups]
    sizes = torch.stack([group.distances(torch.tensor([group.origin]))[:, 0] for group in groups])
    features = torch.cat([features, sizes[..., None]], -1)
    whole = torch.full_like(sizes, torch.nan)
    known, variances = whole.clone(), torch.zeros_like(sizes)
    is_open = torch.ones_like(sizes, dtype=torch.bool)
    is_open[range(len(groups)), origins] = False
    batch = max(BATCH, len(groups) // 2)
    rivals = max(RIVALS, batch // len(groups))
    chosen, bars, factor = first, bars_of(whole, top), 0.0
    while chosen and budget >= samples:
        chosen = chosen[: budget // samples]
        raced = race(chosen, [float(bars[group]) for group, _ in chosen], factor)
        for place, found in raced.items():
            is_open[place], known[place] = False, found.gain
            if found.samples == samples:
                whole[place] = found.gain
            else:
                variances[place] = found.spread**2 * (1 / found.samples - 1 / samples)
            budget -= found.samples
        bars = bars_of(whole, top)
        promises, factor = promises_of(known, variances, features, groups, bars)
        if not promises[is_open].isfinite().all():
            raise ValueError("search: what a candidate promises is not finite; scale the score")
        chosen = best(promises.masked_fill(~is_open, -torch.inf), rivals)[:batch]
    return whole


def bars_of(gains: Tensor, top: int) -> Tensor:
    """What a candidate of each group must gain to be among the `top`: float64 [groups]."""
    of_groups = gains.nan_to_num(-torch.inf).amax(1)
    return of_groups.clamp(min=of_groups.topk(top).values[-1]) if top <= len(gains) else of_groups


def promises_of(
    gains: Tensor, variances: Tensor, features: Tensor, groups: Sequence[Group], bars: Tensor
) -> tuple[Tensor, float]:
    """How many standard deviations each candidate's expected gain lies above its bar, [groups, M];
    and the factor of the first feature.

    Args:
        gains: float64 [groups, M], NaN where not known.
        variances: by how much they may err, float64 [groups, M].
    """
    known = ~gains.isnan()
    scales = features.square().mean((0, 1)).sqrt().clamp(min=TINY)
    scaled = features / scales
    fitted = torch.linalg.lstsq(scaled[known], gains[known]).solution
    means = scaled @ fitted
    noise = NOISE + variances / (gains - means)[known].square().mean().clamp(min=TINY)
    scaled *= SLOPES**0.5
    deviations, energy = torch.empty_like(means), 0.0
    for number, group in enumerate(groups):
        points = known[number].nonzero()[:, 0]
        values = gains[number, points] - means[number, points]
        mean, variance, of_group = _posterior(
            group, scaled[number], points, values, noise[number, points]
        )
        means[number] += mean
        deviations[number] = variance.sqrt()
        energy += of_group
    deviations *= (max(energy, 0.0) / known.sum()).sqrt()
    bars = bars.clamp(min=gains[known].min())  # where fewer are known than wanted
    return (means - bars[:, None]) / deviations.clamp(min=TINY), float(fitted[0] / scales[0])


def _posterior(
    group: Group, features: Tensor, points: Tensor, values: Tensor, noise: Tensor
) -> tuple[Tensor, Tensor, float]:
    """Mean and variance [M] of a process of unit variance that is 0 at the origin, plus a linear
    function of `features` [M, F], and up to `noise` [O] has `values` [O] at `points` [O]; and O
    times the variance that the values speak for."""
    alike = torch.exp(group.distances(torch.cat([points, torch.tensor([group.origin])])) / -2)
    to_points, to_origin = alike[:, :-1], alike[:, -1:]
    covariance = to_points - to_origin - to_origin[points].T + 1 + features @ features[points].T
    within = covariance[points] + noise.diag()
    solved = torch.linalg.solve(within, torch.cat([values[:, None], covariance.T], 1))
    prior = 2 - 2 * to_origin[:, 0] + features.square().sum(1)
    variance = prior - (covariance * solved[:, 1:].T).sum(1)
    return covariance @ solved[:, 0], variance.clamp(min=0), float(values @ solved[:, 0])


def best(values: Tensor, rivals: int) -> list[Place]:
    """Candidates by value, at most `rivals` of a group, none whose value is not finite."""
    rivals = min(rivals, values.shape[1])
    values, members = values.topk(rivals, dim=1)
    order = values.flatten().argsort(descending=True, stable=True)
    order = order[values.flatten()[order].isfinite()]
    return [(n // rivals, int(members[n // rivals, n % rivals])) for n in order.tolist()]
