"""Image sets for an evaluation: one size, one numbering of labels, copies found."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from sfumato.data.images import OwnerArray, OwnerImages, PublicImages
from sfumato.data.release import ReleaseWriter
from sfumato.data.sources import open_source
from sfumato.errors import InputError
from sfumato.evaluation.image_sets import (
    common_shape,
    copies,
    first_shape,
    image_set,
    label_positions,
    pixel_digests,
    same_images,
)


@pytest.fixture
def npz(tmp_path):
    """`npz(name, images, labels)`: a set as an .npz file."""

    def write(name, images, labels=None):
        np.savez(tmp_path / f"{name}.npz", images=images, **({} if labels is None else {"labels": labels}))
        return str(tmp_path / f"{name}.npz")

    return write


@pytest.fixture
def opened(tmp_path):
    """`opened(spec)`: the set at 4 x 4 grey."""
    return lambda spec, kind=PublicImages: kind(spec, size=4, channels=1, cache_dir=tmp_path / "cache")


def pictures(count, seed=0, shape=(4, 4)):
    return np.random.default_rng(seed).integers(0, 256, (count, *shape), dtype=np.uint8)


def save(folder, **files):
    for name, (mode, size) in files.items():
        (folder / name[0]).mkdir(parents=True, exist_ok=True)
        Image.new(mode, size).save(folder / name[0] / f"{name}.png")
    return str(folder)


def test_labels_follow_the_real_set_whatever_their_order(npz, opened):
    made = opened(npz("made", pictures(4), np.array(["dog", "cat", "dog", "cow"])))
    own = image_set(made, ("cat", "cow", "dog"), "made")
    assert own.labels.tolist() == [2, 0, 2, 1]
    other = image_set(made, ("dog", "x", "cow", "cat"), "made")
    assert other.labels.tolist() == [0, 3, 0, 2]
    assert image_set(made, None, "made").labels is None


def test_labels_that_the_real_set_lacks_are_refused():
    with pytest.raises(
        InputError, match=r"made has labels that the real images lack: fox \(they have cat, dog\)"
    ):
        label_positions(["cat", "fox"], ["cat", "dog"], "made")


def test_a_release_without_its_metadata_is_matched_by_the_spelling_of_its_folders(tmp_path):
    names = ("T-shirt/top", "train", "a:b", "a?b", "Bag")
    writer = ReleaseWriter(tmp_path / "run")
    writer.images(pictures(5)[..., None], np.arange(5), names)
    images = writer.complete() / "images"
    kept = PublicImages(str(images), size=4, channels=1, cache_dir=tmp_path / "cache")
    assert [names[i] for i in label_positions(kept.label_names, names, "made")] == list(kept.label_names)
    (images / "metadata.jsonl").unlink()
    bare = PublicImages(str(images), size=4, channels=1, cache_dir=tmp_path / "cache")
    assert "T-shirt_top" in bare.label_names and "label_0001" in bare.label_names
    by_folder = image_set(bare, names, "made")
    np.testing.assert_array_equal(by_folder.images[by_folder.labels == 0], kept.images[:1])
    assert sorted(by_folder.labels.tolist()) == [0, 1, 2, 3, 4]
    for label in range(5):  # each image got the label it was written with
        row = int(np.flatnonzero(by_folder.labels == label)[0])
        np.testing.assert_array_equal(by_folder.images[row, ..., 0], pictures(5)[label])


def test_owners_images_stay_marked(npz, opened):
    own = image_set(opened(npz("own", pictures(4), np.arange(4) % 2), OwnerImages), ("0", "1"), "--against")
    assert isinstance(own.images, OwnerArray) and isinstance(own.labels, OwnerArray)


def test_copies_are_found_whatever_the_order(npz, opened):
    images = pictures(9000)  # more than one block
    whole = image_set(opened(npz("whole", images)), None, "a")
    turned = image_set(opened(npz("turned", images[::-1].copy())), None, "b")
    some = image_set(opened(npz("some", np.concatenate([images[5:8], pictures(4, 1)]))), None, "c")
    assert same_images(whole, turned) and not same_images(whole, some)
    assert whole.content != turned.content  # order counts for what is cached by row
    assert copies(some, whole) == 3 and copies(turned, whole) == 9000
    assert len(np.unique(pixel_digests(images, "x"))) == len(np.unique(images.reshape(9000, -1), axis=0))


def test_the_same_pixels_in_another_shape_are_another_set(npz, tmp_path):
    flat = pictures(3, shape=(2, 8))
    wide = PublicImages(npz("wide", flat), size=(2, 8), channels=1, cache_dir=tmp_path / "cache")
    tall = PublicImages(
        npz("tall", flat.reshape(3, 8, 2)), size=(8, 2), channels=1, cache_dir=tmp_path / "cache"
    )
    assert image_set(wide, None, "a").content != image_set(tall, None, "b").content


@pytest.mark.parametrize(
    ("mode", "size", "shape"),
    [
        ("L", (6, 4), (4, 6, 1)),
        ("RGB", (6, 4), (4, 6, 3)),
        ("P", (5, 5), (5, 5, 3)),
        ("I;16", (5, 5), (5, 5, 1)),
    ],
)
def test_the_shape_is_read_from_the_files(tmp_path, mode, size, shape):
    source = open_source(save(tmp_path / "s", a1=(mode, size), b1=(mode, size)))
    assert common_shape(source, "s", size=None, channels=None) == shape == first_shape(source)
    assert common_shape(source, "s", size=9, channels=None) == (9, 9, shape[2])
    assert common_shape(source, "s", size=None, channels=1) == (*shape[:2], 1)
    assert common_shape(source, "s", size=9, channels=3) == (9, 9, 3)


def test_a_rotated_photograph_counts_upright(tmp_path):
    (tmp_path / "s").mkdir()
    raw = io.BytesIO()
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (6, 4)).save(raw, "JPEG", exif=exif)
    (tmp_path / "s" / "a.jpg").write_bytes(raw.getvalue())
    assert first_shape(open_source(str(tmp_path / "s"))) == (6, 4, 3)


def test_images_that_differ_need_a_word(tmp_path):
    sizes = open_source(save(tmp_path / "sizes", a1=("L", (4, 4)), a2=("L", (5, 4))))
    with pytest.raises(InputError, match=r"'a/a1.png' is 4 x 4 grey and 'a/a2.png' is 4 x 5 grey.*--size"):
        common_shape(sizes, "s", size=None, channels=None)
    assert common_shape(sizes, "s", size=4, channels=None) == (4, 4, 1)
    colours = open_source(save(tmp_path / "colours", a1=("L", (4, 4)), a2=("RGB", (4, 4))))
    with pytest.raises(InputError, match="--channels"):
        common_shape(colours, "s", size=None, channels=None)
    assert common_shape(colours, "s", size=None, channels=1) == (4, 4, 1)


def test_arrays_and_what_cannot_be_read(npz, tmp_path):
    assert first_shape(open_source(npz("grey", pictures(2)))) == (4, 4, 1)
    assert first_shape(open_source(npz("colour", np.zeros((2, 4, 5, 3), np.uint8)))) == (4, 5, 3)
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "x.png").write_bytes(b"nothing")
    source = open_source(str(tmp_path / "bad"))
    assert first_shape(source) is None
    with pytest.raises(InputError, match="no image in it can be read"):
        common_shape(source, "s", size=None, channels=None)
