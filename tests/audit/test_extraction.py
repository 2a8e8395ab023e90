"""Carlini's and Gu's ratios and cliques: by hand, duplicates, planted copies, against networkx, bad input."""

from __future__ import annotations

import networkx
import numpy as np
import pytest

from sfumato.audit import extraction
from sfumato.audit.calibration import calibrate
from sfumato.audit.extraction import CARLINI_NEIGHBOURS, carlini_ratio, cliques, gu_ratio
from sfumato.errors import InputError


def pairs(x, y):
    squares = (x**2).sum(1)[:, None] + (y**2).sum(1) - 2 * x @ y.T
    return np.sqrt(np.maximum(squares, 0))


def carlini(generated, train, k=CARLINI_NEIGHBOURS):
    to_train = pairs(generated, train)
    within = pairs(train, train)
    np.fill_diagonal(within, np.inf)
    return carlini_ratio(to_train.min(axis=1), to_train.argmin(axis=1), np.sort(within, axis=1)[:, :k])


def gu(generated, train):
    ordered = np.sort(pairs(generated, train), axis=1)
    return gu_ratio(ordered[:, 0], ordered[:, 1])


def test_carlini_by_hand():
    neighbours = np.array([[1.0, 3.0], [1.0, 2.0], [4.0, 8.0]])
    found = carlini_ratio(np.array([0.5, 3.0, 0.0]), np.array([0, 2, 1]), neighbours)
    assert found.tolist() == [-0.5 / (0.5 * 2), -3 / (0.5 * 6), 0]
    assert found.dtype == np.float32
    assert carlini_ratio(np.array([0.5]), np.array([0]), neighbours, alpha=1).tolist() == [-0.25]


def test_copies_among_the_neighbours_are_left_out():
    """Duplicates of the nearest image do not make it look isolated or crowded."""
    with_copies = np.array([[0.0, 0.0, 2.0, 4.0]])
    assert carlini_ratio(np.array([1.0]), np.array([0]), with_copies)[0] == np.float32(-1 / (0.5 * 3))


def test_a_zero_denominator_is_a_match():
    filled = np.array([[0.0, 0.0], [1.0, 1.0]])
    found = carlini_ratio(np.array([0.0, 0.3, 0.3]), np.array([0, 0, 1]), filled)
    assert found.tolist() == [0, 0, np.float32(-0.6)]
    assert np.isfinite(found).all()
    assert gu_ratio(np.zeros(2), np.array([0.0, 1.0])).tolist() == [0, 0]
    assert not np.signbit(gu_ratio(np.zeros(1), np.zeros(1)))[0]


def test_gu_by_hand():
    assert gu_ratio(np.array([1.0, 2.0]), np.array([4.0, 2.0])).tolist() == [-0.25, -1]


@pytest.mark.parametrize("score", [carlini, gu])
def test_planted_copies_are_found_and_fresh_images_are_not(score):
    """With a threshold from held-out images that are scored in the same way."""
    rng = np.random.default_rng(0)
    train, holdout = rng.normal(size=(300, 16)), rng.normal(size=(400, 16))
    threshold = calibrate(score(holdout, train), rate=0.01).value
    copied = train[rng.integers(0, 300, 200)] + 0.05 * rng.normal(size=(200, 16))
    assert (score(copied, train) >= threshold).mean() == 1
    assert (score(rng.normal(size=(1000, 16)), train) >= threshold).mean() < 0.03


def test_the_papers_thresholds_on_planted_copies():
    rng = np.random.default_rng(1)
    train = rng.normal(size=(300, 16))
    copied, new = train[:100] + 0.05 * rng.normal(size=(100, 16)), rng.normal(size=(100, 16))
    assert (carlini(copied, train) > -1).all() and (gu(copied, train) > -extraction.GU_RATIO).all()
    assert (carlini(new, train) <= -1).all() and (gu(new, train) <= -extraction.GU_RATIO).all()


def test_a_heavily_duplicated_image_is_still_found():
    """60 copies of one training image: all its 50 nearest are itself, yet its copy is a match."""
    rng = np.random.default_rng(2)
    train = np.concatenate([np.repeat(rng.integers(-2, 3, (1, 8)).astype(float), 60, axis=0),
                            rng.normal(size=(100, 8))])  # fmt: skip
    assert carlini(train[:1] + 0.01, train)[0] == 0


def test_bad_distances():
    neighbours = np.ones((3, 2))
    for distances in (np.array([-0.5]), np.array([np.nan]), np.array([np.inf])):
        with pytest.raises(InputError, match="finite and not negative"):
            carlini_ratio(distances, np.array([0]), neighbours)
    with pytest.raises(InputError, match="finite and not negative"):
        carlini_ratio(np.ones(1), np.array([0]), -neighbours)
    with pytest.raises(InputError, match="axes"):
        carlini_ratio(np.ones((2, 2)), np.array([0, 0]), neighbours)
    with pytest.raises(InputError, match="different images"):
        carlini_ratio(np.ones(2), np.array([0]), neighbours)
    for outside in (-1, 3):
        with pytest.raises(InputError, match="outside the 3"):
            carlini_ratio(np.ones(1), np.array([outside]), neighbours)
    with pytest.raises(InputError, match="one image"):
        carlini_ratio(np.ones(1), np.array([0]), np.ones((1, 0)))
    with pytest.raises(InputError, match="alpha"):
        carlini_ratio(np.ones(1), np.array([0]), neighbours, alpha=0)
    with pytest.raises(InputError, match="nearer than the nearest"):
        gu_ratio(np.array([2.0]), np.array([1.0]))
    with pytest.raises(InputError, match="nearer than the nearest"):
        gu_ratio(np.array([2.0]), np.array([3.0, 4.0]))


# Cliques


def table(links, size):
    distances = np.full((size, size), 9.0)
    for a, b in links:
        distances[a, b] = distances[b, a] = 1.0
    np.fill_diagonal(distances, 0)
    return distances


def test_a_repeated_picture_is_a_clique_and_a_chain_is_none():
    """Twelve images of one picture, and forty of which each is near the next only."""
    rng = np.random.default_rng(0)
    repeated = 0.01 * rng.normal(size=(12, 4)) + 20
    chain = np.outer(np.arange(40), [0.5, 0, 0, 0])
    points = np.concatenate([chain, repeated])
    order = rng.permutation(len(points))
    (found,) = cliques(
        np.maximum(pairs(points[order], points[order]), pairs(points[order], points[order]).T), 0.6
    )
    assert sorted(order[found]) == list(range(40, 52)) and np.array_equal(found, np.sort(found))


def test_least_and_threshold_are_limits():
    five = table([(a, b) for a in range(5) for b in range(a)], 8)
    assert [found.tolist() for found in cliques(five, 1.0, least=5)] == [[0, 1, 2, 3, 4]]
    assert cliques(five, 1.0, least=6) == []
    assert cliques(five, 0.99, least=2) == []


def test_cliques_are_disjoint():
    links = [(a, b) for part in (range(0, 4), range(4, 8)) for a in part for b in part if b < a] + [(0, 4)]
    assert sorted(found.tolist() for found in cliques(table(links, 9), 1.0, least=3)) == [
        [0, 1, 2, 3],
        [4, 5, 6, 7],
    ]


@pytest.mark.parametrize("seed", range(20))
def test_against_networkx(seed):
    """Each is a clique that no other image can join; what is left has no clique of that size."""
    rng = np.random.default_rng(seed)
    size, least = int(rng.integers(10, 40)), int(rng.integers(3, 6))
    distances = rng.random((size, size))
    distances = np.triu(distances, 1) + np.triu(distances, 1).T
    graph = networkx.from_numpy_array((distances <= 0.5) & ~np.eye(size, dtype=bool))
    found = cliques(distances, 0.5, least=least)
    for clique in found:
        assert len(clique) >= least
        assert graph.subgraph(clique).number_of_edges() == len(clique) * (len(clique) - 1) / 2
        joint = set.intersection(*(set(graph[image]) for image in clique))
        assert not joint
        graph.remove_nodes_from(clique)
    largest = max((len(clique) for clique in networkx.find_cliques(graph)), default=0)
    assert largest < least


def test_one_picture_500_times():
    assert len(cliques(np.zeros((500, 500)), 0.1)[0]) == 500


def test_a_search_that_would_not_end_is_refused(monkeypatch):
    monkeypatch.setattr(extraction, "LARGEST_SEARCH", 50)
    draw = np.triu(np.random.default_rng(0).random((120, 120)), 1)
    with pytest.raises(InputError, match="choose a smaller threshold"):
        cliques(draw + draw.T, 0.5, least=14)


def test_bad_tables():
    with pytest.raises(InputError, match="symmetric"):
        cliques(np.ones((2, 3)), 1)
    with pytest.raises(InputError, match="symmetric"):
        cliques(np.array([[0.0, 1.0], [2.0, 0.0]]), 1)
    with pytest.raises(InputError, match="finite"):
        cliques(np.full((2, 2), np.nan), 1)
    with pytest.raises(InputError, match="at least 2"):
        cliques(np.zeros((3, 3)), 1, least=1)
    assert cliques(np.zeros((0, 0)), 1) == []
