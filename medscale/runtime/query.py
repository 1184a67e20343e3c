"""A question to all rows, `(h, r, ?)`, `(?, r, t)` or "what is near?", and how well float32 answers it.

A score is a sum over columns: `sums` gives the part of it that some columns give, fast and in float32, and `scores`
all of it, row by row in float64, rounded to float32 at the end. Scores do not depend on the order in which anything is
read: whoever seeks the best sums in float32, takes in all that may be among the best by `lowest`, and scores those.
"""

import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from medscale.runtime.scoring import Array, compare

__all__ = ["CHUNK_NUMBERS", "Query"]

#: numbers that one step of a sum works on: a megabyte; fewer, and threads wait for each other's turns
CHUNK_NUMBERS = 1 << 18

#: relative error of one rounding to float32
_ROUNDING = 2.0**-24
#: more roundings than any way to sum adds to those of the terms
_EXTRA_ROUNDINGS = 16
#: per column: what is lost where squares or products are too small for float32
_UNDERFLOW = 1e-18


class _Scratch(threading.local):
    """Memory that a thread keeps: a new chunk for each portion would cost as much as the sums, in page faults."""

    def __init__(self) -> None:
        self._numbers = np.empty(CHUNK_NUMBERS, np.float32)

    def rows(self, number: int, columns: int) -> NDArray[np.float32]:
        """Return float32 [number, columns], until the next call."""
        if number * columns > len(self._numbers):  # one row that is longer than a chunk
            self._numbers = np.empty(number * columns, np.float32)
        return self._numbers[: number * columns].reshape(number, columns)


_scratch = _Scratch()


@dataclass(frozen=True)
class Query:
    """A known side, folded into a vector that rows are compared with; C columns of U units."""

    #: "cosine" is for neighbours
    geometry: Literal["l1", "l2", "modulus", "product", "cosine"]
    #: float64[C]
    vector: Array
    #: float64[C] on rows, or None
    factor: Array | None
    #: float64[U] for "modulus", [C] for the others
    weights: Array

    @property
    def is_distance(self) -> bool:
        """Whether scores are distances, less than zero."""
        return self.geometry in ("l1", "l2", "modulus")

    def between(self, start: int, stop: int) -> "Query":
        """Return the part of the query that columns [start, stop) answer."""
        step = 2 if self.geometry == "modulus" else 1
        return replace(
            self,
            vector=self.vector[start:stop],
            factor=None if self.factor is None else self.factor[start:stop],
            weights=self.weights[start // step : stop // step],
        )

    def scores(self, rows_NC: Array) -> NDArray[np.float32]:
        """Return the scores of rows, float32 [N], each computed in float64 by itself."""
        rows_NC = np.ascontiguousarray(rows_NC, np.float64)
        if self.geometry == "cosine":
            lengths_N = np.sqrt(np.square(rows_NC).sum(-1)) * np.sqrt(np.square(self.vector).sum())
            products_N = (rows_NC * self.vector).sum(-1)
            found = np.divide(products_N, lengths_N, out=np.zeros(len(rows_NC)), where=lengths_N > 0)
        else:
            if self.factor is not None:
                rows_NC = rows_NC * self.factor
            found = compare(self.geometry, self.vector, rows_NC, self.weights)
        rounded: NDArray[np.float32] = found.astype(np.float32)
        return rounded

    def approximate(self, parts: Iterable[tuple[int, NDArray[np.float32]]], number: int) -> NDArray[np.float32]:
        """Return the scores of rows, all of whose columns `parts` gives, in float32: see `sums`."""
        if self.geometry != "cosine":
            return self.of_sums(self.sums(parts, number))
        products, squares = np.zeros(number, np.float32), np.zeros(number, np.float32)
        for column, rows_NC in parts:
            products += self._float32(column, column + rows_NC.shape[1])(rows_NC)
            squares += np.einsum("nc,nc->n", rows_NC, rows_NC)
        lengths = np.sqrt(squares) * np.float32(np.linalg.norm(self.vector))
        return np.divide(products, lengths, out=np.zeros_like(products), where=lengths > 0)

    def sums(self, parts: Iterable[tuple[int, NDArray[np.float32]]], number: int) -> NDArray[np.float32]:
        """Return what rows sum up to over the columns given, float32 [number].

        `parts` are (first column, float32 [number, some columns]). Distances give sums that are not negative (for l2
        of squares), products scores.
        """
        total = np.zeros(number, np.float32)
        for column, rows_NC in parts:
            total += self._float32(column, column + rows_NC.shape[1])(rows_NC)
        return total

    def of_sums(self, sums: NDArray[np.float32]) -> NDArray[np.float32]:
        """Return scores of sums over all columns, in place; higher is better."""
        if self.geometry == "l2":
            np.sqrt(sums, out=sums)
        if self.is_distance:
            np.negative(sums, out=sums)
        return sums

    def lowest(self, score: float, length: float) -> np.float32:
        """Return what a float32 score is not below, if the true score is not below that of another one with `score`.

        `length` is the largest Euclidean norm of a row, which only products need.
        """
        bound = score - self._error(score, length)
        lowest: np.float32 = np.nextafter(np.float32(bound - self._error(bound, length)), np.float32(-np.inf))
        return lowest

    def _error(self, score: float, length: float) -> float:
        """Return by how much a float32 score may be off, itself rounded once more at the end."""
        roundings = (len(self.vector) + _EXTRA_ROUNDINGS) * _ROUNDING * 1.01
        underflow = len(self.vector) * _UNDERFLOW
        if self.is_distance:
            return roundings * abs(score) + 4 * _ROUNDING * self._size + underflow
        if self.geometry == "cosine":
            return 2 * roundings + underflow
        return roundings * self._size * length + 2 * _ROUNDING * abs(score) + underflow

    @cached_property
    def _size(self) -> float:
        """The weighted norm of the query's vector, which bounds what its own rounding adds."""
        if self.geometry == "l2":
            return float(np.sqrt(np.square(self.vector) @ self.weights))
        if self.geometry == "product":
            return float(np.linalg.norm(self.vector * self.weights))
        per_column = np.repeat(self.weights, 2) if self.geometry == "modulus" else self.weights
        return float(np.abs(self.vector) @ per_column)

    @cached_property
    def _cache(self) -> dict[tuple[int, int], Callable[[NDArray[np.float32]], NDArray[np.float32]]]:
        return {}

    def _float32(self, start: int, stop: int) -> Callable[[NDArray[np.float32]], NDArray[np.float32]]:
        """Return the function that sums rows over columns [start, stop)."""
        if (start, stop) not in self._cache:
            self._cache[start, stop] = _summing(self.between(start, stop))
        return self._cache[start, stop]


def _summing(query: Query) -> Callable[[NDArray[np.float32]], NDArray[np.float32]]:
    if not query.is_distance:
        vector_C = (query.vector * query.weights).astype(np.float32)

        def products(rows_NC: NDArray[np.float32]) -> NDArray[np.float32]:
            # Not `@`: BLAS has threads of its own, which get in the way of ours.
            found_N: NDArray[np.float32] = np.einsum("nc,c->n", rows_NC, vector_C)
            return found_N

        return products
    columns, weights = len(query.vector), query.weights.astype(np.float32)
    step = max(1, CHUNK_NUMBERS // columns)
    # The query once for each row of a chunk: one long loop instead of one for each row.
    vector_SC = np.tile(query.vector.astype(np.float32), (step, 1))
    factor_SC = None if query.factor is None else np.tile(query.factor.astype(np.float32), (step, 1))

    def sums(rows_NC: NDArray[np.float32]) -> NDArray[np.float32]:
        found_N, chunk_SC = np.empty(len(rows_NC), np.float32), _scratch.rows(step, columns)
        for start in range(0, len(rows_NC), step):
            part_NC = rows_NC[start : start + step]
            number = len(part_NC)
            apart_NC, query_NC = chunk_SC[:number], vector_SC[:number]
            if factor_SC is not None:
                part_NC = np.multiply(part_NC, factor_SC[:number], out=apart_NC)
            np.subtract(part_NC, query_NC, out=apart_NC)
            np.einsum("nu,u->n", _terms(query.geometry, apart_NC), weights, out=found_N[start : start + number])
        return found_N

    return sums


def _terms(geometry: str, apart_NC: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return what each column, or unit, of a difference adds to a distance; overwrites the difference."""
    if geometry == "l1":
        np.abs(apart_NC, out=apart_NC)
        return apart_NC
    np.square(apart_NC, out=apart_NC)
    if geometry == "l2":
        return apart_NC
    squares_NU = apart_NC[:, 0::2] + apart_NC[:, 1::2]
    np.sqrt(squares_NU, out=squares_NU)
    return squares_NU
