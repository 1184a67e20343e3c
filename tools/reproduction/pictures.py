"""What is shown rather than ranked: answers that larger models retain, and clusters of entities."""

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from medscale.errors import GraphError
from medscale.ranking import ability_retention
from reproduction.cells import DIMS, Cell
from reproduction.filling import Reproduction, correct_answers
from reproduction.report import Report, Row

__all__ = ["clusters", "require_categories", "retention"]


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
            correct_nQ = np.stack([correct[dim] for dim in DIMS])
            rows.append({
                "data set": dataset, "scorer": scorer, "method": method, "ARR": ability_retention(correct_nQ),
                f"answered @{DIMS[0]}": float(correct_nQ[0].mean()),
                "of these, by all larger": float(correct_nQ[:, correct_nQ[0]].all(0).mean()),
            })  # fmt: skip
    report.table(rows)
    report.say(
        "Of the test queries (both sides) that some of the models of 10, 40, 160 and 640 units answers among its "
        "first ten, the share where every larger model than the smallest that does so answers it too; the paper counts "
        "triples, and models of all sizes. It says nothing of how much is answered at all, for which there are the "
        "shares of all queries that the smallest answers, and of these that all larger ones answer too. The paper's "
        "figure has no numbers; its text says that MED's ratio is much higher than the baselines'. Here:"
    )
    for dataset, scorer in dict.fromkeys((row["data set"], row["scorer"]) for row in rows):
        of = {row["method"]: row["ARR"] for row in rows if (row["data set"], row["scorer"]) == (dataset, scorer)}
        if len(of) > 1 and "MED" in of:
            above = [f"{method} ({ratio:.3f})" for method, ratio in of.items() if ratio > of["MED"]]
            report.say(f"{dataset}, {scorer}: MED has {of['MED']:.3f}; above it: {', '.join(above) or 'none'}.")
    if rows:
        with report.panels([(row["data set"], row["scorer"]) for row in rows]) as panels:
            for (dataset, scorer), axis in panels.items():
                here = [row for row in rows if (row["data set"], row["scorer"]) == (dataset, scorer)]
                axis.bar([row["method"] for row in here], [row["ARR"] for row in here])
                axis.set(ylabel="ability retention ratio", ylim=(0, 1))


#: entities of each category
_PER_CATEGORY = 250
#: of a data set: a line per entity, its name and its category
_CATEGORIES = "entity_category4.tsv.zst"


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


def require_categories(folder: Path) -> None:
    """Raise GraphError where a data set does not tell its entities' categories."""
    if not (path := folder / _CATEGORIES).exists():
        raise GraphError(f"{path} is not there: figure7 needs the categories of entities, which FB15k-237 has")


def _sampled(folder: Path, names: pa.Array) -> tuple[NDArray[np.int64], NDArray[np.int64], list[str]]:
    """Return ids [N] of entities, their category [N] and the categories' names, from a data set's own file."""
    with pa.input_stream(str(folder / _CATEGORIES)) as stream:
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
