"""The strategy "screened": a share of the pairs and of the subsets, raced."""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from vfmk.channels.channel_map import Pair
from vfmk.channels.progress import Report
from vfmk.channels.racing import Rule
from vfmk.channels.records import PairSet, Raced
from vfmk.channels.scoring import Scoring, agreed
from vfmk.channels.screening import Group, Place, best, explore

# So many subsets' passes are spent; all are scored if there are no more.
SUBSETS_AT_LEAST, SUBSETS_SHARE = 128, 0.01  # and the share of the number of pairs

ROUNDING = 1e-12  # of a distance, in shares of the greatest


class Race:
    """Scores candidates in rounds.

    Args:
        sets: the pairs of a candidate.
        first_order: the gain of K candidates on each sample to first order, float64 [K, n].
    """

    def __init__(
        self,
        scoring: Scoring,
        sets: Callable[[Place], PairSet],
        first_order: Callable[[Sequence[Place]], Tensor],
        report: Report,
    ) -> None:
        self.scoring = scoring
        self.sets = sets
        self.first_order = first_order
        self.report = report
        self.raced = 0
        self.variances = self.first_order_variances = 0.0  # sums over those raced

    def __call__(
        self, places: Sequence[Place], bars: Sequence[float], factor: float
    ) -> dict[Place, Raced]:
        """Candidates usually vary between samples as those of the rounds before did, in proportion
        to their first-order gains, and no less than they did on average: the first order may
        see nothing of what a candidate does."""
        places, bars, factor = agreed((places, bars, factor))
        first_order = self.first_order(places)
        variances = first_order.var(1, correction=min(1, first_order.shape[1] - 1))
        before = self.first_order_variances
        usual = variances * (self.variances / before if before else 0.0)
        rule = Rule(
            torch.tensor(bars, dtype=torch.float64),
            factor * first_order,
            usual.clamp(min=self.variances / self.raced if self.raced else math.nan),
        )
        raced = self.scoring.race([self.sets(place) for place in places], rule, self.report)
        for found, variance in zip(raced, variances.tolist(), strict=True):
            if not math.isnan(found.spread):
                self.raced += 1
                self.variances += found.spread**2
                self.first_order_variances += variance
        return dict(zip(places, raced, strict=True))


def num_pairs(scoring: Scoring) -> int:
    return scoring.num_channels * (scoring.num_channels - 1)


def screened_pairs(scoring: Scoring, baseline: float, keep: float, top_n: int) -> Tensor:
    """`SearchResult.singles`. Channel i gains alike from reading channels that are alike, and
    nothing from itself."""
    channels, samples = scoring.num_channels, len(scoring.features)
    first_order = scoring.first_order_gains
    distances = scoring.channel_distances()
    off_diagonal = ~torch.eye(channels, dtype=torch.bool)
    # Channels may be dead or twins; what sets these apart is 0 but for rounding.
    apart = distances[distances > ROUNDING * distances.max()]
    distances /= apart.median() if len(apart) else 1.0
    groups = [Group(lambda points: distances[:, points], channel) for channel in range(channels)]
    sets = max(1, round(keep * num_pairs(scoring)))
    report = scoring.report("pairs", sets)

    def of_pairs(pairs: Sequence[Pair]) -> Tensor:
        overwritten, read = torch.tensor(pairs).unbind(1)
        return first_order[:, overwritten, read].T.double()

    estimates = first_order.mean(0, dtype=torch.float64)
    squares = torch.linalg.vector_norm(first_order, dim=0, dtype=torch.float64).square() / samples
    gains = explore(
        Race(scoring, lambda pair: (pair,), of_pairs, report),
        torch.stack([estimates, squares], -1),
        groups,
        best(estimates.where(off_diagonal, -torch.inf), 1),
        top_n,
        samples,
        sets * samples,
    )
    report.close()
    singles = torch.full_like(gains, torch.nan).fill_diagonal_(baseline)
    for i, j in (~gains.isnan()).nonzero().tolist():
        singles[i, j] = scoring.records.scores[((i, j),)]
    return singles


def screened_subsets(
    scoring: Scoring,
    baseline: float,
    singles: Tensor,
    candidates: Sequence[Pair],
    subsets: Sequence[PairSet],
    limit: int,
) -> dict[PairSet, float]:
    """Scores of promising subsets, as many as `limit` would cost: the single candidates come first.
    Subsets that differ in few pairs gain alike; the estimate is the sum of their pairs' gains."""
    sets = [(), *subsets]
    members = torch.tensor([[pair in pairs for pair in candidates] for pairs in sets]).double()
    overwritten, read = torch.tensor(candidates).unbind(1)
    first_order = scoring.first_order_gains[:, overwritten, read].double()  # [n, N]

    def of_subsets(places: Sequence[Place]) -> Tensor:
        return members[[number for _, number in places]] @ first_order.T

    def distances(points: Tensor) -> Tensor:  # a median pair of subsets differs in half the pairs
        return torch.cdist(members, members[points], p=1) / (len(candidates) / 2)

    estimates = members @ (singles[overwritten, read] - baseline)
    samples = len(scoring.features)
    report = scoring.report("subsets", limit)
    gains = explore(
        Race(scoring, lambda place: sets[place[1]], of_subsets, report),
        estimates[None, :, None],
        [Group(distances, 0)],
        [(0, number) for number in range(1, len(candidates) + 1)],
        1,
        samples,
        limit * samples,
    )
    report.close()
    chosen = [sets[number] for number in (~gains[0].isnan()).nonzero()[:, 0].tolist()]
    records = scoring.records
    return {pairs: records.scores[records.key(pairs)] for pairs in chosen}
