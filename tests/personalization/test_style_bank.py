"""A bank of public styles: what it says is right, survives its file, and only the right model takes it."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from sfumato.errors import InputError
from sfumato.personalization.style_bank import FORMAT, StyleBank, principal_directions

STYLES, IMAGES, WIDTH, KEPT = 6, 5, 12, 3


def bank(seed=0, **change) -> StyleBank:
    """Styles that differ along three directions, and single images that scatter about their style."""
    rng = np.random.default_rng(seed)
    anchor = rng.normal(size=WIDTH)
    where = rng.normal(size=(STYLES, 3)) * (3.0, 2.0, 1.0)
    tokens = anchor + where @ np.linalg.qr(rng.normal(size=(WIDTH, 3)))[0].T
    tokens += anchor - tokens.mean(0)
    image_style = np.repeat(np.arange(STYLES), IMAGES)
    made = {
        "names": tuple(f"style {number}" for number in range(STYLES)),
        "tokens": tokens.astype(np.float32),
        "image_tokens": (tokens[image_style] + 0.4 * rng.normal(size=(STYLES * IMAGES, WIDTH))).astype(np.float32),
        "image_style": image_style.astype(np.int64), "anchor": anchor.astype(np.float32),
        "basis": principal_directions(tokens, anchor, KEPT), "model": "ab" * 32, "vectors": 2,
    }  # fmt: skip
    return StyleBank(**(made | change))


# --- what it says


def test_directions_are_the_principal_ones_about_the_anchor():
    made = bank()
    centred = made.tokens.astype(float) - made.anchor
    values, columns = np.linalg.eigh(centred.T @ centred)
    expected = columns[:, ::-1][:, :KEPT]
    assert made.basis.shape == (WIDTH, KEPT) and made.basis.dtype == np.float32
    assert np.allclose(np.abs(expected.T @ made.basis), np.eye(KEPT), atol=1e-4)  # up to sign, in this order
    along = centred @ made.basis
    assert np.allclose(np.square(along).sum(0), values[::-1][:KEPT], rtol=1e-4)
    assert (values[::-1][:KEPT] > 1e-2).all()


def test_there_are_no_more_directions_than_styles():
    rng = np.random.default_rng(0)
    assert principal_directions(rng.normal(size=(4, 9)), np.zeros(9), 16).shape == (9, 4)
    assert principal_directions(rng.normal(size=(40, 9)), np.zeros(9)).shape == (9, 9)


@pytest.mark.parametrize("count", [1, 2, None])
def test_directions_taken_are_the_first_and_orthonormal_in_double_precision(count):
    made = bank()
    found = made.directions(count)
    wanted = KEPT if count is None else count
    assert found.shape == (WIDTH, wanted) and found.dtype == np.float64
    assert np.abs(found.T @ found - np.eye(wanted)).max() < 1e-14
    assert np.allclose(np.abs(np.diag(found.T @ made.basis[:, :wanted])), 1, atol=1e-5)


@pytest.mark.parametrize("count", [0, KEPT + 1, -1])
def test_directions_that_are_not_there_are_refused(count):
    with pytest.raises(InputError, match=rf"has {KEPT} directions, not {count}; no budget was spent"):
        bank().directions(count)


def test_the_radius_is_the_median_length_of_single_images_residuals():
    made = bank()
    residuals = made.image_tokens.astype(float) - made.anchor
    lengths = sorted(np.sqrt(np.square(residuals).sum(1)))
    assert made.radius(None) == pytest.approx((lengths[14] + lengths[15]) / 2)
    basis = made.directions(2)
    along = sorted(np.sqrt(np.square(residuals @ basis).sum(1)))
    assert made.radius(basis) == pytest.approx((along[14] + along[15]) / 2)
    assert made.radius(basis) < made.radius(None)
    assert made.radius(None, made.tokens[0].astype(float)) == pytest.approx(
        np.median(np.linalg.norm(made.image_tokens.astype(float) - made.tokens[0], axis=1))
    )


@pytest.mark.parametrize("along", [False, True])
def test_spread_is_the_mean_square_of_what_the_noiseless_mechanism_gives(along):
    """Against the mechanism itself, with next to no noise, for each public style by itself."""
    from types import SimpleNamespace

    from sfumato.privacy.vectors import MeanPlan, vector_mean

    made = bank()
    basis = made.directions(2) if along else None
    radius = made.radius(basis)
    plan = MeanPlan(made.anchor.astype(float), radius, 1e-6, float(IMAGES), basis)

    class Embed:
        dimension, batch_size = WIDTH, 5

        def __call__(self, images, steps=None):
            return made.image_tokens[images[:, 0, 0, 0] % len(made.image_tokens)].astype(float)

    found = []
    for style in range(STYLES):
        rows = np.flatnonzero(made.image_style == style)
        private = SimpleNamespace(
            _images=rows.astype(np.uint8)[:, None, None, None], _units=[np.array([i]) for i in range(IMAGES)]
        )
        mean, _ = vector_mean(private, Embed(), plan, SimpleNamespace(begin=lambda *_: None))
        residual = mean - made.anchor
        found.append(residual if basis is None else residual @ basis)
    expected = np.array(found)
    residual = made.image_tokens.astype(float) - made.anchor
    along = residual if basis is None else residual @ basis
    clipped = along * np.minimum(1, radius / np.linalg.norm(along, axis=1, keepdims=True))
    within = np.mean([clipped[made.image_style == style].var(0, ddof=1) for style in range(STYLES)], axis=0)
    between = np.square(expected).mean(0)
    wanted = np.maximum(between - within / IMAGES, 0.05 * between)
    assert np.allclose(made.spread(basis, radius), wanted, rtol=1e-3, atol=1e-4)
    assert np.sqrt(made.spread(basis, radius).sum()) <= radius


# --- its file


def test_what_is_saved_is_loaded(tmp_path):
    made = bank()
    made.save(tmp_path / "it.safetensors")
    found = StyleBank.load(tmp_path / "it.safetensors")
    assert found.names == made.names and found.model == made.model and found.vectors == 2
    assert np.array_equal(found.basis, made.basis) and np.array_equal(found.anchor, made.anchor)
    assert np.array_equal(found.image_style, made.image_style) and found.image_style.dtype == np.int64
    for name in ("tokens", "image_tokens"):
        loaded, before = getattr(found, name), getattr(made, name)
        assert loaded.dtype == np.float32 and np.allclose(loaded, before, rtol=1e-3, atol=1e-6)
    assert np.array_equal(
        StyleBank.load(str(tmp_path / "it.safetensors")).directions(None), made.directions(None)
    )


@pytest.fixture
def rewritten(tmp_path):
    """Save a bank, change its arrays and header, and load it."""
    path = tmp_path / "it.safetensors"
    bank().save(path)
    header = {"format": FORMAT, "names": json.dumps(bank().names), "model": "ab" * 32, "vectors": "2"}

    def load(arrays=None, **heading):
        changed = {
            name: value for name, value in (load_file(path) | (arrays or {})).items() if value is not None
        }
        held = {name: value for name, value in (header | heading).items() if value is not None}
        save_file(changed, path, metadata=held)
        return StyleBank.load(path)

    return load


def test_the_rewritten_file_is_a_bank_before_it_is_damaged(rewritten):
    assert rewritten().names == bank().names


def refused(load, says="is no style bank|is damaged"):
    with pytest.raises(InputError, match=says) as found:
        load()
    text = str(found.value)
    assert (
        "--subspace" in text
        and "no budget was spent" in text
        and "sfumato style-bank" in text
        and "\n" not in text
    )
    assert found.value.__suppress_context__ or found.value.__context__ is None


@pytest.mark.parametrize(
    "content", [b"", b"\x00", b"no bank at all", b"\xff" * 100, b"\x08" + b"\x00" * 7 + b"{}      "]
)
def test_a_file_that_is_something_else_is_refused(tmp_path, content):
    (tmp_path / "it").write_bytes(content)
    refused(lambda: StyleBank.load(tmp_path / "it"))


@pytest.mark.parametrize("cut", [1, 100, 1500, 2000])
def test_a_file_cut_short_is_refused(tmp_path, cut):
    path = tmp_path / "it.safetensors"
    bank().save(path)
    path.write_bytes(path.read_bytes()[:-cut])
    refused(lambda: StyleBank.load(path))


def test_no_file_or_a_folder_is_refused(tmp_path):
    refused(lambda: StyleBank.load(tmp_path / "nothing"))
    refused(lambda: StyleBank.load(tmp_path))


@pytest.mark.parametrize("name", ["tokens", "image_tokens", "image_style", "anchor", "basis"])
@pytest.mark.parametrize(
    "damage",
    [
        lambda array: None,
        lambda array: array[:-1],
        lambda array: array[..., :-1],
        lambda array: array[None],
        lambda array: array.reshape(-1)[0],
        lambda array: array[:0],
    ],
    ids=["missing", "a row less", "a column less", "an axis more", "a number", "empty"],
)
def test_arrays_that_do_not_fit_are_refused(rewritten, name, damage):
    array = load_file_of(name)
    if name == "basis":  # a bank with one direction less is a bank; this one has none
        array = array[:, :1]
    changed = damage(array)
    refused(lambda: rewritten({name: None if changed is None else np.array(changed, order="C")}))


def load_file_of(name):
    made = bank()
    return getattr(made, name).astype({"image_style": np.int32}.get(name, np.float32))


@pytest.mark.parametrize("name", ["tokens", "image_tokens", "anchor", "basis"])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_numbers_that_are_none_are_refused(rewritten, name, value):
    changed = load_file_of(name).copy()
    changed.reshape(-1)[3] = value
    refused(lambda: rewritten({name: changed}), "is damaged")


@pytest.mark.parametrize("style", [-1, STYLES])
def test_images_of_a_style_that_is_not_there_are_refused(rewritten, style):
    changed = load_file_of("image_style").copy()
    changed[4] = style
    refused(lambda: rewritten({"image_style": changed}), "is damaged")


@pytest.mark.parametrize(
    "heading",
    [
        {"format": "another/1"}, {"format": None}, {"names": "[1, 2"}, {"names": "7"}, {"names": None},
        {"names": '["only one"]'}, {"model": None}, {"vectors": "many"}, {"vectors": None}, {"vectors": "0"},
        {"vectors": "5"}, {"vectors": "-1"},
    ],
)  # fmt: skip
def test_a_header_that_makes_no_sense_is_refused(rewritten, heading):
    refused(lambda: rewritten(**heading))


# --- whose it is


def test_the_model_it_was_made_for_takes_it():
    bank().check("ab" * 32, WIDTH, 2, "it")


@pytest.mark.parametrize(
    ("model", "dimension", "vectors", "says"),
    [
        ("ab" * 32, 16, 2, r"it holds tokens of 2 x 6 numbers, and the model's have 2 x 8"),
        ("ab" * 32, 12, 1, r"it holds tokens of 2 x 6 numbers, and the model's have 1 x 12"),
        (
            "ab" * 31 + "00",
            12,
            2,
            r"made for another model \(its hash is abababababab…, this model's abababababab…\)",
        ),
        (
            "cd" * 32,
            12,
            2,
            r"made for another model \(its hash is abababababab…, this model's cdcdcdcdcdcd…\)",
        ),
    ],
)
def test_another_model_is_refused(model, dimension, vectors, says):
    with pytest.raises(InputError, match=says) as found:
        bank().check(model, dimension, vectors, "it")
    assert "no budget was spent" in str(found.value) and "sfumato style-bank" in str(found.value)


def test_a_bank_is_fixed():
    with pytest.raises(dataclasses.FrozenInstanceError):
        bank().model = "other"  # type: ignore[misc]
    assert bank().dimension == WIDTH
