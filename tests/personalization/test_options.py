"""Options of personalize, render and style-bank: what can never work is refused before anything is spent."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sfumato.errors import InputError
from sfumato.personalization.options import (
    DEFAULT_DELTA,
    SHEET_PROMPTS,
    PersonalizeOptions,
    RenderOptions,
    StyleBankOptions,
    check_token,
)

NAN, INF = float("nan"), float("inf")


def personalize(images="scans", **more) -> PersonalizeOptions:
    return PersonalizeOptions(images, **{"epsilon": 2.0, "token": "<my-style>", **more})


def render(**more) -> RenderOptions:
    return RenderOptions("portraits", **{"token_file": "t", "prompt": "in the style of <my-style>", **more})


def style_bank(**more) -> StyleBankOptions:
    return StyleBankOptions("styles", **{"out": "b", **more})


def test_what_is_usual_is_taken():
    personalize().check()
    personalize(
        public_size=30, delta=1e-3, vectors=3, steps=1, directions=1, batch_size=1, learning_rate=9.9, method="paper",
        anchor="bank",
    ).check()  # fmt: skip
    render().check()
    render(num_images=100_000, steps=1000, guidance=0.0).check()
    style_bank().check()
    assert personalize().delta == DEFAULT_DELTA == 1e-5 and personalize().method == "dpagg-ti"
    assert len(SHEET_PROMPTS) == 4 and all(prompt.count("{}") == 1 for prompt in SHEET_PROMPTS)


@pytest.mark.parametrize(
    ("option", "values"),
    [
        ("epsilon", (0.0, -1.0, NAN, INF)),
        ("delta", (0.0, 1.0, -1e-5, NAN, 2.0)),
        ("vectors", (0, -1)),
        ("steps", (0,)),
        ("batch_size", (0,)),
        ("learning_rate", (0.0, 10.0, NAN, -1.0)),
        ("public_size", (0, -3)),
        ("directions", (0, -1)),
    ],
)
def test_values_out_of_range_are_refused_by_name(option, values):
    for value in values:
        with pytest.raises(InputError, match=f"^--{option.replace('_', '-')} .*no budget was spent") as found:
            personalize(**{option: value}).check()
        assert "\n" not in str(found.value)


@given(st.integers(2, 10**7), st.floats(0.01, 100))
def test_a_delta_of_one_over_n_or_more_is_refused(units, factor):
    chosen = personalize(delta=min(factor / units, 0.999), public_size=units)
    if chosen.delta >= 1 / units:
        with pytest.raises(InputError, match=r"--delta .* too large for .*no budget was spent"):
            chosen.check()
    else:
        chosen.check()


@pytest.mark.parametrize("method", ["paper", "dp-sgd", "selection"])
def test_an_anchor_by_vote_goes_only_with_methods_that_have_an_anchor(method):
    with pytest.raises(InputError, match=f"--anchor nearest does not go with --method {method}; no budget"):
        personalize(method=method, anchor="nearest").check()
    personalize(method="mean", anchor="nearest").check()
    personalize(method=method, anchor="art").check()


@pytest.mark.parametrize(
    "token", ["<my-style>", "<a>", "sks", "zebra_9", "<" + "x" * 60 + ">", "ab", "<日本>"]
)
def test_one_word_can_be_a_token(token):
    check_token(token)
    personalize(token=token).check()


@pytest.mark.parametrize(
    "token",
    ["", " ", "a", "two words", "<two words>", "<open", "close>", "<>", "<<a>>", "<a>b", "<a>\n", "a\tb", "x" * 61,
     "<" + "x" * 61 + ">"],
)  # fmt: skip
def test_what_is_not_one_word_cannot(token):
    with pytest.raises(InputError, match=r"^--token .* is not one word: no budget was spent") as found:
        personalize(token=token).check()
    assert "\n" not in str(found.value)


@pytest.mark.parametrize(
    ("images", "folder"),
    [
        ("/data/My Scans/", "runs/my-scans-eps2"),
        ("private.tar.zip", "runs/private-eps2"),
        ("a/b/portraits_2.npz", "runs/portraits-2-eps2"),
        ("???", "runs/images-eps2"),
        (".", "runs/images-eps2"),
    ],
)
def test_the_runs_folder_and_ledger(images, folder):
    assert personalize(images).run_folder == folder
    assert personalize(images).ledger_url == f"{folder}/internal/ledger.db"
    assert personalize(images, out="here").run_folder == "here"
    assert personalize(images, out="here").ledger_url == "here/internal/ledger.db"
    assert personalize(images, ledger="sqlite:///all.db").ledger_url == "sqlite:///all.db"
    assert personalize(images, epsilon=0.5).run_folder == folder[:-1] + "0.5"


@pytest.mark.parametrize(
    ("option", "values"),
    [("num_images", (0, -1, 100_001)), ("steps", (0, 1001)), ("guidance", (-0.1, INF, NAN))],
)
def test_rendering_refuses_what_cannot_work(option, values):
    for value in values:
        with pytest.raises(InputError, match=f"^--{option.replace('_', '-')} .*sfumato render --help"):
            render(**{option: value}).check()


@pytest.mark.parametrize("prompt", ["", "  ", "\n"])
def test_something_must_be_drawn(prompt):
    with pytest.raises(InputError, match="--prompt is empty"):
        render(prompt=prompt).check()


@pytest.mark.parametrize("option", ["vectors", "directions", "images_per_style", "steps", "batch_size"])
def test_a_style_bank_of_nothing_is_refused(option):
    for value in (0, -1):
        with pytest.raises(InputError, match=f"^--{option.replace('_', '-')} {value} cannot be used"):
            style_bank(**{option: value}).check()
    for rate in (0.0, 10.0, NAN):
        with pytest.raises(InputError, match=r"^--learning-rate"):
            style_bank(learning_rate=rate).check()
