"""A sample of entities by category, and where t-SNE puts them in the plane (Figure 7 of the paper).

Categories are the entities' types, or where a graph has none the slot that an entity takes most often in training
triples: head or tail of a relation. Needs scikit-learn (the extra `report`) to place them.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow.compute as pc
from numpy.typing import NDArray

from medscale.graph.reader import Graph
from medscale.seed import generator, subseed

__all__ = ["Sample", "places_of", "sample_of"]

#: most categories, and entities of each
CATEGORIES = 6
PER_CATEGORY = 150
#: entities looked at, so that a large graph costs no more memory than a small one
CANDIDATES = 20_000
#: a type that more of the entities have than this says nothing
_TOO_COMMON = 0.9
_FEWEST = 5


@dataclass(frozen=True)
class Sample:
    """Some entities, each in one category."""

    #: int64[N]
    entity_N: NDArray[np.int64]
    #: int64[N]: places in `names`
    category_N: NDArray[np.int64]
    #: the categories, most frequent first
    names: tuple[str, ...]
    #: what categories are
    by: str


def sample_of(graph: Graph, seed: int = 0) -> Sample | None:
    """Return a sample of a graph's entities; None where fewer than two categories have enough of them.

    Raises:
        GraphError: a file of the graph is damaged.

    """
    draw = generator(seed, "entities to show")
    number = min(graph.num_entities, CANDIDATES)
    candidates_K = np.sort(draw.choice(graph.num_entities, number, replace=False)).astype(np.int64)
    for categories_of in (_by_type, _by_slot):
        found = categories_of(graph, candidates_K)
        if found is None:
            continue
        category_K, names, by = found
        sizes = np.bincount(category_K[category_K >= 0], minlength=len(names))
        kept = [c for c in np.argsort(-sizes, kind="stable")[:CATEGORIES] if sizes[c] >= _FEWEST]
        if len(kept) < 2:
            continue
        members = [_some(candidates_K[category_K == category], draw) for category in kept]
        numbers = np.repeat(np.arange(len(kept)), list(map(len, members)))
        return Sample(np.concatenate(members), numbers, tuple(names[c] for c in kept), by)
    return None


def _some(entities: NDArray[np.int64], draw: np.random.Generator) -> NDArray[np.int64]:
    return np.sort(draw.choice(entities, min(len(entities), PER_CATEGORY), replace=False))


def _by_type(graph: Graph, candidates_K: NDArray[np.int64]) -> tuple[NDArray[np.int64], list[str], str] | None:
    """Return (category of each candidate or -1, names, what they are); None: the graph has no types.

    The most frequent type takes all who have it, then the most frequent of the rest does, and so on.
    """
    table = graph.entity_types()
    if table is None:
        return None
    of_candidate = np.isin(table.column("entity").to_numpy(), candidates_K)
    table = table.filter(of_candidate)
    if not len(table):
        return None
    names = pc.coalesce(table.column("label"), table.column("type")).combine_chunks().dictionary_encode()
    place_E = np.searchsorted(candidates_K, table.column("entity").to_numpy())
    type_E = names.indices.to_numpy().astype(np.int64)
    pairs = np.unique(np.stack([place_E, type_E], 1), axis=0)
    category_K, chosen = np.full(len(candidates_K), -1, np.int64), list[int]()
    sizes = np.bincount(pairs[:, 1])
    common = sizes > _TOO_COMMON * len(np.unique(pairs[:, 0]))
    pairs = pairs[~common[pairs[:, 1]]]
    while len(pairs) and len(chosen) < CATEGORIES:
        best = int(np.bincount(pairs[:, 1]).argmax())
        members = pairs[pairs[:, 1] == best, 0]
        category_K[members] = len(chosen)
        chosen.append(best)
        pairs = pairs[~np.isin(pairs[:, 0], members)]
    return category_K, [names.dictionary[c].as_py() for c in chosen], "entity type"


def _by_slot(graph: Graph, candidates_K: NDArray[np.int64]) -> tuple[NDArray[np.int64], list[str], str]:
    """Return the same by the slot that each candidate fills most often in training triples; the first of equals."""
    keys = [np.empty(0, np.int64)]
    slots = 2 * graph.num_relations
    for path in graph.parts("train"):
        for rows in graph.read_part(path):
            for column, side in ((0, 0), (2, 1)):
                mine = np.isin(rows[:, column], candidates_K)
                place = np.searchsorted(candidates_K, rows[mine, column])
                keys.append(place * slots + 2 * rows[mine, 1] + side)
    key_M, count_M = np.unique(np.concatenate(keys), return_counts=True)
    order = np.lexsort((key_M, -count_M, key_M // slots))
    place_K, first = np.unique(key_M[order] // slots, return_index=True)
    category_K = np.full(len(candidates_K), -1, np.int64)
    category_K[place_K] = key_M[order][first] % slots
    names = [f"{side} of {name}" for name in graph.relation_names().to_pylist() for side in ("head", "tail")]
    return category_K, names, "most frequent relation slot"


def places_of(crops: Sequence[NDArray[np.float32]], seed: int = 0) -> list[NDArray[np.float64]]:
    """Return float64[N, 2] for each crop [N, C] of the same entities' rows: t-SNE, each starting where the last ended.

    The first starts from its two principal components. One thread and a fixed seed: equal rows give equal places.
    """
    from sklearn.manifold import TSNE
    from threadpoolctl import threadpool_limits

    places: list[NDArray[np.float64]] = []
    with threadpool_limits(limits=1):
        for crop in crops:
            rows_NC = crop.astype(np.float64)
            start_N2 = places[-1] if places else _principal_components(rows_NC)
            model = TSNE(
                perplexity=min(30.0, (len(crop) - 1) / 3),
                init=(start_N2 / (start_N2[:, 0].std() or 1.0) * 1e-4).astype(np.float32),
                learning_rate="auto",
                random_state=subseed(seed, "t-SNE") % 2**32,
                n_jobs=1,
            )
            places.append(model.fit_transform(rows_NC.astype(np.float32)).astype(np.float64))
    return places


def _principal_components(rows_NC: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the first two, float64[N, 2]; the sign of each is such that its largest number is positive."""
    centred = rows_NC - rows_NC.mean(0)
    left, sizes, _ = np.linalg.svd(centred, full_matrices=False)
    components = left[:, :2] * sizes[:2]
    if components.shape[1] < 2:
        components = np.pad(components, ((0, 0), (0, 1)))
    largest = np.abs(components).argmax(0)
    signs = np.where(components[largest, [0, 1]] < 0, -1.0, 1.0)
    return np.asarray(components * signs)
