"""What a search says while it runs."""

import datetime
import heapq
import sys
import time
from collections.abc import Mapping

from vfmk.channels.records import PairSet

LIVE_SECONDS, LOG_SECONDS = 0.2, 30.0  # between two lines, on a terminal and elsewhere
BEST = 3  # sets of pairs that are named


class Report:
    """A line on stderr: how far, how fast, how long to go, the best so far.

    Args:
        total: passes, or other units of work.
    """

    def __init__(self, title: str, total: int, shown: bool, unit: str = "passes") -> None:
        self.title, self.total, self.shown, self.unit = title, total, shown, unit
        self.known = self.done = 0
        self.best: dict[PairSet, float] = {}
        self.begun = self.printed = time.monotonic()
        self.live = sys.stderr.isatty()

    def skip(self, work: int, scores: Mapping[PairSet, float]) -> None:
        """Scores that are read, not computed."""
        self.known += work
        self._look_at(scores)

    def advance(self, work: int, scores: Mapping[PairSet, float]) -> None:
        self.done += work
        self._look_at(scores)
        now = time.monotonic()
        if self.shown and now - self.printed > (LIVE_SECONDS if self.live else LOG_SECONDS):
            self.printed = now
            self._print(now)

    def close(self) -> None:
        if self.shown and self.done:
            self._print(time.monotonic())
            if self.live:
                print(file=sys.stderr)

    def _look_at(self, scores: Mapping[PairSet, float]) -> None:
        known = {**self.best, **scores}
        self.best = {
            pairs: known[pairs] for pairs in heapq.nlargest(BEST, known, known.__getitem__)
        }

    def _print(self, now: float) -> None:
        seconds = now - self.begun
        to_go = self.total - self.known - self.done
        left = datetime.timedelta(seconds=round(seconds / self.done * to_go))
        line = (
            f"search: {self.title}: {self.known + self.done:,} of {self.total:,} {self.unit},"
            f" {self.done / seconds:,.1f} {self.unit}/s, {left} left"
        )
        if self.best:
            line += ", best " + ", ".join(
                f"{score:.4f} ({' '.join(f'{i}:{j}' for i, j in pairs)})"
                for pairs, score in self.best.items()
            )
        print(
            f"\r{line}\x1b[K" if self.live else line, end="" if self.live else "\n", file=sys.stderr
        )
