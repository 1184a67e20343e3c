"""Sections of README.md that are written from committed results, between two marks each."""

import sys
from pathlib import Path

__all__ = ["write_section"]

ROOT = Path(__file__).resolve().parents[2]


def write_section(script: str, text: str) -> None:
    """Write the section of a script of this folder, or, with --check, only say whether it is up to date."""
    begin, end = f"<!-- written by tools/bench/{script} -->", f"<!-- end of tools/bench/{script} -->"
    readme = ROOT / "README.md"
    old = readme.read_text(encoding="utf-8")
    start, stop = old.index(begin), old.index(end)
    new = old[:start] + begin + "\n" + text + "\n" + old[stop:]
    if "--check" in sys.argv:
        sys.exit(0 if new == old else f"README.md is out of date: run python tools/bench/{script}")
    readme.write_text(new, encoding="utf-8")
