"""Planting, sealing, checking and scoring canaries."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
from PIL import Image

from sfumato.audit import canaries as module
from sfumato.audit.canaries import check_training, open_sealed, plant
from sfumato.data.images import OwnerArray, PublicImages
from sfumato.data.records import Record, Source
from sfumato.data.release import refuse_private
from sfumato.data.sources import open_source
from sfumato.errors import InputError
from sfumato.privacy.randomness import SecureStream

NAMES = ("T-shirt/top", "train", "cat")


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
    monkeypatch.setattr(module, "CLAIMS", (1, 2))  # larger ones take seconds to work out


@pytest.fixture
def pictures():
    """60 different 8 x 8 grey images, the last two equal, and their labels."""
    images = np.random.default_rng(0).integers(0, 256, (60, 8, 8, 1), dtype=np.uint8)
    images[59] = images[58]
    return images, np.arange(60) % 3


@pytest.fixture
def private(tmp_path, pictures):
    """A labelled folder of them; its metadata names the labels."""
    folder = tmp_path / "private"
    folder.mkdir()
    rows = []
    for number, (image, label) in enumerate(zip(*pictures, strict=True)):
        Image.fromarray(image[:, :, 0]).save(folder / f"{number}.png")
        rows.append(json.dumps({"file_name": f"{number}.png", "label": NAMES[label]}))
    (folder / "metadata.jsonl").write_text("\n".join(rows) + "\n")
    return folder


@pytest.fixture
def flat(tmp_path, pictures):
    folder = tmp_path / "flat"
    folder.mkdir()
    for number, image in enumerate(pictures[0]):
        Image.fromarray(image[:, :, 0]).save(folder / f"{number}.png")
    return folder


def pixels_and_labels(spec):
    """Sorted (pixels, label name) of a collection."""
    opened = PublicImages(spec, size=8, channels=1)
    names = opened.label_names
    labels = [None if names is None else names[label] for label in opened.labels]
    return sorted(zip([image.tobytes() for image in opened.images], labels, strict=True), key=str)


def of(sealed, wanted):
    names = sealed.label_names
    labels = [None if names is None else names[label] for label in sealed.labels]
    return [(i.tobytes(), label) for i, label, w in zip(sealed.images, labels, wanted, strict=True) if w]


def test_own_canaries_that_are_out_are_all_that_training_lacks(private, tmp_path):
    sealed = plant(str(private), count=30, out=tmp_path / "out")
    assert sealed.images.shape == (30, 8, 8, 1) and sealed.kind == "own" and 0 < sealed.included.sum() < 30
    train = pixels_and_labels(tmp_path / "out" / "train")
    assert sorted(train + of(sealed, ~sealed.included), key=str) == pixels_and_labels(private)
    assert set(of(sealed, sealed.included)) <= set(train)
    assert (sealed.train_images, sealed.expected_images) == (len(train), 45)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "sealed.json",
        "sealed.npz",
        "train",
    ]
    assert {path.name for path in (tmp_path / "out" / "train").iterdir() if path.is_dir()} == {
        "T-shirt_top",
        "label_0002",
        "cat",
    }  # fmt: skip  ("train" would be taken for a split)
    check_training(sealed, tmp_path / "out" / "train")


def test_pattern_canaries_that_are_in_are_all_that_training_has_more(private, tmp_path):
    sealed = plant(str(private), count=40, out=tmp_path / "out", kind="pattern", delta=1e-6)
    train = pixels_and_labels(tmp_path / "out" / "train")
    assert sorted(pixels_and_labels(private) + of(sealed, sealed.included), key=str) == train
    assert sealed.label_names == ("T-shirt/top", "cat", "train") and set(sealed.labels) == {0, 1, 2}
    assert sealed.expected_images == 80 and sealed.delta == 1e-6
    check_training(sealed, tmp_path / "out" / "train")


@pytest.mark.parametrize("kind", ["own", "pattern"])
def test_unlabelled_sets_stay_flat(flat, tmp_path, kind):
    sealed = plant(str(flat), count=20, out=tmp_path / "out", kind=kind)
    assert sealed.label_names is None and (sealed.labels == -1).all()
    train = tmp_path / "out" / "train"
    assert all(path.suffix == ".png" for path in train.iterdir())
    assert len(list(train.iterdir())) == sealed.train_images
    check_training(sealed, train)


def test_copies_and_one_image_of_each_label_are_never_canaries(private, pictures, tmp_path):
    sealed = plant(str(private), count=55, out=tmp_path / "out")  # 60 less two copies and three that stay
    copied = pictures[0][58].tobytes()
    assert copied not in {image.tobytes() for image in sealed.images}
    opened = PublicImages(tmp_path / "out" / "train", size=8, channels=1)
    assert opened.label_names == sealed.label_names == ("T-shirt/top", "cat", "train")


def test_coins_are_fair_and_come_from_the_secure_stream(flat, tmp_path, monkeypatch):
    asked = []

    class Watched(SecureStream):
        def bernoulli(self, p, n):
            asked.append((p, n))
            return super().bernoulli(p, n)

    monkeypatch.setattr(module, "SecureStream", Watched)
    seals = [plant(str(flat), count=50, out=tmp_path / f"out{i}") for i in range(8)]
    assert asked == [(0.5, 50)] * 8
    assert 140 <= sum(int(sealed.included.sum()) for sealed in seals) <= 260  # 200 +- 6 standard deviations
    assert len({sealed.included.tobytes() for sealed in seals}) == 8
    assert len({sealed.identity for sealed in seals}) == 8


def test_names_in_the_training_folder_tell_nothing(flat, tmp_path):
    positions = []
    for i in range(6):
        sealed = plant(str(flat), count=50, out=tmp_path / f"out{i}", kind="pattern")
        own = {image.tobytes() for image in sealed.images}
        opened = PublicImages(tmp_path / f"out{i}" / "train", size=8, channels=1)
        positions += [
            place / len(opened) for place, image in enumerate(opened.images) if image.tobytes() in own
        ]
    assert abs(np.mean(positions) - 0.5) < 0.15 and min(positions) < 0.1 and max(positions) > 0.9


def test_images_keep_their_size_and_mixed_sizes_need_one(flat, tmp_path):
    Image.fromarray(np.zeros((12, 12), np.uint8)).save(flat / "large.png")
    with pytest.raises(InputError, match=r"nothing was planted. Say with --size") as error:
        plant(str(flat), count=10, out=tmp_path / "out")
    assert "large.png" in str(error.value) and not (tmp_path / "out").exists()
    sealed = plant(str(flat), count=10, out=tmp_path / "out", size=6, channels=3)
    assert sealed.images.shape[1:] == (6, 6, 3)
    check_training(sealed, tmp_path / "out" / "train")


@pytest.mark.parametrize(
    ("count", "kind", "says"),
    [
        (0, "own", "--count 0"),
        (56, "own", "--count 56 is more than the 55 images"),
        (-3, "pattern", "--count -3"),
    ],
)
def test_counts_that_cannot_be_planted(private, tmp_path, count, kind, says):
    for _ in range(8):  # whichever image of a label is drawn to stay
        with pytest.raises(InputError, match=f"{says}.*nothing was planted"):
            plant(str(private), count=count, out=tmp_path / "out", kind=kind)
    assert not (tmp_path / "out").exists()


def test_more_patterns_than_fit_into_the_pixels_are_refused(tmp_path):
    np.savez(tmp_path / "tiny.npz", images=np.arange(40, dtype=np.uint8).reshape(10, 2, 2, 1))
    with pytest.raises(InputError, match=r"too small for so many patterns.*nothing was planted"):
        plant(tmp_path / "tiny.npz", count=500, out=tmp_path / "out", kind="pattern")
    assert not (tmp_path / "out").exists()


def test_unreadable_files_stop_it_unless_they_are_skipped(flat, tmp_path):
    (flat / "0.png").write_bytes(b"not a picture")
    with pytest.raises(InputError, match=r"0\.png.*--skip-unreadable"):
        plant(str(flat), count=10, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert plant(str(flat), count=10, out=tmp_path / "out", skip_unreadable=True).train_images <= 59


def test_images_without_a_label_beside_labelled_ones_are_refused(tmp_path):
    def record(number):
        image = np.full((8, 8, 1), number, np.uint8)
        return Record(str(number), "cat" if number else None, None, None, lambda: image)

    source = Source("mixed", "npz", [record(n) for n in range(5)], ("cat",), "0" * 64, "arrays")
    with pytest.raises(InputError, match=r"without a label.*nothing was planted"):
        plant(source, count=2, out=tmp_path / "out")


def test_the_folder_has_to_be_empty_and_outside_the_images(flat, tmp_path):
    full, unfinished = tmp_path / "full", tmp_path / "unfinished"
    full.mkdir()
    (full / "note.txt").write_text("mine")
    (unfinished / "train").mkdir(parents=True)
    for out, says in (
        (full, "is not an empty folder"), (full / "note.txt", "is not an empty folder"),
        (unfinished, "never finished"), (flat / "out", "inside the images themselves"),
    ):  # fmt: skip
        with pytest.raises(InputError, match=f"{says}; nothing was planted"):
            plant(str(flat), count=5, out=out)
    assert (full / "note.txt").read_text() == "mine" and not (flat / "out").exists()
    (tmp_path / "empty").mkdir()
    plant(str(flat), count=5, out=tmp_path / "empty")
    with pytest.raises(InputError, match="is not an empty folder"):
        plant(str(flat), count=5, out=tmp_path / "empty")


@pytest.mark.parametrize("stops", ["sealed.json", "sealed.npz", "training"])
@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_whatever_stops_it_leaves_nothing_behind(flat, tmp_path, monkeypatch, stops, error):
    original = module.write_whole

    def failing(path, content):
        if path.name == stops:
            raise error
        original(path, content)

    def broken(*_):
        raise error

    monkeypatch.setattr(module, "write_whole", failing)
    if stops == "training":
        monkeypatch.setattr(Image.Image, "save", broken)
    with pytest.raises(InputError if isinstance(error, OSError) else KeyboardInterrupt):
        plant(str(flat), count=10, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.fixture
def planted(flat, tmp_path):
    return plant(str(flat), count=30, out=tmp_path / "out")


def test_what_was_sealed_is_opened_as_it_was(planted, tmp_path):
    for path in (tmp_path / "out", tmp_path / "out" / "sealed.json", str(tmp_path / "out" / "sealed.json")):
        again = open_sealed(path)
        np.testing.assert_array_equal(again.images, planted.images)
        np.testing.assert_array_equal(again.included, planted.included)
        assert again.identity == planted.identity and len(again) == 30
    assert planted.cap > planted.audit_cap > 0 and planted.needed["1"] < planted.needed["2"]


def test_the_owner_alone_may_have_it(planted):
    assert isinstance(planted.images, OwnerArray) and isinstance(planted.included, OwnerArray)
    with pytest.raises(InputError):
        refuse_private({"canaries": planted}, "page")
    assert (planted.folder.stat().st_mode & 0o077) == 0
    for name in ("sealed.json", "sealed.npz"):  # also where the folder was there before, open to others
        assert (planted.folder / name).stat().st_mode & 0o077 == 0


def edited(path, change, seal=False):
    content = json.loads(path.read_text())
    change(content)
    if seal:
        content["seal"] = module._seal(content)
    path.write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("change", "seal", "says"),
    [
        (
            lambda c: c["canaries"][3].update(included=not c["canaries"][3]["included"]),
            False,
            "its hash does not match",
        ),
        (lambda c: c["limits"].update(cap=99.0), False, "its hash does not match"),
        (lambda c: c.pop("seal"), False, "its hash does not match"),
        (lambda c: c["canaries"].pop(), True, "does not agree with itself"),
        (lambda c: c.update(included=31), True, "does not agree with itself"),
        (lambda c: c["canaries"][0].update(digest="00" * 16), True, "does not agree with itself"),
        (lambda c: c.pop("canaries"), True, "is damaged"),
        (lambda c: c.update(format="other/1"), True, "is no sealed.json"),
    ],
)
def test_an_edited_seal_is_refused(planted, change, seal, says):
    edited(planted.folder / "sealed.json", change, seal)
    with pytest.raises(InputError, match=f"{says}.*nothing was audited|{says}.*; nothing was audited"):
        open_sealed(planted.folder)


def test_other_pixels_no_file_and_no_json_are_refused(planted, tmp_path):
    np.savez_compressed(planted.folder / "sealed.npz", images=np.asarray(planted.images)[::-1])
    with pytest.raises(InputError, match=r"sealed\.npz' was edited or is damaged"):
        open_sealed(planted.folder)
    (planted.folder / "sealed.npz").unlink()
    with pytest.raises(InputError, match=r"sealed\.npz' cannot be read.*nothing was audited"):
        open_sealed(planted.folder)
    for content in (b"", b"[1]", b"\xff\xfe", b'{"format"', b"[" * 100_000):
        (tmp_path / "bad.json").write_bytes(content)
        with pytest.raises(InputError, match="nothing was audited"):
            open_sealed(tmp_path / "bad.json")
    with pytest.raises(InputError, match="cannot be read"):
        open_sealed(tmp_path / "nowhere.json")


def test_another_training_folder_voids_the_bound(planted, flat, tmp_path):
    train = tmp_path / "out" / "train"
    with pytest.raises(InputError, match="left out are among them; nothing was audited"):
        check_training(planted, str(flat))
    opened = PublicImages(train, size=8, channels=1).images
    kept = [image.tobytes() not in set(map(bytes, planted.images[planted.included])) for image in opened]
    with pytest.raises(InputError, match="that are in are not among them"):
        check_training(planted, np.asarray(opened)[kept])
    inside = {image.tobytes() for image in planted.images[planted.included]}
    number = next(path for path in train.iterdir() if np.asarray(Image.open(path)).tobytes() in inside)
    shutil.copy(number, train / "zz.png")
    with pytest.raises(InputError, match="1 canaries are among them more than once"):
        check_training(planted, open_source(train))


def test_digests_are_compared_at_the_canaries_own_size(planted, tmp_path):
    check_training(planted, tmp_path / "out" / "train")  # whatever size the audit uses
    with pytest.raises(InputError, match="own size"):
        check_training(planted, np.zeros((5, 4, 4, 1), np.uint8))
