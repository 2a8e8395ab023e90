"""The pages: self-contained, escaped, honest, and nothing of the owner's in the release."""

from __future__ import annotations

import base64
import io
import re
from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from sfumato.errors import InputError
from sfumato.report.html import internal_report, release_report, sheet, strip

VOID = {"meta", "img", "br", "link", "input", "hr"}


class _Balanced(HTMLParser):
    """Fails on tags that are not closed in order; collects the page's references."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.references: list[str] = []
        self.tags: set[str] = set()
        self.feed(page)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.references += [
            value or "" for name, value in attrs if name in ("src", "href", "srcset", "data", "action")
        ]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def _pictures(page: str) -> list[np.ndarray]:
    found = re.findall(r"data:image/png;base64,([A-Za-z0-9+/=]+)", page)
    return [np.asarray(Image.open(io.BytesIO(base64.b64decode(each)))) for each in found]


def test_both_pages_are_well_formed_and_need_nothing_else(facts, owner, public_only):
    for page in (release_report(facts), internal_report(facts, owner), release_report(public_only)):
        read = _Balanced(page)
        assert all(reference.startswith("data:image/png;base64,") for reference in read.references)
        assert "script" not in read.tags and "link" not in read.tags
        assert "http" not in re.sub(r"base64,[A-Za-z0-9+/=]+", "", page) and "@import" not in page


def test_the_guarantee_is_told_with_its_unit_relation_and_figures(facts):
    page = release_report(facts)
    for text in ("7.99", "1e-05", "adding or removing one", "replacing one image", "15.2", "8.61", "4,000"):
        assert text in page
    assert "2,930" in page  # e^7.981, rounded up
    assert "Gaussian noise, multiplier 50" in page and "150 × (Poisson sample" in page


def test_public_only_says_that_nothing_was_spent(public_only):
    page = release_report(public_only)
    assert "No sensitive image was used" in page
    assert "Where the budget went" not in page and "e<sup>ε</sup>" not in page


def test_every_bar_carries_its_figure_and_the_parts_exceed_the_whole(facts):
    from sfumato.report.html import _bars

    bars = {bar["name"]: bar for bar in _bars(facts.certificate)}
    assert set(bars) == {"semantic_histogram", "dp_sgd", "composed", "budget"}
    assert bars["semantic_histogram"]["width"] < bars["dp_sgd"]["width"] <= 100
    assert bars["budget"]["text"] == "8"


def test_names_cannot_inject_markup(facts):
    page = release_report(facts)
    assert "<i>shapes</i>" not in page and "&lt;i&gt;shapes" in page
    assert "drawn &amp; printed letters" in page


def test_warnings_stand_before_the_samples(facts):
    page = release_report(facts)
    assert (
        page.index("the release is below the floor") < page.index("The guarantee") < page.index("<h2>Samples")
    )
    assert "Please note" not in release_report(replace(facts, warnings=[]))


def test_no_paths_accounts_seeds_or_timings_in_the_release(facts):
    page = release_report(facts)
    for secret in ("/home/somebody", "secret@host", "20260101", "287", "61.7", "62 s"):
        assert secret not in re.sub(r"base64,[A-Za-z0-9+/=]+", "", page)


def test_the_release_page_has_nothing_of_the_owner(facts, owner):
    page = release_report(facts)
    for text in ("NOT FOR RELEASE", "86.1 %", "97.1 %", "1,000 images kept aside", "Real and synthetic"):
        assert text not in page
    assert not any((picture[..., :3] == 77).any(axis=-1).all() for picture in _pictures(page))
    with pytest.raises(InputError):
        release_report(replace(facts, options={"quality": owner}))


def test_the_owners_page_is_marked_and_shows_what_touches_private_data(facts, owner):
    page = internal_report(facts, owner)
    assert page.index("NOT FOR RELEASE") < page.index("<main>")
    for text in (
        "86.1 %",
        "70.2 %",
        "78.3 %",
        "97.1 %",
        "1,000 images kept aside",
        "287 s",
        "mean of three classifiers",
    ):
        assert text in page
    solid = [picture for picture in _pictures(page) if (picture[picture[..., 3] == 255][:, :3] == 77).all()]
    assert len(solid) == 1  # the private examples


def test_samples_are_shown_under_their_own_label_beside_public_only(facts):
    pictures = _pictures(release_report(facts))
    for label in range(3):
        mine, public = pictures[2 * label], pictures[2 * label + 1]
        np.testing.assert_array_equal(mine[:8, :8, 0], facts.sample_images[3 * label, :, :, 0])
        np.testing.assert_array_equal(public[:8, :8, 0], facts.public_only_images[3 * label, :, :, 0])


def test_without_labels_or_public_images(facts):
    bare = replace(
        facts,
        has_labels=False,
        label_names=("all",),
        sample_labels=np.zeros(9, int),
        public_only_images=None,
        public_description=None,
        selection=[["A", "B"]],
        noisy_histogram=facts.noisy_histogram[:1],
        mean_images=None,
    )
    page = release_report(bare)
    _Balanced(page)
    assert "without labels" in page and "without public images" in page
    assert len(_pictures(page)) == 1


def test_the_histogram_outlines_what_was_chosen(facts):
    page = release_report(facts)
    assert page.count('class="chosen"') == 5
    assert page.count('class="cell"') == 3 * 4 - 5
    assert "round: A, 90" in page


def test_a_wide_histogram_keeps_the_chosen_and_the_largest_classes(facts):
    from sfumato.report.html import CLASSES_SHOWN, _histogram

    rng = np.random.default_rng(1)
    values = rng.normal(size=(3, 500))
    values[1, 321] = 99
    names = [f"c{number}" for number in range(500)]
    shown = _histogram(
        replace(facts, noisy_histogram=values, public_class_names=names, selection=[["c499"], ["c0"], ["c7"]])
    )
    assert shown is not None and shown["left_out"] == 500 - CLASSES_SHOWN
    assert {"c499", "c0", "c7", "c321"} <= {name for name, _ in shown["classes"]}


@pytest.mark.parametrize("channels", [1, 3])
def test_a_sheet_keeps_every_pixel(channels):
    images = np.random.default_rng(2).integers(0, 256, (7, 14, 14, channels), dtype=np.uint8)
    picture = _pictures(sheet(images, columns=3)["source"])[0]
    assert picture.shape == (3 * 15 - 1, 3 * 15 - 1, 4)
    np.testing.assert_array_equal(picture[15:29, 15:29, :3], np.broadcast_to(images[4], (14, 14, 3)))
    assert picture[30:, 15:, 3].max() == 0  # the unused places are transparent
    assert strip(images)["width"] > strip(images[:2])["width"]
