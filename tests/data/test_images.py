from __future__ import annotations

import copy
import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sfumato.data.images import (
    OwnerArray,
    OwnerImages,
    OwnerOnly,
    ProtectedImages,
    PublicImages,
    Units,
    same_content,
)
from sfumato.data.sources import open_source
from sfumato.errors import InputError


def protect(spec: object, **options: object) -> ProtectedImages:
    settings: dict = {"ledger": "the ledger", "size": 4, "channels": 1, **options}
    return ProtectedImages(spec, **settings)  # type: ignore[arg-type]


def values(private: ProtectedImages) -> list[int]:
    return private._images[:, 0, 0, 0].tolist()


GROUPED = [
    {"file_name": "a.png", "group_id": "p"},
    {"file_name": "b.png", "group_id": "q"},
    {"file_name": "c.png", "group_id": "p"},
]


def test_what_it_declares(make_folder: Callable[..., Path]) -> None:
    private = protect(make_folder({"cat/1.png": 1, "dog/2.png": 2}), size=(6, 5), channels=3, public_size=99)
    assert (private.ledger, private.unit, private.size, private.channels) == (
        "the ledger",
        "image",
        (6, 5),
        3,
    )
    assert (private.public_size, private.label_names, private.has_labels) == (99, ("cat", "dog"), True)
    assert private.description == "a folder of images"
    assert private._images.shape == (2, 6, 5, 3)
    assert private._labels.tolist() == [0, 1]
    assert [unit.tolist() for unit in private._units] == [[0], [1]]


def test_unlabelled_is_one_label(make_folder: Callable[..., Path]) -> None:
    private = protect(make_folder({"a.png": 1, "b.png": 2}))
    assert (private.label_names, private.has_labels, private._labels.tolist()) == (("all",), False, [0, 0])


def test_groups_are_units(make_folder: Callable[..., Path]) -> None:
    private = protect(make_folder({"a.png": 1, "b.png": 2, "c.png": 3}, GROUPED), unit="group")
    assert [unit.tolist() for unit in private._units] == [[0, 2], [1]]
    assert [unit.tolist() for unit in protect(private._source)._units] == [[0], [1], [2]]


def test_a_group_for_every_image_or_an_error(make_folder: Callable[..., Path]) -> None:
    root = make_folder(
        {"a.png": 1, "b.png": 2}, [{"file_name": "a.png", "group_id": "p"}, {"file_name": "b.png"}]
    )
    with pytest.raises(InputError, match=r"no group_id for 'b\.png'; no budget was spent"):
        protect(root, unit="group")
    assert protect(root)._units[1].tolist() == [1]


@given(st.lists(st.integers(0, 9), min_size=1, max_size=60))
def test_units_hold_every_row_once(raw: list[int]) -> None:
    groups = np.unique(raw, return_inverse=True)[1]
    units = Units(groups)
    assert len(units) == groups.max() + 1
    assert sorted(np.concatenate(list(units)).tolist()) == list(range(len(raw)))
    for number, rows in enumerate(units):
        assert (groups[rows] == number).all()
        assert rows.tolist() == units[number].tolist() == units[number - len(units)].tolist() == sorted(rows)
    with pytest.raises(IndexError):
        units[len(units)]


def test_single_images_as_units() -> None:
    units = Units(3)
    assert [rows.tolist() for rows in units] == [[0], [1], [2]]
    assert [rows.tolist() for rows in units[1:]] == [[1], [2]]
    assert len(Units(0)) == 0


REACHES = {
    "iteration": iter,
    "a list": list,
    "length": len,
    "index": lambda p: p[0],
    "slice": lambda p: p[:],
    "in": lambda p: 0 in p,
    "numpy": np.asarray,
    "numpy array": np.array,
    "numpy arithmetic": lambda p: np.add(p, 1),
    "pickle": pickle.dumps,
    "copy": copy.copy,
    "deepcopy": copy.deepcopy,
    "json": json.dumps,
    "unpack": lambda p: [*p],
    "memoryview": memoryview,
    "numpy()": lambda p: p.numpy(),
    "images": lambda p: p.images,
    "labels": lambda p: p.labels,
    "float": float,
    "state": lambda p: p.__getstate__(),
    "reduce": lambda p: p.__reduce_ex__(4),
}


@pytest.mark.parametrize("reach", REACHES.values(), ids=REACHES.keys())
def test_no_public_way_to_the_pixels(reach: Callable[[ProtectedImages], object], make_folder) -> None:
    private = protect(make_folder({"a.png": 201, "b.png": 202, "c.png": 203}))
    with pytest.raises((TypeError, AttributeError)) as caught:
        reach(private)
    assert not {"201", "202", "203", "3"} & set(str(caught.value).replace("'", " ").split())


def test_public_attributes_and_repr_show_only_what_was_declared(make_folder: Callable[..., Path]) -> None:
    root = make_folder({f"cat/jane{n}.png": 200 + n for n in range(23)}, name="clinic")
    private = protect(root)
    public = {name for name in dir(private) if not name.startswith("_")}
    declared = {
        "ledger",
        "unit",
        "size",
        "channels",
        "public_size",
        "label_names",
        "has_labels",
        "description",
    }
    assert public == declared | {"skipped"}
    assert bool(private)
    for text in (repr(private), str(private), f"{private}", repr(private.skipped)):
        for secret in ("23", "jane", "clinic", "200"):
            assert secret not in text
    assert repr(private) == (
        "ProtectedImages('a folder of images', unit='image', size=(4, 4), channels=1, public_size=None, "
        "label_names=('cat',))"
    )


def test_left_out_images_are_for_the_owner_only(make_folder: Callable[..., Path]) -> None:
    root = make_folder({"a.png": 1, "b.png": b""})
    with pytest.raises(InputError, match=r"'b\.png' is empty .*no budget was spent.*--skip-unreadable"):
        protect(root)
    private = protect(root, skip_unreadable=True)
    assert values(private) == [1]
    assert isinstance(private.skipped, OwnerOnly)
    assert private.skipped.value == ["'b.png' is empty (0 bytes)"]


def test_declared_labels(make_folder: Callable[..., Path]) -> None:
    root = make_folder({"cat/1.png": 1, "dog/2.png": 2, "cat/3.png": 3})
    private = protect(root, label_names=["dog", "emu", "cat"])
    assert private.label_names == ("dog", "emu", "cat")
    assert private._labels.tolist() == [2, 2, 0]
    with pytest.raises(InputError, match="has the label 'dog', which was not declared; no budget was spent"):
        protect(root, label_names=["cat"])
    (root / "empty").mkdir()
    assert protect(root, label_names=["cat", "dog"]).label_names == ("cat", "dog")
    for wrong in (["cat", "dog", "cat"], []):
        with pytest.raises(InputError, match="no budget was spent"):
            protect(root, label_names=wrong)
    with pytest.raises(InputError, match="has no labels"):
        protect(make_folder({"a.png": 1}, name="plain"), label_names=["cat"])


@pytest.mark.parametrize(
    "options",
    [
        {"unit": "patient"},
        {"size": 0},
        {"size": (4,)},
        {"size": (4, 5000)},
        {"size": "4"},
        {"size": (4.0, 4)},
        {"channels": 2},
        {"public_size": 0},
        {"public_size": -5},
        {"public_size": True},
        {"public_size": 1.5},
        {"public_size": "many"},
        {"size": True},
    ],
)
def test_wrong_declarations(options: dict[str, object], make_folder: Callable[..., Path]) -> None:
    with pytest.raises(InputError, match="no budget was spent"):
        protect(make_folder({"a.png": 1}), **options)


def test_public_images(make_folder: Callable[..., Path]) -> None:
    public = PublicImages(make_folder({"cat/1.png": 1, "dog/2.png": 2}, name="atlas"), size=4, channels=3)
    assert len(public) == 2
    assert public.images.shape == (2, 4, 4, 3)
    assert (public.labels.tolist(), public.label_names) == ([0, 1], ("cat", "dog"))
    assert public.description == "a folder of images 'atlas'"
    assert not hasattr(public, "for_owner_only")


def test_owner_images_stay_marked(make_folder: Callable[..., Path]) -> None:
    owner = OwnerImages(make_folder({"cat/1.png": 1, "cat/2.png": 2}), size=4, channels=1)
    assert owner.for_owner_only
    for derived in (
        owner.images,
        owner.images[:1],
        owner.images / 255,
        owner.images.mean(0),
        np.stack([owner.images[0]] * 2),
    ):
        marked = isinstance(derived, OwnerArray)
        assert marked or derived.shape == (2, 4, 4, 1), "only np.stack loses the mark"
    assert isinstance(owner.labels, OwnerArray)
    assert "2" not in repr(owner)
    assert repr(OwnerOnly("secret")) == "OwnerOnly(...)"


def test_private_and_public_may_not_be_the_same(make_folder, tmp_path: Path) -> None:
    root = make_folder({"cat/1.png": 1, "cat/2.png": 2})
    private = protect(root)
    (tmp_path / "link").symlink_to(root)
    shutil.copytree(root, tmp_path / "copy")
    (tmp_path / "copy/cat/1.png").rename(tmp_path / "copy/cat/z.png")
    shutil.make_archive(str(tmp_path / "packed"), "zip", root)
    for other in (
        root,
        str(root) + "/.",
        tmp_path / "link",
        tmp_path / "copy",
        tmp_path / "packed.zip",
        root / "cat",
    ):
        public = PublicImages(other, size=8, channels=3)
        with pytest.raises(InputError, match="no budget was spent; give public images"):
            same_content(private, public)
        with pytest.raises(InputError, match="no budget was spent; give public images"):
            same_content(OwnerImages(other, size=4, channels=1), PublicImages(root, size=4, channels=1))
    different = PublicImages(make_folder({"cat/1.png": 1, "cat/2.png": 3}, name="atlas"), size=4, channels=1)
    same_content(private, different)


def test_an_opened_source_is_as_good_as_its_name(make_folder: Callable[..., Path]) -> None:
    root = make_folder({"a.png": 1})
    assert values(protect(open_source(root))) == values(protect(root)) == [1]


def test_the_cache_goes_where_it_is_told(
    make_folder: Callable[..., Path], tmp_path: Path, own_cache: Path
) -> None:
    protect(make_folder({"a.png": 1}), cache_dir=tmp_path / "here")
    assert len(list((tmp_path / "here").iterdir())) == 1
    assert not own_cache.exists()
