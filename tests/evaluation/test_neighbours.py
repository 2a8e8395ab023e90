"""Precision, recall, density, coverage: by hand, against the authors' package, duplicates, blocks, bad input."""

from __future__ import annotations

import numpy as np
import pytest
from prdc import compute_prdc

from sfumato.errors import InputError
from sfumato.evaluation import neighbours
from sfumato.evaluation.neighbours import NeighbourMetrics, neighbour_metrics, squared_distances


def four(found):
    return found.precision, found.recall, found.density, found.coverage


def column(*values):
    return np.array(values, np.float32)[:, None]


def test_a_line_by_hand():
    """Real balls (k = 1): 0±1, 1±1, 3±2, 10±7. Generated balls: 0.5±1, 1.5±1, 20±18.5."""
    found = neighbour_metrics(column(0, 1, 3, 10), column(0.5, 1.5, 20), k=1)
    # 0.5 is in two balls (0, 1); 1.5 in two (1, 3); 20 in none. 10 has no generated point within 7 and lies
    # in the ball of 20; 0 and 1 in that of 0.5; 3 in that of 20.
    assert found == NeighbourMetrics(2 / 3, 1.0, 4 / 3, 3 / 4, 4, 3)


def test_the_surface_belongs_to_a_ball():
    assert four(neighbour_metrics(column(0, 1), column(2, 3), k=1)) == (0.5, 0.5, 0.5, 0.5)


def test_sets_far_apart_share_nothing():
    x = np.random.default_rng(0).normal(size=(30, 4))
    assert four(neighbour_metrics(x, x + 100)) == (0, 0, 0, 0)


def test_a_collapsed_generator_is_precise_and_covers_nothing_else():
    real = np.random.default_rng(0).normal(size=(200, 4))
    found = neighbour_metrics(real, np.repeat(real[:1], 50, axis=0), k=5)
    assert found.precision == 1
    assert found.recall == 1 / 200  # balls of radius 0 hold the point itself
    assert 1 / 200 <= found.coverage < 0.1


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("k", [1, 5])
def test_it_agrees_with_the_authors_of_density_and_coverage(seed, k):
    rng = np.random.default_rng(seed)
    real, generated = rng.normal(size=(70, 6)), 0.8 * rng.normal(size=(90, 6)) + 0.4
    theirs = compute_prdc(real, generated, k)
    found = neighbour_metrics(real, generated, k=k)
    assert 0 < found.precision < 1 and 0 < found.recall < 1 and 0 < found.coverage < 1
    for name, value in theirs.items():
        assert getattr(found, name) == pytest.approx(value, abs=1e-12), name


@pytest.mark.parametrize("offset", [0.0, 1e4])
def test_identical_sets_agree_whatever_their_offset(tmp_path, offset):
    """Rows of float32 features from a file, also with duplicates and far from the origin."""
    rows = np.random.default_rng(0).normal(size=(60, 16)) + offset
    np.save(
        tmp_path / "features.npy", np.concatenate([rows, np.repeat(rows[:3], 7, axis=0)]).astype(np.float32)
    )
    features = np.load(tmp_path / "features.npy", mmap_mode="r")
    found = neighbour_metrics(features, features[::-1])
    assert (found.precision, found.recall, found.coverage) == (1, 1, 1)
    assert (found.real_used, found.generated_used) == (81, 81)


def test_a_ball_of_duplicates_holds_only_them():
    found = neighbour_metrics(column(0.1, 0.1, 0.1), column(0.1, 0.1001, 0.1001, 0.1001), k=2)
    assert four(found) == (0.25, 1.0, 3 / 8, 1.0)


def test_blocks_and_row_order_do_not_matter(monkeypatch):
    rng = np.random.default_rng(0)
    real, generated = rng.normal(size=(53, 3)), rng.normal(size=(41, 3)) + 0.5
    whole = neighbour_metrics(real, generated, k=3)
    monkeypatch.setattr(neighbours, "DISTANCES_AT_A_TIME", 200)  # 3 or 4 rows
    assert four(neighbour_metrics(real, generated, k=3)) == pytest.approx(four(whole))
    assert four(neighbour_metrics(real[::-1], generated[::-1], k=3)) == pytest.approx(four(whole))


def test_no_more_distances_are_held_than_promised(monkeypatch):
    sizes = []
    monkeypatch.setattr(neighbours, "DISTANCES_AT_A_TIME", 500)
    monkeypatch.setattr(
        neighbours, "squared_distances", lambda x, y: sizes.append(len(x) * len(y)) or squared_distances(x, y)
    )
    neighbour_metrics(np.random.default_rng(0).normal(size=(90, 2)), np.zeros((70, 2)))
    assert len(sizes) > 40 and max(sizes) <= 500


def test_larger_sets_are_sampled():
    rng = np.random.default_rng(0)
    real, generated = rng.normal(size=(300, 3)), rng.normal(size=(90, 3))
    found = neighbour_metrics(real, generated, most=100)
    assert (found.real_used, found.generated_used) == (100, 90)
    assert found == neighbour_metrics(real, generated, most=100, seed=0)
    assert found != neighbour_metrics(real, generated, most=100, seed=2)
    drawn = neighbours.random_rows(real, 100, 7, "real")
    assert len(np.unique(drawn, axis=0)) == 100 and set(drawn[:, 0]) <= set(real[:, 0])


def test_the_features_are_left_as_they_are():
    real, generated = np.random.default_rng(0).normal(1, 1, (2, 20, 3))
    before = real.copy(), generated.copy()
    neighbour_metrics(real, generated)
    assert np.array_equal(real, before[0]) and np.array_equal(generated, before[1])


def test_distances_are_those_of_differences_and_0_for_equal_rows():
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(20, 500)), rng.normal(size=(30, 500))
    y[:5] = x[:5]
    direct = ((x[:, None] - y) ** 2).sum(-1)
    found = squared_distances(x, y)
    assert np.allclose(found, direct, rtol=1e-12)
    assert np.array_equal(found == 0, direct == 0) and (found == 0).sum() == 5


def test_rows_a_float32_step_apart_are_not_equal():
    x = np.random.default_rng(0).normal(size=(50, 512)).astype(np.float32)
    y = (x * np.float32(1 + 1e-5)).astype(np.float64)
    assert (squared_distances(x.astype(np.float64), y).diagonal() > 0).all()


@pytest.mark.parametrize(("k", "which"), [(0, "real"), (20, "real"), (10, "generated")])
def test_k_must_leave_neighbours(k, which):
    x = np.random.default_rng(0).normal(size=(20, 2))
    with pytest.raises(InputError, match=rf"{k} nearest neighbours of \d+ {which} images; k must be 1 to"):
        neighbour_metrics(x, x[:10], k=k)
    assert neighbour_metrics(x, x[:10], k=9).generated_used == 10


def test_bad_features_are_refused():
    x = np.random.default_rng(0).normal(size=(20, 2))
    bad = x.copy()
    bad[4, 0] = np.inf
    with pytest.raises(InputError, match="generated: row 4 holds NaN or infinity"):
        neighbour_metrics(x, bad)
    with pytest.raises(InputError, match="real 2, generated 1"):
        neighbour_metrics(x, x[:, :1])
    with pytest.raises(InputError, match="leaves none"):
        neighbour_metrics(x, x, most=0)
