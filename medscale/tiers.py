"""The smallest tier that keeps enough quality, or the best that fits: `python -m medscale.tiers JOB_OR_RUN`.

Bytes are those of a tier's numeric core and names: entity rows (with int8 and int4 a float32 scale per row and cut
of the tier chain), relation rows as float32, and names (UTF-8, with 16 bytes each to find them). Parquet copies, search
indexes, models of other formats and manifests are not counted.
"""

import argparse
import itertools
import json
import math
import re
import shlex
import sys
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
from rich.box import SIMPLE_HEAD
from rich.markup import escape
from rich.table import Table

from medscale.config import Job
from medscale.errors import CapacityError, ConfigError, MedscaleError, UnsupportedError
from medscale.evaluate import PROTOCOL
from medscale.graph.reader import Graph, open_graph
from medscale.logs import console, log
from medscale.model.layout import layout_of
from medscale.options import job_parser, run_command, run_of
from medscale.results import evaluation_of, summary_of
from medscale.runtime.precision import PRECISIONS, Precision, row_bytes, stored_dtype
from medscale.runtime.scoring import exported_scorer
from medscale.storage import write_atomic

__all__ = [
    "INSTALL",
    "Point",
    "Sizes",
    "bytes_per_entity",
    "choose",
    "curve_of",
    "in_bytes",
    "main",
    "missing_for_figures",
    "parse_budget",
    "parse_keep",
    "sizes_of",
    "text_plot",
]  # fmt: skip

#: how to get what figures need
INSTALL = "pip install 'medscale[report]'"

#: of a name: its place in the sorted order, and where it ends, int64 each
_NAME_BYTES = 16
_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "ki": 1 << 10, "mi": 1 << 20, "gi": 1 << 30}
_SIZE = re.compile(r"(?P<number>\d+(?:\.\d+)?)\s*(?P<unit>[kmg]i?)?b?", re.IGNORECASE)
_SHARE = re.compile(r"(?P<number>\d+(?:\.\d+)?)\s*(?P<percent>%)?")


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """What decides the bytes of a tier beside its dim and precision."""

    num_entities: int
    #: inverses included
    relation_rows: int
    #: columns of a unit of an entity row, and of a relation row, as they are exported
    unit_columns: int
    relation_unit_columns: int
    #: units of the job's tiers: where rows are cut
    tiers: tuple[int, ...]
    #: whether rows bring norms: those of scorers that are products
    norms: bool
    #: of the names of all entities and relations
    name_bytes: int

    def per_entity(self, dim: int, precision: Precision) -> int:
        """Return the bytes of an entity's row of `dim` units."""
        return bytes_per_entity({*self.tiers, dim}, dim, self.unit_columns, precision, norms=self.norms)

    def whole(self, dim: int, precision: Precision) -> int:
        """Return the bytes of a tier of `dim` units: entities, relations, names."""
        relations = self.relation_rows * dim * self.relation_unit_columns * stored_dtype("float32").itemsize
        return self.num_entities * self.per_entity(dim, precision) + relations + self.name_bytes


@dataclass(frozen=True, kw_only=True)
class Point:
    """One sub-model on the curve of quality by size."""

    units: int
    #: reals of an entity row
    columns: int
    mrr: float
    hits_at_10: float
    #: of the largest sub-model's MRR
    share: float
    #: by precision
    bytes_per_entity: Mapping[str, int]
    #: of the whole tier, by precision
    bytes: Mapping[str, int]


def bytes_per_entity(cuts: Collection[int], dim: int, unit_columns: int, precision: Precision, *, norms: bool) -> int:
    """Return the bytes of a row of `dim` units; rows are cut at those of `cuts` (units) up to `dim`."""
    ends = sorted(cut for cut in cuts if cut <= dim)
    assert ends[-1] == dim
    widths = [(end - start) * unit_columns for start, end in itertools.pairwise([0, *ends])]
    return row_bytes(widths, precision, norms=norms)


def sizes_of(job: Job, graph: Graph) -> Sizes:
    """Return what decides the bytes of a job's tiers; reads the names of the graph once."""
    layout = layout_of(job.model, graph.num_entities, graph.num_relations)
    scorer = exported_scorer(job.model.scorer, job.model.norm)
    names = [graph.entity_names(), graph.relation_names()]
    return Sizes(
        num_entities=graph.num_entities,
        relation_rows=layout.num_relation_rows,
        unit_columns=len(scorer.entity_unit),
        relation_unit_columns=len(scorer.relation_unit),
        tiers=tuple(sorted(set(job.model.tiers.values()))),
        norms=scorer.geometry == "product",
        name_bytes=sum(_utf8_bytes(each) + _NAME_BYTES * len(each) for each in names),
    )


def _utf8_bytes(names: pa.Array | pa.ChunkedArray) -> int:
    return int(pc.sum(pc.binary_length(names)).as_py() or 0)


def curve_of(job: Job, run_directory: Path, graph: Graph) -> list[Point]:
    """Return every sub-model's quality and size, smallest first.

    Raises:
        MedscaleError: the run is not evaluated, or was on another graph.

    """
    evaluation = evaluation_of(run_directory)
    layout = layout_of(job.model, graph.num_entities, graph.num_relations)
    full = max(evaluation)
    told = summary_of(run_directory).get("parameters_million", {}).get(str(full))
    if full not in layout.dims or (told is not None and told != layout.num_parameters(full) / 1e6):
        raise MedscaleError(
            f"{run_directory} was evaluated with another job, or on another graph than {graph.directory}: point "
            "--graphs-dir to that graph, or run medscale evaluate again"
        )
    sizes = sizes_of(job, graph)
    return [
        Point(
            units=dim,
            columns=dim * sizes.unit_columns,
            mrr=record["mrr"],
            hits_at_10=record["hits@10"],
            share=record["mrr"] / evaluation[full]["mrr"],
            bytes_per_entity={precision: sizes.per_entity(dim, precision) for precision in PRECISIONS},
            bytes={precision: sizes.whole(dim, precision) for precision in PRECISIONS},
        )
        for dim, record in evaluation.items()
    ]


def choose(
    points: Sequence[Point], *, budget: int | None = None, keep: float | None = None, precision: Precision = "float32"
) -> Point | None:
    """Return the best point of at most `budget` bytes, or the smallest that keeps a share; None: neither is asked.

    Raises:
        CapacityError: no sub-model fits.

    """
    if keep is not None:
        return next(point for point in points if point.share >= keep)  # the largest has all of it
    if budget is None:
        return None
    fitting = [point for point in points if point.bytes[precision] <= budget]
    if not fitting:
        smallest = points[0]
        others = [f"{in_bytes(smallest.bytes[p])} at {p}" for p in PRECISIONS if smallest.bytes[p] <= budget]
        way_out = f"; it takes {others[0]}: --precision {others[0].split()[-1]}" if others else ""
        raise CapacityError(
            f"--budget: no tier fits {in_bytes(budget)}: the smallest sub-model, {smallest.units} units, takes "
            f"{in_bytes(smallest.bytes[precision])} at {precision}{way_out}"
        )
    return max(fitting, key=lambda point: (point.mrr, -point.units))


def parse_budget(text: str) -> int:
    """Return the bytes that `20MB`, `512KiB` or `20000000` means.

    Raises:
        ConfigError: it means none.

    """
    match = _SIZE.fullmatch(text.strip())
    if match is None:
        raise ConfigError([f"--budget: {text!r} is not a number of bytes; allowed: such as 20MB, 512KiB or 20000000"])
    return int(float(match["number"]) * _UNITS[(match["unit"] or "").lower()])


def parse_keep(text: str) -> float:
    """Return the share that `95%` or `0.95` means, in (0, 1].

    Raises:
        ConfigError: it means none, or is over 100%.

    """
    match = _SHARE.fullmatch(text.strip())
    share = float(match["number"]) / (100 if match["percent"] else 1) if match else 0.0
    if share > 1:
        raise ConfigError(
            [f"--keep: {text} is over 100% of the full model's MRR, which no tier can promise; allowed: such as 95%"]
        )
    if not share:
        raise ConfigError([f"--keep: {text!r} is not a share of the full model's MRR; allowed: such as 95% or 0.95"])
    return share


def in_bytes(number: int) -> str:
    """Return a number of bytes in words of three figures: 1.23 MB; units are powers of 1000."""
    size, units = float(number), ["B", "kB", "MB", "GB"]
    while size >= 999.5 and len(units) > 1:
        size, units = size / 1000, units[1:]
    digits = 0 if units[0] == "B" or size >= 99.95 else 1 if size >= 9.995 else 2
    return f"{size:,.{digits}f} {units[0]}"


# ---- showing -----------------------------------------------------------------------------------------------


def _table(name: str, points: Sequence[Point], chosen: Point | None, precision: Precision, queries: str) -> Table:
    table = Table(
        title=escape(name),
        box=SIMPLE_HEAD,
        caption=(
            f"{queries}, both sides: {PROTOCOL}. share: of the largest sub-model's MRR, measured at float32. Bytes: "
            "vectors (with scales at int8 and int4, and norms for products, per row and cut), relations as float32, "
            f"names; no Parquet copies, indexes, manifests. B/entity: vectors and scales at {precision}."
        ),
    )
    headings = ("", "units", "columns", "MRR", "share", "Hits@10", "B/entity", *PRECISIONS)
    for heading in headings:
        table.add_column(heading, justify="right")
    for point in points:
        quality = (f"{point.mrr:.4f}", f"{point.share:.1%}", f"{point.hits_at_10:.4f}")
        sizes = (f"{point.bytes_per_entity[precision]:,}", *(in_bytes(point.bytes[p]) for p in PRECISIONS))
        is_chosen = point is chosen
        table.add_row(
            ">" if is_chosen else "", f"{point.units:,}", f"{point.columns:,}", *quality, *sizes,
            style="bold" if is_chosen else "",
        )  # fmt: skip
    return table


def text_plot(points: Sequence[Point], chosen: Point | None, *, width: int = 64, height: int = 12) -> str:
    """Return MRR by units (logarithmic) as lines of plain characters: o is a sub-model, # the chosen one."""
    columns = _places([math.log2(point.units) for point in points], width)
    rows = [height - 1 - row for row in _places([point.mrr for point in points], height)]
    canvas = [[" "] * width for _ in range(height)]
    for (x0, y0), (x1, y1) in itertools.pairwise(zip(columns, rows, strict=True)):
        for x in range(x0 + 1, x1):
            canvas[round(y0 + (y1 - y0) * (x - x0) / (x1 - x0))][x] = "."
    for x, y in zip(columns, rows, strict=True):
        canvas[y][x] = "o"
    if chosen is not None:
        place = [point.units for point in points].index(chosen.units)
        canvas[rows[place]][columns[place]] = "#"
    low, high = min(point.mrr for point in points), max(point.mrr for point in points)
    labels = {0: f"{high:.3f}", height - 1: f"{low:.3f}"}
    lines = [f"{labels.get(y, ''):>8} |{''.join(cells).rstrip()}" for y, cells in enumerate(canvas)]
    axis = f"{'':8} +{'-' * width} units"
    return "\n".join([f"{'MRR':>8}", *lines, axis, f"{'':10}{_ticks(points, columns)}"])


def _places(values: Sequence[float], size: int) -> list[int]:
    """Return the cell of each value, where the least is in cell 0 and the greatest in the last of `size`."""
    least, span = min(values), (max(values) - min(values)) or 1.0
    return [round((value - least) / span * (size - 1)) for value in values]


def _ticks(points: Sequence[Point], columns: Sequence[int]) -> str:
    """Return the units, each below its place: from the largest down, those that do not touch another."""
    line, free = [" "] * (columns[-1] + 8), columns[-1] + 8
    for point, column in reversed(list(zip(points, columns, strict=True))):
        label = str(point.units)
        start = max(0, column - len(label) // 2)
        if start + len(label) < free:
            line[start : start + len(label)] = label
            free = start
    return "".join(line).rstrip()


def _words(chosen: Point, precision: Precision) -> str:
    size = in_bytes(chosen.bytes[precision])
    return f"{chosen.units} units, {size} at {precision}: MRR {chosen.mrr:.4f}, {chosen.share:.1%} of the full model's"


def _advice(job: Job, asked: Path, arguments: argparse.Namespace, chosen: Point) -> str:
    """Return how to get the chosen tier: words, the line for a job file, the command that cuts it from this run."""
    precision, words = arguments.precision, _words(chosen, arguments.precision)
    names = [name for name, units in job.model.tiers.items() if units == chosen.units]
    tiers = dict(job.model.tiers)
    if names:
        words += f"; the job's tier {names[0]} has it already"
    else:
        tiers[f"units{chosen.units}"] = chosen.units
    tiers = dict(sorted(tiers.items(), key=lambda item: item[1]))
    command = ["medscale", "export", str(asked), "--tiers", ",".join(f"{n}={units}" for n, units in tiers.items())]
    # Without copies in other formats, which the bytes do not count.
    command += ["--precision", precision, "--formats", "none"]
    for option in ("graphs_dir",) if asked.is_dir() else ("runs_dir", "graphs_dir"):
        value = getattr(arguments, option)
        if str(value) != option.removesuffix("_dir"):
            command += [f"--{option.replace('_', '-')}", str(value)]
    listed = ", ".join(f"{name}: {units}" for name, units in tiers.items())
    return (
        f"chosen: {words}\nin a job, under model:   tiers: {{{listed}}}\ncut it from this run:    {shlex.join(command)}"
    )


def missing_for_figures() -> list[str]:
    """Return the libraries that figures need and this environment lacks."""
    needed = {"matplotlib": "matplotlib", "sklearn": "scikit-learn"}
    return [name for module, name in needed.items() if find_spec(module) is None]


def _draw(points: Sequence[Point], chosen: Point | None, job: Job, arguments: argparse.Namespace, path: Path) -> None:
    if missing_for_figures():
        message = f"no figure without {' and '.join(missing_for_figures())}: {INSTALL}"
        if arguments.plot is not None:
            raise UnsupportedError(f"--plot: {message}")
        log(message)
        return
    from medscale.figures import Curve, choice

    curve = Curve("MRR", [point.units for point in points], [point.mrr for point in points])
    sizes = {point.units: in_bytes(point.bytes[arguments.precision]) for point in points}
    mark = None if chosen is None else (chosen.units, chosen.mrr, _words(chosen, arguments.precision))
    write_atomic(
        path, choice(f"{job.name}: quality and size", curve, sizes, arguments.precision, mark, job.model.tiers)
    )
    log(f"written: {path}")


def _run(arguments: argparse.Namespace) -> None:
    budget = None if arguments.budget is None else parse_budget(arguments.budget)
    keep = None if arguments.keep is None else parse_keep(arguments.keep)
    job, run_directory = run_of(arguments.job, arguments.runs_dir)
    evaluation = evaluation_of(run_directory)  # before the graph: this is what a new run lacks
    points = curve_of(job, run_directory, open_graph(arguments.graphs_dir / job.graph_name, verify=False))
    chosen = choose(points, budget=budget, keep=keep, precision=arguments.precision)
    if arguments.json:
        for point in points:
            print(json.dumps({**_plain(point), "precision": arguments.precision, "chosen": point is chosen}))
    else:
        first = next(iter(evaluation.values()))
        queries = f"{first['split']} split, {first['num_queries']:,} queries"
        console().print(_table(job.name, points, chosen, arguments.precision, queries))
        print(text_plot(points, chosen), end="\n\n")
        if chosen is not None:
            print(_advice(job, arguments.job, arguments, chosen))
    _draw(points, chosen, job, arguments, arguments.plot or run_directory / "tiers.png")


def _plain(point: Point) -> dict[str, Any]:
    record = asdict(point)
    record["hits@10"] = record.pop("hits_at_10")
    return record


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    parser = job_parser(
        "tiers",
        "Print every sub-model's quality and bytes, mark the smallest that keeps a share of the full model's MRR or "
        "the best that fits a number of bytes, and say how to cut it. Writes RUN/tiers.png.",
        or_run=True,
    )
    asked = parser.add_mutually_exclusive_group()
    asked.add_argument(
        "--budget", metavar="BYTES", help="the best sub-model of at most so many, such as 20MB or 512KiB"
    )
    asked.add_argument("--keep", metavar="SHARE", help="the smallest that keeps this of the full MRR, such as 95%%")
    parser.add_argument(
        "--precision", choices=PRECISIONS, default="float32", help="what --budget counts in (default: float32)"
    )
    parser.add_argument("--plot", metavar="FILE", type=Path, help="write the figure there instead")
    parser.add_argument("--json", action="store_true", help="print one JSON line per sub-model instead of a table")
    arguments = parser.parse_args(argv)
    return run_command(lambda: _run(arguments))


if __name__ == "__main__":
    sys.exit(main())
