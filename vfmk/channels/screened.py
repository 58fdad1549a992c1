"""The strategy "screened": a share of the pairs and of the subsets, raced."""

from collections.abc import Sequence

import torch
from torch import Tensor

from vfmk.channels.channel_map import Pair
from vfmk.channels.race import Race
from vfmk.channels.records import PairSet
from vfmk.channels.scoring import Scoring
from vfmk.channels.screening import Group, Place, best, explore

# So many subsets' passes are spent; all are scored if there are no more.
SUBSETS_AT_LEAST, SUBSETS_SHARE = 128, 0.01  # and the share of the number of pairs

ROUNDING = 1e-12  # of a distance, in shares of the greatest


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
    Subsets that differ in few pairs gain alike; the estimate is the sum of their pairs' gains. On a
    single sample that says little, and the first order less: they are raced without a control."""
    sets = [(), *subsets]
    members = torch.tensor([[pair in pairs for pair in candidates] for pairs in sets]).double()
    overwritten, read = torch.tensor(candidates).unbind(1)
    samples = len(scoring.features)

    def no_control(places: Sequence[Place]) -> Tensor:
        return torch.zeros(len(places), samples, dtype=torch.float64)

    def distances(points: Tensor) -> Tensor:  # a median pair of subsets differs in half the pairs
        return torch.cdist(members, members[points], p=1) / (len(candidates) / 2)

    estimates = members @ (singles[overwritten, read] - baseline)
    report = scoring.report("subsets", limit)
    gains = explore(
        Race(scoring, lambda place: sets[place[1]], no_control, report),
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
