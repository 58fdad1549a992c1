"""The log of a run: a JSON document for each line; and how a run writes JSON."""

import contextlib
import json
import math
from pathlib import Path
from typing import Any

from vfmk._files import write_whole

LOG = "log.jsonl"


class Log:
    """Appends lines; on resuming, those after the checkpoint are dropped."""

    def __init__(self, path: Path, start: int, is_writer: bool) -> None:
        self.path, self.start, self.is_writer = path, start, is_writer

    def __enter__(self) -> "Log":
        if self.is_writer:
            kept = [line for line in read_log(self.path) if line["step"] < self.start]
            write_whole(self.path, "".join(to_json(line) + "\n" for line in kept).encode())
            self.file = self.path.open("a")
        return self

    def __exit__(self, *exception: object) -> None:
        if self.is_writer:
            self.file.close()

    def write(self, **line: Any) -> None:
        if self.is_writer:
            self.file.write(to_json(line) + "\n")
            self.file.flush()


def read_log(path: Path) -> list[dict[str, Any]]:
    """Its lines; one that a kill cut off is left out, and a file that is not there has none."""
    lines = []
    for text in path.read_text().splitlines() if path.exists() else []:
        with contextlib.suppress(json.JSONDecodeError):
            lines.append(json.loads(text))
    return lines


def to_json(document: Any, indent: int | None = None) -> str:
    """JSON has no NaN: a number that is not finite, such as a score of no objects, is null."""
    return json.dumps(_finite(document), indent=indent, allow_nan=False)


def _finite(document: Any) -> Any:
    if isinstance(document, dict):
        return {key: _finite(value) for key, value in document.items()}
    if isinstance(document, list | tuple):
        return [_finite(value) for value in document]
    return None if isinstance(document, float) and not math.isfinite(document) else document
