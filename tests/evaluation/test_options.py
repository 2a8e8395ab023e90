"""Options of evaluate: what names a run, a release or a set, where results go, what is refused early."""

from __future__ import annotations

from dataclasses import replace

import pytest

from sfumato.cli.parsing import field_help
from sfumato.errors import InputError
from sfumato.evaluation.options import EvaluateOptions, find_target

OPTIONS = EvaluateOptions("images.npz", "real.npz")


@pytest.fixture
def run(tmp_path, monkeypatch):
    """A run's folder with a release in it, the current folder being the one around it."""
    folder = tmp_path / "runs" / "scans"
    (folder / "release" / "images").mkdir(parents=True)
    (folder / "internal").mkdir()
    (folder / "config.yaml").write_text("private: scans\n")
    (folder / "release" / "privacy.json").write_text("{}")
    monkeypatch.chdir(tmp_path)
    return folder


def test_every_option_has_its_help():
    assert set(field_help(EvaluateOptions)) >= {
        "images",
        "against",
        "holdout",
        "features",
        "reference_is_public",
    }


def test_a_run_is_known_by_any_of_its_folders(run, monkeypatch):
    for name in (run, run / "release", run / "release" / "images", "runs/scans", "runs/scans/release/"):
        target = find_target(str(name))
        assert target.release is not None and target.release.resolve() == run / "release"
        assert target.run is not None and target.run.resolve() == run
        assert target.images.endswith("images")
        assert replace(OPTIONS, images=str(name)).folder.resolve() == run
    for inside, name in ((run, "."), (run, "release"), (run / "release", "."), (run / "release", "images")):
        monkeypatch.chdir(inside)
        assert find_target(name).run.resolve() == run, (inside, name)  # type: ignore[union-attr]


def test_a_release_that_was_handed_on_has_no_run(run, tmp_path):
    (run / "release").rename(tmp_path / "theirs")
    target = find_target(str(tmp_path / "theirs"))
    assert target.release == tmp_path / "theirs" and target.run is None
    assert str(replace(OPTIONS, images=str(tmp_path / "theirs")).folder) == "runs/theirs-evaluation"


def test_a_run_without_a_release_is_told(run):
    (run / "release" / "privacy.json").unlink()
    with pytest.raises(InputError, match=r"without a finished release.*sfumato synthesize"):
        find_target(str(run))


@pytest.mark.parametrize(
    ("images", "folder"),
    [
        ("data/More Images.npz", "runs/more-images-evaluation"),
        ("demo:digits", "runs/demo-digits-evaluation"),
        ("hf:owner/name:train", "runs/name-train-evaluation"),
        ("???", "runs/images-evaluation"),
    ],
)
def test_other_sets_get_a_folder_of_their_own(images, folder):
    assert str(replace(OPTIONS, images=images).folder) == folder
    assert str(replace(OPTIONS, images=images, out="there").folder) == "there"


def test_nothing_internal_is_put_into_a_release(run, monkeypatch):
    for out in (run / "release", run / "release" / "images", run / "release" / "deep" / "er"):
        with pytest.raises(InputError, match="lies inside the release"):
            replace(OPTIONS, out=str(out)).check()
    monkeypatch.chdir(run / "release")  # the default folder would be inside it too
    with pytest.raises(InputError, match="lies inside the release"):
        OPTIONS.check()
    replace(OPTIONS, images=str(run / "release")).check()  # goes to the run's internal/


@pytest.mark.parametrize(
    ("features", "specs"),
    [
        ("efficientnet-lite0,pixels", ("efficientnet-lite0", "pixels")),
        (" pixels , fid=inception.pt,", ("pixels", "fid=inception.pt")),
        ("pixels efficientnet-lite0", ("pixels", "efficientnet-lite0")),
    ],
)
def test_features_are_separated_by_commas_or_spaces(features, specs):
    assert replace(OPTIONS, features=features).feature_specs == specs


def test_a_path_with_spaces_stays_whole(tmp_path):
    weights = tmp_path / "my weights, v2.pt"
    weights.touch()
    for spec in (str(weights), f"fid={weights}"):
        assert replace(OPTIONS, features=spec).feature_specs == (spec,)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"size": 2}, "--size 2"),
        ({"channels": 2}, "--channels 2"),
        ({"seeds": 0}, "--seeds 0"),
        ({"features": " , "}, "--features names no feature space"),
        ({"features": "pixels,pixels"}, "--features names pixels twice"),
        ({"reference_is_public": True}, "images.npz is none"),
    ],
)
def test_what_cannot_work_is_refused_with_its_option(change, says):
    with pytest.raises(InputError) as told:
        replace(OPTIONS, **change).check()
    assert says in str(told.value) and "nothing was done" in str(told.value)


def test_figures_on_public_images_go_into_the_release_only(run):
    options = replace(OPTIONS, images=str(run), reference_is_public=True)
    options.check()
    with pytest.raises(InputError, match="--out elsewhere cannot be used"):
        replace(options, out="elsewhere").check()
