"""Candidates scored sample by sample, and dropped by the rule of `vfmk.channels.dropping`."""

import math
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from vfmk.channels.dropping import Rule, looks, shuffled
from vfmk.channels.processes import agreed, rank, summed, world_size
from vfmk.channels.progress import Report
from vfmk.channels.records import PairSet, Raced
from vfmk.channels.scoring import Scoring, blocks_of
from vfmk.channels.screening import Place

TOTAL, GAIN = 0, 1  # of a candidate's scores; then the fields of Raced


class Race:
    """Scores candidates in rounds.

    Args:
        sets: the pairs of a candidate.
        first_order: the gain of K candidates on each sample to first order, float64 [K, n], or 0.
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
        raced = self._run([self.sets(place) for place in places], rule)
        for found, variance in zip(raced, variances.tolist(), strict=True):
            if not math.isnan(found.spread):
                self.raced += 1
                self.variances += found.spread**2
                self.first_order_variances += variance
        return dict(zip(places, raced, strict=True))

    def _run(self, sets: Sequence[PairSet], rule: Rule) -> list[Raced]:
        """From the records, or run and put there."""
        scoring = self.scoring
        sets = [scoring.records.key(pairs) for pairs in sets]
        found = {
            pairs: known
            for number, pairs in enumerate(sets)
            if (known := self._known(pairs, rule.of([number])))
        }
        self.report.skip(sum(known.samples for known in found.values()), self._whole(found))
        missing = [number for number, pairs in enumerate(sets) if pairs not in found]
        for block in blocks_of(missing, scoring.block):
            new = self._block([sets[number] for number in block], rule.of(block))
            self.report.advance(sum(raced.samples for raced in new.values()), self._whole(new))
            found |= new
        return [found[pairs] for pairs in sets]

    def _known(self, pairs: PairSet, rule: Rule) -> Raced | None:
        """Where this rule drops the pairs too, or they were scored on all samples."""
        records, samples = self.scoring.records, len(self.scoring.prepared)
        raced = records.raced.get(pairs)
        if raced and (
            raced.samples == samples
            or rule.drops(*(torch.tensor([value], dtype=torch.float64) for value in raced))
        ):
            return raced
        if pairs in records.scores:
            gain = records.scores[pairs] - records.scores[()]
            return Raced(gain, torch.nan, samples)
        return None

    def _whole(self, raced: Mapping[PairSet, Raced]) -> dict[PairSet, float]:
        """Scores of those that were not dropped."""
        scores, samples = self.scoring.records.scores, len(self.scoring.prepared)
        return {pairs: scores[pairs] for pairs, found in raced.items() if found.samples == samples}

    def _block(self, block: Sequence[PairSet], rule: Rule) -> dict[PairSet, Raced]:
        """Shared out between the processes."""
        scoring, frozen = self.scoring, self.scoring.frozen_scores
        results = torch.zeros(len(block), 4, dtype=torch.float64, device=scoring.device)
        mine = list(range(rank(), len(block), world_size()))
        if mine:
            results[mine] = self._alone([block[i] for i in mine], rule.of(mine), frozen)
        # First the sum: what is not finite in one process then stops them all.
        if not summed(results).isfinite().all():
            raise ValueError("search: a score is not finite")
        raced, means = {}, {}
        for pairs, (total, gain, spread, samples) in zip(block, results.tolist(), strict=True):
            scoring.passes += int(samples)
            means[pairs] = total / samples
            if samples == len(scoring.prepared):
                gain = means[pairs] - scoring.records.scores[()]
            raced[pairs] = Raced(gain, spread, int(samples))
        scoring.records.add_raced(raced, means)
        return raced

    def _alone(self, sets: Sequence[PairSet], rule: Rule, frozen: Tensor) -> Tensor:
        """In this process: [K, 4]."""
        scoring, samples = self.scoring, len(self.scoring.prepared)
        overwritten, read = scoring.tensors(sets)
        scores = torch.zeros(len(sets), samples, dtype=torch.float64, device=scoring.device)
        results = torch.zeros(len(sets), 4, dtype=torch.float64)
        order, done = shuffled(samples), 0
        racing = torch.arange(len(sets))
        for end in looks(samples):
            for number in order[done:end].tolist():
                for chunk in racing.split(scoring.chunk):
                    prepared = scoring.prepared[number]
                    new = scoring.scorer.scores(prepared, overwritten[chunk], read[chunk])
                    scores[chunk, number] = new.double()
            done, seen = end, order[:end]
            gains = (scores - frozen).cpu()[racing][:, seen]
            of_racing = rule.of(racing)
            gain, spread = of_racing.estimates(gains, seen)
            count = torch.full_like(gain, end)
            results[racing, GAIN:] = torch.stack([gain, spread, count], 1)
            racing = racing[~of_racing.drops(gain, spread, count)]
            if not len(racing):
                break
        for of_sample in scores.cpu().unbind(1):  # in the order in which `Scoring` adds them
            results[:, TOTAL] += of_sample
        return results.to(scoring.device)
