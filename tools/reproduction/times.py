"""What all 64 sizes cost by each method, and how soon one croppable run is as good as direct training."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from reproduction.cells import CROPS, DIMS, LARGEST, LESSONS, SIXTY_FOUR, Cell
from reproduction.filling import Reproduction, curve_of, cut_short, minutes_of
from reproduction.report import NEAR, Report, Row

__all__ = ["times"]

Measure = Callable[[Mapping[str, Any]], float]


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
        "measured dims are some of them, others are interpolated linearly between those; students of other dims are "
        "taken to be as those measured of all students, which is a guess: larger ones take longer. Per epoch: of all "
        "models together, which is the ratio at equal epochs. Students and crops: with their teacher, TA's each with "
        "its assistant, IterDE's with those between. Seconds differ by up to a quarter with what else the machine did."
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
    med_epoch = None if med is None else _epoch_seconds(med)

    def row(method: str, minutes: float, trials: float, epoch_s: float | None, measured: str) -> Row:
        hours, med_hours = (paper.get((dataset, m, scorer)) for m in (method, "MED"))
        return {
            "data set": dataset, "scorer": scorer, "method": method, "minutes": minutes, "of trials": trials,
            "per epoch, s": epoch_s,
            "times MED, per epoch": epoch_s / med_epoch if epoch_s is not None and med_epoch else None,
            "paper, h": hours, "times MED, paper": hours / med_hours if hours and med_hours else None,
            "measured": measured,
        }  # fmt: skip

    def of_all(models: Mapping[int, Mapping[str, Any]], measure: Measure, dims: Sequence[int] = SIXTY_FOUR) -> float:
        sizes = sorted(models)
        return float(np.interp(dims, sizes, [measure(models[dim]) for dim in sizes]).sum())

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
        minutes, trials, epochs = (of_all(direct, measure) for measure in (minutes_of, _trial_minutes, _epoch_seconds))
        yield row("DT", minutes, trials, epochs, of_some(direct))
    if LARGEST in direct:
        teacher = direct[LARGEST]
        crops = [f for (method, _), f in found.items() if method in CROPS and method != "PCA"]
        if crops:
            minutes = minutes_of(teacher) + max(minutes_of(crop) for crop in crops)
            yield row("Ext", minutes, _trial_minutes(teacher), _epoch_seconds(teacher), "all, of one model")
        taught = {method: by_method[method] for method in LESSONS if method in by_method}
        shared = set.intersection(*(set(students) for students in taught.values())) if taught else set()
        for method, students in taught.items():
            alike = {dim: students[dim] for dim in shared or students}
            minutes, trials, epochs = (
                measure(teacher) + of_all(alike, measure, SIXTY_FOUR[:-1])
                for measure in (minutes_of, _trial_minutes, _epoch_seconds)
            )
            yield row(method, minutes, trials, epochs, of_some(alike))
    if med is not None:
        yield row("MED", minutes_of(med), _trial_minutes(med), med_epoch, "all, in one run")


def _trial_minutes(found: Mapping[str, Any]) -> float:
    seconds: float = sum(trial["seconds"] for trial in found["trials"]) + found.get("earlier_trial_seconds", 0)
    return seconds / 60


def _epoch_seconds(found: Mapping[str, Any]) -> float:
    return 60 * minutes_of(found) / int(found["validations"][-1]["epoch"])


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
