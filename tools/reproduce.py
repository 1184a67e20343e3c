"""The paper's tables and figures, made anew: every baseline beside MED, on one trainer, one evaluator, equal budgets.

- table3: MED against models trained for each dim alone (DT), crops of the largest of those (Ext, Ext-L, Ext-V, PCA),
  and its students (BKD, TA, DualDE, IterDE; at `--student-dims`);
- table4: RotatE, NodePiece and EARL of about as many parameters as MED's sub-model of 40 units;
- table7: the processor time of all 64 sizes by each of these, and how soon one croppable run is as good as each model;
- table8: MED with 64, 16 and 4 sub-models;
- table13: MED without mutual learning (MLM), evolutionary improvement (EIM), or the dynamic loss weight (DLW); as the
  paper writes it (neighbours teach each other, by Huber's loss of scores; triples weigh by the next smaller sub-model's
  scores); products also without the balance of sizes (`med.balance`, not the paper's);
- figure5: the ability retention ratio; figure6: MED at all 64 dims beside DT;
- figure7: where t-SNE puts entities of four categories, for MED, DualDE and Ext-V at 10, 100 and 600 units;
- recipe: not the paper's: `jobs/wn18rr.yaml` and `jobs/fb15k237.yaml` (ComplEx, softmax, N3), whose croppable run
  stands beside models of each of its dims alone; strengths of the regularizer are what is tried there.

What is missing is trained, the rest is read: each cell is one JSON file under tools/bench/results/reproduce/cells, so
that a table grows run by run, and the same command goes on where it was stopped (Ctrl-C, SIGTERM; a model that was
killed outright begins anew, since the time it took is unknown). At the end the table is written as
Markdown, CSV and PNG, of all cells that are there: the paper's value, ours, their difference, the time it took.

Protocol: each model first gets trials by the same rule (learning rates) of the same number of epochs, compared by
validation MRR, and is then trained anew with the best for `--epochs`, or as many as the trials' pace lets into
`--budget` minutes of processor time (20: ten minutes of two cores), and then says so; learning rates fall linearly to 0
over trials and models alike. The step that was best on validation is ranked on the whole test split: filtered, both
sides, realistic ranks for ties, all entities. MED is tuned once for all its dims, by the mean of those shown (its step
by that of all), each other model for its own. Learning rates are four, and up to two larger ones for whichever model
the largest so far suits best. Students have the epochs of one model beside their teacher's; so has TA's assistant, and
the models between a student of IterDE and its teacher have half of them each. All models weigh triples by their own
scores, of one size or of many, where the paper's MED weighs them by the next smaller sub-model's: "w/o EIM" means equal
weights here. Sub-models learn from the next larger one alone, by probabilities; in the paper both ways, by scores.
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
    LESSONS,
    RECIPE,
    RECIPE_DIMS,
    SCORERS,
    SIXTY_FOUR,
    SUB_MODELS,
    Cell,
)
from reproduction.filling import Reproduction, Settings
from reproduction.pictures import clusters, retention
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
SCORERS_OF: Mapping[str, Sequence[str]] = {"table4": ("RotatE",), "figure7": ("RotatE",), "recipe": (RECIPE,)}
DATASETS_OF: Mapping[str, Sequence[str]] = {"figure7": ("FB15k-237",)}  # whose categories the paper shows


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
    parser.add_argument("--datasets", nargs="+", choices=DATASETS, help="to fill; default: both; figure7: FB15k-237")
    parser.add_argument(
        "--scorers", nargs="+", choices=(*SCORERS, RECIPE),
        help=f"to fill; default: all of the paper's; table4 and figure7: RotatE; recipe: {RECIPE}",
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
        "--budget", type=_minutes, default=20, metavar="MINUTES", help="of processor time for each model (default: 20)"
    )
    parser.add_argument("--epochs", type=_count, default=200, metavar="N", help="of each model, at most (default: 200)")
    parser.add_argument("--trial-epochs", type=_count, default=20, metavar="N", help="of each trial (default: 20)")
    parser.add_argument("--data-dir", type=Path, default=Path(os.environ.get("MEDSCALE_DATA_DIR") or "data"))
    parser.add_argument("--runs-dir", type=Path, default=Path("runs") / "reproduce")
    parser.add_argument(
        "--out", type=Path, default=OUT, help="of cells and reports (default: tools/bench/results/reproduce)"
    )
    parser.add_argument(
        "--paper-dir", type=Path, default=ROOT.parent / "shared" / "paper", help="the paper's CSV files"
    )
    parser.add_argument("--only-report", action="store_true", help="train nothing")
    arguments = parser.parse_args()
    table = arguments.table
    arguments.methods = arguments.methods or METHODS[table]
    arguments.datasets = arguments.datasets or DATASETS_OF.get(table, DATASETS)
    arguments.scorers = arguments.scorers or SCORERS_OF.get(table, tuple(SCORERS))
    known_dims = RECIPE_DIMS if table == "recipe" else SIXTY_FOUR
    arguments.dims = arguments.dims or (RECIPE_DIMS if table == "recipe" else DIMS)
    arguments.student_dims = arguments.student_dims or (CLUSTER_DIMS if table == "figure7" else (10,))
    if table == "figure7" and len(arguments.datasets) + len(arguments.scorers) > 2:
        parser.error("figure7 shows one data set and one scorer")
    if table == "figure7" and (arguments.only_report or set(arguments.student_dims) != set(CLUSTER_DIMS)):
        parser.error(f"figure7 draws models of {_listed(CLUSTER_DIMS)} units; it has no --only-report or other dims")
    if (table == "recipe") != (RECIPE in arguments.scorers) or (table == "recipe" and len(arguments.scorers) > 1):
        parser.error(f"--scorers: {RECIPE} is recipe's, which has no other")
    for name, given, known in (("methods", arguments.methods, METHODS[table]), ("dims", arguments.dims, known_dims)):
        if unknown := [value for value in given if value not in known]:
            parser.error(f"--{name}: {table} has no {_listed(unknown)}; it has {_few(known)}")
    sys.exit(run_command(lambda: _main(arguments)))


def _count(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} is not at least 1")
    return number


def _minutes(text: str) -> float:
    minutes = float(text)
    if not 0 < minutes < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is no number of minutes above 0")
    return minutes


def _few(values: Sequence[object]) -> str:
    """List values, of long series the first and the last."""
    return _listed(values) if len(values) < 12 else f"{values[0]} {values[1]} ... {values[-1]}"


def _listed(values: Sequence[object]) -> str:
    return " ".join(map(str, values))


def _main(arguments: argparse.Namespace) -> int:
    settings = Settings(arguments.budget, arguments.epochs, arguments.trial_epochs)
    reproduction = Reproduction(arguments.out, arguments.runs_dir, arguments.data_dir, settings)
    table, dims = arguments.table, arguments.dims
    wanted = list(cells_of(arguments.datasets, arguments.scorers, arguments.methods, dims, arguments.student_dims))
    for cell in () if arguments.only_report else wanted:
        reproduction.fill(cell)
    # The report is of all that is there, whoever filled it.
    datasets, scorers = DATASETS_OF.get(table, DATASETS), SCORERS_OF.get(table, tuple(SCORERS))
    every = [
        cell
        for cell in cells_of(datasets, scorers, METHODS[table], dims, SIXTY_FOUR[:-1])
        if cell.method not in LESSONS or cell.dim in arguments.student_dims or reproduction.found(cell) is not None
    ]
    cells = wanted if table == "figure7" else list(dict.fromkeys([*every, *wanted]))
    protocol = (__doc__ or "").partition("Protocol: ")[2].partition("\n\n")[0].replace("\n", " ")
    report = Report(arguments.out, table, f"Protocol: {protocol}")
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
