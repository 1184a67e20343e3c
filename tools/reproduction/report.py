"""A report of cells: Markdown, CSV and PNG of one name."""

import csv
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
from matplotlib.axes import Axes

from medscale.logs import log
from medscale.storage import write_atomic

__all__ = ["NEAR", "Panels", "Report", "Row"]

#: a model counts as good as another from this far below
NEAR = 0.005

Row = dict[str, Any]


class Report:
    """A Markdown file, a CSV file and a picture of the same name."""

    def __init__(self, out: Path, name: str, protocol: str) -> None:
        self.out, self.name = out, name
        self.lines = [f"# {name}", "", protocol]

    def table(self, rows: Sequence[Row], *, suffix: str = "") -> None:
        """Add rows to the Markdown, and write them as CSV."""
        path = self.out / f"{self.name}{suffix}.csv"
        if not rows:
            path.unlink(missing_ok=True)  # of another time
            return
        headings = list(rows[0])
        numbers = [all(isinstance(row[h], int | float | None) for row in rows) for h in headings]
        self.lines += [
            "", f"| {' | '.join(headings)} |", "|" + "|".join("---:" if n else "---" for n in numbers) + "|",
            *(f"| {' | '.join(_shown(value) for value in row.values())} |" for row in rows),
        ]  # fmt: skip
        text = io.StringIO()
        writer = csv.DictWriter(text, headings, lineterminator="\n")
        writer.writeheader()
        writer.writerows({h: round(v, 6) if isinstance(v, float) else v for h, v in row.items()} for row in rows)
        write_atomic(path, text.getvalue().encode())

    def say(self, text: str) -> None:
        """Add a paragraph to the Markdown."""
        self.lines += ["", text]

    def panels(self, names: Sequence[tuple[str, str]], suffix: str = "") -> "Panels":
        """Return axes, one per data set and scorer, that are written as a picture at the end of a `with`."""
        return Panels(self.out / f"{self.name}{suffix}.png", names)

    def write(self) -> None:
        """Write the Markdown."""
        write_atomic(self.out / f"{self.name}.md", ("\n".join(self.lines) + "\n").encode())
        log(f"{self.name}: {self.out / self.name}.md")


class Panels:
    """Axes by data set and scorer, side by side."""

    def __init__(self, path: Path, names: Sequence[tuple[str, str]]) -> None:
        self.path, self.names = path, sorted(set(names))

    def __enter__(self) -> dict[tuple[str, str], Axes]:
        size = (5 * len(self.names), 4)
        self.figure, axes = plt.subplots(1, len(self.names), figsize=size, squeeze=False, layout="constrained")
        for axis, (dataset, scorer) in zip(axes[0], self.names, strict=True):
            axis.set_title(f"{dataset}, {scorer}")
        return dict(zip(self.names, axes[0], strict=True))

    def __exit__(self, *_: object) -> None:
        for axis in self.figure.axes:
            if axis.get_legend_handles_labels()[1]:
                axis.legend(fontsize="small")
        self.figure.savefig(self.path, dpi=120, metadata={"Software": None})
        plt.close(self.figure)


def _shown(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.3f}" if abs(value) < 1 else f"{value:,.1f}"
    return str(value)
