"""What the commands show while they work, and how they end."""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.markdown import Markdown
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn


def terminal(stderr: bool = False) -> Console:
    """Of several processes that torchrun started, the first alone speaks. Paths and messages are
    shown as they are, whatever brackets they have."""
    return Console(stderr=stderr, quiet=os.environ.get("RANK", "0") != "0", markup=False)


def print_report(out: Path) -> None:
    """The report.md in a folder, and where it is."""
    console = terminal()
    if not console.quiet:
        console.print(Markdown((out / "report.md").read_text()))
        console.print(f"\nreport and pictures: {out}")


def list_skipped(reasons: Sequence[str]) -> None:
    """On stderr, what --skip-bad left out."""
    console = terminal(stderr=True)
    console.print(f"left out {len(reasons)} of the records:")
    for reason in reasons:
        console.print(f"  {reason}", highlight=False, soft_wrap=True)


@contextmanager
def steps_bar() -> Iterator[Callable[[int, int, float], None]]:
    """A bar; call what it gives with steps done, steps in all, and the loss."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, TimeRemainingColumn(), console=terminal()) as bar:
        task = bar.add_task("starting", total=None)

        def show(done: int, total: int, loss: float) -> None:
            bar.update(task, description=f"loss {loss:.4f}", completed=done, total=total)

        yield show


@contextmanager
def plain_errors(command: str, extra: str, in_all: bool = False) -> Iterator[None]:
    """A user's mistake ends the command with its message alone; where all of several processes make
    it, here or by its own mark, the first alone prints it."""
    try:
        yield
    except (ImportError, OSError, ValueError, FloatingPointError) as error:
        if terminal().quiet and (in_all or getattr(error, "by_all", False)):
            raise SystemExit(1) from None
        message = f"vfmk {command}: {str(error).removeprefix(f'{command}: ')}"
        if isinstance(error, ImportError):
            message += f"; it needs: pip install vfmk[{extra}]"
        raise SystemExit(message) from None
