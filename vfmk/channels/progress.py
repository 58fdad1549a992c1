"""What a search says while it runs."""

import datetime
import math
import sys
import time
from collections.abc import Mapping

from vfmk.channels.records import PairSet

LIVE_SECONDS, LOG_SECONDS = 0.2, 30.0  # between two lines, on a terminal and elsewhere


class Report:
    """A line on stderr: how far, how fast, how long to go, the best so far.

    Args:
        total: passes.
    """

    def __init__(self, title: str, total: int, shown: bool) -> None:
        self.title, self.total, self.shown = title, total, shown
        self.known = self.done = 0
        self.best = -math.inf
        self.best_pairs: PairSet = ()
        self.begun = self.printed = time.monotonic()
        self.live = sys.stderr.isatty()

    def skip(self, passes: int, scores: Mapping[PairSet, float]) -> None:
        """Scores that are read, not computed."""
        self.known += passes
        self._look_at(scores)

    def advance(self, passes: int, scores: Mapping[PairSet, float]) -> None:
        self.done += passes
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
        for pairs, score in scores.items():
            if score > self.best:
                self.best, self.best_pairs = score, pairs

    def _print(self, now: float) -> None:
        seconds = now - self.begun
        to_go = self.total - self.known - self.done
        left = datetime.timedelta(seconds=round(seconds / self.done * to_go))
        best = " ".join(f"{i}:{j}" for i, j in self.best_pairs)
        line = (
            f"search: {self.title}: {self.known + self.done:,} of {self.total:,} passes,"
            f" {self.done / seconds:,.0f} a second, {left} left, best {self.best:.4f} ({best})"
        )
        print(
            f"\r{line}\x1b[K" if self.live else line, end="" if self.live else "\n", file=sys.stderr
        )
