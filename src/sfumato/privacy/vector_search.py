"""Exact search among private vectors: everything within a threshold, or the nearest in order.

A fast pass in float32, block by block over the memory map, finds all that could belong to the answer; what does is
decided in whole numbers (`GRID`), so that whether a record belongs depends on that record and the query alone, not on
how records share a block. Equal scores are ordered by row, an order that one record more does not change among the
others.

With public centroids a search looks only into the lists nearest to the query. A record's list is its nearest centroid:
a property of the record alone, so sensitivities are those of the exact search over a smaller collection.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from sfumato.privacy.protected_vectors import GRID, ProtectedVectors, on_grid

BLOCK = 16384  # rows scored at once
_OFF = 2.0**-22  # times D: four times as much as a float32 inner product of unit vectors can be off


class Lists:
    """Records by nearest public centroid, for collections too large to scan for each query.

    centroids: float [C, D], made from public vectors only. probes: lists looked into for one query.
    """

    def __init__(self, centroids: np.ndarray, probes: int) -> None:
        self.centroids, self.probes = on_grid(centroids), min(probes, len(centroids))
        self._seen, self._order, self._ends = -1, np.empty(0, np.int64), np.empty(0, np.int64)

    def rows(self, vectors: ProtectedVectors, query: np.ndarray) -> np.ndarray:
        """Rows in the lists nearest to the query (in steps of the grid), ascending."""
        if self._seen != vectors._seen:
            self._assign(vectors)
        nearest = np.argsort(-(self.centroids @ query), kind="stable")[: self.probes]
        starts = np.concatenate([[0], self._ends[:-1]])
        return np.sort(np.concatenate([self._order[starts[c] : self._ends[c]] for c in nearest]))

    def _assign(self, vectors: ProtectedVectors) -> None:
        half = (self.centroids**2).sum(1) / (
            2 * GRID
        )  # nearest in distance: exact enough, and of the record alone
        found = np.full(vectors._end, -1, np.int64)
        for first, block in vectors._blocks(4096):
            scores = on_grid(block) @ self.centroids.T / GRID - half
            found[first : first + len(block)] = scores.argmax(1)
        rows = np.flatnonzero(vectors._alive)
        self._order = rows[np.argsort(found[rows], kind="stable")]
        self._ends = np.cumsum(np.bincount(found[rows], minlength=len(self.centroids)))
        self._seen = vectors._seen


def within(
    vectors: ProtectedVectors, queries: np.ndarray, thresholds: np.ndarray, lists: Lists | None = None
) -> list[np.ndarray]:
    """For each query, int64 [M]: the rows, ascending, of all records whose inner product reaches the threshold.

    queries: float [Q, D], unit vectors. thresholds: float [Q].
    """
    queries, cuts = on_grid(queries), np.ceil(np.asarray(thresholds, np.float64) * GRID) * GRID
    found: list[list[np.ndarray]] = [[] for _ in queries]
    for hits in _above(vectors, queries, np.asarray(thresholds) - _OFF * vectors.dimension, lists):
        for q, rows in hits:
            exact = vectors._vectors(rows) @ queries[q]
            found[q].append(rows[exact >= cuts[q]])
    return [np.sort(np.concatenate(parts)) if parts else np.empty(0, np.int64) for parts in found]


def ranked(
    vectors: ProtectedVectors,
    query: np.ndarray,
    count: int,
    lists: Lists | None = None,
    among: np.ndarray | None = None,
) -> tuple[np.ndarray, bool]:
    """(the `count` nearest rows in descending order of inner product, whether there are no more), at most `count`.

    among: bool, for each row whether it may be found; None for all.
    """
    steps = on_grid(query)
    kept_rows, kept_scores, seen = np.empty(0, np.int64), np.empty(0, np.float32), 0
    for rows, scores in _scored(vectors, steps[None], lists, among):
        seen += len(rows)
        kept_rows = np.concatenate([kept_rows, rows])
        kept_scores = np.concatenate([kept_scores, scores[:, 0]])
        if len(kept_rows) > count:  # keep the best, and whatever rounding may have put below them
            worst = np.partition(kept_scores, len(kept_scores) - count)[len(kept_scores) - count]
            keep = kept_scores >= worst - 2 * _OFF * vectors.dimension
            kept_rows, kept_scores = kept_rows[keep], kept_scores[keep]
    exact = vectors._vectors(kept_rows) @ steps
    order = np.lexsort((kept_rows, -exact))
    return kept_rows[order[:count]], seen <= count


def _above(
    vectors: ProtectedVectors, queries: np.ndarray, cuts: np.ndarray, lists: Lists | None
) -> Iterator[list[tuple[int, np.ndarray]]]:
    if lists is not None:
        for q in range(len(queries)):
            for rows, scores in _scored(vectors, queries[q : q + 1], lists):
                yield [(q, rows[scores[:, 0] >= cuts[q]])]
        return
    for rows, scores in _scored(vectors, queries, None):
        hits = scores >= cuts
        yield [(q, rows[hits[:, q]]) for q in np.flatnonzero(hits.any(0)).tolist()]


def _scored(
    vectors: ProtectedVectors, queries: np.ndarray, lists: Lists | None, among: np.ndarray | None = None
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """(rows, float32 scores [B, Q]) of all living records, block by block."""
    told = np.ascontiguousarray((queries / GRID).astype(np.float32).T)
    if lists is not None or among is not None:
        if lists is None:
            near = np.flatnonzero(vectors._alive & among)
        else:
            near = lists.rows(vectors, queries[0])
            near = near if among is None else near[among[near]]
        for start in range(0, len(near), BLOCK):
            rows = near[start : start + BLOCK]
            yield rows, vectors._rows(rows) @ told
        return
    for first, block in vectors._blocks(BLOCK):
        scores = np.asarray(block) @ told
        alive = vectors._alive[first : first + len(block)]
        rows = np.arange(first, first + len(block))
        yield (rows, scores) if alive.all() else (rows[alive], scores[alive])
