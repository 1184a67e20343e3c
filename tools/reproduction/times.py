"""What all 64 sizes cost by each method, and how soon one croppable run is as good as direct training."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from reproduction.cells import CROPS, DIMS, LARGEST, LESSONS, SIXTY_FOUR, Cell
from reproduction.filling import Reproduction, curve_of, cut_short, minutes_of
from reproduction.report import NEAR, Report, Row

__all__ = ["times"]

#: of a model, or several: minutes of training, minutes of trials, seconds per epoch [3]
Costs = NDArray[np.float64]


def times(report: Report, reproduction: Reproduction, cells: Sequence[Cell], paper: Mapping[Any, float]) -> None:
    """Add the time of 64 sizes by every method, and the time in which one croppable run reaches direct training."""
    rows: list[Row] = []
    reached: list[Row] = []
    for dataset, scorer in dict.fromkeys((cell.dataset, cell.scorer) for cell in cells):
        found = {
            (cell.method, cell.dim): measured
            for cell in cells
            if (cell.dataset, cell.scorer) == (dataset, scorer) and (measured := reproduction.found(cell)) is not None
        }
        rows += _time_rows(dataset, scorer, found, paper)
        reached += _reached_rows(dataset, scorer, found)
    report.table(rows)
    report.say(
        "Minutes of processor time for all 64 sizes (10, 20, ..., 640), of training and of the trials before it; where "
        "measured dims are some of them, others are interpolated linearly between those; students of one "
        "measured dim are all taken to be like it, which is a guess: larger ones take longer. Per epoch: of all models "
        "together, which is the ratio at equal epochs. Students and crops: with their teacher, and students with TA's "
        "assistant or IterDE's models between; all these are counted once, as if all sizes had the same, which is "
        "the least. Seconds differ by up to a quarter with what else the machine did."
    )
    if rows:
        with report.panels([(row["data set"], row["scorer"]) for row in rows]) as panels:
            for (dataset, scorer), axis in panels.items():
                here = [row for row in rows if (row["data set"], row["scorer"]) == (dataset, scorer)]
                bars = axis.barh([row["method"] for row in here], [row["minutes"] for row in here])
                axis.bar_label(bars, fmt="%.0f", padding=2)
                axis.invert_yaxis()
                axis.margins(x=0.15)
                axis.set(xlabel="minutes of processor time for all 64 sizes")
    report.table(reached, suffix="_reached")
    report.say(
        f"Minutes until validation MRR came within {NEAR} of the best that direct training reached at that dim: of "
        "that model itself, of the one croppable run, and how good the latter became; empty: not within its budget. "
        f"`{report.name}.png`: minutes for all 64 sizes."
    )


def _time_rows(
    dataset: str, scorer: str, found: Mapping[tuple[str, int | None], Mapping[str, Any]], paper: Mapping[Any, float]
) -> Iterator[Row]:
    med = found.get(("MED", None))
    med_epoch_s = None if med is None else _costs(med)[2]

    def row(method: str, costs: Costs, measured: str) -> Row:
        minutes, trials, epoch_s = map(float, costs)
        hours, med_hours = (paper.get((dataset, m, scorer)) for m in (method, "MED"))
        return {
            "data set": dataset, "scorer": scorer, "method": method, "minutes": minutes, "of trials": trials,
            "per epoch, s": epoch_s,
            "times MED, per epoch": None if med_epoch_s is None else epoch_s / med_epoch_s,
            "paper, h": hours, "times MED, paper": hours / med_hours if hours and med_hours else None,
            "measured": measured,
        }  # fmt: skip

    def of_all(models: Mapping[int, Mapping[str, Any]], dims: Sequence[int] = SIXTY_FOUR) -> Costs:
        sizes = sorted(models)
        costs_n3 = np.array([_costs(models[dim]) for dim in sizes])
        return np.array([np.interp(dims, sizes, of_sizes).sum() for of_sizes in costs_n3.T])

    def of_some(models: Mapping[int, Mapping[str, Any]]) -> str:
        sizes = sorted(models)
        others = "interpolated" if len(sizes) > 1 else "taken alike"
        short = [str(dim) for dim in sizes if cut_short(models[dim])]
        return f"{', '.join(map(str, sizes))}; others {others}" + (f"; {', '.join(short)} cut short" if short else "")

    by_method: dict[str, dict[int, Mapping[str, Any]]] = {}
    for (method, dim), measured in found.items():
        if dim is not None:
            by_method.setdefault(method, {})[dim] = measured
    direct = by_method.get("DT", {})
    if LARGEST in direct and len(direct) > 1:
        yield row("DT", of_all(direct), of_some(direct))
    if LARGEST in direct:
        teacher = _costs(direct[LARGEST])
        crops = [f for (method, _), f in found.items() if method in CROPS and method != "PCA"]
        if crops:
            arranged = np.array([max(minutes_of(crop) for crop in crops), 0, 0])
            yield row("Ext", teacher + arranged, "all, of one model")
        for method, students in ((method, by_method[method]) for method in LESSONS if method in by_method):
            between = np.max([_costs_between(student) for student in students.values()], axis=0)
            yield row(method, teacher + between + of_all(students, SIXTY_FOUR[:-1]), of_some(students))
    if med is not None:
        yield row("MED", _costs(med), "all, in one run")


def _costs(found: Mapping[str, Any]) -> Costs:
    """Return what a model itself took."""
    trials_s = sum(trial["seconds"] for trial in found["trials"])
    return np.array([found["seconds"] / 60, trials_s / 60, found["seconds"] / found["validations"][-1]["epoch"]])


def _costs_between(found: Mapping[str, Any]) -> Costs:
    """Return what was trained between a student and its teacher."""
    seconds, epochs = found["earlier_seconds"], found["validations"][-1]["epoch"]
    return np.array([seconds / 60, found.get("earlier_trial_seconds", 0) / 60, seconds / epochs])


def _reached_rows(
    dataset: str, scorer: str, found: Mapping[tuple[str, int | None], Mapping[str, Any]]
) -> Iterator[Row]:
    med = found.get(("MED", None))
    for dim in DIMS:
        direct = found.get(("DT", dim))
        if med is None or direct is None:
            continue
        wanted = max(curve_of(direct, dim)[1])
        yield {
            "data set": dataset, "scorer": scorer, "dim": dim, "valid MRR, DT": wanted,
            "minutes, DT": _minutes_to(curve_of(direct, dim), wanted - NEAR),
            "minutes, MED": _minutes_to(curve_of(med, dim), wanted - NEAR),
            "valid MRR, MED": max(curve_of(med, dim)[1]),
        }  # fmt: skip


def _minutes_to(curve: tuple[list[float], list[float]], mrr: float) -> float | None:
    return next((minutes for minutes, reached in zip(*curve, strict=True) if reached >= mrr), None)
