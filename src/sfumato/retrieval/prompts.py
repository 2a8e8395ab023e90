"""Texts that are asked: what is accepted as a prompt, and prompts about portraits to plan with."""

from __future__ import annotations

import unicodedata
from itertools import product

from sfumato.errors import InputError

LONGEST = 1000  # characters

_WHO = ("a portrait", "a smiling portrait", "a sad portrait")
_HAIR = (
    "", "short hair", "long hair", "curly hair", "no hair", "a bun", "black hair", "blonde hair", "brown hair",
    "red hair", "pink hair",
)  # fmt: skip
_WORN = ("", "glasses", "sunglasses", "a beard", "a hat", "earrings", "light skin", "dark skin")


def checked_prompt(prompt: str) -> str:
    """The prompt as it is asked: one line, normalised (NFC), spaces single. The same text is the same question.

    Raises InputError for an empty or too long one, and for control characters.
    """
    if len(prompt) > LONGEST:
        raise InputError(
            f"the prompt has {len(prompt):,} characters, and {LONGEST:,} are the most; no budget was spent. Shorten it"
        )
    text = " ".join(unicodedata.normalize("NFC", prompt).split())
    if not text:
        raise InputError(
            'the prompt is empty; no budget was spent. Give some words, such as "a portrait with glasses"'
        )
    strange = next(
        (letter for letter in text if unicodedata.category(letter) in ("Cc", "Cs", "Co", "Cn")), None
    )
    if strange is not None:
        raise InputError(
            f"the prompt holds a control character (U+{ord(strange):04X}); no budget was spent. Leave it out"
        )
    return text


def portrait_prompts() -> list[str]:
    """264 prompts about portraits, without a style: what the embedded index plans with."""
    found = []
    for who, hair, worn in product(_WHO, _HAIR, _WORN):
        parts = [part for part in (hair, worn) if part]
        found.append(f"{who} with {' and '.join(parts)}" if parts else who)
    return found
