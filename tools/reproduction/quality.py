"""How good models are, the paper's value beside ours, and what differences are made of."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes

from reproduction.cells import DIMS, RECIPE, RECIPE_DIMS, SIXTY_FOUR, Cell
from reproduction.filling import Reproduction, curve_of, cut_short, minutes_of
from reproduction.report import NEAR, Report, Row

__all__ = ["efficiency", "quality"]

#: the sub-model of MED in table 4
_MED_DIM = 40
#: the parts of what MED is beyond DT
_TRIALS, _RATE, _LATER, _STEP = "in trials", "by the shared rate", "later", "by the shared step"


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
            "validation MRR; what is negative is lost. In trials: what the best of MED's at this very dim has beyond "
            "DT's best (which is of sharing columns). By the shared rate: what the trial that "
            "was taken for all dims has beyond that. Later: what MED gains from there to its best step at this dim, "
            "beyond what DT gains. By the shared step: what the step that was taken for all dims has beyond that. Left "
            "over: what test says beyond validation, which is of few triples."
        )
    report.table(gaps, suffix="_gaps")
    if behind := [row for row in gaps if row["difference"] < -NEAR]:
        report.say(f"Behind DT by more than {NEAR}, and what most of it is: " + "; ".join(map(_why, behind)) + ".")
    trials = [row for cell in cells if cell.dim is None for row in _trial_rows(reproduction, cell)]
    if trials:
        report.say(
            "Each tier of a recipe's croppable run has the learning rate and the regularizer's strength that were best "
            "for its dim where all tiers had the same. Validation MRR by what was tried, and the dims that took it:"
            if trials[0]["scorer"] == RECIPE
            else "All dims of a croppable run share its learning rate, and the best for one is not the best for "
            "another; a model of one dim has its own. Validation MRR by what was tried, and what was taken:"
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
            "cut short by its budget": cut_short(found),
        }  # fmt: skip


def _gap_rows(reproduction: Reproduction, cell: Cell) -> Iterator[Row]:
    """Yield a row of a directly trained model and the croppable one of its data set and scorer."""
    direct, whole = reproduction.found(cell), reproduction.found(Cell(cell.dataset, cell.scorer, "MED", None))
    if direct is None or whole is None:
        return
    assert cell.dim is not None
    mrr, alone = next(r["mrr"] for r in whole["records"] if r["dim"] == cell.dim), direct["records"][0]["mrr"]
    parts = _parts(direct, whole, str(cell.dim), shares_rate=cell.scorer != RECIPE)
    yield {
        "data set": cell.dataset, "scorer": cell.scorer, "dim": cell.dim, "MED": mrr, "DT": alone,
        "difference": mrr - alone, **parts,
        "left over": None if None in parts.values() else mrr - alone - sum(part or 0.0 for part in parts.values()),
        "epochs of MED": whole["validations"][-1]["epoch"], "of DT": direct["validations"][-1]["epoch"],
    }  # fmt: skip


def _parts(
    direct: Mapping[str, Any], whole: Mapping[str, Any], dim: str, *, shares_rate: bool
) -> dict[str, float | None]:
    """Return what MED's validation MRR at a dim is beyond DT's, part by part; None where its trials do not tell."""
    judged = [trial for trial in whole["trials"] if trial["mrr"] is not None]
    chosen = max(judged, key=lambda trial: trial["mrr"] if shares_rate else trial["mrr_by_dim"][dim])
    taken = chosen["mrr_by_dim"].get(dim)
    mrr_of_step = {v["step"]: v["mrr"][dim] for v in whole["validations"]}
    best_step = max(mrr_of_step.values())
    of_step = {_STEP: mrr_of_step[whole["step"]] - best_step}
    if taken is None:  # trials keep the dims that tables show by default
        return {_TRIALS: None, _RATE: None, _LATER: None, **of_step}
    best = max(trial["mrr_by_dim"][dim] for trial in judged)
    direct_best = max(trial["mrr"] for trial in direct["trials"] if trial["mrr"] is not None)
    direct_gain = max(curve_of(direct, int(dim))[1]) - direct_best
    return {_TRIALS: best - direct_best, _RATE: taken - best, _LATER: best_step - taken - direct_gain, **of_step}


def _why(row: Row) -> str:
    """Say what half of the difference or more is, where MED is behind."""
    fewer = row["epochs of MED"] < 0.8 * row["of DT"]
    reasons = {
        _TRIALS: "columns that are shared, already after the epochs of trials",
        _RATE: "a learning rate that suits other dims better",
        _LATER: "less gained later"
        + (", in fewer epochs" if fewer else ", while a model alone goes on to fit its own"),
        _STEP: "a step that suits other dims better",
        "left over": "on test alone, which validation, of few triples, does not show",
    }
    where = f"{row['data set']}, {row['scorer']}, {row['dim']} units ({row['difference']:+.3f})"
    costs = {reason: row[name] for name, reason in reasons.items() if row[name] is not None}
    most = min(costs, key=lambda reason: costs[reason])
    if costs[most] > row["difference"] / 2:
        return f"{where}: none of the parts"
    return f"{where}: {most} ({costs[most]:+.3f})"


def _trial_rows(reproduction: Reproduction, cell: Cell) -> Iterator[Row]:
    """Yield a row per trial of a croppable run."""
    trials = (reproduction.found(cell) or {}).get("trials", ())
    dims = RECIPE_DIMS if cell.scorer == RECIPE else DIMS
    rows = [
        {
            "data set": cell.dataset, "scorer": cell.scorer, "method": cell.method, "tried": trial["value"],
            **{f"@{dim}": trial["mrr_by_dim"].get(str(dim)) for dim in dims}, "mean": trial["mrr"],
        }
        for trial in trials
    ]  # fmt: skip
    judged = [row for row in rows if row["mean"] is not None]
    takers = [f"@{dim}" for dim in dims] if cell.scorer == RECIPE else ["mean"]
    best = {taker: max(judged, key=lambda row: row[taker] or 0.0) for taker in takers} if judged else {}
    for row in rows:
        mine = [taker for taker in takers if best.get(taker) is row]
        yield row | {"taken": "yes" if mine == ["mean"] else " ".join(mine)}


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
                "minutes": minutes_of(found), "cut short by its budget": cut_short(found),
            })  # fmt: skip
    report.table(rows)
    if rows:
        with report.panels([(row["data set"], cells[0].scorer) for row in rows]) as panels:
            for (dataset, _), axis in panels.items():
                for row in (row for row in rows if row["data set"] == dataset):
                    label = f"{row['method']} @{row['dim']}"
                    axis.scatter(row["parameters, million"], row["MRR"], label=label)
                axis.set(xlabel="parameters, million", ylabel="test MRR")
    missing = [cell.name for cell in cells if reproduction.found(cell) is None]
    if missing:
        report.say(f"Not trained yet: {', '.join(missing)}.")
