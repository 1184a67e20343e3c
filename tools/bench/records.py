"""How benches take their options and give their figures: a table, or JSON."""

import argparse
import json
import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from environment import environment

from medscale.logs import console

if TYPE_CHECKING:
    from rich.table import Table

__all__ = ["Record", "options", "parse", "publish", "table_of"]

Record = dict[str, Any]

RESULTS = Path(__file__).parent / "results"


def options(description: str, threads: Sequence[int]) -> argparse.ArgumentParser:
    """Return a parser with what all benches take; `threads` are the numbers measured by default."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    cores = len(os.sched_getaffinity(0))
    number = {"type": int, "choices": range(1, cores + 1), "metavar": "N"}
    default = sorted({min(n, cores) for n in threads})
    parser.add_argument("--threads", nargs="+", default=default, help="numbers of threads, each a core", **number)
    parser.add_argument("--quick", action="store_true", help="a few small measurements, under a minute in all")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument(
        "--out", metavar="FILE", help=f"write the JSON too; `default`: tools/bench/results/{_bench()}.json"
    )
    return parser


def parse(parser: argparse.ArgumentParser, **quick: Any) -> argparse.Namespace:
    """Return the options; `quick` are their defaults with `--quick`."""
    if parser.parse_args().quick:
        parser.set_defaults(**quick)
    return parser.parse_args()


def publish(arguments: argparse.Namespace, records: Sequence[Record], libraries: tuple[str, ...] = ()) -> None:
    """Print the records, and write them where `--out` says."""
    command = shlex.join(["python", f"tools/bench/{_bench()}.py", *sys.argv[1:]])
    facts = environment(command, len(os.sched_getaffinity(0)), libraries)
    text = json.dumps({"environment": facts, "results": records}, indent=1) + "\n"
    if arguments.out:
        path = RESULTS / f"{_bench()}.json" if arguments.out == "default" else Path(arguments.out)
        path.write_text(text, encoding="utf-8")
    if arguments.json:
        print(text, end="")
    else:
        console().print(*table_of(records), sep="\n")


def _bench() -> str:
    return Path(sys.argv[0]).stem


def table_of(records: Sequence[Record]) -> "tuple[Table, str]":
    """Return a table of what differs between the records, and a line of what does not."""
    from rich.table import Table

    names = list(dict.fromkeys(name for record in records for name in record))
    same = [n for n in names if len(records) > 1 and all(n in r and r[n] == records[0][n] for r in records)]
    shown = [n for n in names if n not in same]
    table = Table()
    for name in shown:
        table.add_column(_words(name), justify="right" if isinstance(records[0].get(name), int | float) else "left")
    for record in records:
        table.add_row(*(_words(record.get(name, "")) for name in shown))
    return table, ", ".join(f"{_words(name)} {_words(records[0][name])}" for name in same)


def _words(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {_words(part)}" for key, part in value.items())
    if isinstance(value, float):
        return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"
    return str(value).replace("_", " ")
