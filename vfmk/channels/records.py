"""The search's results file: a line of JSON for each score, appended whole, read back on resuming.

    {"pairs": [], "miou": 0.49, "delta": 0, "samples": 50, "run": {…}}   the frozen model, first
    {"pairs": [[3, 7]], "miou": 0.5, "delta": 0.01, "samples": 50}
    {"pairs": [[5, 2]], "miou": 0.47, "delta": -0.02, "samples": 15, "spread": 0.03}   dropped

as the authors' tool writes it; "run" is ours, and says of which search the scores are.
"spread" is ours too, of pairs that were raced: how much their gain differs between samples. Over
fewer samples than the run has, "miou" is the mean over those, and "delta" what they let expect of
the gain over all; a later line may have it over all.
"""

import fcntl
import json
import math
import os
import statistics
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from vfmk.channels.channel_map import ChannelMap, Pair, checked_pair

PairSet = tuple[Pair, ...]  # what is scored: pairs of channels, applied together
TOLERANCE = 1e-3  # between scores computed in another precision, in shares of their size
RECORD = b'{"pairs": ['  # how each of our lines begins


class Raced(NamedTuple):
    """What a race told of a set of pairs."""

    gain: float  # over the frozen model; estimated, unless on all samples
    spread: float  # standard deviation between samples of what was averaged; NaN if not known
    samples: int


class Records:
    """The file at `path`, held by this run alone until `close`.

    `scores` has the mean score over all samples of each set of pairs, `raced` what the last race of
    one told; `is_foreign` whether the file does not say of which run it is. Without a path nothing
    is read or written.

    Args:
        run: what tells runs apart.
        samples: of the run.
        sequential: pairs are applied in order, not at once; tells runs apart too.

    Raises:
        ValueError: another run holds the file; a line is no record; the scores are of another run.
    """

    def __init__(
        self, path: Path | None, run: Mapping[str, Any], samples: int, sequential: bool = False
    ) -> None:
        self.run = {**run, "sequential": sequential}
        self.sequential = sequential
        self.samples = samples
        self.scores: dict[PairSet, float] = {}
        self.raced: dict[PairSet, Raced] = {}
        self.is_foreign = False
        self._path = path
        self._file: int | None = None
        self._cut_from: int | None = None  # where a line begins that was never finished
        self._is_unended = False  # the last line is whole, but for its end
        if path is None:
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            self._lock()
            self._read()
        except BaseException:
            self.close()
            raise

    def key(self, pairs: PairSet) -> PairSet:
        """Under which they are in `scores` and `raced`: applied at once, they have no order."""
        return pairs if self.sequential else tuple(sorted(pairs))

    def check(self, channels: int) -> None:
        """That all sets of pairs are maps of so many channels."""
        for pairs in self.scores.keys() | self.raced:
            try:
                ChannelMap(pairs, channels)
            except ValueError as error:
                raise ValueError(f"search: {self._path}: {error}") from None

    def check_scores(self, scores: Mapping[PairSet, float]) -> None:
        """That these sets of pairs, scored anew, have about the scores that they have there."""
        typical = statistics.median(abs(self.scores[pairs]) for pairs in scores)
        for pairs, score in scores.items():
            if abs(self.scores[pairs] - score) > TOLERANCE * max(abs(self.scores[pairs]), typical):
                name = " ".join(f"{i}:{j}" for i, j in pairs) or "the frozen model"
                raise ValueError(
                    f"search: {self._path} is of another model or other samples, or another score:"
                    f" {name} scores {self.scores[pairs]:.6g} there, {score:.6g} here"
                )

    def add(self, scores: Mapping[PairSet, float]) -> None:
        """Take in and write down new scores; the frozen model's must come first."""
        self.scores |= scores
        self._write(
            {
                "pairs": pairs,
                "miou": score,
                "delta": score - self.scores[()],
                "samples": self.samples,
                **({} if pairs else {"run": self.run}),
            }
            for pairs, score in scores.items()
        )

    def add_raced(self, raced: Mapping[PairSet, Raced], means: Mapping[PairSet, float]) -> None:
        """The same of a race; of those that were dropped, the means over their samples."""
        self.raced |= raced
        self.scores |= {p: means[p] for p, found in raced.items() if found.samples == self.samples}
        self._write(
            {
                "pairs": pairs,
                "miou": means[pairs],
                "delta": found.gain,
                "samples": found.samples,
                "spread": found.spread,
            }
            for pairs, found in raced.items()
        )

    def _write(self, lines: Iterable[Mapping[str, Any]]) -> None:
        if self._file is None:
            return
        content = "".join(f"{json.dumps(line)}\n" for line in lines).encode()
        # Only now: a file that is refused stays as it was.
        if self._cut_from is not None:
            os.ftruncate(self._file, self._cut_from)
        if self._is_unended:
            content = b"\n" + content
        self._cut_from, self._is_unended = None, False
        while content:
            content = content[os.write(self._file, content) :]

    def close(self) -> None:
        """Write through to the disk, and let go of the file."""
        if self._file is not None:
            os.fsync(self._file)
            os.close(self._file)
            self._file = None

    def _lock(self) -> None:
        assert self._file is not None
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"search: {self._path} is being written by another run") from None

    def _read(self) -> None:
        assert self._file is not None
        assert self._path is not None
        content = self._path.read_bytes()
        *lines, tail = content.split(b"\n")
        self._is_unended = bool(tail) and _is_json(tail)
        if self._is_unended:
            lines.append(tail)
        elif tail:
            self._cut_from = len(content) - len(tail)
        if not lines and not tail.startswith(RECORD[: len(tail)]):
            raise ValueError(f"search: {self._path}: no record of a score: {tail[:60]!r}")
        for number, line in enumerate(lines, 1):
            self._take(line, f"{self._path}, line {number}")
        if self._cut_from is not None:
            warnings.warn(
                f"search: {self._path} ended in a cut line, which is dropped: {tail[:60]!r}",
                stacklevel=5,
            )

    def _take(self, line: bytes, place: str) -> None:
        try:
            record = json.loads(line)
            pairs = self.key(tuple(checked_pair(pair) for pair in record["pairs"]))
            score, samples = float(record["miou"]), int(record["samples"])
            run = dict(record.get("run", self.run))
            raced = None
            if "spread" in record:
                raced = Raced(float(record["delta"]), float(record["spread"]), samples)
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"search: {place}: no record of a score: {error}") from None
        if not all(map(math.isfinite, (score, *(raced or ())))):
            raise ValueError(f"search: {place}: a score that is not finite: {line.decode()}")
        if bool(self.scores) != bool(pairs):
            raise ValueError(
                f"search: {place}: the frozen model's score must come first, and only once"
            )
        self.is_foreign |= not pairs and "run" not in record
        if not pairs and run != self.run:
            raise ValueError(f"search: {place}: {_difference(run, self.run)}")
        was_dropped = pairs and raced and 0 < samples < self.samples
        if samples != self.samples and not was_dropped:
            raise ValueError(
                f"search: {place}: a score over {samples} samples, there are {self.samples}"
            )
        if raced:
            self.raced[pairs] = raced
        if not was_dropped and self.scores.setdefault(pairs, score) != score:
            raise ValueError(f"search: {place}: a second, different score of these pairs")


def _is_json(line: bytes) -> bool:
    try:
        json.loads(line)
    except ValueError:
        return False
    return True


def _difference(found: Mapping[str, Any], expected: Mapping[str, Any]) -> str:
    names: Iterable[str] = [k for k in expected if found.get(k) != expected[k]]
    return f"the scores are of another run, of different {' and '.join(names)}"
