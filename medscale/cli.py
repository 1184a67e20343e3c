"""The console script `medscale`: `medscale VERB ...` is `python -m medscale.VERB ...`."""

import importlib
import sys
from collections.abc import Sequence

from medscale import __version__

__all__ = ["VERBS", "main"]

#: by verb: what it does. Its module is imported only when it is asked for: `--help` needs no torch.
VERBS = {
    "prepare": "turn raw files, or a generator, into a graph directory; `train` does it the first time",
    "plan": "say what a job will need (memory, parameters, steps, files) before anything runs",
    "train": "run a whole job: prepare, train, evaluate, export; goes on where it stopped; --extend adds triples",
    "search": "train a job with every combination of some keys' values, and write the best as a job file",
    "evaluate": "rank a split at every sub-model, from the best checkpoint",
    "export": "cut the tiers out of a checkpoint into files to ship",
    "predict": "answer a Parquet file of queries with the best entities of an exported tier",
    "tiers": "say which dim keeps a share of the quality, or is the best that fits in a number of bytes",
    "report": "a finished run as one table (tier, quality, bytes, look-up time) and one HTML page with figures",
    "doctor": "check this machine and its libraries, and say how to repair what is wrong",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run a verb with the rest of the command line and return its exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    first = arguments[0] if arguments else "--help"
    if first in ("-h", "--help"):
        print(_help())
        return 0 if arguments else 2
    if first == "--version":
        print(f"medscale {__version__}")
        return 0
    if first not in VERBS:
        print(f"medscale: {first!r} is not a verb; allowed: {', '.join(VERBS)}", file=sys.stderr)
        return 2
    return int(importlib.import_module(f"medscale.{first}").main(arguments[1:]))


def _help() -> str:
    width = max(map(len, VERBS))
    verbs = "\n".join(f"  {verb:{width}}  {text}" for verb, text in VERBS.items())
    return (
        "usage: medscale VERB [JOB] [options]\n\n"
        "Trains knowledge-graph embeddings that can be cropped: one run, every dimension.\n\n"
        f"verbs:\n{verbs}\n\n"
        "`medscale VERB --help` explains a verb; `python -m medscale.VERB` is the same.\n"
        "Job files are explained in jobs/README.md."
    )


if __name__ == "__main__":
    sys.exit(main())
