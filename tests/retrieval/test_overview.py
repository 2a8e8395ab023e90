"""What is learnt of a collection as a whole: told where it stands out of noise, and forgotten where it does not."""

from __future__ import annotations

import numpy as np
import pytest

from sfumato.errors import LedgerError
from sfumato.privacy import vector_moments
from sfumato.privacy.answers import Answers
from sfumato.privacy.budget import Budget
from sfumato.privacy.ledger import Ledger
from sfumato.privacy.protected_vectors import ProtectedVectors
from sfumato.privacy.vector_moments import Moments, MomentsPlan
from sfumato.retrieval.overview import SHARE_OF_OVERVIEW, look_over, moved_by
from tests.retrieval.frame import DIMENSION, clustered, public_side, unit


def looked_over(folder, vectors: np.ndarray, epsilon: float, public_size: int | None):
    private = ProtectedVectors.create(folder / "vectors", DIMENSION)
    names = [str(i) for i in range(len(vectors))]
    private.add(vectors, names, names)
    ledger = Ledger.open(folder / "ledger.db", total=Budget(epsilon, 1e-5))
    (folder / "answers").mkdir()
    return look_over(
        Budget(epsilon, 1e-5), private, public_side(), ledger, Answers(folder / "answers"), public_size
    )


def elsewhere(count: int) -> np.ndarray:
    """Less spread out than the public vectors, in other directions, around another mean."""
    turn = np.linalg.qr(np.random.default_rng(8).normal(size=(DIMENSION, DIMENSION)))[0]
    return unit(0.4 * clustered(count, 4) @ turn + np.eye(DIMENSION)[3])


@pytest.mark.parametrize("public_size", [None, 30_000])
def test_the_whole_is_found_for_its_share_of_the_budget(tmp_path, public_size) -> None:
    vectors, before = elsewhere(30_000), public_side().vectors
    units, public, reservation = looked_over(tmp_path, vectors, 10.0, public_size)
    assert abs(units - 30_000) < 100
    assert reservation.status == "settled"
    assert reservation.epsilon <= SHARE_OF_OVERVIEW * 10 and reservation.delta <= SHARE_OF_OVERVIEW * 1e-5
    for moved, own, true in (
        (public.mean(), before.mean(0), vectors.mean(0)),
        (np.cov(public.vectors.T), np.cov(before.T), np.cov(vectors.T)),
    ):
        assert np.linalg.norm(moved - true) < 0.25 * np.linalg.norm(own - true)


def test_balls_of_a_rank_hold_about_that_share_of_the_private_vectors(tmp_path) -> None:
    vectors = elsewhere(30_000)
    _, public, _ = looked_over(tmp_path, vectors, 10.0, 30_000)
    directions = clustered(40, 6).astype(np.float64)
    found, before = (
        [(vectors @ z >= side.ball(z, 40).threshold).mean() for z in directions]
        for side in (public, public_side())
    )
    assert 0.05 < np.median(found) < 0.2
    assert not 0.05 < np.median(before) < 0.2


def test_killed_after_the_charge_the_whole_is_not_asked_again(tmp_path, monkeypatch) -> None:
    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(vector_moments, "discrete_gaussian", killed)
        with pytest.raises(KeyboardInterrupt):
            looked_over(tmp_path, clustered(50, 4), 10.0, 50)
    ledger, private = Ledger.open(tmp_path / "ledger.db"), ProtectedVectors(tmp_path / "vectors", DIMENSION)
    spent = ledger.spent
    with pytest.raises(LedgerError, match=r"answer is lost.*another --out"):
        look_over(Budget(10.0, 1e-5), private, public_side(), ledger, Answers(tmp_path / "answers"), 50)
    assert ledger.spent == spent


def test_where_noise_drowns_the_whole_nothing_is_moved() -> None:
    public = public_side()
    plan = MomentsPlan(public.mean(), 1e3, 1.0, public.directions[:, :4].astype(np.float64))
    rng = np.random.default_rng(0)
    found = Moments(
        50 + plan.count_noise * rng.normal(),
        plan.mean_noise * rng.normal(size=DIMENSION),
        plan.square_noise * np.eye(4),
    )
    moved = moved_by(found, plan, public, 50)
    assert np.linalg.norm(moved.mean() - public.mean()) < 0.2  # James and Stein keep a little of the noise
    assert np.isfinite(moved.vectors).all()
