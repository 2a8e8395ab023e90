import numpy as np
import pytest
from sklearn.metrics import adjusted_rand_score

from sfumato.audit import surrogate
from sfumato.audit.surrogate import NoUsableSurrogate, find_clusters, labels_of_conditions, unit_rows
from sfumato.errors import InputError


def blobs(groups=6, each=40, dimension=32, spread=0.03, seed=0):
    """Directions well apart, with a different length each, and which group a row is of."""
    draw = np.random.default_rng(seed)
    centres = unit_rows(draw.normal(size=(groups, dimension)))
    truth = np.repeat(np.arange(groups), each)
    rows = centres[truth] + spread * draw.normal(size=(groups * each, dimension))
    return (rows * draw.uniform(0.1, 50, (len(rows), 1))).astype(np.float32), truth


def test_groups_are_found_whatever_the_length_of_their_vectors():
    rows, truth = blobs()
    found = find_clusters(rows, clusters=6, seed=1)
    assert adjusted_rand_score(truth, found.labels) == 1
    assert len(found) == 6 and found.asked == 6 and found.dropped == 0
    assert found.sizes.tolist() == [40] * 6
    assert np.allclose(np.linalg.norm(found.centroids, axis=1), 1, atol=1e-6)


def test_cohesion_is_the_mean_cosine_to_the_centroid():
    rows, _ = blobs(groups=2, spread=0.1)
    found = find_clusters(rows, clusters=2, seed=0)
    for cluster in (0, 1):
        members = unit_rows(rows[found.labels == cluster])
        centroid = members.mean(0) / np.linalg.norm(members.mean(0))
        assert found.cohesion[cluster] == pytest.approx((members @ centroid).mean(), abs=1e-5)
        assert np.allclose(found.centroids[cluster], centroid, atol=1e-5)


def test_loose_clusters_are_dropped_and_their_images_relabelled():
    rows, truth = blobs(groups=3)
    scattered = np.random.default_rng(5).normal(size=(60, 32)).astype(np.float32)
    both = np.concatenate([rows, scattered])
    found = find_clusters(both, clusters=5, seed=0)
    assert (found.cohesion >= 0.5).all() and found.dropped >= 1 and len(found) + found.dropped == 5
    cosines = unit_rows(both) @ found.centroids.T
    assert np.array_equal(found.labels, cosines.argmax(1))
    assert found.sizes.sum() == len(both)
    assert adjusted_rand_score(truth, found.labels[: len(truth)]) == 1
    with pytest.raises(NoUsableSurrogate, match="coherent"):
        find_clusters(scattered, clusters=5, cohesion=0.9, seed=0)


def test_no_cluster_is_a_single_image():
    rows, _ = blobs(groups=2, each=40)
    alone = -rows[:1]
    found = find_clusters(np.concatenate([rows, alone]), clusters=3, seed=0)
    assert len(found) == 2 and found.dropped == 1 and found.sizes.min() >= 2


@pytest.mark.parametrize("constant", [0.0, 3.0])
def test_a_generator_that_always_draws_the_same_has_no_surrogate(constant):
    with pytest.raises(NoUsableSurrogate, match="alike"):
        find_clusters(np.full((50, 8), constant, np.float32), clusters=10)


def test_two_different_images_are_two_clusters():
    rows = np.tile(np.eye(2, 8, dtype=np.float32), (30, 1))
    found = find_clusters(rows, clusters=100)
    assert found.asked == 2 and found.sizes.tolist() == [30, 30]


def test_there_are_no_more_clusters_than_a_fifth_of_the_images():
    rows, _ = blobs(groups=5, each=10, spread=0.2)
    assert find_clusters(rows, clusters=100).asked == 10


def test_same_seed_same_clusters():
    rows, _ = blobs(spread=0.3)
    one, same = (find_clusters(rows, clusters=20, cohesion=0.0, seed=3) for _ in range(2))
    assert np.array_equal(one.labels, same.labels) and np.array_equal(one.centroids, same.centroids)


def test_many_images_in_mini_batches(monkeypatch):
    monkeypatch.setattr(surrogate, "MINI_BATCHES_ABOVE", 100)
    rows, truth = blobs(groups=4)
    found = find_clusters(rows, clusters=4, seed=0)
    assert adjusted_rand_score(truth, found.labels) == 1


@pytest.mark.parametrize(
    "features", [np.zeros((5, 3)), np.full((20, 3), np.nan), np.zeros(20), np.zeros((0, 3))]
)
def test_features_that_cannot_be_clustered_are_refused(features):
    with pytest.raises(InputError, match="nothing was audited") as raised:
        find_clusters(features)
    assert not isinstance(raised.value, NoUsableSurrogate)
    with pytest.raises(InputError, match="2 or more"):
        find_clusters(np.eye(20), clusters=1)


def test_labels_follow_the_clusters():
    pseudo = np.repeat([0, 1, 2], [100, 100, 50])
    labels = np.where(np.arange(250) < 25, 7, np.where(pseudo == 2, 3, 5))  # cluster 0: a quarter of it is 7
    conditions = np.repeat([0, 1, 2], 4000)
    drawn = labels_of_conditions(conditions, pseudo, labels, seed=1)
    assert (drawn[4000:8000] == 5).all() and (drawn[8000:] == 3).all()
    assert (drawn[:4000] == 7).mean() == pytest.approx(0.25, abs=0.03)
    assert np.array_equal(drawn, labels_of_conditions(conditions, pseudo, labels, seed=1))
    with pytest.raises(ValueError, match="without images"):
        labels_of_conditions(np.array([3]), pseudo, labels, seed=1)


def test_rounding_noise_is_no_difference():
    rows = np.ones((40, 16), np.float32)
    noise = np.random.default_rng(0).uniform(-1e-7, 1e-7, rows.shape).astype(np.float32)
    with pytest.raises(NoUsableSurrogate, match="alike"):
        find_clusters(rows * 0.25 + noise, clusters=10)
