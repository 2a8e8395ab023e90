"""Search among private vectors: as by brute force in whole numbers, and nobody's place depends on the others."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sfumato.privacy import vector_search
from sfumato.privacy.protected_vectors import GRID, ProtectedVectors, on_grid
from sfumato.privacy.vector_search import Lists, ranked, within

D = 5
fresh = itertools.count()


def unit_vectors(n: int, seed: int = 0, dimension: int = D) -> np.ndarray:
    drawn = np.random.default_rng(seed).normal(size=(n, dimension))
    return (drawn / np.linalg.norm(drawn, axis=1, keepdims=True)).astype(np.float32)


def near(vector: np.ndarray, n: int, spread: float, seed: int = 0) -> np.ndarray:
    """n unit vectors around one, at distances where float32 no longer tells their inner products apart."""
    drawn = vector + spread * np.random.default_rng(seed).normal(size=(n, len(vector)))
    return (drawn / np.linalg.norm(drawn, axis=1, keepdims=True)).astype(np.float32)


def collection(folder: Path, vectors: np.ndarray, cuts: Any = ()) -> ProtectedVectors:
    """Row i is called "i"; added in parts that end at the cuts."""
    private = ProtectedVectors.create(folder / f"index{next(fresh)}", vectors.shape[1])
    edges = [0, *cuts, len(vectors)]
    for start, end in itertools.pairwise(edges):
        if end > start:
            mine = [str(i) for i in range(start, end)]
            private.add(vectors[start:end], mine, mine)
    return private


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(vector_search, "BLOCK", 7)


def scores(vectors: np.ndarray, query: np.ndarray) -> list[int]:
    """Exact inner products in steps of 2^-44, in Python's whole numbers."""
    grid, told = on_grid(vectors).astype(int).tolist(), on_grid(query).astype(int).tolist()
    return [sum(a * b for a, b in zip(row, told, strict=True)) for row in grid]


def by_brute_force(vectors: np.ndarray, query: np.ndarray, alive: Any = None) -> list[int]:
    found = scores(vectors, query)
    return sorted(range(len(vectors)) if alive is None else alive, key=lambda row: (-found[row], row))


# --- all within a threshold


def test_all_within_a_threshold_and_nobody_else(tmp_path):
    vectors, queries = unit_vectors(60), unit_vectors(9, 1).astype(np.float64)
    private = collection(tmp_path, vectors, (20, 21, 45))
    thresholds = np.linspace(-1.1, 1.1, 9)
    found = within(private, queries, thresholds)
    for query, threshold, rows in zip(queries, thresholds, found, strict=True):
        exact = scores(vectors, query)
        assert (
            rows.tolist() == [i for i in range(60) if exact[i] >= threshold * GRID**2]
            and rows.dtype == np.int64
        )
    assert len(found[0]) == 60 and len(found[-1]) == 0


def test_the_threshold_is_decided_in_whole_numbers(tmp_path):
    """Vectors so close that float32 confuses them, and a threshold at the score of one of them."""
    query = unit_vectors(1, 3, 64)[0].astype(np.float64)
    vectors = near(query, 80, 3e-4)
    private, exact = collection(tmp_path, vectors, (33,)), scores(vectors, query)
    assert len(set((vectors @ query.astype(np.float32)).tolist())) < 40 < len(set(exact))
    for target in sorted(exact)[::8]:
        threshold = target // GRID / GRID  # one step of the grid
        (rows,) = within(private, query[None], np.array([threshold]))
        assert rows.tolist() == [i for i in range(80) if exact[i] >= threshold * GRID**2]
        (above,) = within(private, query[None], np.array([threshold + 1 / GRID]))
        assert above.tolist() == [i for i in range(80) if exact[i] >= (threshold + 1 / GRID) * GRID**2]
    thresholds = np.array([exact[0] // GRID / GRID, 2.0, -2.0])
    together = within(private, np.tile(query, (3, 1)), thresholds)
    alone = [within(private, query[None], thresholds[i : i + 1])[0] for i in range(3)]
    assert [rows.tolist() for rows in together] == [rows.tolist() for rows in alone]


@pytest.mark.parametrize("dimension", [1, 2, 3, 64, 512, 4096])
def test_the_fast_pass_leaves_nobody_out(tmp_path, dimension):
    query = unit_vectors(1, 5, dimension)[0].astype(np.float64)
    vectors = np.concatenate([near(query, 40, 10.0**-e, e) for e in range(1, 8)] + [-near(query, 5, 1e-5)])
    private, exact = collection(tmp_path, vectors, (100,)), scores(vectors, query)
    for target in sorted(exact)[::13]:
        threshold = -(-target // GRID) / GRID
        (rows,) = within(private, query[None], np.array([threshold]))
        assert rows.tolist() == [i for i in range(len(vectors)) if exact[i] >= threshold * GRID**2]
    order = by_brute_force(vectors, query)
    for count in (1, 3, 40, 200, 284):
        assert ranked(private, query, count)[0].tolist() == order[:count]


# --- the nearest, in order


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 40), st.integers(1, 45), st.integers(0, 999), st.lists(st.integers(0, 39), max_size=20))
def test_the_nearest_in_order_ties_by_row_and_whether_there_are_more(tmp_path_factory, n, count, seed, twins):
    query = unit_vectors(1, seed + 1)[0].astype(np.float64)
    vectors = np.concatenate([unit_vectors(n // 2, seed), near(query, n - n // 2, 1e-6, seed)])
    for position, twin in enumerate(twins):  # duplicates
        if n:
            vectors[(position * 7) % n] = vectors[twin % n]
    private = collection(tmp_path_factory.mktemp("x"), vectors, sorted({n // 3, n // 2}) if n else ())
    gone = [row for row in range(n) if (row * 7 + seed) % 5 == 0]
    if gone:
        private.delete([str(row) for row in gone])
    alive = [row for row in range(n) if row not in gone]
    rows, everything = ranked(private, query, count)
    assert rows.tolist() == by_brute_force(vectors, query, alive)[:count]
    assert everything == (len(alive) <= count)


def test_there_are_more_also_where_the_rest_is_far_away(tmp_path):
    vectors = np.concatenate([near(np.eye(D)[0], 4, 1e-3), -near(np.eye(D)[0], 30, 1e-3)])
    private = collection(tmp_path, vectors)
    assert [ranked(private, np.eye(D)[0], count)[1] for count in (1, 4, 33, 34, 35)] == [False] * 3 + [
        True
    ] * 2


@pytest.mark.parametrize("lists", [False, True])
def test_only_those_that_may_be_found_are(tmp_path, lists):
    query = unit_vectors(1, 3)[0].astype(np.float64)
    vectors, using = unit_vectors(60), Lists(unit_vectors(5, 9), 99) if lists else None
    private = collection(tmp_path, vectors, (20, 40))
    private.delete(["4", "31"])
    among = np.random.default_rng(0).random(60) < 0.4
    among[[4, 5]] = True
    left = [row for row in np.flatnonzero(among).tolist() if row not in (4, 31)]
    for count in (1, 7, len(left), 99):
        rows, everything = ranked(private, query, count, using, among)
        assert rows.tolist() == by_brute_force(vectors, query, left)[:count]
        assert everything == (count >= len(left))
    assert ranked(private, query, 3, using, np.zeros(60, bool))[0].tolist() == []


# --- one record more


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 12), st.integers(0, 999), st.sampled_from([0.0, 1e-7, 1e-3, 1.0]))
def test_one_record_more_changes_no_other_records_place(tmp_path_factory, place, seed, spread):
    """Wherever it comes in, twin of another or not: who is within, who is before whom, who is in which list."""
    folder = tmp_path_factory.mktemp("x")
    query = unit_vectors(1, seed)[0].astype(np.float64)
    vectors = np.concatenate([near(query, 8, spread, seed), unit_vectors(4, seed)])
    new = near(query, 1, spread, seed + 7)
    both = [collection(folder, held, (5,)) for held in (vectors, np.insert(vectors, place, new, 0))]
    centroids = unit_vectors(4, seed + 2).astype(np.float64)
    exact = sorted(scores(vectors, query))
    for step, lists in itertools.product((0, 6, -1), (False, True)):
        threshold, seen = exact[step] // GRID / GRID, []
        for number, private in enumerate(both):
            using = Lists(centroids, 2) if lists else None
            (rows,) = within(private, query[None], np.array([threshold]), using)
            order = ranked(private, query, 20, using)[0]
            if number:  # in the numbers of the others
                rows, order = (
                    np.array([r - (r > place) for r in part if r != place]) for part in (rows, order)
                )
            seen.append((rows.tolist(), order.tolist()))
        assert seen[0] == seen[1]


# --- lists around public centroids


def test_lists_hold_everybody_once_by_the_nearest_centroid(tmp_path):
    vectors, centroids = unit_vectors(90), unit_vectors(6, 9).astype(np.float64) * 0.7
    private = collection(tmp_path, vectors, (40,))
    private.delete(["3", "50"])
    distances = np.square(on_grid(vectors)[:, None] - on_grid(centroids)[None]).sum(2)
    mine, gone = distances.argmin(1), {3, 50}
    for query in on_grid(unit_vectors(8, 4)):
        nearest = np.argsort(-(centroids @ query))
        for probes in range(1, 7):
            rows = Lists(centroids, probes).rows(private, query)
            wanted = [i for i in range(90) if mine[i] in nearest[:probes] and i not in gone]
            assert rows.tolist() == wanted


def test_all_lists_together_are_the_exact_search(tmp_path):
    query = unit_vectors(1, 8)[0].astype(np.float64)
    vectors = np.concatenate([unit_vectors(50), near(query, 20, 1e-4)])
    private, lists = collection(tmp_path, vectors), Lists(unit_vectors(5, 9), 99)
    for threshold in (-1, 0.0, 0.5, 0.99999):
        both = [
            within(private, query[None], np.array([threshold]), using)[0].tolist() for using in (None, lists)
        ]
        assert both[0] == both[1]
    for count in (1, 8, 69, 70, 71):
        first, second = (ranked(private, query, count, using) for using in (None, lists))
        assert first[0].tolist() == second[0].tolist() and first[1] == second[1]


def test_lists_follow_what_is_added_and_deleted(tmp_path):
    query, lists = np.eye(D)[0], Lists(np.concatenate([np.eye(D), -np.eye(D)]), 1)
    private = collection(tmp_path, unit_vectors(0))
    assert within(private, query[None], np.array([0.9]), lists)[0].tolist() == []
    assert ranked(private, query, 3, lists)[0].tolist() == [] and ranked(private, query, 3, lists)[1]
    private.add(near(query, 3, 0.01), list("abc"), list("abc"))
    assert within(private, query[None], np.array([0.9]), lists)[0].tolist() == [0, 1, 2]
    private.delete(["b"])
    assert within(private, query[None], np.array([0.9]), lists)[0].tolist() == [0, 2]
    assert within(private, query[None], np.array([0.9]))[0].tolist() == [0, 2]


@pytest.mark.parametrize("lists", [False, True])
def test_a_deleted_record_is_not_found_though_its_zeros_would_fit(tmp_path, lists):
    private = collection(tmp_path, unit_vectors(20), (10,))
    private.delete([str(i) for i in (0, 9, 10, 19)])
    using = Lists(np.eye(D), D) if lists else None
    left = [i for i in range(20) if i not in (0, 9, 10, 19)]
    assert within(private, np.eye(D)[:1], np.array([-2.0]), using)[0].tolist() == left
    assert sorted(ranked(private, np.eye(D)[0], 99, using)[0].tolist()) == left
