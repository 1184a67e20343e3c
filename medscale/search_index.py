"""An approximate index of an exported tier, for the best answers of a query without a look at every entity.

One file beside the tier's own, `entities.faiss`: inverted lists around about 4 sqrt(N) centroids (fewer below 65,000
entities), with 4 bits a column (faiss's IVF with a scalar quantizer). Who asks looks through the lists nearest to the
query, which gives a shortlist by approximate scores; `SearchIndex` then ranks it by the tier's own score, so scores are
exact and only an answer may be missing: recall@k is what `medscale.formats` reports.

Why this one: on 60,000 rows made from trained ones (ComplEx, 64 columns, one core, shortlists of 100), lists took 44
bytes a row and 4 s to build for a recall@10 of 0.99, a sixteenth of the lists read; faiss's HNSW 208 bytes and 6 s for
0.91, usearch's HNSW 213 to 277 bytes and at least 53 s for 0.89 to 0.90 (16 links a row, 128 looked at to build, 100
to search; the machine did other work). 8 bits a column gave the same recall in 76 bytes. faiss's licence is MIT; its
wheels, of 66 MB installed, exist for Linux, macOS and Windows, and need numpy alone.

What is approximated, beside the lists, depends on the score (`medscale.runtime.scoring`):

    products            nothing: the inner product of the weighted query and a row is the score
    transe l2           nothing: Euclidean distance of weighted rows
    transe l1, rotate   the shortlist is by Euclidean distance of weighted columns, not the sum of absolutes or moduli
    pairre              as transe l1; factors of relations are in the query: sum (q - f t)^2 is, up to a constant,
                        an inner product with (t, t^2), so this index has twice the columns, and finds least
"""

import contextlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from medscale.errors import ExportError, UnsupportedError
from medscale.runtime.query import Query
from medscale.runtime.scoring import Array, Side, exported_scorer, unit_weights
from medscale.runtime.tier import Tier

__all__ = ["INDEX_FILE", "SearchIndex", "write_index"]

INDEX_FILE = "entities.faiss"
#: bytes of float32 rows that are added at a time
CHUNK_BYTES = 32 << 20
#: rows that centroids are found from, for each of them
SAMPLE = 64
#: the shortlist is so many times as long as the answer
SHORTLIST = 10
#: the share of the lists that a query reads, and their least number
SHARE, LEAST = 16, 16


def write_index(tier: Tier, directory: Path) -> None:
    """Write `entities.faiss` into a tier's directory; equal tiers give equal bytes. One thread.

    Holds the index in memory, columns / 2 + 8 bytes a row, and some rows.

    Raises:
        UnsupportedError: the package faiss is not installed.

    """
    faiss = _faiss()
    geometry = _Geometry.of(tier)
    lists = max(1, min(round(4 * math.sqrt(tier.num_entities)), tier.num_entities // SAMPLE))
    step = max(1, CHUNK_BYTES // (4 * geometry.columns))
    with _one_thread(faiss):
        metric = faiss.METRIC_INNER_PRODUCT if geometry.products else faiss.METRIC_L2
        centroids = faiss.IndexFlat(geometry.columns, metric)
        coding = faiss.ScalarQuantizer.QT_4bit
        index = faiss.IndexIVFScalarQuantizer(centroids, geometry.columns, lists, coding, metric)
        index.cp.max_points_per_centroid = SAMPLE
        stride = max(1, tier.num_entities // (SAMPLE * lists))
        index.train(geometry.rows(tier.vectors(np.arange(0, tier.num_entities, stride))))
        for start in range(0, tier.num_entities, step):
            ids = np.arange(start, min(start + step, tier.num_entities))
            index.add(geometry.rows(tier.vectors(ids)))
        faiss.write_index(index, str(directory / INDEX_FILE))


class SearchIndex:
    """A tier with its index. Instances may be shared by threads."""

    def __init__(self, tier: Tier, index: Any) -> None:
        self.tier = tier
        self._index = index
        self._geometry = _Geometry.of(tier)

    @classmethod
    def open(cls, tier: Tier, directory: Path) -> "SearchIndex":
        """Map the index that lies in the directory of an open tier (whose manifest vouches for it).

        Raises:
            ExportError: there is none, or not of this tier.
            UnsupportedError: the package faiss is not installed.

        """
        faiss, path = _faiss(), directory / INDEX_FILE
        if not path.is_file():
            raise ExportError(f"{path} is missing: export the tier with an index")
        try:
            index = faiss.read_index(str(path), faiss.IO_FLAG_MMAP | faiss.IO_FLAG_READ_ONLY)
        except RuntimeError as cause:
            raise ExportError(f"{path} is no index: {str(cause).splitlines()[0]}") from None
        expected = (tier.num_entities, _Geometry.of(tier).columns)
        if (index.ntotal, index.d) != expected:
            raise ExportError(
                f"{path} is the index of another tier: it holds {index.ntotal} rows of {index.d} columns, not "
                f"{expected[0]} of {expected[1]}"
            )
        return cls(tier, index)

    def top_k(self, head: str | int, relation: str | int, k: int) -> tuple[list[str], NDArray[np.float32]]:
        """Return names and scores of about the k best tails, best first. See `best`."""
        ids, scores = self.best(head, relation, "tail", k)
        return [self.tier.entity_name(int(i)) for i in ids], scores

    def top_k_heads(self, relation: str | int, tail: str | int, k: int) -> tuple[list[str], NDArray[np.float32]]:
        """Return names and scores of about the k best heads, best first. See `best`."""
        ids, scores = self.best(tail, relation, "head", k)
        return [self.tier.entity_name(int(i)) for i in ids], scores

    def best(
        self, known: str | int, relation: str | int, side: Side, k: int, *,
        shortlist: int | None = None, lists: int | None = None,
    ) -> tuple[NDArray[np.int64], NDArray[np.float32]]:  # fmt: skip
        """Return ids and exact scores, [k], of about the k best entities for a side, best first; equal scores by id.

        `shortlist` are ranked by the score (default: 10 k), out of so many `lists` (default: a sixteenth, at least 16).
        More of either finds more of the true answers and takes longer; fewer than k come back where the lists hold no
        more.

        Raises:
            ExportError: unknown name or id, or k below 1.

        """
        if k < 1:
            raise ExportError(f"k is {k}; ask for at least 1")
        asked = self.tier.query(known, relation, side)
        lists = max(LEAST, self._index.nlist // SHARE) if lists is None else lists
        parameters = _faiss().SearchParametersIVF(nprobe=min(lists, self._index.nlist))
        number = min(max(k, SHORTLIST * k if shortlist is None else shortlist), self.tier.num_entities)
        _, found = self._index.search(self._geometry.query(asked)[None], number, params=parameters)
        ids = np.sort(found[0][found[0] >= 0])
        scores = asked.scores(self.tier.vectors(ids))
        order = np.argsort(-scores, kind="stable")[:k]
        return ids[order], scores[order]


@dataclass(frozen=True)
class _Geometry:
    """How rows and queries lie in the index."""

    #: inner products, not Euclidean distances
    products: bool
    #: rows are followed by their squares
    squares: bool
    #: float64 per column of the tier; 1 where the query bears the weights
    weights: Array

    @classmethod
    def of(cls, tier: Tier) -> "_Geometry":
        scorer = exported_scorer(tier.scorer, tier.facts["norm"])
        weights = np.repeat(unit_weights(tier.facts["dims"], tier.damping), len(scorer.entity_unit))
        squares, products = scorer.factor is not None, scorer.geometry == "product"
        if squares or products:
            weights = np.ones_like(weights)
        return cls(squares or products, squares, np.sqrt(weights) if scorer.geometry == "l2" else weights)

    @property
    def columns(self) -> int:
        """Columns of the index."""
        return len(self.weights) * (2 if self.squares else 1)

    def rows(self, rows: NDArray[np.float32]) -> NDArray[np.float32]:
        """Return rows [N, columns] as the index holds them."""
        if self.squares:
            return np.concatenate([rows, np.square(rows)], 1)
        weighted: NDArray[np.float32] = rows * self.weights.astype(np.float32)
        return weighted

    def query(self, asked: Query) -> NDArray[np.float32]:
        """Return a query [columns] as the index compares it."""
        if asked.factor is not None:
            weighted = np.square(asked.weights) * asked.factor
            query = np.concatenate([2 * weighted * asked.vector, -weighted * asked.factor])
        else:
            query = asked.vector * (asked.weights if self.products else self.weights)
        return query.astype(np.float32)


def _faiss() -> Any:
    try:
        import faiss
    except ImportError:
        raise UnsupportedError("a search index needs the package faiss: pip install 'medscale[index]'") from None
    return faiss


@contextlib.contextmanager
def _one_thread(faiss: Any) -> Iterator[None]:
    """Let faiss work in one thread, so that sums are taken in one order."""
    threads = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(1)
    try:
        yield
    finally:
        faiss.omp_set_num_threads(threads)
