"""Neighbours, balls and directions of public vectors."""

from __future__ import annotations

import numpy as np
import pytest

from sfumato.errors import InputError
from sfumato.retrieval.public_side import PublicSide
from tests.retrieval.frame import DIMENSION, clustered, public_side


def test_neighbours_are_the_nearest_in_order() -> None:
    public = public_side()
    direction = clustered(1, 9)[0]
    found = public.neighbours(direction, 20)
    assert found.tolist() == np.argsort(-(public.vectors @ direction), kind="stable")[:20].tolist()
    assert len(public.neighbours(direction, 10_000)) == len(public.vectors)


def test_a_ball_holds_as_many_public_vectors_as_asked_and_is_measured_from_their_mean() -> None:
    public = public_side()
    ball = public.ball(clustered(1, 9)[0], 25)
    inside = public.vectors.astype(np.float64) @ ball.direction >= ball.threshold - 1e-9
    assert inside.sum() == 25
    np.testing.assert_allclose(ball.center, public.vectors[inside].mean(0), atol=1e-6)


def gaussian(count: int, seed: int, mean: np.ndarray, spread: np.ndarray) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return mean + rng.normal(size=(count, DIMENSION)) * spread


def test_public_vectors_are_moved_to_another_mean_and_covariance() -> None:
    public = PublicSide.of(
        gaussian(4000, 0, 9 * np.eye(DIMENSION)[0], np.linspace(1, 0.1, 16)), clustered(60, 3), "a"
    )
    turn = np.linalg.qr(np.random.default_rng(1).normal(size=(DIMENSION, DIMENSION)))[0]
    wanted = turn * np.linspace(4e-3, 1e-4, DIMENSION) @ turn.T
    mean = 0.98 * np.eye(DIMENSION)[2]
    along = public.directions.T.astype(np.float64) @ wanted @ public.directions
    moved = public.moved(mean, along)
    np.testing.assert_allclose(np.linalg.norm(moved.vectors, axis=1), 1, atol=1e-5)
    assert np.linalg.norm(moved.mean() - mean) < 0.03
    found, across = np.cov(moved.vectors.T), np.eye(DIMENSION) - np.outer(mean, mean) / (mean @ mean)
    flat = across @ wanted @ across  # the length being 1, nothing is left along the mean
    assert np.linalg.norm(across @ found @ across - flat) < 0.08 * np.linalg.norm(flat)


def test_moving_to_where_they_are_changes_nothing() -> None:
    public = public_side()
    still = public.moved(public.mean(), public.covariance(DIMENSION))
    np.testing.assert_allclose(still.vectors, public.vectors, atol=1e-4)
    assert still.encoder == public.encoder and still.prompts is not public.directions


def test_directions_that_were_not_measured_narrow_with_the_others() -> None:
    public = public_side()
    moved = public.moved(public.mean(), 0.25 * public.covariance(3))
    rest = np.eye(DIMENSION) - public.directions[:, :3] @ public.directions[:, :3].T
    before, after = (np.var(each.vectors @ rest, axis=0).sum() for each in (public, moved))
    assert 0.2 < after / before < 0.9


def test_principal_directions_are_orthonormal_and_ordered() -> None:
    public = public_side()
    basis = public.basis(4)
    assert basis is not None and basis.shape == (DIMENSION, 4)
    np.testing.assert_allclose(basis.T @ basis, np.eye(4), atol=1e-5)
    spread = np.var(public.vectors @ public.directions, axis=0)
    assert (np.diff(spread) <= 1e-6).all()
    assert public.basis(DIMENSION) is None
    share = public.directions_for(0.9)
    held = spread[:share].sum() / np.var(public.vectors, axis=0).sum()
    assert held >= 0.9 > spread[: share - 1].sum() / np.var(public.vectors, axis=0).sum()


def test_what_is_saved_is_loaded(tmp_path) -> None:
    public = public_side()
    public.save(tmp_path / "p.safetensors")
    back = PublicSide.load(tmp_path / "p.safetensors")
    np.testing.assert_allclose(back.vectors, public.vectors, atol=1e-3)
    np.testing.assert_allclose(np.linalg.norm(back.vectors, axis=1), 1, atol=1e-6)
    assert back.encoder == public.encoder and np.array_equal(back.directions, public.directions)


@pytest.mark.parametrize("content", [b"", b"not a file of tensors" * 10])
def test_a_damaged_file_is_refused_in_one_line(tmp_path, content) -> None:
    path = tmp_path / "public.safetensors"
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"public\.safetensors is damaged.*no budget was spent"):
        PublicSide.load(path)
    with pytest.raises(InputError, match="damaged"):
        PublicSide.load(tmp_path / "none.safetensors")


def test_too_few_public_images_are_refused() -> None:
    with pytest.raises(InputError, match="--public at least 50"):
        public_side(20)
