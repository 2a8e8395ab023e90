"""The whole evaluation on tiny sets: figures, resuming, what may be written where, what is refused."""

from __future__ import annotations

import json
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest

from sfumato.data.images import OwnerArray, OwnerOnly
from sfumato.data.release import ReleaseWriter, refuse_private
from sfumato.encoders.encoder import open_encoder
from sfumato.errors import InputError
from sfumato.evaluation import feature_metrics, run
from sfumato.evaluation.frechet import Moments, frechet_distance
from sfumato.evaluation.image_sets import ImageSet
from sfumato.evaluation.options import EvaluateOptions
from sfumato.evaluation.run import COPIED, Place, evaluate

SIDE = 8
NAMES = ("no", "one/two")  # the second cannot be a folder's name


def draw(per_label, seed, side=SIDE):
    """Noise with a bright row or a bright column, labelled by which."""
    rng = np.random.default_rng(seed)
    labels = np.repeat([0, 1], per_label)
    images = rng.integers(0, 120, (2 * per_label, side, side, 1), dtype=np.uint8)
    images[:per_label, 1] = 250
    images[per_label:, :, 1] = 250
    return images, labels


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """One classifier instead of four: the cheapest."""
    only = partial(run.downstream_accuracies, classifiers=("logistic-regression",))
    monkeypatch.setattr(run, "downstream_accuracies", only)


@pytest.fixture
def sets(tmp_path, monkeypatch):
    """Paths of private, held-out and other images, and a run that released images."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))

    def write(name, images, labels=None):
        named = {} if labels is None else {"labels": np.array(NAMES)[labels]}
        np.savez(tmp_path / f"{name}.npz", images=images, **named)
        return str(tmp_path / f"{name}.npz")

    private = write("private", *draw(40, 1))
    (tmp_path / "run" / "internal").mkdir(parents=True)
    (tmp_path / "run" / "config.yaml").write_text(f"private: {private}\nskip_unreadable: false\n")
    writer = ReleaseWriter(tmp_path / "run")
    writer.images(*draw(20, 2), NAMES)
    writer.json("privacy.json", {"format": "sfumato-privacy/1"})
    writer.complete()
    return SimpleNamespace(
        write=write,
        private=private,
        held=write("held", *draw(15, 3)),
        public=write("atlas", *draw(30, 4)),
        run=tmp_path / "run",
        plain=write("plain", draw(20, 5)[0]),
    )


def options(sets, **change):
    given = {"images": str(sets.run), "against": sets.private, "holdout": sets.held, "features": "pixels"}
    return EvaluateOptions(**(given | change))


def summary_of(sets, **change):
    return evaluate(options(sets, **change)).summary.value


def refused(sets, **change):
    with pytest.raises(InputError) as told:
        evaluate(options(sets, **change))
    assert "\n" not in str(told.value)
    return str(told.value)


def test_the_figures_are_those_of_the_sets(sets):
    summary = summary_of(sets)
    kept = json.loads((sets.run / "internal" / "evaluation" / "summary.json").read_text())
    assert kept == {"not_for_release": True, **json.loads(json.dumps(summary))}
    figures = summary["features"]["pixels"]
    encoder = open_encoder("pixels")
    made, private, held = (Moments.of(encoder(draw(*each)[0])) for each in ((20, 2), (40, 1), (15, 3)))
    assert figures["frechet"] == pytest.approx(frechet_distance(private, made), rel=1e-6)
    assert figures["attainable"]["frechet"] == pytest.approx(frechet_distance(private, held), rel=1e-6)
    assert figures["kid_interval"][0] <= figures["kid"] <= figures["kid_interval"][1]
    for name in ("precision", "recall", "coverage", "authenticity"):
        assert 0 <= figures[name] <= 1
    assert (
        figures["encoder"]["identity"] == encoder.identity and figures["encoder"]["dimension"] == SIDE * SIDE
    )
    assert summary["accuracy"]["logistic-regression"]["mean"] > 0.95  # the labels are matched
    assert summary["accuracy"]["mean"]["std"] is None
    assert summary["ceiling"]["accuracy"]["mean"]["mean"] > 0.95 and summary["floor"]["accuracy"] == 0.5
    assert summary["label_names"] == list(NAMES)
    assert (summary["synthetic"]["images"], summary["against"]["images"], summary["holdout"]["images"]) == (
        40,
        80,
        30,
    )


def test_several_seeds_show_their_spread(sets):
    accuracy = summary_of(sets, seeds=2)["accuracy"]["mean"]
    assert len(accuracy["seeds"]) == 2 and accuracy["std"] is not None


def test_what_is_computed_from_private_images_is_for_their_owner_only(sets):
    before = set(sets.run.joinpath("release").rglob("*"))
    result = evaluate(options(sets))
    for part in (result.summary, result.gallery, result.points):
        with pytest.raises(InputError):
            refuse_private(part, "it")
    assert all(isinstance(real, OwnerArray) for _, _, real in result.gallery.value)
    assert set(sets.run.joinpath("release").rglob("*")) == before
    assert (sets.run / "internal" / "NOT_FOR_RELEASE.txt").exists()
    writer = ReleaseWriter(sets.run.parent / "other")
    for part in (result.summary, result.gallery):
        with pytest.raises(InputError):
            writer.json("summary.json", part)


def test_a_plain_set_gets_a_folder_of_its_own(sets, tmp_path):
    evaluate(options(sets, images=sets.public))
    assert (tmp_path / "runs" / "atlas-evaluation" / "internal" / "evaluation" / "summary.json").exists()
    evaluate(options(sets, images=sets.public, out="there"))
    assert (tmp_path / "there" / "internal" / "evaluation" / "summary.json").exists()


def test_the_gallery_shows_both_sets_by_label(sets):
    gallery = evaluate(options(sets)).gallery.value
    assert [name for name, _, _ in gallery] == list(NAMES)
    for label, (_, made, real) in enumerate(gallery):
        for shown in (np.asarray(made), np.asarray(real)):
            assert len(shown) == 10
            assert (shown[:, 1] == 250).all() if label == 0 else (shown[:, :, 1] == 250).all()


def test_the_same_command_again_measures_nothing(sets, monkeypatch):
    first = evaluate(options(sets))
    assert first.fresh

    def never(*_, **__):
        raise AssertionError("measured again")

    for name in (
        "cached_features",
        "frechet_distance",
        "kernel_distance",
        "neighbour_metrics",
        "authenticity",
    ):
        monkeypatch.setattr(feature_metrics, name, never)
    monkeypatch.setattr("sfumato.evaluation.accuracy.guess", never)
    again = evaluate(options(sets))
    assert not again.fresh and again.summary.value == first.summary.value


def test_another_seed_is_a_fresh_figure(sets):
    evaluate(options(sets))
    assert evaluate(options(sets, seeds=2)).fresh and not evaluate(options(sets)).fresh


def test_other_options_measure_what_they_change_and_no_more(sets, monkeypatch):
    evaluate(options(sets, holdout=None))
    measured = []
    distance = feature_metrics.frechet_distance
    monkeypatch.setattr(
        feature_metrics,
        "frechet_distance",
        lambda a, b: measured.append((a.count, b.count)) or distance(a, b),
    )
    assert "attainable" in summary_of(sets)["features"]["pixels"]
    assert measured == [(80, 30)]
    other = sets.write("more", *draw(25, 9))
    summary_of(sets, images=other, out=str(sets.run))
    assert measured == [(80, 30), (80, 50)]


def test_after_an_interruption_what_was_measured_stays(sets, monkeypatch):
    def stop(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(feature_metrics, "neighbour_metrics", stop)
        with pytest.raises(KeyboardInterrupt):
            evaluate(options(sets))
    assert not (sets.run / "internal" / "evaluation" / "summary.json").exists()
    monkeypatch.setattr(feature_metrics, "frechet_distance", lambda a, b: 1 / 0 if b.count == 40 else 7.0)
    assert summary_of(sets)["features"]["pixels"]["attainable"]["frechet"] == 7.0


def test_damaged_or_older_figures_are_measured_again(sets):
    evaluate(options(sets))
    kept = sets.run / "internal" / "evaluation" / "measured.json"
    figures = json.loads(kept.read_text())
    kept.write_text(json.dumps(figures | {"version": "0.0.0"}))
    assert evaluate(options(sets)).fresh
    kept.write_text("{")
    assert evaluate(options(sets)).fresh


def test_features_of_another_encoder_are_refused(sets, monkeypatch):
    evaluate(options(sets))
    other = open_encoder("pixels")
    other.identity = "0" * 64  # type: ignore[misc]
    monkeypatch.setattr(run, "open_encoder", lambda spec: other)
    line = refused(sets)
    assert "pixels" in line and "delete that folder" in line and "--out" in line


def test_features_that_are_not_finite_are_refused_with_the_image(sets, monkeypatch):
    encoder = open_encoder("pixels")

    class Broken:
        name, identity, dimension, distance = "broken", "1" * 64, None, "FD-broken"

        def __call__(self, images):
            features = encoder(images)
            features[2] = np.nan
            return features

    monkeypatch.setattr(run, "open_encoder", lambda spec: Broken())
    line = refused(sets)
    assert "broken" in line and "image 3" in line


def test_two_spaces_of_one_name_are_refused(sets, monkeypatch):
    monkeypatch.setattr(run, "open_encoder", lambda spec: open_encoder("pixels"))
    assert "the name pixels" in refused(sets, features="pixels,other")


def test_fewer_images_than_dimensions_are_warned_about(sets):
    warnings = summary_of(sets)["features"]["pixels"]["warnings"]
    assert any("synthetic" in warning and "40 images for 64" in warning for warning in warnings)
    assert any("held-out" in warning for warning in warnings)
    assert not any(warning.startswith("real images") for warning in warnings)  # 80 of them


def test_the_private_images_themselves_are_called_a_copy(sets):
    summary = summary_of(sets, images=sets.private, out="copy")
    assert COPIED in summary["notes"] and summary["copies"]["synthetic"] == 80
    figures = summary["features"]["pixels"]
    assert figures["frechet"] < 1e-6 and figures["authenticity"] == 0
    assert figures["memorised_by_authenticity"] is True and any(
        "memorisation" in w for w in figures["warnings"]
    )


def test_some_copies_are_counted(sets):
    images, labels = draw(20, 2)
    images[:3] = draw(40, 1)[0][:3]
    notes = summary_of(sets, images=sets.write("leaky", images, labels), out="leaky")["notes"]
    assert any(note.startswith("3 of the 40 synthetic images are") for note in notes)


def test_a_holdout_that_is_not_held_out(sets):
    assert "--holdout holds no image that --against lacks" in refused(sets, holdout=sets.private)
    images, labels = draw(15, 3)
    subset = sets.write("subset", *(array[30:50] for array in draw(40, 1)))
    assert "--holdout holds no image" in refused(sets, holdout=subset)
    images[:2] = draw(40, 1)[0][:2]
    notes = summary_of(sets, holdout=sets.write("mixed", images, labels))["notes"]
    assert any(note.startswith("2 of the 30 held-out images are also") for note in notes)


def test_without_labels_accuracy_is_skipped_and_said(sets):
    summary = summary_of(sets, images=sets.plain, out="plain")
    assert summary["accuracy"] == {} and "ceiling" not in summary
    assert any("skipped: the synthetic images have no labels" in note for note in summary["notes"])
    bare = sets.write("bare", draw(15, 3)[0])
    assert any(
        "the held-out images have no labels" in note for note in summary_of(sets, holdout=bare)["notes"]
    )
    assert any("--holdout" in note for note in summary_of(sets, holdout=None)["notes"])
    real = sets.write("real", draw(40, 1)[0])
    summary = summary_of(sets, against=real)  # labels from the holdout; no ceiling without real ones
    assert summary["accuracy"] and "ceiling" not in summary
    assert summary["features"]["pixels"]["frechet"] > 0


def test_one_label_or_one_missing(sets):
    images, labels = draw(20, 2)
    notes = summary_of(sets, images=sets.write("ones", images[20:], labels[20:]), out="ones")["notes"]
    assert any("one label only" in note for note in notes)
    third = sets.write("third", np.concatenate([draw(40, 1)[0], draw(4, 7)[0][:4]]))
    np.savez(
        third,
        images=np.load(third)["images"],
        labels=np.array([*np.array(NAMES)[draw(40, 1)[1]], *["x"] * 4]),
    )
    notes = summary_of(sets, against=third, out="third")["notes"]
    assert any("No synthetic image has the label x" in note for note in notes)


def test_other_labels_are_refused(sets):
    np.savez("odd.npz", images=draw(20, 2)[0], labels=np.repeat(["no", "never"], 20))
    assert "the synthetic set has labels that the real images lack: never" in refused(
        sets, images="odd.npz", out="o"
    )
    assert "--holdout has labels that the real images lack: never" in refused(sets, holdout="odd.npz")


def test_other_sizes_and_channels_are_brought_to_the_releases_and_said(sets):
    images, labels = draw(40, 1, side=12)
    large = sets.write("large", np.repeat(images, 3, axis=3), labels)
    summary = summary_of(sets, against=large)
    assert summary["size"] == [8, 8] and summary["channels"] == 1
    assert "The --against images are 12 x 12 RGB; they were brought to 8 x 8 grey." in summary["notes"]
    summary = summary_of(sets, size=10, channels=3)
    assert summary["size"] == [10, 10] and summary["features"]["pixels"]["encoder"]["dimension"] == 300


def test_small_images_are_compared_but_not_learned_from(sets):
    summary = summary_of(sets, size=6)
    assert summary["accuracy"] == {} and any("8 pixels a side" in note for note in summary["notes"])


def test_too_few_images(sets):
    few = sets.write("few", draw(1, 8)[0])
    assert "the synthetic set has 2 images" in refused(sets, images=few, out="few")
    assert "--against has 2 images" in refused(sets, against=few)
    summary = summary_of(sets, images=sets.write("four", draw(2, 8)[0]), out="four")
    assert summary["features"]["pixels"]["neighbours"] == 3


def test_what_does_not_exist(sets):
    assert "nowhere" in refused(sets, against="nowhere")
    assert "nowhere" in refused(sets, holdout="nowhere")
    assert "nowhere" in refused(sets, images="nowhere")
    assert "nowhere" in refused(sets, features="nowhere")


def test_figures_on_public_images_go_into_the_release(sets):
    result = evaluate(options(sets, against=sets.public, holdout=sets.held, reference_is_public=True))
    folder = sets.run / "release" / "evaluation"
    assert result.place.path == folder and {path.name for path in folder.iterdir()} == {"summary.json"}
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["reference_is_public"] is True and "not_for_release" not in summary
    assert (
        "declared to be public" in summary["statement"]
        and summary["accuracy"]
        and summary["features"]["pixels"]
    )
    refuse_private([result.summary, result.gallery, result.points], "it")
    for secret in (str(sets.run.parent), "private.npz"):
        assert secret not in (folder / "summary.json").read_text()
    assert not (sets.run / "internal" / "evaluation" / "summary.json").exists()


def test_the_protected_images_are_never_taken_for_public(sets, tmp_path):
    images, labels = draw(40, 1)
    with np.load(sets.private) as kept:
        np.savez(tmp_path / "copy.npz", **kept)
    turned = sets.write("turned", images[::-1].copy(), labels[::-1].copy())
    subset = sets.write("subset", images[30:50], labels[30:50])
    mixed_images, mixed_labels = draw(30, 4)
    mixed_images[:6] = images[11:17]
    mixed = sets.write("mixed", mixed_images, mixed_labels)
    for against in (sets.private, str(tmp_path / "copy.npz"), turned, subset, mixed):
        line = refused(sets, against=against, holdout=None, reference_is_public=True)
        assert "the same, or one holds the other" in line or "among those that the run protects" in line
    line = refused(sets, against=sets.public, holdout=mixed, reference_is_public=True)
    assert "--holdout: 6 of its 60 images" in line
    assert not (sets.run / "release" / "evaluation").exists()


def test_a_stray_protected_image_is_told_to_the_owner_alone(sets, capsys):
    images, labels = draw(30, 4)
    images[0] = draw(40, 1)[0][0]
    stray = sets.write("stray", images, labels)
    evaluate(options(sets, against=stray, holdout=None, reference_is_public=True))
    assert "--against: 1 of its 60 images are among those" in capsys.readouterr().err
    for file in (sets.run / "release" / "evaluation").iterdir():
        assert "protects" not in file.read_text()


def test_when_the_protected_images_cannot_be_seen_nothing_is_public(sets, tmp_path):
    (tmp_path / "private.npz").rename(tmp_path / "elsewhere.npz")
    line = refused(sets, against=str(tmp_path / "elsewhere.npz"), reference_is_public=True)
    assert "cannot be opened to make sure" in line and "where the run was made" in line
    (sets.run / "config.yaml").write_text("- nonsense\n")
    assert "cannot be opened to make sure" in refused(sets, against=sets.public, reference_is_public=True)
    assert not (sets.run / "release" / "evaluation").exists()


def test_a_release_that_was_handed_on_is_measured_where_it_lies(sets, tmp_path):
    (sets.run / "release").rename(tmp_path / "theirs")
    evaluate(options(sets, images=str(tmp_path / "theirs"), against=sets.public, reference_is_public=True))
    assert (tmp_path / "theirs" / "evaluation" / "summary.json").exists()


def test_nothing_of_the_owners_is_written_into_a_release(sets):
    place = Place(sets.run, sets.run / "release")
    private = np.zeros((2, 2)).view(OwnerArray)
    for content in (OwnerOnly({"frechet": 1.0}), {"a": [private]}):
        with pytest.raises(InputError):
            place.json("summary.json", content)
    with pytest.raises(InputError):
        place.text("report.html", OwnerOnly("<html>"))
    assert not (sets.run / "release" / "evaluation").exists()


def test_a_full_disk_leaves_the_release_as_it_was(sets, monkeypatch):
    import errno
    import os

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    place = Place(sets.run, sets.run / "release")
    place.json("summary.json", {"a": 1})
    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(InputError, match="the disk is full"):
        place.json("summary.json", {"a": 2})
    folder = sets.run / "release" / "evaluation"
    assert [path.name for path in folder.iterdir()] == ["summary.json"]
    assert json.loads((folder / "summary.json").read_text()) == {"a": 1}


def test_built_in_sets_bring_their_holdout(sets, monkeypatch):
    asked = []
    monkeypatch.setattr(run, "default_holdout", lambda spec: asked.append(spec) or sets.held)
    assert summary_of(sets, holdout=None)["holdout"]["images"] == 30 and asked == [sets.private]


def test_of_many_labels_those_of_the_synthetic_images_are_shown(sets):
    names = [f"n{number:02d}" for number in range(60)]
    images = np.concatenate([draw(30, 1)[0], draw(2, 2)[0]])
    np.savez("many.npz", images=images, labels=np.array([*names, "no", "one/two", "no", "no"]))
    shown = [name for name, _, _ in evaluate(options(sets, against="many.npz")).gallery.value]
    assert (
        len(shown) == run.LABELS_SHOWN and set(NAMES) <= set(shown) and "n00" in shown and "n59" not in shown
    )


def test_a_holdout_of_another_number_is_said(sets):
    said = "There are 40 synthetic and 30 held-out images."
    assert any(note.startswith(said) for note in summary_of(sets)["notes"])
    equal = sets.write("equal", *draw(20, 3))
    assert not any(note.startswith("There are") for note in summary_of(sets, holdout=equal)["notes"])


def test_a_huge_set_is_learned_from_in_part(sets, monkeypatch):
    seen = []
    learn = run.downstream_accuracies
    monkeypatch.setattr(run, "MOST_LEARNED", 35)
    monkeypatch.setattr(
        run, "downstream_accuracies", lambda *s, **k: seen.append([len(each) for each in s]) or learn(*s, **k)
    )
    summary = summary_of(sets)
    assert seen == [[35, 35, 30, 30], [35, 35, 30, 30]] and any(
        "35 images of a set" in n for n in summary["notes"]
    )
    assert summary["accuracy"]["mean"]["mean"] > 0.9 and summary["synthetic"]["images"] == 40


def test_images_without_a_label_among_labelled_ones_are_left_out():
    some = ImageSet(
        "x", draw(20, 2)[0], np.where(np.arange(40) % 4, draw(20, 2)[1], -1), np.empty(40, "V16"), "0"
    )
    pixels, labels = run._labelled(some)
    assert len(pixels) == len(labels) == 30 and (labels >= 0).all()
    np.testing.assert_array_equal(pixels, draw(20, 2)[0][np.arange(40) % 4 > 0])
    nothing = ImageSet("x", draw(20, 2)[0], np.full(40, -1), np.empty(40, "V16"), "0")
    assert run._labelled(nothing) is None


@pytest.mark.parametrize("how", ["brighter", "link", "renamed", "no config"])
def test_what_a_run_protects_is_found_under_disguises(sets, tmp_path, how):
    """Almost the same pixels, a link to the release, a renamed release, a run without its configuration."""
    run = sets.run
    against, images = sets.private, run / "release"
    if how == "brighter":
        with np.load(sets.private) as of:
            brighter = np.clip(of["images"].astype(int) + 2, 0, 255).astype(np.uint8)
            against = str(tmp_path / "brighter.npz")
            np.savez(against, images=brighter, labels=of["labels"])
    elif how == "link":
        images = tmp_path / "link"
        images.symlink_to(run / "release")
    elif how == "renamed":
        images = (run / "release").rename(run / "release-v1")
    else:
        (run / "config.yaml").unlink()
        (run / "internal").mkdir(exist_ok=True)
    line = refused(sets, images=str(images), against=against, holdout=None, reference_is_public=True)
    assert "protects" in line or "the same, or one holds the other" in line
    assert not (images / "evaluation").exists()


def test_repeated_copies_are_all_counted(sets, tmp_path):
    with np.load(sets.private) as of:
        many = str(tmp_path / "many.npz")
        np.savez(many, **{name: np.concatenate([of[name]] * 12) for name in of.files})
    line = refused(sets, against=many, holdout=None, reference_is_public=True)
    assert "protects" in line and not (sets.run / "release" / "evaluation").exists()


def test_a_page_for_everybody_shows_no_picture_of_the_reference(sets, tmp_path):
    run = sets.run
    result = evaluate(
        options(sets, images=str(run), against=sets.public, holdout=None, reference_is_public=True)
    )
    assert all(len(real) == 0 and len(made) > 0 for _, made, real in result.gallery)
    assert all(set(of) == {"synthetic"} for of in result.points.values())
