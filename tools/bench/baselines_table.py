"""Write the tables of committed baselines into README.md, between its two marks.

usage: python tools/bench/baselines_table.py [--check]

Reads table3.csv and recipe.csv of tools/bench/results/reproduce, which `python tools/reproduce.py` writes.
"""

import csv
import itertools
import sys
from collections.abc import Iterator
from pathlib import Path

from readme import write_section

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from reproduction.report import NEAR

#: methods with one model for all dims
ONE_RUN = ("MED", "Ext", "Ext-L", "Ext-V", "PCA")
RESULTS = Path(__file__).parent / "results" / "reproduce"


def mrr_of(row: dict[str, str] | None) -> str:
    """Return ours, and the paper's where it has one."""
    if row is None:
        return ""
    return f"{float(row['MRR']):.3f}" + (f" ({float(row['paper']):.3f})" if row["paper"] else "")


def lines(rows: list[dict[str, str]]) -> Iterator[str]:
    """Yield the table of one data set and scorer: a row per method, a column per dim."""
    dims = sorted({int(row["dim"]) for row in rows})
    yield f"| {rows[0]['data set']}, {rows[0]['scorer']} | {' | '.join(f'@{dim}' for dim in dims)} | minutes |"
    yield "|---|" + "---:|" * (len(dims) + 1)
    for method, group in itertools.groupby(rows, lambda row: row["method"]):
        by_dim = {int(row["dim"]): row for row in group}
        minutes = [float(row["minutes"]) for row in by_dim.values()]
        if method in ONE_RUN:
            minutes = minutes[:1]
        cells = [mrr_of(by_dim.get(dim)) for dim in dims]
        yield f"| {method} | {' | '.join(cells)} | {sum(minutes):.1f} |"


def tables(name: str) -> Iterator[str]:
    """Yield all tables of a report."""
    rows = list(csv.DictReader((RESULTS / f"{name}.csv").read_text(encoding="utf-8").splitlines()))
    for _, group in itertools.groupby(rows, lambda row: (row["data set"], row["scorer"])):
        yield from ("", *lines(list(group)))


def beside_direct(name: str) -> str:
    """Say where a report's croppable runs stand beside models of each dim alone."""
    gaps = list(csv.DictReader((RESULTS / f"{name}_gaps.csv").read_text(encoding="utf-8").splitlines()))
    ten = [row for row in gaps if row["dim"] == "10"]
    above = [f"{row['scorer']} on {row['data set']}" for row in ten if float(row["difference"]) > NEAR]
    near = sum(float(row["difference"]) >= -NEAR for row in gaps)
    return (
        f"At 10 units one croppable run is more than {NEAR} above a model of that size alone in {len(above)} of "
        + f"{len(ten)}"
        + (f" ({', '.join(above)})" if above else "")
        + f"; over all dims it is ahead, or at most {NEAR} behind, in {near} of {len(gaps)}. "
        + f"`{name}.md` says what each difference is made of."
    )


def section() -> str:
    """Return the section of the README."""
    return "\n".join([
        beside_direct("table3"),
        "",
        "Test MRR (filtered, both sides, realistic ranks for ties, all entities as candidates), in brackets the "
        "paper's; minutes of one core for training, of DT and students for all dims shown together, of crops for the "
        "arrangement alone; of students without their teacher, of TA with its assistant, of IterDE with the models "
        "between. The learning rate of each "
        "model is the best by validation, of four, or more where the largest of these was best; tables with epochs, "
        "Hits@10, curves and the protocol are in "
        "`tools/bench/results/reproduce/`. MED of products (SimplE) is trained with the balance of sizes "
        "(`med.balance`), which the paper does not have; without it is in `table13`.",
        *tables("table3"),
        "",
        "The same for the jobs `wn18rr` and `fb15k237`, which are not the paper's (ComplEx, softmax, N3, damped "
        "nesting): one croppable run beside a model of each dim alone, of as many epochs. Each model has the same "
        "seven trials of a learning rate and a regularizer's strength; a model of one dim takes the best by "
        "validation, and each tier of the croppable run what was best for its own dim.",
        *tables("recipe"),
        "",
        beside_direct("recipe"),
    ])  # fmt: skip


if __name__ == "__main__":
    write_section("baselines_table.py", section())
