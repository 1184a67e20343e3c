"""What a run tells while it trains: metrics.jsonl, TensorBoard, and a live bar or plain lines."""

import contextlib
import json
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from torch.utils.tensorboard import SummaryWriter

from medscale.logs import LINE_SECONDS, log, silenced
from medscale.storage import write_atomic

__all__ = ["Display", "RunLog", "training_display"]


class RunLog:
    """metrics.jsonl and TensorBoard of one run, appended to; a resumed run first drops what it will repeat.

    Of several workers the leader alone writes.
    """

    def __init__(
        self, run_directory: Path, resumed_step: int, waiting_step: int | None = None, *, leads: bool = True
    ) -> None:
        """Open both; what came after `resumed_step`, and the validation of `waiting_step`, will come again."""
        self.path, self.leads = run_directory / "metrics.jsonl", leads
        if leads:
            self._drop_after(resumed_step, waiting_step)
            self.file = self.path.open("a", encoding="utf-8")
            self.board = SummaryWriter(str(run_directory / "tensorboard"), purge_step=resumed_step + 1)

    def write(self, kind: str, step: int, values: Mapping[str, Any]) -> None:
        """Append one record {"kind", "step", ...}; numbers also become TensorBoard curves `kind/name`."""
        if not self.leads:
            return
        self.file.write(json.dumps({"kind": kind, "step": step, **values}) + "\n")
        self.file.flush()
        for name, value in values.items():
            if isinstance(value, int | float):
                self.board.add_scalar(f"{kind}/{name}", value, step)
            elif isinstance(value, Mapping):
                for key, number in value.items():
                    self.board.add_scalar(f"{kind}/{name}/{key}", number, step)

    def close(self) -> None:
        """Flush and close both."""
        if not self.leads:
            return
        self.file.close()
        self.board.close()

    def _drop_after(self, step: int, waiting_step: int | None) -> None:
        """Keep the whole lines up to a step: a killed run may have written more, and half a line."""
        if not self.path.exists():
            return
        kept = []
        for line in self.path.read_text(encoding="utf-8").splitlines(keepends=True):
            try:
                record = json.loads(line)
                if record["step"] <= step and (record["kind"], record["step"]) != ("valid", waiting_step):
                    kept.append(line)
            except (ValueError, KeyError):
                continue
        write_atomic(self.path, "".join(kept).encode())


class Display:
    """Where a run stands; the plain form writes a line every few seconds."""

    def __init__(self, total_steps: int, steps_per_epoch: int) -> None:
        self.total_steps, self.steps_per_epoch = total_steps, steps_per_epoch
        self.quality = ""
        #: when the last line was shown; the first step is always due
        self.last = -LINE_SECONDS

    def due(self) -> bool:
        """Whether to show a step between those that are logged: the first one, and one every few seconds."""
        return time.monotonic() - self.last >= LINE_SECONDS

    def update(self, step: int, triples_per_second: float, terms: Mapping[str, float]) -> None:
        """Show a step's numbers; steps count from 1."""
        if self.due():
            self.last = time.monotonic()
            log(self._line(step, triples_per_second, terms))

    def validated(self, line: str, quality: str) -> None:
        """Show a validation: a whole line, and a few words to keep beside the steps."""
        self.quality = quality
        log(line)

    def _line(self, step: int, triples_per_second: float, terms: Mapping[str, float]) -> str:
        losses = "  ".join(f"{name} {value:.4g}" for name, value in terms.items())
        epoch = -(-step // self.steps_per_epoch)
        return (
            f"epoch {epoch}  step {step:,}/{self.total_steps:,}  {triples_per_second:,.0f} triples/s  "
            f"{losses}  {self.quality}".rstrip()
        )


class _LiveDisplay(Display):
    """The same in a live bar."""

    def __init__(self, total_steps: int, steps_per_epoch: int, bar: Any) -> None:
        super().__init__(total_steps, steps_per_epoch)
        self.bar, self.task = bar, bar.add_task("", total=total_steps)

    def update(self, step: int, triples_per_second: float, terms: Mapping[str, float]) -> None:
        self.last = time.monotonic()
        self.bar.update(self.task, completed=step, description=self._line(step, triples_per_second, terms))

    def validated(self, line: str, quality: str) -> None:
        self.quality = quality
        self.bar.console.print(line)


@contextlib.contextmanager
def training_display(total_steps: int, steps_per_epoch: int) -> Iterator[Display]:
    """Yield a live display on a terminal, a plain one elsewhere (which a silenced worker writes nowhere)."""
    if not sys.stderr.isatty() or silenced():
        yield Display(total_steps, steps_per_epoch)
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (BarColumn(bar_width=20), TextColumn("{task.description}"), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as bar:
        yield _LiveDisplay(total_steps, steps_per_epoch, bar)
