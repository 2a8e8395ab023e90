from __future__ import annotations

import numpy as np
import pytest

from sfumato.audit.calibration import TooFewHeldOut
from sfumato.audit.evidence import Copies, References, figures
from sfumato.audit.similarity import open_extractor

SIDE = 8


def pictures(count: int, seed: int) -> np.ndarray:
    """Distinct smooth pictures of one kind: uint8 [count, SIDE, SIDE, 1]."""
    coarse = np.random.default_rng(seed).integers(0, 256, (count, 4, 4, 1))
    return np.repeat(np.repeat(coarse, SIDE // 4, axis=1), SIDE // 4, axis=2).astype(np.uint8)


def noisy(images: np.ndarray, seed: int) -> np.ndarray:
    noise = np.random.default_rng(seed).normal(0, 4, images.shape)
    return np.clip(images + noise, 0, 255).astype(np.uint8)


@pytest.fixture
def references(tmp_path) -> References:
    return References(
        pictures(600, 1), pictures(200, 2), open_extractor("pixels"), seed=0, directory=tmp_path
    )


def measured(references: References, images: np.ndarray, score: str = "matches", level: float = 0.95):
    score = getattr(references, score)
    return figures(references.search(images, score), references.threshold(score, 0.01), level=level)


def test_a_memoriser_is_found_out(references):
    of = measured(references, noisy(references.train, 3))
    assert of["ams"] == 1 and of["matches"] == 600 and of["distinct"] == 600 and of["ums"] == 1
    assert of["excess"] > 0.95 and of["ci"][0] > 0.8
    assert of["saturation"][-1]["ums"] == of["ums"] and sum(
        band["ams"] for band in of["bands"]
    ) == pytest.approx(1)


def test_fresh_images_and_copies_of_the_holdout_show_no_excess(references):
    fresh = measured(references, pictures(600, 4))
    assert fresh["ci"][0] <= 0 <= fresh["ci"][1] and fresh["ams"] < 0.05
    held = measured(references, noisy(references.holdout, 5))
    assert held["ci"][0] <= 0


def test_half_copies_are_half(references):
    half = np.concatenate([noisy(references.train[:300], 6), pictures(300, 7)])
    assert measured(references, half)["excess"] == pytest.approx(0.5, abs=0.06)


def test_copies_of_any_training_image_count_though_blocks_are_no_larger_than_the_holdout(references):
    assert len(references.blocks) == 3
    for block in references.blocks:
        assert measured(references, noisy(references.train[block], 8))["excess"] > 0.9


def test_flipped_copies_are_copies(references):
    assert measured(references, np.ascontiguousarray(references.train[:, :, ::-1]))["ams"] == 1


def test_blank_images_match_nothing_but_are_counted(references):
    blank = np.full((300, SIDE, SIDE, 1), 128, np.uint8)
    of = measured(references, np.concatenate([blank, noisy(references.train[:300], 9)]))
    assert of["filtered"] == 300 and of["num_images"] == 600 and of["ams"] == pytest.approx(0.5)


def test_repeating_one_image_proves_nothing_by_itself(references):
    of = measured(references, noisy(np.repeat(references.train[:1], 300, axis=0), 10))
    assert of["ams"] == 1 and of["distinct"] == 1 and of["ums"] == 1 / 300
    assert of["ci"][0] < 0.03 < of["ci"][1]


@pytest.mark.parametrize("score", ["carlini", "gu"])
def test_the_older_scores_find_copies_and_nothing_in_fresh_images(references, score):
    assert measured(references, noisy(references.train, 11), score)["excess"] > 0.9
    fresh = measured(references, pictures(600, 12), score)
    assert fresh["ci"][0] <= 0 <= fresh["ci"][1]


def test_search_finds_the_best_of_all_training_images(references):
    images = noisy(references.train[::7], 13)
    found = references.search(images, references.matches)
    direct = references.matches(images, references.train)
    assert (found.index == direct[1]).all() and np.allclose(found.similarity, direct[0], atol=1e-4)
    assert (found.index == np.arange(600)[::7]).all()


def test_closeness_is_about_nothing_for_fresh_images_and_large_for_copies(references):
    fresh, copied = (
        references.closeness(images) for images in (pictures(500, 14), noisy(references.train, 15))
    )
    assert abs(fresh) < 0.01 and copied > 3 * abs(fresh)


def test_too_few_held_out_images_calibrate_nothing(tmp_path):
    few = References(pictures(50, 1), pictures(20, 2), open_extractor("pixels"), seed=0, directory=tmp_path)
    with pytest.raises(TooFewHeldOut):
        few.threshold(few.matches, 0.01)


@pytest.mark.parametrize("score", ["matches", "carlini", "gu"])
def test_a_threshold_says_whether_it_would_see_copies(references, tmp_path, score):
    tau = references.threshold(getattr(references, score), 0.01).value
    assert references.recognised(getattr(references, score), tau) == 1
    # With black at the sides a shift by one pixel is no difference, and the threshold is out of reach.
    black = np.isin(np.arange(SIDE), (0, SIDE - 2, SIDE - 1))[:, None]
    framed = [np.where(black, 0, pictures(300, seed)).astype(np.uint8) for seed in (1, 2)]
    held = np.concatenate([np.roll(framed[0][:10], 1, axis=2), framed[1][10:]])
    close = References(framed[0], held, open_extractor("pixels"), seed=0, directory=tmp_path)
    tau = close.threshold(getattr(close, score), 0.01).value
    assert close.recognised(getattr(close, score), tau) < 0.1


def test_a_copy_of_any_image_of_a_picture_is_a_match_of_that_picture(tmp_path):
    """A burst: near-duplicates chain, and the last is far from the first that stands for all."""
    first, last = pictures(100, 1), pictures(100, 21)
    copies = Copies(
        np.concatenate([last, pictures(40, 22)]), np.concatenate([np.arange(100), np.full(40, 7)])
    )
    held = Copies(pictures(50, 23), np.arange(50))
    both = References(
        first, pictures(100, 2), open_extractor("pixels"), seed=0, directory=tmp_path, train_copies=copies,
        holdout_copies=held,
    )  # fmt: skip
    of = measured(both, noisy(last, 16))
    assert of["ams"] == 1 and of["distinct"] == 100 and of["ci"][0] > 0.5
    assert (both.search(noisy(copies.images[100:], 17), both.matches).index == 7).all()
    burst = measured(both, noisy(copies.images[100:], 18))
    assert burst["ams"] == 1 and burst["distinct"] == 1
    from_holdout = both.search(noisy(held.images, 19), both.matches)
    assert (from_holdout.held_index == np.arange(50)).all() and (
        from_holdout.held > from_holdout.similarity
    ).all()
