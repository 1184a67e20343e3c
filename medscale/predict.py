"""Answers a file of queries from an exported tier: `python -m medscale.predict TIER QUERIES --out ANSWERS`.

What runs as tasks on a Ray cluster is in `answers`: a module that is run as a command cannot be sent there.
"""

import argparse
import functools
import sys
from collections.abc import Sequence
from pathlib import Path

from medscale.answers import predict
from medscale.logs import log
from medscale.options import run_command

__all__ = ["main"]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    parser = argparse.ArgumentParser(
        prog="medscale predict",
        description="Answer a Parquet file of queries (columns head, relation, tail by name or id; null where asked) "
        "with the k best entities of an exported tier.",
    )
    parser.add_argument("tier", metavar="TIER", type=Path, help="an exported tier, such as runs/NAME/export/server")
    parser.add_argument("queries", metavar="QUERIES", type=Path, help="a Parquet file")
    parser.add_argument("--out", metavar="FILE", type=Path, required=True, help="the Parquet file to write")
    parser.add_argument("--k", type=_positive, default=10, metavar="N", help="answers for each query (default: 10)")
    parser.add_argument(
        "--tasks", type=_positive, default=1, metavar="N", help="parts answered at a time, on a Ray cluster if above 1"
    )
    parser.add_argument(
        "--cascade", action="store_true",
        help="let the smaller tiers beside TIER choose which rows it scores: sooner, and not always the same answers",
    )  # fmt: skip
    parser.add_argument("--skip-unknown", action="store_true", help="leave out queries with unknown names or ids")
    return run_command(functools.partial(_main, parser.parse_args(argv)))


def _main(arguments: argparse.Namespace) -> int:
    answered, skipped = predict(
        arguments.tier, arguments.queries, arguments.out, k=arguments.k, tasks=arguments.tasks,
        skip_unknown=arguments.skip_unknown, cascade=arguments.cascade,
    )  # fmt: skip
    log(f"{answered:,} queries answered, {skipped:,} skipped: {arguments.out}")
    return 0


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is less than 1")
    return value


if __name__ == "__main__":
    sys.exit(main())
