"""How good models are, the paper's value beside ours, and what differences are made of."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes

from reproduction.cells import DIMS, SIXTY_FOUR, Cell
from reproduction.filling import Reproduction, curve_of, minutes_of
from reproduction.report import NEAR, Report, Row

__all__ = ["efficiency", "quality"]

#: the sub-model of MED in table 4
_MED_DIM = 40


def quality(
    report: Report, reproduction: Reproduction, cells: Sequence[Cell], dims: Sequence[int], paper: Mapping[Any, float]
) -> None:
    """Add a row per cell and dim, MRR by dim as a picture, and validation by time as another."""
    rows = [row for cell in cells for row in _quality_rows(reproduction, cell, dims, paper)]
    report.table(rows)
    missing = [cell.name for cell in cells if reproduction.found(cell) is None]
    if missing:
        report.say(f"Not trained yet: {', '.join(missing)}.")
    if any(row["method"] == "PCA" for row in rows):
        report.say(
            "PCA turns the axes, which neither L1 distances nor moduli nor products by unit survive, so that even all "
            "of its columns are worse than the model that they come from."
        )
    gaps = [row for cell in cells if cell.method == "DT" for row in _gap_rows(reproduction, cell)]
    if gaps:
        report.say(
            "One croppable run beside a model of each dim alone (test MRR), and what the difference is made of, by "
            "validation MRR; what is negative is lost. Of columns: what the best of MED's trials at this very dim has "
            "beyond DT's best trial. Of the learning rate: what the trial that was taken for all dims has beyond that. "
            "Of training on: what MED gains from there to its best step at this dim, beyond what DT gains. Of the "
            "step: what the step that was taken for all dims has beyond that. Validation is of few triples, and their "
            "sum not quite the difference on test."
        )
    report.table(gaps, suffix="_gaps")
    if behind := [row for row in gaps if row["difference"] < -NEAR]:
        report.say(f"Behind DT by more than {NEAR}: " + "; ".join(map(_why, behind)) + ".")
    trials = [row for cell in cells if cell.dim is None for row in _trial_rows(reproduction, cell)]
    if trials:
        report.say(
            "All dims of a croppable run share its learning rate, or the strength of its regularizer, and the best for "
            "one is not the best for another; a model of one dim has its own. Validation MRR by what was tried, and "
            "what was taken:"
        )
    report.table(trials, suffix="_trials")
    if not rows:
        return
    with report.panels([(row["data set"], row["scorer"]) for row in rows]) as panels:
        for (dataset, scorer), axis in panels.items():
            here = [row for row in rows if (row["data set"], row["scorer"]) == (dataset, scorer)]
            _draw_by_dim(axis, here, dims if len(dims) < len(SIXTY_FOUR) else DIMS)
    with report.panels([(row["data set"], row["scorer"]) for row in rows], "_curves") as panels:
        for cell in cells:
            found = reproduction.found(cell)
            if found is not None and "validations" in found:
                _draw_by_time(
                    panels[cell.dataset, cell.scorer], cell, found, dims if len(dims) < len(SIXTY_FOUR) else DIMS
                )
    report.say(
        f"`{report.name}.png`: test MRR by dim, the paper's dashed. `{report.name}_curves.png`: validation MRR by "
        "processor time, of models trained for one dim (dashed) and of croppable ones."
    )


def _quality_rows(
    reproduction: Reproduction, cell: Cell, dims: Sequence[int], paper: Mapping[Any, float]
) -> Iterator[Row]:
    found = reproduction.found(cell)
    for record in found["records"] if found else ():
        if record["dim"] not in dims:
            continue
        key = (cell.dataset, cell.scorer, cell.method, record["dim"])
        mrr, hits = paper.get((*key, "MRR")), paper.get((*key, "Hit@10"))
        assert found is not None
        yield {
            "data set": cell.dataset, "scorer": cell.scorer, "method": cell.method, "dim": record["dim"],
            "MRR": record["mrr"], "paper": mrr, "difference": None if mrr is None else record["mrr"] - mrr,
            "Hits@10": record["hits@10"], "paper's Hits@10": hits, "minutes": minutes_of(found),
            "epochs": found["validations"][-1]["epoch"] if "validations" in found else None,
            "cut short by its budget": "yes" if found.get("out_of_time") else "",
        }  # fmt: skip


def _gap_rows(reproduction: Reproduction, cell: Cell) -> Iterator[Row]:
    """Yield a row of a directly trained model and the croppable one of its data set and scorer."""
    direct, whole = reproduction.found(cell), reproduction.found(Cell(cell.dataset, cell.scorer, "MED", None))
    if direct is None or whole is None:
        return
    mrr_of, dim = {record["dim"]: record["mrr"] for record in whole["records"]}, str(cell.dim)
    judged = [trial for trial in whole["trials"] if trial["mrr"] is not None]
    taken = max(judged, key=lambda trial: trial["mrr"])["mrr_by_dim"].get(dim)
    best = max((trial["mrr_by_dim"][dim] for trial in judged if dim in trial["mrr_by_dim"]), default=None)
    direct_best = max(trial["mrr"] for trial in direct["trials"] if trial["mrr"] is not None)
    mrr_of_step = {v["step"]: v["mrr"][dim] for v in whole["validations"]}
    gained = None if taken is None else max(mrr_of_step.values()) - taken
    direct_gained = max(curve_of(direct, cell.dim)[1]) - direct_best if cell.dim else 0.0
    alone = direct["records"][0]["mrr"]
    yield {
        "data set": cell.dataset, "scorer": cell.scorer, "dim": cell.dim, "MED": mrr_of[cell.dim], "DT": alone,
        "difference": mrr_of[cell.dim] - alone,
        # trials keep the dims that tables show by default
        "of columns": None if best is None else best - direct_best,
        "of the learning rate": None if best is None or taken is None else taken - best,
        "of training on": None if gained is None else gained - direct_gained,
        "of the step": mrr_of_step[whole["step"]] - max(mrr_of_step.values()),
        "epochs of MED": whole["validations"][-1]["epoch"], "of DT": direct["validations"][-1]["epoch"],
    }  # fmt: skip


def _why(row: Row) -> str:
    """Say what costs most where MED is behind."""
    reasons = {
        "of columns": "columns that serve larger sub-models too",
        "of the learning rate": "a learning rate that suits other dims better",
        "of training on": "columns that go on serving all sub-models, while a model alone goes on to fit its own",
        "of the step": "a step that suits other dims better",
    }
    costs = {name: row[name] for name in reasons if row[name] is not None}
    most = min(costs, key=lambda name: costs[name])
    where = f"{row['data set']}, {row['scorer']}, {row['dim']} units ({row['difference']:+.3f})"
    return f"{where}: mostly {reasons[most]} ({costs[most]:+.3f})"


def _trial_rows(reproduction: Reproduction, cell: Cell) -> Iterator[Row]:
    """Yield a row per trial of a croppable run."""
    trials = (reproduction.found(cell) or {}).get("trials", ())
    best = max((trial["mrr"] for trial in trials if trial["mrr"] is not None), default=None)
    nothing: Row = {dim: None for trial in trials for dim in trial["mrr_by_dim"]}  # of trials that diverged
    for trial in trials:
        yield {
            "data set": cell.dataset, "scorer": cell.scorer, "method": cell.method, "tried": trial["value"],
            **{f"@{dim}": mrr for dim, mrr in {**nothing, **trial["mrr_by_dim"]}.items()}, "mean": trial["mrr"],
            "taken": "yes" if trial["mrr"] == best else "",
        }  # fmt: skip


def _draw_by_dim(axis: Axes, rows: Sequence[Row], dims: Sequence[int]) -> None:
    for method in dict.fromkeys(row["method"] for row in rows):
        here = [row for row in rows if row["method"] == method]
        (line,) = axis.plot([r["dim"] for r in here], [r["MRR"] for r in here], marker="o", label=method)
        known = [(r["dim"], r["paper"]) for r in here if r["paper"] is not None]
        axis.plot(*np.array(known).reshape(-1, 2).T, linestyle="--", linewidth=0.8, color=line.get_color())
    axis.set(xscale="log", xlabel="dim", ylabel="test MRR (dashed: the paper's)")
    axis.set_xticks(dims, [str(dim) for dim in dims])
    axis.minorticks_off()


def _draw_by_time(axis: Axes, cell: Cell, found: Mapping[str, Any], dims: Sequence[int]) -> None:
    for color, dim in enumerate(dims):
        minutes, mrr = curve_of(found, dim)
        if len(mrr) and cell.method in ("MED", "DT"):
            axis.plot(
                minutes, mrr, color=f"C{color}", linestyle="-" if cell.method == "MED" else "--", linewidth=0.9,
                label=f"{cell.method} @{dim}",
            )  # fmt: skip
    axis.set(xlabel="minutes of processor time", ylabel="validation MRR")


def efficiency(
    report: Report, reproduction: Reproduction, cells: Sequence[Cell], paper: Mapping[Any, Mapping[str, float]]
) -> None:
    """Add a row per parameter-efficient model, and the MED sub-model that the paper puts beside them."""
    rows: list[Row] = []
    for cell in cells:
        found = reproduction.found(cell)
        dim = _MED_DIM if cell.dim is None else cell.dim
        for record in found["records"] if found else ():
            if record["dim"] != dim:
                continue
            assert found is not None
            millions, theirs = found["parameters_million"][str(dim)], paper.get((cell.dataset, cell.method), {})
            rows.append({
                "data set": cell.dataset, "method": cell.method, "dim": dim, "parameters, million": millions,
                "paper's": theirs.get("params_million"), "MRR": record["mrr"], "paper": theirs.get("MRR"),
                "Hits@10": record["hits@10"], "paper's Hits@10": theirs.get("Hit@10"),
                "MRR / million": record["mrr"] / millions, "paper's Effi": theirs.get("Effi"),
                "minutes": minutes_of(found), "cut short by its budget": "yes" if found.get("out_of_time") else "",
            })  # fmt: skip
    report.table(rows)
    missing = [cell.name for cell in cells if reproduction.found(cell) is None]
    if missing:
        report.say(f"Not trained yet: {', '.join(missing)}.")
