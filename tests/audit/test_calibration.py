"""Thresholds and the excess: by hand, against exact tests, the targets we must tell apart, and many seeds."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import beta, binomtest

from sfumato.audit.calibration import (
    Interval,
    TooFewHeldOut,
    calibrate,
    excess,
    reference_blocks,
)
from sfumato.errors import InputError
from sfumato.evaluation.intervals import clopper_pearson, rule_of_three

DIMENSION = 8


def fresh(rng, count):
    """Independent images of one kind, as feature vectors."""
    return rng.normal(size=(count, DIMENSION))


def best(queries, references):
    """Similarity to the nearest reference and its row."""
    squares = (queries**2).sum(1)[:, None] + (references**2).sum(1) - 2 * queries @ references.T
    index = squares.argmin(axis=1)
    return -np.sqrt(np.maximum(squares[np.arange(len(queries)), index], 0)).astype(np.float32), index


def audited(train, holdout, generated, *, rate=0.01, level=0.95, seed=0):
    """Threshold, share of matches, and excess, as an audit puts them together."""
    threshold = calibrate(best(holdout, train)[0], rate=rate)
    blocks, held = reference_blocks(len(train), len(holdout), seed)
    to_train, row = best(generated, train)
    to_held, held_row = best(generated, holdout[held])
    hits = sum((best(generated, train[block])[0] >= threshold.value).astype(int) for block in blocks)
    clusters = np.where(to_train >= to_held, row, len(train) + held_row)
    found = excess(hits, to_held >= threshold.value, clusters, blocks=len(blocks), level=level)
    return threshold, float((to_train >= threshold.value).mean()), found


def copies(rng, train, count, noise=0.01):
    return train[rng.integers(0, len(train), count)] + noise * rng.normal(size=(count, DIMENSION))


# Thresholds


def test_the_threshold_is_the_quantile():
    found = calibrate(np.arange(1000) / 1000, rate=0.01)
    assert (found.value, found.achieved, found.holdout) == (np.float32(0.990), 0.01, 1000)
    assert (found.low, found.high) == pytest.approx(clopper_pearson(10, 1000))


def test_the_smallest_holdout():
    """100 held-out images: the closest of them is the threshold, and the next image beats it once in 101."""
    assert calibrate(np.arange(100.0), rate=0.01).value == 99
    with pytest.raises(TooFewHeldOut, match=r"99 held-out images .* at least 100"):
        calibrate(np.arange(99.0), rate=0.01)


def test_ties_never_lift_the_rate():
    """Hamming distances have few values: 5 % of the held-out images share the best one."""
    found = calibrate(np.repeat([-2.0, -8.0], [50, 950]), rate=0.01)
    assert found.achieved == 0 and found.value > -2
    similarity = np.full(10, -2, np.float32)
    assert not (similarity >= found.value).any()  # also after a round trip through a Python float
    assert calibrate(np.repeat([-2.0, -8.0], [50, 950]), rate=0.05).achieved == 0.05


def test_the_rate_holds_for_the_next_image():
    """Over many holdouts, a fresh image is at or above the threshold with probability j/(M+1) <= rate."""
    draw = np.random.default_rng(0).normal(size=(2000, 151)).astype(np.float32)
    hits = sum(row[0] >= calibrate(row[1:], rate=0.1).value for row in draw)
    assert binomtest(hits, 2000, 15 / 151).pvalue > 1e-3


@pytest.mark.parametrize("values", [np.r_[np.nan, np.ones(200)], np.r_[-np.inf, np.ones(200)]])
def test_similarities_must_be_finite(values):
    with pytest.raises(InputError, match="finite"):
        calibrate(values)


@pytest.mark.parametrize("rate", [0, 1, -0.1])
def test_rates_out_of_range(rate):
    with pytest.raises(InputError, match="false match rate"):
        calibrate(np.ones(500), rate=rate)


# Blocks


@pytest.mark.parametrize(
    ("train", "holdout", "count", "size"),
    [(1000, 250, 4, 250), (1003, 250, 5, 200), (6000, 100, 60, 100), (50, 80, 1, 50), (7, 7, 1, 7)],
)
def test_blocks_are_disjoint_and_of_the_holdouts_size(train, holdout, count, size):
    blocks, held = reference_blocks(train, holdout, seed=3)
    assert len(blocks) == count and {len(block) for block in blocks} == {size} and len(held) == size
    positions = np.concatenate(blocks)
    assert (
        len(np.unique(positions)) == count * size > train - count
        and 0 <= positions.min() <= positions.max() < train
    )
    assert len(np.unique(held)) == size and held.max() < holdout
    again, held_again = reference_blocks(train, holdout, seed=3)
    assert np.array_equal(held, held_again) and all(map(np.array_equal, blocks, again))


def test_blocks_are_drawn_at_random():
    """An ordered training set (by class, by date) must not give blocks of one kind each."""
    blocks, held = reference_blocks(1000, 100, seed=0)
    assert all(400 < block.mean() < 600 for block in blocks)
    assert not np.array_equal(reference_blocks(1000, 100, seed=1)[0][0], blocks[0])
    assert 30 < reference_blocks(50, 100, seed=0)[1].mean() < 70 and len(held) == 100


def test_nothing_to_compare():
    with pytest.raises(InputError, match="nothing to compare"):
        reference_blocks(100, 0, seed=0)


# The targets we must tell apart (specification, section 4)


@pytest.mark.parametrize("times", [1, 4, 60])
def test_a_memoriser_is_seen(times):
    rng = np.random.default_rng(times)
    holdout = fresh(rng, 100)
    train = fresh(rng, 100 * times)
    _, share, found = audited(train, holdout, copies(rng, train, 1000))
    assert share == 1
    assert found.value == pytest.approx(1, abs=0.05) and found.low > (0.9, 0.7, 0.3)[(1, 4, 60).index(times)]


@pytest.mark.parametrize("times", [1, 4, 60])
def test_fresh_images_have_no_excess(times):
    rng = np.random.default_rng(10 + times)
    train, holdout = fresh(rng, 100 * times), fresh(rng, 100)
    _, share, found = audited(train, holdout, fresh(rng, 1000))
    assert found.low <= 0 <= found.high < 0.1 and share < 0.1


@pytest.mark.parametrize("times", [1, 4, 10])
def test_half_and_half(times):
    rng = np.random.default_rng(20 + times)
    holdout, train = fresh(rng, 150), fresh(rng, 150 * times)
    generated = np.concatenate([copies(rng, train, 500), fresh(rng, 500)])
    _, share, found = audited(train, holdout, generated)
    assert found.low <= 0.5 <= found.high and found.low > 0.2
    assert share == pytest.approx(0.5, abs=0.05) and found.value == pytest.approx(0.5, abs=0.07)


def test_holdout_passed_off_as_generated_raises_no_alarm():
    """Over 200 seeds: fresh images match at the rate that was asked for at most, and the excess alarms in at most
    2.5 %, in fact far fewer. At the rate of 5 % there are matches to be wrong about."""
    shares, alarms = [], 0
    for seed in range(200):
        rng = np.random.default_rng(seed)
        train, holdout, generated = fresh(rng, 160), fresh(rng, 80), fresh(rng, 80)
        _, share, found = audited(train, holdout, generated, rate=0.05, seed=seed)
        shares.append(share)
        alarms += found.low > 0
    error = np.std(shares) / np.sqrt(len(shares))
    assert 0.02 < np.mean(shares) <= 0.05 + 2 * error
    assert alarms <= 8


@pytest.mark.parametrize(("leaves", "alarming"), [("both", False), ("holdout", True)])
def test_pictures_in_both_sets_must_leave_both(leaves, alarming):
    """Some pictures are commoner than others, and fresh images repeat them: no excess. If the common ones, which
    are in both sets, left the held-out set only, they would look memorised."""
    rng = np.random.default_rng(0)
    popularity = np.arange(1, 5001) ** -0.5
    alarms = 0
    for seed in range(60):
        train, holdout, fresh_images = rng.choice(5000, (3, 1000), p=popularity / popularity.sum())
        shared = np.intersect1d(train, holdout)
        pictures = np.setdiff1d(train, shared) if leaves == "both" else np.unique(train)
        held_out = np.setdiff1d(holdout, shared)
        blocks, held = reference_blocks(len(pictures), len(held_out), seed)
        hits = sum(np.isin(fresh_images, pictures[block]).astype(int) for block in blocks)
        matched = np.isin(fresh_images, held_out[held])
        alarms += excess(hits, matched, fresh_images, blocks=len(blocks)).low > 0
    assert alarms > 20 if alarming else alarms <= 5


# The interval of the excess


def interval(train_hits, holdout_hits, *, blocks=1, clusters=None, level=0.95):
    clusters = np.arange(len(train_hits)) if clusters is None else clusters
    return excess(np.array(train_hits), np.array(holdout_hits), clusters, blocks=blocks, level=level)


def test_the_value_by_hand():
    found = interval([2, 0, 1, 0], [0, 1, 1, 0], blocks=3)
    assert found.value == ((2 - 0) + (0 - 3) + (1 - 3) + 0) / 4
    assert found.low < found.value < found.high and found.level == 0.95


def test_one_side_alone_has_clopper_and_pearsons_ends():
    """40 of 400 training matches, none held out: the upper end joins the upper end of 40/400 with 0."""
    hits = np.repeat([1, 0], [40, 360])
    found = interval(hits, np.zeros(400))
    low, high = clopper_pearson(40, 400)
    assert found.high == pytest.approx(high)
    nothing = clopper_pearson(0, 400)[1]
    assert found.low == pytest.approx(0.1 - np.hypot(0.1 - low, nothing))


def test_zero_hits_are_not_zero():
    found = interval(np.zeros(1000, int), np.zeros(1000), blocks=4)
    limit = rule_of_three(1000, 0.975)
    assert found == Interval(0, pytest.approx(-4 * limit), pytest.approx(limit), 0.95)
    assert limit == pytest.approx(3.7 / 1000, rel=0.01)


def test_zero_held_out_hits_leave_room_for_as_many_as_one_in_every_block():
    """Ten training hits with 60 blocks: that none of them is held out is likely by chance (85 %)."""
    hits = np.repeat([1, 0], [10, 990])
    assert interval(hits, np.zeros(1000), blocks=60).low < 0
    assert interval(hits, np.zeros(1000), blocks=1).low > 0


@pytest.mark.parametrize("blocks", [1, 4, 10, 60])
def test_few_clusters_are_judged_as_by_the_exact_sign_test(blocks):
    """All K references that were hit are training images: chance does that with (B / (B + 1))^K."""
    tail = 0.025
    for count in range(1, 400):
        hits = np.zeros(20_000, int)
        hits[:count] = 1
        if interval(hits, np.zeros(20_000), blocks=blocks).low > 0:
            break
    exact = np.log(tail) / np.log(blocks / (blocks + 1))
    assert exact <= count <= exact + 2


def test_a_generic_reference_is_no_evidence():
    """300 of 1,000 images match one training image: as likely a held-out image. But it is no all-clear either."""
    hits, clusters = np.repeat([1, 0], [300, 700]), np.r_[np.zeros(300, int), np.arange(1, 701)]
    found = interval(hits, np.zeros(1000), clusters=clusters)
    assert found.value == 0.3 and found.low < 0 and found.high > 0.3
    assert interval(hits, np.zeros(1000)).low > 0.2, "images one by one would be taken for evidence"


def test_a_memoriser_of_few_images_and_a_large_holdout_are_decided():
    clusters = np.random.default_rng(0).integers(0, 12, 1000)
    assert interval(np.ones(1000, int), np.zeros(1000), clusters=clusters).low > 0.3


def test_images_that_match_on_both_sides_count_for_neither():
    """A threshold so low that everything matches everywhere: no excess, and next to no width."""
    found = interval(np.full(5000, 3), np.ones(5000), blocks=3)
    assert found.value == 0 and -0.01 < found.low <= 0 <= found.high < 0.01


def test_matches_in_several_blocks_count_several_times():
    """A picture that lies in three blocks: the ends stay those of a share, three times as far out."""
    hits = np.repeat([3, 0], [500, 500])
    found = interval(hits, np.zeros(1000), blocks=4)
    low, high = clopper_pearson(500, 1000)
    assert found.value == 1.5 and found.high == pytest.approx(3 * high)
    assert found.low == pytest.approx(1.5 - np.hypot(1.5 - 3 * low, 4 * clopper_pearson(0, 1000)[1]))


def test_a_higher_level_is_wider():
    hits = np.repeat([1, 0], [40, 360])
    assert interval(hits, np.zeros(400), level=0.99).low < interval(hits, np.zeros(400)).low


def exchangeable(rng, *, references, zipf, blocks, images=400, share=0.15):
    """Generated images around generic references, of which chance made one in B + 1 a held-out one."""
    popularity = np.arange(1, references + 1) ** -float(zipf)
    reference = rng.choice(references, images, p=popularity / popularity.sum())
    hit, in_train = rng.random(images) < share, rng.random(references) < blocks / (blocks + 1)
    clusters = np.where(hit, reference, references + np.arange(images))
    return (hit & in_train[reference]).astype(int), hit & ~in_train[reference], clusters


CASES = [
    (1, 8, 0),
    (1, 8, 1),
    (1, 100, 0),
    (1, 100, 1),
    (4, 8, 0),
    (4, 30, 1),
    (4, 100, 0),
    (60, 20, 0),
    (60, 100, 1),
]


@pytest.mark.parametrize(("blocks", "references", "zipf"), CASES)
def test_coverage_when_nothing_was_memorised(blocks, references, zipf):
    """At most 2.5 % of the intervals lie wholly above 0, and as many below, for few clusters and for uneven ones."""
    rng = np.random.default_rng([blocks, references, zipf])
    draws = [exchangeable(rng, references=references, zipf=zipf, blocks=blocks) for _ in range(300)]
    found = [excess(*draw, blocks=blocks) for draw in draws]
    most = 15  # P(Bin(300, 0.025) > 15) < 0.5 %
    assert sum(each.low > 0 for each in found) <= most
    assert sum(each.high < 0 for each in found) <= most
    mean, error = np.mean([each.value for each in found]), np.std([each.value for each in found]) / 300**0.5
    assert abs(mean) < 4 * error, "without the factor B the value is not 0 on average"


def test_clusters_and_the_factor_b_are_needed():
    """The test above can fail: images as their own clusters, or B left out, alarm far more often."""
    rng = np.random.default_rng(0)
    draws = [exchangeable(rng, references=30, zipf=0, blocks=4) for _ in range(200)]
    alone = sum(excess(t, h, np.arange(len(t)), blocks=4).low > 0 for t, h, _ in draws)
    dropped = sum(excess(np.minimum(t, 1), h, c, blocks=1).low > 0 for t, h, c in draws)
    assert alone > 20 and dropped > 20
    assert sum(excess(*draw, blocks=4).low > 0 for draw in draws) <= 10


def percentile_bootstrap(train_hits, holdout_hits, clusters, blocks, rng, draws=200):
    _, cluster = np.unique(clusters, return_inverse=True)
    sums = np.bincount(cluster, weights=train_hits - blocks * holdout_hits.astype(float))
    sizes = np.bincount(cluster)
    drawn = rng.integers(0, len(sums), (draws, len(sums)))
    return np.quantile(sums[drawn].sum(axis=1) / sizes[drawn].sum(axis=1), [0.025, 0.975])


def test_why_it_is_no_bootstrap():
    """Where the few references that were hit are all in training, every resample is above 0."""
    rng = np.random.default_rng(0)
    draws = [exchangeable(rng, references=12, zipf=0, blocks=60) for _ in range(60)]
    assert sum(percentile_bootstrap(*draw, 60, rng)[0] > 0 for draw in draws) > 40
    assert sum(excess(*draw, blocks=60).low > 0 for draw in draws) <= 4


@pytest.mark.parametrize(("blocks", "share"), [(1, 0.05), (4, 0.3), (10, 0.1)])
def test_coverage_when_a_share_was_memorised(blocks, share):
    """Copies of 200 training images on top of generic matches: the interval covers the share copied."""
    rng = np.random.default_rng([blocks, int(100 * share)])
    covered = 0
    for _ in range(150):
        train_hits, holdout_hits, clusters = exchangeable(rng, references=60, zipf=0, blocks=blocks)
        copied = rng.random(len(clusters)) < share
        clusters = np.where(copied, 10_000 + rng.integers(0, 200, len(clusters)), clusters)
        train_hits, holdout_hits = np.where(copied, 1, train_hits), holdout_hits & ~copied
        found = excess(train_hits, holdout_hits, clusters, blocks=blocks)
        covered += found.low <= share <= found.high
    assert covered >= 135  # P(Bin(150, 0.95) < 135) = 0.4 %


@pytest.mark.parametrize(
    ("train_hits", "holdout_hits", "clusters", "blocks", "says"),
    [
        ([], [], [], 1, "no generated image"),
        ([1, 0], [0], [0, 1], 1, "different images"),
        ([1, 0], [0, 1], [0], 1, "different images"),
        ([2, 0], [0, 1], [0, 1], 1, "between 0 and blocks"),
        ([-1, 0], [0, 1], [0, 1], 1, "between 0 and blocks"),
        ([1, 0], [0, 4], [0, 1], 4, "not yet multiplied"),
        ([0, 0], [0, 0], [0, 1], 0, "between 0 and blocks"),
    ],
)
def test_bad_hits(train_hits, holdout_hits, clusters, blocks, says):
    with pytest.raises(InputError, match=says):
        excess(np.array(train_hits), np.array(holdout_hits), np.array(clusters), blocks=blocks)


def test_effective_numbers_are_real_numbers():
    """Clusters of two images each are half as many observations."""
    hits, clusters = np.repeat([1, 0], [40, 360]), np.arange(400) // 2
    low = 0.1 - interval(hits, np.zeros(400), clusters=clusters).low
    ends = beta.ppf(0.025, 20, 181), beta.ppf(0.975, 1, 200)
    assert low == pytest.approx(np.hypot(0.1 - ends[0], ends[1]))
