"""What is accepted as a prompt."""

from __future__ import annotations

import pytest

from sfumato.errors import InputError
from sfumato.retrieval.prompts import LONGEST, checked_prompt, portrait_prompts


def test_the_same_words_are_the_same_prompt() -> None:
    assert checked_prompt("  a\tportrait \n with  glasses ") == "a portrait with glasses"
    assert checked_prompt("cafe\u0301") == checked_prompt("café")


@pytest.mark.parametrize(
    ("prompt", "said"),
    [
        ("", "empty"),
        (" \n\t", "empty"),
        ("x" * (LONGEST + 1), "1,001 characters"),
        ("x" * 5_000_000, "5,000,000 characters"),
        ("a\x00b", r"control character \(U\+0000\)"),
        ("a\x1b[31m", r"U\+001B"),
        ("\ud800", r"U\+D800"),
    ],
)
def test_what_cannot_be_a_prompt_is_refused_and_costs_nothing(prompt, said) -> None:
    with pytest.raises(InputError, match=f"{said}.*no budget was spent"):
        checked_prompt(prompt)


def test_planning_prompts_are_many_and_each_once() -> None:
    found = portrait_prompts()
    assert len(found) == len(set(found)) == 264
    assert all(checked_prompt(prompt) == prompt for prompt in found)
