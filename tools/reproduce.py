"""The paper's tables, trained anew: every baseline beside MED, on one trainer, one evaluator and equal budgets.

usage: python tools/reproduce.py table3|table8|table13 [--datasets ...] [--scorers ...] [--methods ...] [--dims ...]
           [--budget MINUTES] [--trial-minutes MINUTES] [--data-dir DIR] [--runs-dir DIR] [--out DIR] [--only-report]

- table3: MED against models trained for each dim alone (DT) and crops of the largest of those (Ext, Ext-L, Ext-V, PCA);
- table8: MED with 64, 16 and 4 sub-models (the paper does not say which 16: these hold 10, 40, 160 and 640);
- table13: MED without mutual learning (MLM), evolutionary improvement (EIM), or the dynamic loss weight (DLW).

What is missing is trained, the rest is read: each cell is one JSON file under tools/bench/results/reproduce/cells, so
that a table grows run by run, and the same command goes on where it was stopped. At the end the table is written as
Markdown, CSV and PNG: the paper's value, ours, their difference, the time it took.

Protocol: each model first gets the same number of trials (learning rates) of the same length, compared by validation
MRR, and is then trained anew with the best for at most `--budget` minutes of all cores, or until validation MRR no
longer rises; a run that its budget ended says so. The step that was best on validation is ranked on the whole test
split: filtered, both sides, realistic ranks for ties, all entities. MED is tuned once for all its dims, each DT model
for its own. Not done yet: distillation (BKD, TA, DualDE, IterDE), table4, table7, figures.
"""

import argparse
import csv
import io
import json
import os
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np

from medscale.baselines.crops import arranged
from medscale.checkpoint import committed, committed_steps, newest_checkpoint, open_tables, step_of
from medscale.config import Job
from medscale.evaluate import PROTOCOL, rank_tables
from medscale.graph.known_triples import KnownTriples
from medscale.graph.reader import Graph
from medscale.jobfile import dump_job, parse_job
from medscale.logs import log
from medscale.options import run_command
from medscale.prepare import prepare
from medscale.ranking import Ranks, count_halves, records_of
from medscale.search import best_of, search
from medscale.storage import write_atomic, write_json
from medscale.train import time_limit, train
from medscale.trainer import Outcome

sys.path.insert(0, str(Path(__file__).parent / "bench"))
from environment import environment

ROOT = Path(__file__).resolve().parents[1]
OUT = ROOT / "tools" / "bench" / "results" / "reproduce"

DATASETS = ("WN18RR", "FB15k-237")
SCORERS = {"TransE": "transe", "SimplE": "simple", "RotatE": "rotate", "PairRE": "pairre"}
SIXTY_FOUR = tuple(range(10, 641, 10))
DIMS = (10, 40, 160, 640)
CROPPED = {"Ext": "ext", "Ext-L": "ext-l", "Ext-V": "ext-v", "PCA": "pca"}
#: sub-models by the name that a run has in table 8
SUB_MODELS = {"MED": SIXTY_FOUR, "MED n=16": (10, *range(40, 561, 40), 640), "MED n=4": (10, 40, 160, 640)}
ABLATIONS = {
    "MED w/o MLM": {"med.mutual": "off"}, "MED w/o EIM": {"med.evolution": "off"},
    "MED w/o DLW": {"med.dynamic_weight": "false"},
}  # fmt: skip
METHODS = {
    "table3": ("DT", *CROPPED, "MED"), "table8": tuple(SUB_MODELS), "table13": ("MED", *ABLATIONS),
}  # fmt: skip

#: the learning rates that every model is tried with
RATES = ("0.003", "0.01", "0.03", "0.1")

JOB = """
name: {name}
graph:
  name: {files}
  train: [{files}/train.tsv.zst]
  valid: [{files}/valid.tsv.zst]
  test: [{files}/test.tsv.zst]
model:
  scorer: {scorer}
  dims: {dims}
  tiers: {{largest: {largest}}}
negatives: {{kind: chunk, number: 64, chunk_size: 32}}
loss: {{kind: bce, margin: 9.0}}
med: {med}
optimizer: {{kind: rowwise_adagrad, lr: 0.03}}
train:
  epochs: 3000
  batch_size: 1024
  validate_every: 5
  valid_triples: 500
  patience: 6
checkpoint: {{every_steps: 100000}}
"""


@dataclass(frozen=True)
class Cell:
    """One trained model, or one way to crop another's: a row of a table at some dims."""

    dataset: str
    scorer: str
    method: str
    #: the dim it was trained for; None: all dims of one croppable run
    dim: int | None

    @property
    def name(self) -> str:
        method = self.method.replace("w/o ", "without ").replace("=", "").replace(" ", "_")
        return f"{self.dataset}_{self.scorer}_{method}{'' if self.dim is None else f'_{self.dim}'}".lower()

    def job(self) -> Job:
        dims = SUB_MODELS.get(self.method, SIXTY_FOUR) if self.dim is None else (self.dim,)
        changes = {key.partition(".")[2]: value for key, value in ABLATIONS.get(self.method, {}).items()}
        med = "{" + ", ".join(f"{key}: {value}" for key, value in changes.items()) + "}"
        return parse_job(
            JOB.format(
                name=self.name, files=self.dataset, scorer=SCORERS[self.scorer], dims=list(dims),
                largest=dims[-1], med=med,
            ),
            self.name,
        )  # fmt: skip


class Reproduction:
    """Fills cells: trains what is missing within the budget."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.arguments = arguments
        self.cells: Path = arguments.out / "cells"
        self.cells.mkdir(parents=True, exist_ok=True)

    def found(self, cell: Cell) -> dict[str, Any] | None:
        path = self.cells / f"{cell.name}.json"
        return json.loads(path.read_text()) if path.exists() else None

    def fill(self, cell: Cell) -> None:
        """Train a cell's model, or crop the largest directly trained one, and write what was measured."""
        if self.found(cell) is not None:
            return
        if cell.method in CROPPED:
            self._crop(cell)
        else:
            self._train(cell)

    def _graph(self, job: Job) -> Graph:
        return prepare(job, data_root=self.arguments.data_dir, graphs_root=self.arguments.runs_dir / "graphs")

    def _train(self, cell: Cell) -> None:
        arguments, job = self.arguments, cell.job()
        graph, run_directory = self._graph(job), arguments.runs_dir / cell.name
        rates = [{"optimizer.lr": rate} for rate in RATES]
        trials, stopped = search(
            job, graph, arguments.runs_dir / f"{cell.name}-search", rates, minutes=arguments.trial_minutes
        )
        best = best_of(trials)
        if stopped is not None or best is None:
            sys.exit(
                128 + stopped if stopped is not None else f"{cell.name}: no trial was validated; more --trial-minutes?"
            )
        job = parse_job((arguments.runs_dir / f"{cell.name}-search" / "best.yaml").read_text(), cell.name)
        start = time.monotonic()
        if run_directory.exists():
            shutil.rmtree(run_directory)  # its minutes are unknown
        with time_limit(arguments.budget) as rang:
            outcome, number = train(job, graph, run_directory)
        if outcome is Outcome.INTERRUPTED and not rang.is_set():
            sys.exit(128 + (number or 15))
        seconds = time.monotonic() - start
        tables = open_tables(newest_checkpoint(run_directory))
        triples = graph.triples("test")
        newest = committed(run_directory, step_of(committed_steps(run_directory)[-1]))
        validations = newest.facts["progress"]["validations"]
        self._write(cell, {
            "job": dump_job(job), "seconds": round(seconds, 1), "budget_minutes": arguments.budget,
            "out_of_time": rang.is_set(), "step": tables.facts["step"], "validations": validations,
            "trials": [[t.values["optimizer.lr"], t.mrr] for t in trials], "trial_minutes": arguments.trial_minutes,
            "records": field_records(rank_tables(job, graph, tables, triples, "test")),
        })  # fmt: skip
        if (cell.method, cell.dim) != ("DT", SIXTY_FOUR[-1]):  # crops need that one
            shutil.rmtree(run_directory)

    def _crop(self, cell: Cell) -> None:
        largest = Cell(cell.dataset, cell.scorer, "DT", SIXTY_FOUR[-1])
        self.fill(largest)
        directory = self.arguments.runs_dir / largest.name
        if not directory.exists():
            sys.exit(
                f"{directory} is gone, and {cell.name} is a crop of it: remove cells/{largest.name}.json to train it"
            )
        job = parse_job(self.found(largest)["job"], largest.name)  # type: ignore[index]
        graph, tables = self._graph(job), open_tables(newest_checkpoint(directory))
        triples = graph.triples("test")
        start = time.monotonic()
        model = arranged(
            CROPPED[cell.method], job, tables.rows().slice(0, graph.num_entities), tables.relation_table, tables.layout,  # type: ignore[arg-type]
            graph.triples("valid"),
        ).cropped(SIXTY_FOUR)  # fmt: skip
        halves = count_halves(
            triples, model.table(), model.relations_RC, model.layout, KnownTriples.of_graph(graph, about=triples)
        )
        self._write(cell, {
            "of": largest.name, "seconds": round(time.monotonic() - start, 1),
            "records": field_records(Ranks.of_halves(model.layout.dims, halves)),
        })  # fmt: skip

    def _write(self, cell: Cell, measured: dict[str, Any]) -> None:
        command = f"python tools/reproduce.py (cell {cell.name})"
        facts = {
            "environment": environment(command, os.cpu_count() or 1), "dataset": cell.dataset, "scorer": cell.scorer,
            "method": cell.method, "dim": cell.dim, "protocol": PROTOCOL,
        }  # fmt: skip
        write_json(self.cells / f"{cell.name}.json", facts | measured)
        log(f"{cell.name}: " + ", ".join(f"{r['mrr']:.3f} @{r['dim']}" for r in measured["records"][:4]))


def field_records(ranks: Ranks) -> list[dict[str, Any]]:
    """Return figures per dim by the field's protocol, both sides."""
    wanted = ("dim", "mrr", "hits@1", "hits@3", "hits@10", "mean_rank", "num_queries")
    records = (r for r in records_of(ranks, "test") if (r["protocol"], r["side"]) == ("field", "both"))
    return [{key: record[key] for key in wanted} for record in records]


def cells_of(arguments: argparse.Namespace) -> Iterator[Cell]:
    """Yield what a table is made of; the cheapest to have first."""
    for dataset in arguments.datasets:
        for scorer in arguments.scorers:
            for method in arguments.methods:
                for dim in arguments.dims if method == "DT" else (None,):
                    if method != "PCA" or scorer == "TransE":  # projecting keeps no other scorer's scores
                        yield Cell(dataset, scorer, method, dim)


@dataclass(frozen=True)
class Row:
    """A method at a dim, beside the paper."""

    dataset: str
    scorer: str
    method: str
    dim: int
    mrr: float
    hits_at_10: float
    paper_mrr: float | None
    paper_hits_at_10: float | None
    #: of the run that this is a part of
    minutes: float
    epochs: int | None
    out_of_time: bool


def rows_of(reproduction: Reproduction, cells: Sequence[Cell], dims: Sequence[int]) -> list[Row]:
    """Return a row per cell and dim that was measured."""
    paper = paper_values(reproduction.arguments.paper_dir)
    rows = []
    for cell in cells:
        found = reproduction.found(cell)
        for record in found["records"] if found else ():
            if record["dim"] in dims:
                key = (cell.dataset, cell.scorer, cell.method, record["dim"])
                rows.append(Row(
                    *key, record["mrr"], record["hits@10"], paper.get((*key, "MRR")), paper.get((*key, "Hit@10")),
                    found["seconds"] / 60, found["validations"][-1]["epoch"] if "validations" in found else None,
                    found.get("out_of_time", False),
                ))  # fmt: skip
    return rows


def paper_values(directory: Path) -> dict[tuple[str, str, str, int, str], float]:
    """Return the paper's value by data set, scorer, method, dim and metric; empty where its tables are not at hand."""
    path = directory / "link_prediction.csv"
    if not path.exists():
        log(f"{path} is not there: the report leaves the paper's column empty")
        return {}
    with path.open(encoding="utf-8") as file:
        return {
            (r["dataset"], r["model"], r["method"], int(r["dim"]), r["metric"]): float(r["value"])
            for r in csv.DictReader(file)
        }


def markdown(table: str, rows: Sequence[Row], cells: Sequence[Cell], reproduction: Reproduction) -> str:
    """Return the table with its protocol."""
    protocol = (__doc__ or "").partition("Protocol: ")[2].partition(" Not done yet")[0]
    lines = [
        f"# {table}", "", protocol.replace("\n", " "), "",
        "| data set | scorer | method | dim | MRR | paper | difference | Hits@10 | paper | training, min | epochs |",
        "|---|---|---|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]  # fmt: skip
    for row in rows:
        mrr, hits = ("" if v is None else f"{v:.3f}" for v in (row.paper_mrr, row.paper_hits_at_10))
        difference = "" if row.paper_mrr is None else f"{row.mrr - row.paper_mrr:+.3f}"
        minutes = f"{row.minutes:.1f}" + (" (cut short)" if row.out_of_time else "")
        lines.append(
            f"| {row.dataset} | {row.scorer} | {row.method} | {row.dim} | {row.mrr:.3f} | {mrr} | {difference} | "
            f"{row.hits_at_10:.3f} | {hits} | {minutes} | {'' if row.epochs is None else row.epochs} |"
        )
    missing = [cell.name for cell in cells if reproduction.found(cell) is None]
    if missing:
        lines += ["", f"Not trained yet: {', '.join(missing)}."]
    return "\n".join(lines) + "\n"


def draw(table: str, rows: Sequence[Row], path: Path) -> None:
    """Draw MRR by dim, a panel per data set and scorer; the paper's values dashed."""
    panels = sorted({(row.dataset, row.scorer) for row in rows})
    figure, axes = plt.subplots(1, len(panels), figsize=(5 * len(panels), 4), squeeze=False, layout="constrained")
    for axis, (dataset, scorer) in zip(axes[0], panels, strict=True):
        for method in dict.fromkeys(row.method for row in rows):
            here = [r for r in rows if (r.dataset, r.scorer, r.method) == (dataset, scorer, method)]
            (line,) = axis.plot([r.dim for r in here], [r.mrr for r in here], marker="o", label=method)
            known = [(r.dim, r.paper_mrr) for r in here if r.paper_mrr is not None]
            axis.plot(*np.array(known).reshape(-1, 2).T, linestyle="--", linewidth=0.8, color=line.get_color())
        axis.set(title=f"{dataset}, {scorer}", xscale="log", xlabel="dim", ylabel="test MRR (dashed: the paper's)")
        axis.set_xticks(DIMS, [str(dim) for dim in DIMS])
        axis.legend(fontsize="small")
    figure.savefig(path, dpi=120, metadata={"Software": None})
    plt.close(figure)


def report(table: str, rows: Sequence[Row], cells: Sequence[Cell], reproduction: Reproduction) -> None:
    """Write Markdown, CSV and PNG."""
    out: Path = reproduction.arguments.out
    write_atomic(out / f"{table}.md", markdown(table, rows, cells, reproduction).encode())
    text = io.StringIO()
    writer = csv.DictWriter(text, [field.name for field in fields(Row)], lineterminator="\n")
    writer.writeheader()
    writer.writerows(
        {name: round(v, 4) if isinstance(v, float) else v for name, v in asdict(row).items()} for row in rows
    )
    write_atomic(out / f"{table}.csv", text.getvalue().encode())
    if rows:
        draw(table, rows, out / f"{table}.png")
    log(f"{table}: {len(rows)} rows in {out}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("table", choices=tuple(METHODS))
    parser.add_argument("--datasets", nargs="+", choices=DATASETS, default=DATASETS)
    parser.add_argument("--scorers", nargs="+", choices=tuple(SCORERS), default=tuple(SCORERS))
    parser.add_argument("--methods", nargs="+", metavar="METHOD", help="default: all of the table")
    parser.add_argument("--dims", nargs="+", type=int, choices=SIXTY_FOUR, default=DIMS, metavar="DIM")
    parser.add_argument("--budget", type=float, default=10, metavar="MINUTES", help="for each model (default: 10)")
    parser.add_argument("--trial-minutes", type=float, default=2, metavar="MINUTES", help="for each trial (default: 2)")
    parser.add_argument("--data-dir", type=Path, default=Path(os.environ.get("MEDSCALE_DATA_DIR") or "data"))
    parser.add_argument("--runs-dir", type=Path, default=Path("runs") / "reproduce")
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument(
        "--paper-dir", type=Path, default=ROOT.parent / "shared" / "paper", help="the paper's CSV files"
    )
    parser.add_argument("--only-report", action="store_true", help="train nothing")
    arguments = parser.parse_args()
    arguments.methods = arguments.methods or METHODS[arguments.table]
    if unknown := set(arguments.methods) - set(METHODS[arguments.table]):
        parser.error(
            f"{arguments.table} has no {', '.join(sorted(unknown))}; it has {', '.join(METHODS[arguments.table])}"
        )
    sys.exit(run_command(lambda: _main(arguments)))


def _main(arguments: argparse.Namespace) -> int:
    reproduction, cells = Reproduction(arguments), list(cells_of(arguments))
    for cell in () if arguments.only_report else cells:
        reproduction.fill(cell)
    report(arguments.table, rows_of(reproduction, cells, arguments.dims), cells, reproduction)
    return 0


if __name__ == "__main__":
    main()
