"""Tables and figures of cells: the paper's value beside ours, as Markdown, CSV and PNG."""

import csv
import io
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pyarrow as pa
from matplotlib.axes import Axes
from numpy.typing import NDArray

from medscale.logs import log
from medscale.ranking import ability_retention
from medscale.storage import write_atomic
from reproduction.cells import CROPS, DIMS, LARGEST, LESSONS, SIXTY_FOUR, Cell
from reproduction.filling import Reproduction, correct_answers

__all__ = ["Report", "clusters", "efficiency", "quality", "retention", "times"]

#: a model counts as reached from this far below
_NEAR = 0.005
#: the sub-model of MED in table 4
_MED_DIM = 40

Row = dict[str, Any]
Measure = Callable[[Mapping[str, Any]], float]


class Report:
    """A Markdown file, a CSV file and a picture of the same name."""

    def __init__(self, out: Path, name: str, protocol: str) -> None:
        self.out, self.name = out, name
        self.lines = [f"# {name}", "", protocol]

    def table(self, rows: Sequence[Row], *, suffix: str = "") -> None:
        """Add rows to the Markdown, and write them as CSV."""
        path = self.out / f"{self.name}{suffix}.csv"
        if not rows:
            path.unlink(missing_ok=True)  # of another time
            return
        headings = list(rows[0])
        numbers = [all(isinstance(row[h], int | float | None) for row in rows) for h in headings]
        self.lines += [
            "", f"| {' | '.join(headings)} |", "|" + "|".join("---:" if n else "---" for n in numbers) + "|",
            *(f"| {' | '.join(_shown(value) for value in row.values())} |" for row in rows),
        ]  # fmt: skip
        text = io.StringIO()
        writer = csv.DictWriter(text, headings, lineterminator="\n")
        writer.writeheader()
        writer.writerows({h: round(v, 4) if isinstance(v, float) else v for h, v in row.items()} for row in rows)
        write_atomic(path, text.getvalue().encode())

    def say(self, text: str) -> None:
        """Add a paragraph to the Markdown."""
        self.lines += ["", text]

    def panels(self, names: Sequence[tuple[str, str]], suffix: str = "") -> "Panels":
        """Return axes, one per data set and scorer, that are written as a picture at the end of a `with`."""
        return Panels(self.out / f"{self.name}{suffix}.png", names)

    def write(self) -> None:
        """Write the Markdown."""
        write_atomic(self.out / f"{self.name}.md", ("\n".join(self.lines) + "\n").encode())
        log(f"{self.name}: {self.out / self.name}.md")


class Panels:
    """Axes by data set and scorer, side by side."""

    def __init__(self, path: Path, names: Sequence[tuple[str, str]]) -> None:
        self.path, self.names = path, sorted(set(names))

    def __enter__(self) -> dict[tuple[str, str], Axes]:
        size = (5 * len(self.names), 4)
        self.figure, axes = plt.subplots(1, len(self.names), figsize=size, squeeze=False, layout="constrained")
        for axis, (dataset, scorer) in zip(axes[0], self.names, strict=True):
            axis.set_title(f"{dataset}, {scorer}")
        return dict(zip(self.names, axes[0], strict=True))

    def __exit__(self, *_: object) -> None:
        for axis in self.figure.axes:
            if axis.get_legend_handles_labels()[1]:
                axis.legend(fontsize="small")
        self.figure.savefig(self.path, dpi=120, metadata={"Software": None})
        plt.close(self.figure)


def _shown(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.3f}" if abs(value) < 1 else f"{value:,.1f}"
    return str(value)


# -- quality ----------------------------------------------------------------------------------------------------------


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
    if behind := [row for row in gaps if row["difference"] < -_NEAR]:
        report.say(f"Behind DT by more than {_NEAR}: " + "; ".join(map(_why, behind)) + ".")
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
    direct_gained = max(_curve(direct, cell.dim)[1]) - direct_best if cell.dim else 0.0
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


def minutes_of(found: Mapping[str, Any]) -> float:
    """Return the minutes that a cell's model took, with what stood between it and its teacher."""
    return float(found["seconds"] + found.get("earlier_seconds", 0)) / 60


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
        minutes, mrr = _curve(found, dim)
        if len(mrr) and cell.method in ("MED", "DT"):
            axis.plot(
                minutes, mrr, color=f"C{color}", linestyle="-" if cell.method == "MED" else "--", linewidth=0.9,
                label=f"{cell.method} @{dim}",
            )  # fmt: skip
    axis.set(xlabel="minutes of processor time", ylabel="validation MRR")


def _curve(found: Mapping[str, Any], dim: int) -> tuple[list[float], list[float]]:
    """Return minutes and validation MRR of a dim; epochs are taken to be equally long."""
    validations = [v for v in found["validations"] if str(dim) in v["mrr"]]
    per_epoch = minutes_of(found) / found["validations"][-1]["epoch"]
    return [v["epoch"] * per_epoch for v in validations], [v["mrr"][str(dim)] for v in validations]


# -- parameters -------------------------------------------------------------------------------------------------------


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


# -- time -------------------------------------------------------------------------------------------------------------


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
        "measured dims are some of them, others are interpolated linearly between those, and taken to be that of the "
        "nearest beyond them (of students that is a guess: larger ones take longer). Per epoch: of all models "
        "together, which is the ratio at equal epochs. Students and crops: with their teacher."
    )
    report.table(reached, suffix="_reached")
    report.say(
        f"Minutes until validation MRR came within {_NEAR} of the best that direct training reached at that dim: of "
        "that model itself, of the one croppable run, and how good the latter became; empty: not within its budget."
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
        return f"{', '.join(map(str, sizes))}; others {others}"

    by_method: dict[str, dict[int, Mapping[str, Any]]] = {}
    for (method, dim), measured in found.items():
        if dim is not None:
            by_method.setdefault(method, {})[dim] = measured
    direct = by_method.get("DT", {})
    if direct:
        minutes, trials, epochs = (of_all(direct, measure) for measure in (minutes_of, _trial_minutes, _epoch_seconds))
        yield row("DT", minutes, trials, epochs, of_some(direct))
    if LARGEST in direct:
        teacher = direct[LARGEST]
        crops = [f for (method, _), f in found.items() if method in CROPS and method != "PCA"]
        if crops:
            minutes = minutes_of(teacher) + max(minutes_of(crop) for crop in crops)
            yield row("Ext", minutes, _trial_minutes(teacher), _epoch_seconds(teacher), "all, of one model")
        for method in LESSONS:
            if students := by_method.get(method):
                minutes, trials = (
                    m(teacher) + of_all(students, m, SIXTY_FOUR[:-1]) for m in (minutes_of, _trial_minutes)
                )
                yield row(method, minutes, trials, None, of_some(students))
    if med is not None:
        yield row("MED", minutes_of(med), _trial_minutes(med), med_epoch, "all, in one run")


def _trial_minutes(found: Mapping[str, Any]) -> float:
    return sum(float(trial["seconds"]) for trial in found["trials"]) / 60


def _epoch_seconds(found: Mapping[str, Any]) -> float:
    return float(found["seconds"]) / int(found["validations"][-1]["epoch"])


def _reached_rows(
    dataset: str, scorer: str, found: Mapping[tuple[str, int | None], Mapping[str, Any]]
) -> Iterator[Row]:
    med = found.get(("MED", None))
    for dim in DIMS:
        direct = found.get(("DT", dim))
        if med is None or direct is None:
            continue
        wanted = max(_curve(direct, dim)[1])
        yield {
            "data set": dataset, "scorer": scorer, "dim": dim, "valid MRR, DT": wanted,
            "minutes, DT": _minutes_to(_curve(direct, dim), wanted - _NEAR),
            "minutes, MED": _minutes_to(_curve(med, dim), wanted - _NEAR), "valid MRR, MED": max(_curve(med, dim)[1]),
        }  # fmt: skip


def _minutes_to(curve: tuple[list[float], list[float]], mrr: float) -> float | None:
    return next((minutes for minutes, reached in zip(*curve, strict=True) if reached >= mrr), None)


# -- ability retention ------------------------------------------------------------------------------------------------


def retention(report: Report, reproduction: Reproduction, cells: Sequence[Cell]) -> None:
    """Add the ability retention ratio of every method that has a model, or a crop, of each dim that tables show."""
    rows: list[Row] = []
    for dataset, scorer, method in dict.fromkeys((cell.dataset, cell.scorer, cell.method) for cell in cells):
        correct: dict[int, Any] = {}
        for cell in cells:
            found = reproduction.found(cell)
            if found is not None and (cell.dataset, cell.scorer, cell.method) == (dataset, scorer, method):
                correct |= correct_answers(found)
        if set(correct) == set(DIMS):
            ratio = ability_retention(np.stack([correct[dim] for dim in DIMS]))
            rows.append({"data set": dataset, "scorer": scorer, "method": method, "ARR": ratio})
    report.table(rows)
    report.say(
        "Of the test queries (both sides) that some of the models of 10, 40, 160 and 640 units answers among its "
        "first ten, the share where every larger model than the smallest that does so answers it too. It says nothing "
        "of how much is answered at all: crops of a small prefix that answer next to nothing have little to lose. The "
        "paper has a picture alone."
    )
    for dataset, scorer in dict.fromkeys((row["data set"], row["scorer"]) for row in rows):
        of = {row["method"]: row["ARR"] for row in rows if (row["data set"], row["scorer"]) == (dataset, scorer)}
        if {"MED", "DT"} <= set(of):
            less = "less" if of["MED"] < of["DT"] else "more"
            report.say(f"{dataset}, {scorer}: MED retains {less} ({of['MED']:.3f}) than DT does ({of['DT']:.3f}).")
    if rows:
        with report.panels([(row["data set"], row["scorer"]) for row in rows]) as panels:
            for (dataset, scorer), axis in panels.items():
                here = [row for row in rows if (row["data set"], row["scorer"]) == (dataset, scorer)]
                axis.bar([row["method"] for row in here], [row["ARR"] for row in here])
                axis.set(ylabel="ability retention ratio", ylim=(0, 1))


# -- clusters ---------------------------------------------------------------------------------------------------------

#: entities of each category
_PER_CATEGORY = 250


def clusters(report: Report, reproduction: Reproduction, cells: Sequence[Cell], dims: Sequence[int]) -> None:
    """Draw where t-SNE puts entities of four categories, a row per method and a column per dim.

    The number beside is the silhouette of the categories among the vectors themselves, which no projection flatters.
    """
    from sklearn.manifold import TSNE
    from sklearn.metrics import silhouette_score

    # of students there is a model per dim, of others one for all
    models = {(cell.method, dim): cell for cell in cells for dim in ((cell.dim,) if cell.dim else dims)}
    methods = list(dict.fromkeys(cell.method for cell in cells))
    figure, axes = plt.subplots(
        len(methods), len(dims), figsize=(4 * len(dims), 4 * len(methods)), squeeze=False, layout="constrained"
    )
    rows: list[Row] = []
    for (i, method), (j, dim) in itertools.product(enumerate(methods), enumerate(dims)):
        cell = models[method, dim]
        graph, columns_EC = reproduction.vectors(cell, dim)
        names = pa.array(graph.entity_names())
        chosen_N, category_N, categories = _sampled(reproduction.data_dir / cell.dataset, names)
        vectors_NC = columns_EC[chosen_N]
        places_N2 = TSNE(init="pca", random_state=0).fit_transform(vectors_NC)
        silhouette = float(silhouette_score(vectors_NC, category_N))
        rows.append({
            "data set": cell.dataset, "scorer": cell.scorer, "method": method, "dim": dim, "silhouette": silhouette,
        })  # fmt: skip
        axis = axes[i][j]
        for number, category in enumerate(categories):
            axis.scatter(*places_N2[category_N == number].T, s=4, label=category)
        axis.set(title=f"{method}, {dim} units (silhouette {silhouette:.3f})", xticks=[], yticks=[])
    axes[0][0].legend(fontsize="small", markerscale=3)
    figure.savefig(report.out / f"{report.name}.png", dpi=120, metadata={"Software": None})
    plt.close(figure)
    report.table(rows)
    report.say(
        f"t-SNE of up to {_PER_CATEGORY} entities of each category, drawn by a fixed seed; the silhouette is of the "
        "vectors themselves. The paper has a picture alone."
    )


def _sampled(folder: Path, names: pa.Array) -> tuple[NDArray[np.int64], NDArray[np.int64], list[str]]:
    """Return ids [N] of entities, their category [N] and the categories' names, from a data set's own file."""
    path = folder / "entity_category4.tsv.zst"
    with pa.input_stream(str(path)) as stream:
        lines = [line.split("\t") for line in stream.read().decode().splitlines()]
    category_of = dict(line[:2] for line in lines)
    categories = sorted(set(category_of.values()))
    id_of = {name: number for number, name in enumerate(names.to_pylist())}
    draw = np.random.default_rng(0)
    chosen: list[NDArray[np.int64]] = []
    for category in categories:
        known = [id_of[name] for name, found in category_of.items() if found == category and name in id_of]
        number = min(_PER_CATEGORY, len(known))
        chosen.append(np.sort(draw.choice(np.array(known, dtype=np.int64), number, replace=False)))
    return np.concatenate(chosen), np.repeat(np.arange(len(categories)), [len(part) for part in chosen]), categories
