"""Downstream accuracy: learns what can be learnt, chooses without the test set, remembers only what it measured."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sfumato.errors import InputError
from sfumato.evaluation import accuracy
from sfumato.evaluation.accuracy import CLASSIFIERS, MEAN, Accuracy, downstream_accuracies, held_back


def halves(count, seed, *, channels=1, size=8, classes=2):
    """Images uint8 in noise, bright in the upper, left, lower or right half: labels 0 to 3."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, classes, count)
    images = rng.integers(0, 120, (count, size, size, channels), np.uint8)
    half = size // 2
    images[labels == 0, :half] += 100
    images[labels == 1, :, :half] += 100
    images[labels == 2, half:] += 100
    images[labels == 3, :, half:] += 100
    return images, labels


def noise(count, seed):
    """Images without any sense, and labels likewise."""
    rng = np.random.default_rng(seed)
    return rng.integers(0, 256, (count, 8, 8, 1), np.uint8), rng.integers(0, 2, count)


@pytest.fixture(autouse=True)
def few_steps(monkeypatch):
    monkeypatch.setattr(accuracy, "FEWEST_STEPS", 12)
    monkeypatch.setattr(accuracy, "MOST_STEPS", 12)
    monkeypatch.setattr(accuracy, "REGULARISATION", (0.01, 1.0))


def test_all_four_learn_and_their_mean_is_their_mean(monkeypatch):
    monkeypatch.setattr(accuracy, "FEWEST_STEPS", 40)
    monkeypatch.setattr(accuracy, "MOST_STEPS", 40)
    found = downstream_accuracies(*halves(300, 1, channels=3), *halves(200, 2, channels=3), num_classes=2)
    assert list(found) == [*CLASSIFIERS, MEAN]
    assert all(found[name].mean > 0.9 for name in CLASSIFIERS), found
    assert found[MEAN].mean == pytest.approx(np.mean([found[name].mean for name in CLASSIFIERS]))
    assert all(each.std is None and each.seeds == (each.mean,) for each in found.values())


def test_labels_that_are_swapped_give_the_complement():
    images, labels = halves(300, 1)
    found = downstream_accuracies(images, 1 - labels, *halves(200, 2), num_classes=2)
    assert all(found[name].mean < 0.1 for name in CLASSIFIERS if name != "resnet")  # needs more steps


def test_random_labels_teach_nothing():
    found = downstream_accuracies(*noise(200, 1), *noise(1000, 2), num_classes=2)
    assert all(abs(found[name].mean - 0.5) < 0.1 for name in CLASSIFIERS), found


FAST = ("logistic-regression", "mlp")


def guesses_of(monkeypatch, train, test_images, test_labels, **more):
    """The accuracies, and the labels each classifier gave the test images."""
    made, real = [], accuracy.guess

    def watched(*args, **kwargs):
        made.append(real(*args, **kwargs))
        return made[-1]

    monkeypatch.setattr(accuracy, "guess", watched)
    found = downstream_accuracies(*train, test_images, test_labels, num_classes=2, **more)
    monkeypatch.setattr(accuracy, "guess", real)
    return found, made


def test_permuted_test_labels_change_nothing_but_the_figure(monkeypatch):
    train, (images, labels) = halves(80, 1), halves(101, 2)
    permuted = np.random.default_rng(3).permutation(labels)
    found, guesses = guesses_of(monkeypatch, train, images, labels)
    other, same = guesses_of(monkeypatch, train, images, permuted)
    assert len(guesses) == len(CLASSIFIERS)
    for name, first, second in zip(CLASSIFIERS, guesses, same, strict=True):
        assert np.array_equal(first, second)
        assert found[name].mean == np.mean(first == labels) and other[name].mean == np.mean(first == permuted)
    assert found != other


def test_the_other_test_images_have_no_say(monkeypatch):
    train, (images, labels) = halves(80, 1), halves(60, 2)
    _, whole = guesses_of(monkeypatch, train, images, labels)
    _, part = guesses_of(monkeypatch, train, images[:7], labels[:7])
    for first, second in zip(whole, part, strict=True):
        assert np.array_equal(first[:7], second)


def test_choices_are_made_on_images_held_back_from_training(monkeypatch):
    from sfumato.encoders import classifier

    images, labels = halves(90, 1)
    seen, real = [], classifier.train_classifier

    def watched(network, train_images, train_labels, *, validation, **more):
        seen.append((train_images, train_labels, *validation))
        return real(network, train_images, train_labels, validation=validation, **more)

    monkeypatch.setattr(classifier, "train_classifier", watched)
    downstream_accuracies(images, labels, *halves(10, 2), num_classes=2, classifiers=("mlp",))
    ((kept, kept_labels, held, held_labels),) = seen
    assert len(kept) + len(held) == 90 and 7 <= len(held) <= 11
    everything = sorted((image.tobytes(), label) for image, label in zip(images, labels, strict=True))
    parts = [*zip(kept, kept_labels, strict=True), *zip(held, held_labels, strict=True)]
    assert sorted((image.tobytes(), label) for image, label in parts) == everything


@pytest.mark.parametrize(
    ("validation", "chosen"), [([0, 0, 1], 0), ([1, 1, 2], 1), ([2, 2, 2], 2), ([3, 3], 0)]
)
def test_the_regularisation_that_does_best_on_validation_is_taken(monkeypatch, validation, chosen):
    class Constant:
        """Says the position of its C whatever it is shown."""

        def __init__(self, C, **_):
            self.answer = (0.1, 1.0, 10.0).index(C)

        def fit(self, pixels, targets):
            assert pixels.shape == (30, 64) and pixels.dtype == np.float32 and len(targets) == 30
            return self

        def predict(self, pixels):
            return np.full(len(pixels), self.answer)

    monkeypatch.setattr(accuracy, "REGULARISATION", (0.1, 1.0, 10.0))
    monkeypatch.setattr("sklearn.linear_model.LogisticRegression", Constant)
    images, _ = halves(40, 1)
    held = images[: len(validation)], np.array(validation)
    guesses = accuracy._logistic_regression(halves(30, 2), held, images, "x")
    assert guesses.tolist() == [chosen] * 40  # of equals the smallest


def test_seeds_and_their_spread():
    found = downstream_accuracies(
        *noise(60, 1), *noise(300, 2), num_classes=2, seeds=(0, 1, 0), classifiers=FAST
    )
    for name in FAST:
        first, second, again = found[name].seeds
        assert first == again
        assert found[name].std == pytest.approx(np.std([first, second, again], ddof=1))
        assert found[name].mean == pytest.approx(np.mean([first, second, again]))
    assert found["mlp"].seeds[0] != found["mlp"].seeds[1]
    means = [np.mean([found[name].seeds[i] for name in FAST]) for i in range(3)]
    assert found[MEAN].seeds == pytest.approx(means)
    assert Accuracy.over([0.25]) == Accuracy(0.25, None, (0.25,))


def test_a_class_that_is_never_shown_is_never_guessed():
    images, labels = halves(200, 1, classes=4)
    shown, (test, test_labels) = labels != 1, halves(200, 2, classes=4)
    found = downstream_accuracies(images[shown], labels[shown], test, test_labels, num_classes=5)
    assert all(found[name].mean <= np.mean(test_labels != 1) for name in CLASSIFIERS)
    assert found["logistic-regression"].mean > 0.6


@pytest.mark.parametrize("labels", [[0, 1], [0, 0, 1], [0, 1, 2, 3]])
def test_sets_too_small_to_split(labels):
    images = halves(len(labels), 1)[0]
    found = downstream_accuracies(images, np.array(labels), *halves(20, 2), num_classes=4, classifiers=FAST)
    assert 0 <= found[MEAN].mean <= 1


def test_one_colour_and_a_larger_side_train_with_shifts(monkeypatch):
    from sfumato.encoders import classifier

    shifts, real = [], classifier.train_classifier

    def watched(network, *args, largest_shift, **more):
        shifts.append(largest_shift)
        return real(network, *args, largest_shift=largest_shift, **more)

    monkeypatch.setattr(classifier, "train_classifier", watched)
    monkeypatch.setattr(accuracy, "FEWEST_STEPS", 2)
    monkeypatch.setattr(accuracy, "MOST_STEPS", 2)
    downstream_accuracies(*halves(20, 1, size=32), *halves(9, 2, size=32), num_classes=2)
    assert shifts == [0, 1, 1]  # MLP, CNN, ResNet


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(0, 4), min_size=2, max_size=120), st.integers(0, 10**6))
def test_what_is_held_back(labels, seed):
    array = np.array(labels)
    kept, held = held_back(array, seed)
    assert set(array[kept]) == set(labels) and len(held) >= 1
    if max(labels.count(label) for label in set(labels)) > 1:
        assert sorted([*kept, *held]) == list(range(len(labels)))
    else:
        assert list(kept) == list(held) == list(range(len(labels)))
    for label in set(labels):
        assert np.sum(array[held] == label) <= max(1, np.ceil(0.1 * labels.count(label)))
    again = held_back(array, seed)
    assert np.array_equal(kept, again[0]) and np.array_equal(held, again[1])


def test_a_tenth_of_many_small_classes_is_held_back():
    _, held = held_back(np.repeat(np.arange(300), 3), seed=0)
    assert 60 <= len(held) <= 120


# --- what is remembered


def test_an_interrupted_call_goes_on_where_it_stopped(monkeypatch, tmp_path):
    file, sets = tmp_path / "deep" / "accuracy.json", (*halves(60, 1), *halves(50, 2))
    wanted = downstream_accuracies(*sets, num_classes=2)
    calls, real = [], accuracy.guess

    def counted(name, *args, **more):
        calls.append(name)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(name, *args, **more)

    monkeypatch.setattr(accuracy, "guess", counted)
    with pytest.raises(KeyboardInterrupt):
        downstream_accuracies(*sets, num_classes=2, remembered=file)
    assert downstream_accuracies(*sets, num_classes=2, remembered=file) == wanted
    assert calls == [*CLASSIFIERS[:3], *CLASSIFIERS[2:]]
    assert downstream_accuracies(*sets, num_classes=2, remembered=file) == wanted
    assert len(calls) == 5
    assert [path.name for path in file.parent.iterdir()] == [file.name]


def test_a_figure_is_remembered_for_its_inputs_only(monkeypatch, tmp_path):
    file = tmp_path / "accuracy.json"
    monkeypatch.setattr(accuracy, "guess", lambda name, a, b, test, **_: np.zeros(len(test), np.int64))
    images, labels = halves(20, 1)
    test, test_labels = halves(10, 2)
    other_image, other_label, other_test, other_test_label = (
        images.copy(), labels.copy(), test.copy(), test_labels.copy(),
    )  # fmt: skip
    other_image[3, 2, 1, 0] ^= 1
    other_test[9, 7, 7, 0] ^= 1
    other_label[0] = 1 - other_label[0]
    other_test_label[4] = 1 - other_test_label[4]
    inputs = [
        ((images, labels, test, test_labels), 2, 0),
        ((other_image, labels, test, test_labels), 2, 0),
        ((images, other_label, test, test_labels), 2, 0),
        ((images, labels, other_test, test_labels), 2, 0),
        ((images, labels, test, other_test_label), 2, 0),
        ((images[:-1], labels[:-1], test, test_labels), 2, 0),
        ((images, labels, test, test_labels), 3, 0),
        ((images, labels, test, test_labels), 2, 1),
    ]
    for number, (sets, classes, seed) in enumerate(inputs, 1):
        for _ in range(2):
            downstream_accuracies(
                *sets, num_classes=classes, seeds=(seed,), classifiers=("cnn",), remembered=file
            )
            assert len(json.loads(file.read_text())) == number
    same_labels = labels.astype(np.uint8), test_labels.astype(np.int32)
    downstream_accuracies(
        images, same_labels[0], test, same_labels[1], num_classes=2, classifiers=("cnn",), remembered=file
    )
    assert len(json.loads(file.read_text())) == len(inputs)
    monkeypatch.setattr(accuracy, "EPOCHS", 13)
    downstream_accuracies(*inputs[0][0], num_classes=2, classifiers=("cnn",), remembered=file)
    assert len(json.loads(file.read_text())) == len(inputs) + 1


@pytest.mark.parametrize("text", ["", "[1]", '{"a": "b"}', '{"a": 1.5}', '{"cnn/0', "\x00\xff"])
def test_a_file_that_remembers_nothing(tmp_path, text):
    file = tmp_path / "accuracy.json"
    file.write_text(text, encoding="latin-1")
    with pytest.raises(InputError, match=r"accuracy\.json.*delete it"):
        downstream_accuracies(*halves(20, 1), *halves(10, 2), num_classes=2, remembered=file)
    assert file.read_text(encoding="latin-1") == text


def test_inputs_are_left_as_they_are_and_may_be_read_only_maps(tmp_path):
    images, labels = halves(40, 1)
    np.save(tmp_path / "images.npy", images)
    mapped = np.load(tmp_path / "images.npy", mmap_mode="r")
    found = downstream_accuracies(mapped, labels, mapped, labels, num_classes=2, classifiers=FAST)
    assert found == downstream_accuracies(images, labels, images, labels, num_classes=2, classifiers=FAST)
    assert np.array_equal(np.load(tmp_path / "images.npy"), images)


# --- what cannot be used


def change(**changes):
    images, labels = halves(20, 1)
    test, test_labels = halves(10, 2)
    sets = {"a": images, "b": labels, "c": test, "d": test_labels, "num_classes": 2, **changes}
    return [sets.pop(name) for name in "abcd"], sets


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"c": np.zeros((10, 9, 8, 1), np.uint8)}, "8 x 8 with 1 channel and the test images 8 x 9 with 1"),
        ({"c": np.zeros((10, 8, 8, 3), np.uint8)}, "1 channel and .* 3 channels"),
        ({"a": np.zeros((20, 8, 8, 1), np.float32)}, "training images must be uint8"),
        ({"c": np.zeros((10, 64), np.uint8)}, "test images must be uint8"),
        ({"a": np.zeros((20, 8, 8, 4), np.uint8)}, "1 or 3 channels"),
        ({"a": np.zeros((20, 7, 8, 1), np.uint8)}, "8 pixels a side"),
        ({"b": np.full(20, 2)}, "labels of the training set must be whole numbers from 0 to 1"),
        ({"d": np.full(10, -1)}, "labels of the test set"),
        ({"b": np.zeros(20, np.float32)}, "whole numbers"),
        ({"b": np.zeros(19, np.int64)}, "20 images and 19 labels"),
        ({"c": np.zeros((0, 8, 8, 1), np.uint8), "d": np.zeros(0, np.int64)}, "0 images"),
        ({"b": np.zeros(20, np.int64)}, "fewer than two classes"),
        ({"num_classes": 1, "b": np.zeros(20, np.int64), "d": np.zeros(10, np.int64)}, "fewer than two"),
        ({"classifiers": ("cnn", "vit")}, "vit"),
        ({"classifiers": ()}, "classifiers must be some of"),
        ({"seeds": ()}, "at least one seed"),
    ],
)  # fmt: skip
def test_inputs_that_do_not_fit(changes, words):
    sets, more = change(**changes)
    with pytest.raises(InputError, match=words) as caught:
        downstream_accuracies(*sets, **more)
    assert "\n" not in str(caught.value)
