"""The evaluation's page: self-contained, marked for its owner, or free of anything of the owner's."""

from __future__ import annotations

import base64
import io
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from sfumato.data.images import OwnerArray, OwnerOnly
from sfumato.data.release import refuse_private
from sfumato.errors import InputError
from sfumato.report.evaluation import SCATTER_SIDE, evaluation_report, figure, notes, spread

BANNER = "NOT DIFFERENTIALLY PRIVATE. NOT FOR RELEASE."
VOID = {"meta", "img", "br", "link", "input", "hr", "circle"}


class _Balanced(HTMLParser):
    """Fails on tags that are not closed in order; collects the page's references."""

    def __init__(self, page):
        super().__init__()
        self.open, self.references, self.tags = [], [], []
        self.feed(page)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.references += [
            value or "" for name, value in attrs if name in ("src", "href", "srcset", "data", "action")
        ]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def accuracy(mean, std=None):
    return {"mean": mean, "std": std, "seeds": [mean]}


@pytest.fixture
def summary():
    figures = {
        "frechet": 12.25, "kid": 0.031, "kid_interval": [0.02, 0.04], "precision": 0.61, "recall": 0.52,
        "density": 1.25, "coverage": 0.43, "authenticity": 0.44, "fld": 5.5, "fld_gap": 0.75,
    }  # fmt: skip
    encoder = {"identity": "ab" * 32, "dimension": 64, "distance": "FD-pixels"}
    attainable = {key: value / 2 for key, value in figures.items() if key not in ("kid_interval", "fld")}
    return {
        "statement": "what it is",
        "reference_is_public": False,
        "synthetic": {"description": "a folder <made>", "images": 4000, "labelled": 4000},
        "against": {"description": "scans & more", "images": 1234, "labelled": 1200},
        "holdout": {"description": "kept aside", "images": 555, "labelled": None},
        "size": [8, 8],
        "channels": 1,
        "label_names": ["round", "sha<rp"],
        "copies": {"synthetic": 7, "holdout": 0},
        "features": {
            "pixels": figures | {"attainable": attainable, "encoder": encoder, "warnings": ["rank-deficient"]},
            "other": figures | {"encoder": encoder | {"distance": "FD-other"}, "warnings": []},
        },
        "accuracy": {"cnn": accuracy(0.861), "mean": accuracy(0.8, 0.02)},
        "ceiling": {"accuracy": {"cnn": accuracy(0.975)}},
        "floor": {"accuracy": 0.25},
        "notes": ["labels <b>were</b> missing"],
        "software": {"sfumato": "0.1.0"},
    }  # fmt: skip


@pytest.fixture
def gallery():
    made, real = np.full((3, 8, 8, 1), 10, np.uint8), np.full((3, 8, 8, 1), 77, np.uint8)
    return [("round", made, real), ("sha<rp", made[:0], real[:2])]


@pytest.fixture
def points():
    return {"pixels": {"real": [[0.0, 0.0], [99.0, -99.0]], "synthetic": [[1.0, 1.0]]}}


def owners(summary, gallery, points):
    page = evaluation_report(OwnerOnly(summary), OwnerOnly(gallery), OwnerOnly(points))
    assert isinstance(page, OwnerOnly)
    return page.value


def test_the_owners_page_is_marked_and_no_release_takes_it(summary, gallery, points):
    page = evaluation_report(OwnerOnly(summary), OwnerOnly(gallery), OwnerOnly(points))
    with pytest.raises(InputError):
        refuse_private(page, "report.html")
    assert isinstance(page, OwnerOnly) and page.value.index(BANNER) < page.value.index("<main>")


def test_the_public_page_says_what_it_was_compared_with(summary, gallery, points):
    page = evaluation_report(summary | {"reference_is_public": True}, gallery, points)
    assert isinstance(page, str) and BANNER not in page and "NOT FOR RELEASE" not in page
    assert "scans &amp; more" in page and page.count("declared to be public by the owner") == 2
    assert "evaluation against public images" in page


def test_private_pictures_are_refused_on_a_public_page(summary, gallery, points):
    owned = [(name, made, real.view(OwnerArray)) for name, made, real in gallery]
    with pytest.raises(InputError):
        evaluation_report(summary, owned, points)
    with pytest.raises(InputError):
        evaluation_report(summary, gallery, OwnerOnly(points))
    with pytest.raises(InputError):
        evaluation_report(summary | {"features": OwnerOnly({})}, gallery, points)


def test_it_is_well_formed_and_needs_nothing_else(summary, gallery, points):
    for page in (owners(summary, gallery, points), evaluation_report(summary, gallery, points)):
        read = _Balanced(page)
        assert read.references and all(each.startswith("data:image/png;base64,") for each in read.references)
        assert not {"script", "link", "iframe", "object"} & set(read.tags)
        assert "http" not in re.sub(r"base64,[A-Za-z0-9+/=]+", "", page) and "@import" not in page
        assert not re.search(r"url\(", page)


def test_every_figure_is_told_beside_what_is_attainable(summary, gallery, points):
    page = owners(summary, gallery, points)
    for text in (
        "12.25", "6.1250", "0.031 (0.02 to 0.04)", "0.6100", "0.3050", "1.2500", "5.5000", "0.7500", "0.3750",
        "86.1 %", "97.5 %", "80.0 ± 2.0 %", "25.0 %", "Fréchet distance, FD-pixels", "FD-other", "ab" * 32,
        "4,000", "1,234", "1,200 with a label", "no labels used", "7 synthetic images are one of the real",
    ):  # fmt: skip
        assert text in page, text


def test_names_cannot_inject_markup(summary, gallery, points):
    page = owners(summary, gallery, points)
    for bad in ("<made>", "sha<rp", "<b>were"):
        assert bad not in page
    assert "&lt;made&gt;" in page and "sha&lt;rp" in page


def test_notes_and_warnings_stand_before_the_figures(summary, gallery, points):
    assert notes(summary) == ["labels <b>were</b> missing", "pixels: rank-deficient"]
    page = owners(summary, gallery, points)
    assert page.index("pixels: rank-deficient") < page.index("Accuracy on held-out")
    summary = summary | {"notes": [], "features": {"other": summary["features"]["other"]}}
    assert "Please note" not in owners(summary, gallery, points)


def test_bars_are_as_long_as_their_figures(summary, gallery, points):
    page = owners(summary, gallery, points)
    assert 'style="width:86.1%"' in page and 'style="left:97.5%"' in page  # accuracy and its ceiling
    assert 'style="left:25.0%"' in page  # the floor
    assert (
        'style="width:100.0%"' in page and 'style="left:50.0%"' in page
    )  # density 1.25, the longest, and its half
    assert f'style="width:{0.61 / 1.25 * 100:.1f}%"' in page


def test_the_grids_show_synthetic_beside_real(summary, gallery, points):
    page = owners(summary, gallery, points)
    sent = re.findall(r"data:image/png;base64,([A-Za-z0-9+/=]+)", page)
    shown = [np.asarray(Image.open(io.BytesIO(base64.b64decode(each)))) for each in sent]
    values = [int(np.unique(each[each[..., 3] == 255][:, :3])[0]) for each in shown]
    assert values == [10, 77, 77] and "<small>none</small>" in page  # no synthetic image of the second label


def test_without_labels_accuracy_or_holdout(summary, gallery, points):
    bare = summary | {"label_names": None, "accuracy": {}, "holdout": None}
    bare.pop("ceiling"), bare.pop("floor")
    page = owners(bare, [("", *gallery[0][1:])], {})
    _Balanced(page)
    assert "Accuracy on held-out" not in page and "by label" not in page and "<svg" not in page
    assert "--holdout" in page


def test_points_stay_on_the_picture(summary, gallery, points):
    page = owners(summary, gallery, points)
    places = [(float(x), float(y)) for x, y in re.findall(r'<circle cx="([-\d.]+)" cy="([-\d.]+)"', page)]
    assert len(places) == 3 and all(0 < x < SCATTER_SIDE and 0 < y < SCATTER_SIDE for x, y in places)
    middle = (SCATTER_SIDE / 2, SCATTER_SIDE / 2)
    assert places[0] == middle and places[2][0] > middle[0] and places[2][1] < middle[1]  # up is up


def test_many_labels_are_not_all_shown(summary, gallery, points):
    page = owners(summary | {"label_names": [str(n) for n in range(50)]}, gallery, points)
    assert "48 more labels were measured" in page


def test_figures_in_words():
    assert figure(0.5) == "0.5000" and figure(0.00012345) == "0.0001234" and figure(123.456) == "123.5"
    assert spread(accuracy(0.5)) == "50.0 %" and spread(accuracy(0.5, 0.01)) == "50.0 ± 1.0 %"
