"""What a running command says: dated lines on stderr, and how far a long stage has come.

A terminal gets a live bar; a file or a pod's log gets a plain line every ten seconds, without control
characters.
"""

import contextlib
import sys
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["LINE_SECONDS", "Advance", "console", "log", "progress", "silence", "silenced"]

#: called with how many more units are done
Advance = Callable[[int], None]

#: seconds between two plain lines of a stage's progress
LINE_SECONDS = 10.0


def console() -> "Console":
    """Return where tables are printed: stdout, as wide as the terminal, or 120 columns where there is none."""
    from rich.console import Console

    return Console(width=None if sys.stdout.isatty() else 120)


_silenced = False


def silence() -> None:
    """Say nothing from now on: of several workers, which all know the same, the leader speaks."""
    global _silenced
    _silenced = True


def silenced() -> bool:
    """Whether this process says nothing."""
    return _silenced


def log(message: str) -> None:
    """Write one dated line to stderr."""
    if not _silenced:
        print(time.strftime("%H:%M:%S"), message, file=sys.stderr, flush=True)


@contextlib.contextmanager
def progress(description: str, total: int, unit: str) -> Iterator[Advance]:
    """Show how far a stage of `total` units (bytes, triples, steps) has come; yields `advance(n)`.

    A terminal on stderr gets a live bar, anything else a line every `LINE_SECONDS` and one at the end.
    """
    shown = _live_bar if sys.stderr.isatty() else _plain_lines
    with shown(description, total, unit) as advance:
        yield advance


@contextlib.contextmanager
def _live_bar(description: str, total: int, unit: str) -> Iterator[Advance]:
    # Imported here: commands whose output is piped never pay for it.
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    amount = TextColumn("{task.completed:,.0f}/{task.total:,.0f} " + unit)
    text = TextColumn("{task.description}")
    columns = (text, BarColumn(), amount, TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task(description, total=total)
        yield lambda count: bar.advance(task, count)


@contextlib.contextmanager
def _plain_lines(description: str, total: int, unit: str) -> Iterator[Advance]:
    start = last = time.monotonic()
    done = 0

    def advance(count: int) -> None:
        nonlocal done, last
        done += count
        if time.monotonic() - last >= LINE_SECONDS:
            last = time.monotonic()
            log(f"{description}: {done:,} of {total:,} {unit} ({done / max(total, 1):.0%})")

    yield advance
    log(f"{description}: {done:,} {unit} in {time.monotonic() - start:.1f} s")
