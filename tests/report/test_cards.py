"""The card of a release."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
import yaml

from sfumato.errors import InputError
from sfumato.report.cards import card


def _front_matter(text: str) -> dict:
    found = re.match(r"---\n(.*?)\n---\n", text, re.S)
    assert found
    return yaml.safe_load(found.group(1))


def test_front_matter_is_what_hubs_read(facts):
    header = _front_matter(card(facts))
    assert header["library_name"] == "diffusers"
    assert {"differential-privacy", "synthetic-data", "sfumato-privimage"} <= set(header["tags"])
    assert "license" in header


def test_the_promise_the_limits_and_how_to_load(facts):
    text = card(facts)
    for part in (
        "7.99, 1e-05 (adding or removing one image)",
        "15.2",
        "## Intended use",
        "## Limits",
        'load_dataset("imagefolder", data_dir="images"',
        'UNet2DModel.from_pretrained("model")',
        "Gaussian noise, multiplier 50",
        "weak worst-case bound",
        "the release is below the floor",
    ):
        assert part in text


def test_the_code_in_the_card_is_python(facts):
    code = re.search(r"```python\n(.*?)```", card(facts), re.S)
    assert code
    compile(code.group(1), "card", "exec")


def test_names_stay_inside_their_cells(facts):
    text = card(facts)
    assert "sharp\\|edged" in text and "\\<i\\>shapes" in text
    tables = [line for line in text.splitlines() if line.startswith("|")]
    assert all(len(re.findall(r"(?<!\\)\|", line)) in (3, 4) for line in tables)


def test_nothing_of_the_owner(facts, owner):
    text = card(facts)
    for secret in ("/home/somebody", "secret@host", "20260101", "287"):
        assert secret not in text
    with pytest.raises(InputError):
        card(replace(facts, options={"quality": owner}))


def test_public_only_makes_no_promise_it_does_not_need(public_only):
    text = card(public_only)
    assert "No sensitive image was used" in text and "weak worst-case bound" not in text
