"""Asking an index: charged once, free again, refused when spent; and every way in which it may not fit."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest

from sfumato.errors import BudgetError, InputError, LedgerError
from sfumato.privacy.ledger import Ledger
from sfumato.retrieval.collection import Collection, open_source

PROMPTS = ("a portrait", "a portrait with glasses", "a hat")


@pytest.mark.parametrize("mechanism", ["ball-filter", "ball", "topk"])
def test_a_prompt_is_charged_once_and_the_same_answer_comes_again(made, mechanism) -> None:
    index = made(mechanism=mechanism)
    collection = Collection.open(index)
    first = collection.condition("a  portrait ")
    again = Collection.open(index).condition("a portrait")
    assert not first.cached and again.cached
    assert np.array_equal(first.vector, again.vector) and first.noise == again.noise
    assert first.vector.shape == (16,) and first.vector.dtype == np.float32
    assert collection.status()["queries_asked"] == 1
    collection.condition("another")
    status = collection.status()
    assert (status["queries_asked"], status["queries_left"], status["queries_planned"]) == (2, 1, 3)


@pytest.mark.parametrize("mechanism", ["ball-filter", "ball", "topk"])
def test_when_the_budget_is_spent_only_old_prompts_and_the_public_are_answered(made, mechanism) -> None:
    collection = Collection.open(made(mechanism=mechanism))
    for prompt in PROMPTS:
        collection.condition(prompt)
    with pytest.raises(BudgetError, match=r"all 3 questions of this index were asked.*--fallback"):
        collection.condition("one more")
    told = collection.condition("one more", fallback=True)
    assert not told.private and told.noise == 0 and told.cached
    assert collection.condition(PROMPTS[0]).cached
    assert collection.status()["queries_left"] == 0
    with pytest.raises(BudgetError):  # a refusal changes nothing
        collection.condition("one more")
    assert collection.condition(PROMPTS[2]).cached


def test_what_was_spent_is_what_the_index_promised(made) -> None:
    collection = Collection.open(made())
    collection.condition("a portrait")
    ledger = collection.reservation.ledger
    assert ledger.spent.epsilon <= 5.0 * (1 + 1e-9) and ledger.verify() > 0
    claim = collection.certificate()
    assert (
        4.99 < claim["epsilon"] <= 5.0 * (1 + 1e-9)
        and claim["unit"] == "image"
        and claim["public_size"] == 60
    )
    names = [event["mechanism"] for part in claim["reservations"] for event in part["events"]]
    assert names == ["vector_moments", "ball_budgets", "ball_query"]


@pytest.mark.parametrize("prompt", ["", "  ", "a\x07b", "x" * 3_000_000])
def test_a_bad_prompt_costs_nothing(made, prompt) -> None:
    collection = Collection.open(made())
    with pytest.raises(InputError, match="no budget was spent"):
        collection.condition(prompt)
    assert collection.status()["queries_asked"] == 0


def test_an_index_is_opened_with_its_own_encoder_only(made) -> None:
    index = made()
    with pytest.raises(InputError, match="built with another encoder than elsewhere"):
        Collection.open(index, encoder="elsewhere")


def test_what_is_no_index_is_refused(tmp_path, made) -> None:
    with pytest.raises(InputError, match="is no index"):
        open_source(tmp_path)
    index = made()
    (index / "index.json").write_text("{")
    with pytest.raises(InputError, match=r"index\.json cannot be read"):
        open_source(index)


def test_a_lost_or_older_state_is_refused(made) -> None:
    index = made()
    state = index / "internal" / "vectors" / "state.db"
    shutil.copyfile(state, index / "old.db")
    Collection.open(index).condition("a portrait")
    shutil.copyfile(index / "old.db", state)
    with pytest.raises(LedgerError, match="older copy"):
        Collection.open(index).condition("another")
    state.unlink()
    with pytest.raises(LedgerError, match="missing or empty"):
        Collection.open(index)
    state.write_bytes(b"")
    with pytest.raises(LedgerError, match="missing or empty"):
        Collection.open(index)
    state.write_bytes(b"rubbish" * 1000)
    with pytest.raises(LedgerError):
        Collection.open(index)


def test_a_ledger_that_is_not_its_own_is_refused(made, tmp_path) -> None:
    from sfumato.privacy.budget import Budget

    index = made()
    (index / "internal" / "ledger.db").unlink()
    Ledger.open(index / "internal" / "ledger.db", total=Budget(5.0, 1e-6))
    with pytest.raises(LedgerError, match="does not hold what"):
        Collection.open(index)


def test_a_plan_that_was_edited_is_not_what_was_reserved(made) -> None:
    index = made(mechanism="ball")
    facts = json.loads((index / "index.json").read_text())
    facts["plan"]["query"]["noise_multiplier"] /= 10
    (index / "index.json").write_text(json.dumps(facts))
    with pytest.raises(LedgerError, match="is not what was reserved"):
        Collection.open(index).condition("a portrait")


def test_status_says_nothing_private(made) -> None:
    index = made()
    collection = Collection.open(index)
    before = collection.status()
    assert set(before) == {
        "mechanism", "epsilon", "delta", "unit", "queries_asked", "queries_left", "queries_planned", "statement",
    }  # fmt: skip
    assert "ProtectedVectors" not in repr(collection) and "0000.png" not in repr(collection)
