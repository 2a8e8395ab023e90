import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from sfumato.errors import InputError
from sfumato.synthesis.selection import Selection, random_classes, select_classes


def test_no_label_chooses_first():
    """Label 0 likes class 0 a little more than class 1; label 1 has no other choice than class 0."""
    histogram = np.array([[100, 99, 0], [90, 0, 0]])
    assert select_classes(histogram, 1).classes == ((1,), (0,))


def test_most_voted_first_and_shares_follow_the_votes():
    selection = select_classes(np.array([[10.0, 30.0, 0.0], [0.0, 0.0, 5.0]])[:1], 2)
    assert selection.classes == ((1, 0),)
    assert selection.shares[0] == pytest.approx((0.75, 0.25))


def test_votes_below_the_noise_weigh_as_noise():
    selection = select_classes(np.array([[1000.0, -50.0]]), 2, noise_scale=10.0)
    assert selection.shares[0] == pytest.approx((1000 / 1020, 20 / 1020))


@settings(max_examples=60, deadline=None)
@given(arrays(np.int64, st.tuples(st.integers(1, 4), st.integers(8, 12)), elements=st.integers(-50, 500)))
def test_every_class_goes_to_one_label_at_most_and_the_total_is_the_best(histogram):
    selection = select_classes(histogram, 2)
    chosen = [c for classes in selection.classes for c in classes]
    assert len(chosen) == len(set(chosen)) == 2 * len(histogram)
    assert all(sum(shares) == pytest.approx(1) for shares in selection.shares)
    total = sum(histogram[label, c] for label, classes in enumerate(selection.classes) for c in classes)
    greedy, taken = 0, set()
    for row in histogram:
        mine = [c for c in np.argsort(-row, kind="stable") if c not in taken][:2]
        taken |= set(mine)
        greedy += row[mine].sum()
    assert total >= greedy


def test_relabel_spreads_each_share_over_the_images_of_its_class():
    public = np.array([0, 0, 0, 1, 2, 2])
    rows, labels, weights = Selection(((0, 2), (1,)), ((0.6, 0.4), (1.0,))).relabel(public)
    assert rows.tolist() == [0, 1, 2, 4, 5, 3]
    assert labels.tolist() == [0, 0, 0, 0, 0, 1]
    assert weights == pytest.approx([0.2, 0.2, 0.2, 0.2, 0.2, 1.0])


def test_too_few_public_classes_is_an_error():
    with pytest.raises(InputError, match="more classes"):
        select_classes(np.zeros((3, 5)), 2)


def test_blind_selection_gives_each_label_its_own_classes():
    drawn = random_classes(3, 10, 2, seed=4)
    assert len({c for row in drawn.classes for c in row}) == 6 and drawn.shares == ((0.5, 0.5),) * 3
    assert drawn == random_classes(3, 10, 2, seed=4) != random_classes(3, 10, 2, seed=5)
    with pytest.raises(InputError, match="no budget was spent"):
        random_classes(3, 5, 2, seed=0)
