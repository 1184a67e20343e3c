"""The paper's tables and figures, made anew: every baseline beside MED, on one trainer, one evaluator, one cap of time.

- table3: MED against models trained for each dim alone (DT), crops of the largest of those (Ext, Ext-L, Ext-V, PCA),
  and its students (BKD, TA, DualDE, IterDE; at `--student-dims`);
- table4: parameter-efficient NodePiece and EARL, and a large and a small RotatE, beside MED's sub-model of 40 units;
- table7: the processor time of all 64 sizes by each of these, and how soon one croppable run is as good as each model;
- table8: MED with 64, 16 and 4 sub-models;
- table13: MED without mutual learning (MLM), evolutionary improvement (EIM), or the dynamic loss weight (DLW); as the
  paper writes it (neighbours teach each other, by Huber's loss of scores; triples weigh by the next smaller sub-model's
  scores); products also without the balance of sizes (`med.balance`, not the paper's);
- figure5: the ability retention ratio; figure6: MED at all 64 dims beside DT;
- figure7: where t-SNE puts entities of four categories, for MED, DualDE and Ext-V at 10, 100 and 600 units;
- recipe: not the paper's: `jobs/wn18rr.yaml` and `jobs/fb15k237.yaml` (ComplEx, softmax, N3), whose croppable run
  stands beside models of each of its dims alone; learning rates and strengths of the regularizer are tried there.

What is missing is trained, the rest is read: each cell is one JSON file under tools/bench/results/reproduce/cells, so
that a table grows run by run, and the same command goes on where it was stopped (Ctrl-C, SIGTERM; a model that was
killed outright begins anew, since the time it took is unknown). At the end the table is written as
Markdown, CSV and PNG, of all cells that are there: the paper's value, ours, their difference, the time it took.

Protocol:

- Each model gets trials by one rule: epochs as `--trial-epochs` says (20, and 7 of RotatE on FB15k-237, whose epochs
  take longest), at four learning rates, and up to two larger ones while the largest so far is the best; compared by
  validation MRR (500 triples). The best one is trained anew. In `recipe` the trials have 5 epochs and 2,000 triples,
  and every model has the same seven: pairs of a learning rate and a strength of the regularizer, which all levels
  share; each tier of the croppable run then gets the pair that was best for its dim. What it has beside that (damping,
  mutual learning and its weight) is the shipped job's, chosen by hand on validation; models of one dim have no use for
  it.
- Trials are of learning rates, in `recipe` of the regularizer too. Else no model has a regularizer, and the margin of
  distances is 9 for all: that of the whole model, from which the margins of sub-models follow.
- Each model gets the same cap of processor time, `--budget` minutes (20: ten minutes of two cores), and `--epochs` if
  the trials' pace lets as many into it. If not, it has fewer, and the table says so. Learning rates fall linearly to 0.
- The step that was best on validation is ranked on the whole test split: filtered, both sides, realistic ranks for
  ties, all entities. One seed.
- MED is tuned once for all its dims, by the mean of those shown (its step by that of all; in `recipe` the step alone),
  each other model for its own.
- All models weigh triples by their own scores, of one size or of many, where the paper's MED weighs them by the next
  smaller sub-model's, and its DT not at all: DT here is stronger than the paper's, and "w/o EIM" means equal weights.
  Sub-models learn from the next larger one alone, by probabilities; in the paper both ways, by scores.
- Products' losses are balanced by size in MED (`med.balance` 2), which the paper does not have; the exponent was chosen
  on WN18RR's validation triples, with SimplE.
- Students have the epochs of one model beside their teacher's, whose scoring takes from their time; so has TA's
  assistant. The models between a student of IterDE and its teacher have half the epochs, the teacher's learning rate
  and no trials. DualDE and IterDE are simplified, and compare probabilities (`medscale/baselines/distillation.py` says
  what is not theirs); the stages of both, and the sum of soft labels, were chosen with TransE on WN18RR, by validation.
"""

import argparse
import csv
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent / "bench"))
from reproduction.cells import (
    ABLATIONS,
    COMPACT,
    CROPS,
    DATASETS,
    DIMS,
    LARGEST,
    LESSONS,
    RECIPE,
    RECIPE_DIMS,
    SCORERS,
    SHORTER_TRIALS,
    SIXTY_FOUR,
    SUB_MODELS,
    TRIAL_EPOCHS,
    Cell,
)
from reproduction.filling import Reproduction, Settings
from reproduction.pictures import clusters, require_categories, retention
from reproduction.quality import efficiency, quality
from reproduction.report import Report
from reproduction.times import times

from medscale.config import DISTANCES
from medscale.logs import log
from medscale.options import run_command

ROOT = Path(__file__).resolve().parents[1]
OUT = ROOT / "tools" / "bench" / "results" / "reproduce"

#: the paper's choice for figure 7
CLUSTER_DIMS = (10, 100, 600)

BESIDE = ("MED", "DT", *CROPS)
METHODS = {
    "table3": (*BESIDE, *LESSONS), "table4": ("MED", *COMPACT["WN18RR"]), "table7": (*BESIDE, *LESSONS),
    "table8": tuple(SUB_MODELS), "table13": ("MED", *ABLATIONS), "figure5": BESIDE, "figure6": ("MED", "DT"),
    "figure7": ("MED", "DualDE", "Ext-V"), "recipe": ("MED", "DT"),
}  # fmt: skip
#: tables of some scorers, or data sets, alone; of all others they are of all
SCORERS_OF: Mapping[str, Sequence[str]] = {
    "table4": ("RotatE",), "table8": ("RotatE",), "table13": ("TransE",), "figure7": ("RotatE",), "recipe": (RECIPE,),
}  # fmt: skip
DATASETS_OF: Mapping[str, Sequence[str]] = {
    "table8": ("WN18RR",), "table13": ("WN18RR",), "figure7": ("FB15k-237",),  # whose categories the paper shows
}  # fmt: skip


def cells_of(
    datasets: Sequence[str], scorers: Sequence[str], methods: Sequence[str], direct_dims: Sequence[int],
    student_dims: Sequence[int],
) -> Iterator[Cell]:  # fmt: skip
    """Yield what a table is made of."""
    for dataset in datasets:
        for scorer in scorers:
            for method in methods:
                if method == "MED w/o balance" and SCORERS.get(scorer) in DISTANCES:
                    continue  # theirs is 0 anyway
                dims: Sequence[int | None] = (None,)
                if method == "DT":
                    dims = direct_dims
                elif method in LESSONS:
                    dims = student_dims
                elif method in COMPACT[dataset]:
                    dims = COMPACT[dataset][method][:1]
                for dim in dims:
                    yield Cell(dataset, scorer, method, dim)


def papers_quality(directory: Path) -> Mapping[Any, float]:
    """Return the paper's value by data set, scorer, method, dim and metric; empty where its tables are not at hand."""
    rows = _rows(directory / "link_prediction.csv")
    return {(r["dataset"], r["model"], r["method"], int(r["dim"]), r["metric"]): float(r["value"]) for r in rows}


def papers_hours(directory: Path) -> Mapping[Any, float]:
    """Return the paper's hours by data set, method and scorer."""
    rows = _rows(directory / "training_time_hours.csv")
    return {(r["dataset"], r["method"], scorer): float(r[scorer]) for r in rows for scorer in SCORERS if r[scorer]}


def papers_efficiency(directory: Path) -> Mapping[Any, Mapping[str, float]]:
    """Return the paper's figures of parameter-efficient models by data set and method."""
    rows = _rows(directory / "parameter_efficiency.csv")
    names = ("params_million", "MRR", "Hit@10", "Effi")
    return {(r["dataset"], r["method"]): {name: float(r[name]) for name in names} for r in rows}


def _rows(path: Path) -> list[dict[str, str]]:
    if not path.exists():
        log(f"{path} is not there: the report leaves the paper's values empty")
        return []
    with path.open(encoding="utf-8") as file:
        return list(csv.DictReader(file))


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("table", choices=tuple(METHODS))
    parser.add_argument(
        "--datasets", nargs="+", choices=DATASETS,
        help="to fill; default: both; table8 and table13: WN18RR; figure7: FB15k-237",
    )  # fmt: skip
    parser.add_argument(
        "--scorers", nargs="+", choices=(*SCORERS, RECIPE),
        help="to fill; default: all of the paper's; table4, table8 and figure7: RotatE; table13: TransE; "
        f"recipe: {RECIPE}",
    )  # fmt: skip
    parser.add_argument("--methods", nargs="+", metavar="METHOD", help="to fill; default: all of the table")
    parser.add_argument(
        "--dims", nargs="+", type=int, metavar="DIM",
        help=f"of direct training, and shown (default: {_listed(DIMS)}; recipe: {_listed(RECIPE_DIMS)})",
    )  # fmt: skip
    parser.add_argument(
        "--student-dims", nargs="+", type=int, choices=SIXTY_FOUR[:-1], metavar="DIM",
        help="of students (default: 10; figure7: 10 100 600)",
    )  # fmt: skip
    parser.add_argument(
        "--budget", type=_minutes, default=20, metavar="MINUTES",
        help="of processor time for each model (default: 20); cells of another need their own --out and --runs-dir",
    )  # fmt: skip
    parser.add_argument(
        "--epochs", type=_count, metavar="N", help="of each model, at most (default: 200; recipe: the shipped job's)"
    )
    parser.add_argument(
        "--trial-epochs", type=_count, metavar="N",
        help=f"of each trial (default: {TRIAL_EPOCHS}; "
        + "".join(f"{number} of {scorer} on {dataset}; " for (dataset, scorer), number in SHORTER_TRIALS.items())
        + "recipe 5)",
    )  # fmt: skip
    parser.add_argument("--data-dir", type=Path, default=Path(os.environ.get("MEDSCALE_DATA_DIR") or "data"))
    parser.add_argument("--runs-dir", type=Path, default=Path("runs") / "reproduce")
    parser.add_argument(
        "--out", type=Path, default=OUT, help="of cells and reports (default: tools/bench/results/reproduce)"
    )
    parser.add_argument(
        "--paper-dir", type=Path, default=ROOT.parent / "shared" / "paper", help="the paper's CSV files"
    )
    parser.add_argument(
        "--only-report", action="store_true", help="train nothing, write the report of all that is there"
    )
    arguments = parser.parse_args()
    table = arguments.table
    arguments.methods = arguments.methods or METHODS[table]
    arguments.datasets = arguments.datasets or DATASETS_OF.get(table, DATASETS)
    arguments.scorers = arguments.scorers or SCORERS_OF.get(table, tuple(SCORERS))
    known_dims = RECIPE_DIMS if table == "recipe" else SIXTY_FOUR
    arguments.dims = arguments.dims or (RECIPE_DIMS if table == "recipe" else DIMS)
    arguments.student_dims = arguments.student_dims or (CLUSTER_DIMS if table == "figure7" else (10,))
    if table == "table4" and tuple(arguments.scorers) != SCORERS_OF[table]:
        parser.error("--scorers: table4 is RotatE's alone")
    if table == "figure7" and len(arguments.datasets) + len(arguments.scorers) > 2:
        parser.error("figure7 shows one data set and one scorer")
    if table == "figure7" and (arguments.only_report or set(arguments.student_dims) != set(CLUSTER_DIMS)):
        parser.error(f"figure7 draws models of {_listed(CLUSTER_DIMS)} units; it has no --only-report or other dims")
    if (table == "recipe") != (RECIPE in arguments.scorers) or (table == "recipe" and len(arguments.scorers) > 1):
        parser.error(f"--scorers: {RECIPE} is recipe's, which has no other")
    if "TA" in arguments.methods and SIXTY_FOUR[-2] in arguments.student_dims:
        parser.error(f"--student-dims: TA has no dim between {SIXTY_FOUR[-2]} and the teacher's {LARGEST}")
    if not arguments.paper_dir.is_dir() and arguments.out == OUT:
        parser.error(
            f"--paper-dir: {arguments.paper_dir} is not there, and {OUT} has the paper's values; give an --out"
        )
    for name, given, known in (("methods", arguments.methods, METHODS[table]), ("dims", arguments.dims, known_dims)):
        if unknown := [value for value in given if value not in known]:
            parser.error(f"--{name}: {table} has no {_listed(unknown)}; it has {_few(known)}")
    sys.exit(run_command(lambda: _main(arguments)))


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is no whole number of at least 1")
    return int(text)


def _minutes(text: str) -> float:
    try:
        minutes = float(text)
    except ValueError:
        minutes = 0.0
    if not 0 < minutes < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is no number of minutes above 0")
    return minutes


def _few(values: Sequence[object]) -> str:
    """List values, of long series the first and the last."""
    return _listed(values) if len(values) < 12 else f"{values[0]} {values[1]} ... {values[-1]}"


def _listed(values: Sequence[object]) -> str:
    return " ".join(map(str, values))


def _main(arguments: argparse.Namespace) -> int:
    reproduction = Reproduction(
        arguments.out, arguments.runs_dir, arguments.data_dir, arguments.budget, arguments.epochs,
        arguments.trial_epochs,
    )  # fmt: skip
    table, dims = arguments.table, arguments.dims
    if table == "figure7":
        require_categories(arguments.data_dir / arguments.datasets[0])
    wanted = list(cells_of(arguments.datasets, arguments.scorers, arguments.methods, dims, arguments.student_dims))
    for cell in () if arguments.only_report else wanted:
        reproduction.fill(cell)
    # The report is of all that is there, whoever filled it, and tells what is missing of the paper's.
    dims_of_table = RECIPE_DIMS if table == "recipe" else DIMS
    expected = list(cells_of(
        DATASETS_OF.get(table, DATASETS), SCORERS_OF.get(table, tuple(SCORERS)), METHODS[table], dims_of_table, (10,)
    ))  # fmt: skip
    others = cells_of(
        DATASETS, (RECIPE,) if table == "recipe" else tuple(SCORERS), METHODS[table],
        sorted({*SIXTY_FOUR, *RECIPE_DIMS}), SIXTY_FOUR[:-1],
    )  # fmt: skip
    there = [cell for cell in others if reproduction.found(cell) is not None]
    # A table of one scorer alone shows another's croppable run where there is something that it stands beside.
    shown = {(cell.dataset, cell.scorer) for cell in (*expected, *wanted)}
    shown |= {(cell.dataset, cell.scorer) for cell in there if cell.method != "MED"}
    there = [cell for cell in there if (cell.dataset, cell.scorer) in shown]
    cells = wanted if table == "figure7" else sorted({*expected, *there, *wanted}, key=_order)
    dims = sorted({*dims, *dims_of_table, *(cell.dim for cell in cells if cell.method == "DT" and cell.dim)})
    report = Report(arguments.out, table, "Protocol:" + (__doc__ or "").partition("Protocol:")[2].rstrip())
    match table:
        case "table4":
            efficiency(report, reproduction, cells, papers_efficiency(arguments.paper_dir))
        case "table7":
            times(report, reproduction, cells, papers_hours(arguments.paper_dir))
        case "figure5":
            retention(report, reproduction, cells)
        case "figure7":
            clusters(report, reproduction, cells, CLUSTER_DIMS)
        case "figure6":
            quality(report, reproduction, cells, SIXTY_FOUR, papers_quality(arguments.paper_dir))
        case _:
            quality(report, reproduction, cells, dims, papers_quality(arguments.paper_dir))
    for settings, names in settings_of(reproduction, cells).items():
        report.say(f"Filled with `{settings}`: {', '.join(names)}.")
    report.write()
    return 0


def _order(cell: Cell) -> tuple[int, int, int, int]:
    """Order cells as tables show them."""
    methods = [*dict.fromkeys(method for table in METHODS.values() for method in table)]
    scorers = [*SCORERS, RECIPE]
    return DATASETS.index(cell.dataset), scorers.index(cell.scorer), methods.index(cell.method), cell.dim or 0


def settings_of(reproduction: Reproduction, cells: Sequence[Cell]) -> dict[str, list[str]]:
    """Return the names of trained cells by what they were given."""
    names: dict[str, list[str]] = {}
    for cell in cells:
        found = reproduction.found(cell) or {}
        if "settings" in found:
            names.setdefault(str(Settings(**found["settings"])), []).append(cell.name)
    return names


if __name__ == "__main__":
    main()
