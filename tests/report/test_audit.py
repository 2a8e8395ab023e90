"""The audit's pages: a verdict anybody can read, figures with counts, nothing of the owner's on the redacted one."""

from __future__ import annotations

import base64
import dataclasses
import io
import re
from copy import deepcopy
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sfumato.data.images import OwnerOnly
from sfumato.data.release import refuse_private
from sfumato.errors import InputError
from sfumato.report.audit import MOST_PIXELS, PAIRS_SHOWN, Pair, audit_report, redacted_report
from sfumato.report.audit_figures import percent
from sfumato.report.redaction import redacted

BANNER = "NOT DIFFERENTIALLY PRIVATE. NOT FOR RELEASE."
VOID = {"meta", "img", "br", "link", "input", "hr"}
PARTS = (
    "verdict", "sentence", "reasons", "target", "train", "holdout", "extractor", "guidance_extractor", "threshold",
    "attacks", "side", "membership", "blind", "epsilon_lower_bound", "epsilon_claimed", "policy", "skipped",
    "searched", "seconds", "software", "statement",
)  # fmt: skip


class _Balanced(HTMLParser):
    """Fails on tags that are not closed in order; collects the page's references and its text."""

    def __init__(self, page):
        super().__init__()
        self.open, self.references, self.tags, self.text = [], [], [], ""
        self.feed(page)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.text += " "
        self.references += [
            value or "" for name, value in attrs if name in ("src", "href", "srcset", "data", "action")
        ]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] != "style":
            self.text += data


def words(page):
    """What a reader sees, with single blanks."""
    return re.sub(r"\s+", " ", _Balanced(page).text)


def found(num_images, matches, distinct, excess, ci, **more):
    """One attack's figures, its saturation rising to `distinct` different training images."""
    ams = matches / num_images
    points = [round(num_images * part / 10) for part in range(1, 11)]
    return {
        "num_images": num_images,
        "matches": matches,
        "ams": ams,
        "ams_ci": [max(0.0, ams - 0.014), min(1.0, ams + 0.015)],
        "ums": distinct / num_images,
        "excess": excess,
        "ci": ci,
        "level": 0.9917,
        "bands": [
            {"low": -0.02, "high": 0.0, "ams": ams / 4, "ums": ams / 5},
            {"low": -0.041, "high": -0.02, "ams": 3 * ams / 4, "ums": ams / 2},
        ],
        "saturation": [
            {
                "num_images": n,
                "ams": ams * (0.9 + n / num_images / 10),
                "ums": distinct * (n / num_images) ** 0.6 / n,
            }
            for n in points
        ],
        "filtered": 0,
        "says": "",
    } | more


def inferred(auc, low, high, hits, members=1000, nonmembers=1000):
    fpr = np.linspace(0, 1, 101) ** 3
    power = (1 - auc) / auc

    def rate(hit):
        return {"value": hit / members, "low": max(0.0, hit / members - 0.008), "high": hit / members + 0.011}

    return {
        "auc": auc,
        "auc_ci": [low, high],
        "tpr": {
            "0.001": rate(hits[0]) | {"true_positives": hits[0], "false_positives": 1},
            "0.01": rate(hits[1]) | {"true_positives": hits[1], "false_positives": 10},
        },
        "members": members,
        "nonmembers": nonmembers,
        "roc": [[float(x), float(x**power)] for x in fpr],
    }


def fail_result():
    return {
        "format": "sfumato-audit/1",
        "statement": "Figures of private images without any guarantee: for their owner only.",
        "verdict": "fail",
        "sentence": "It gives away more of its training images than the policy allows: SIDE's excess is 17.3 %.",
        "reasons": [
            "SIDE: the excess of 17.3 % (12.9 to 21.4 %) lies above the 1 % that the policy allows.",
            "SimA finds 11.2 % of members at 1 % false alarms (9.3 to 13.4 %), above the 5 % allowed.",
        ],
        "target": {
            "description": "runs/ward-7 scans",
            "kind": "sfumato",
            "identity": "ab12" * 16,
            "images": None,
        },
        "train": {"description": "/data/ward-7/<b>scans</b>", "images": 1200, "groups": 1150, "duplicates": 50},
        "holdout": {"description": "/data/w/kept & aside.zip", "images": 988, "given": 1003, "removed_overlap": 12},
        "extractor": {
            "name": "pixels",
            "identity": "cd34" * 16,
            "preprocessing": "root mean square difference, flips and shifts by one pixel",
            "direction": "rms pixel distance, lower is closer",
        },
        "guidance_extractor": {
            "name": "efficientnet-lite0",
            "identity": "ef56" * 16,
            "preprocessing": "224 pixels",
            "direction": "cosine, higher is closer",
        },
        "threshold": {
            "value": -0.0412,
            "rate": 0.01,
            "achieved": 0.0101,
            "low": 0.00486,
            "high": 0.01854,
            "holdout": 988,
        },
        "attacks": {
            "random": found(2000, 154, 41, 0.068, [0.041, 0.094], filtered=3),
            "side": found(2000, 374, 88, 0.173, [0.129, 0.214]),
            "side-shuffled": found(2000, 171, 44, 0.075, [0.046, 0.103]),
            "conditioned": found(2000, 252, 61, 0.117, [0.081, 0.152], says="knows the labels of all images"),
            "carlini": found(
                2000, 22, 9, 0.006, [0.001, 0.013], saturation=[], threshold=-0.41,
                bands=[{"low": -0.41, "high": -0.3, "ams": 0.011, "ums": 0.0045}],
            ),
            "gu": found(2000, 0, 0, 0.0, [0.0, 0.0018], ams_ci=[0.0, 0.0018], bands=[], saturation=[]),
        },
        "side": {
            "clusters": 50,
            "kept": 31,
            "scale": 5.0,
            "pilot": [
                {"clusters": 50, "scale": 1.0, "score": 0.061},
                {"clusters": 50, "scale": 5.0, "score": 0.19},
                {"clusters": 50, "scale": 10.0, "score": 0.11},
                {"clusters": 100, "scale": 5.0, "score": 0.17},
            ],
            "says": "31 of 50 clusters were coherent enough.",
        },
        "membership": {
            "loss": inferred(0.61, 0.585, 0.634, (4, 31)),
            "secmi": inferred(0.66, 0.637, 0.684, (9, 60)),
            "pia": inferred(0.68, 0.657, 0.703, (11, 71)),
            "sima": inferred(0.74, 0.718, 0.762, (23, 112)),
        },
        "blind": {"auc": 0.507, "ci": [0.478, 0.536]},
        "epsilon_lower_bound": {
            "epsilon": 3.218,
            "score": "SimA",
            "correct": 187,
            "guesses": 192,
            "canaries": 1000,
            "cap": 5.784,
            "level": 0.95,
            "delta": 1e-5,
            "scores": {"nearest generated image (pixels)": 0.41, "loss": 2.1, "SimA": 3.218},
        },
        "epsilon_claimed": {"epsilon": 1.0, "delta": 1e-5, "unit": "image", "relation": "add_or_remove_one"},
        "policy": {
            "false_match_rate": 0.01,
            "maximum_excess": 0.01,
            "maximum_tpr_at_1_percent_fpr": 0.05,
            "epsilon_must_not_exceed_claim": True,
            "minimum_holdout": 100,
        },
        "skipped": [{"attack": "cliques", "why": "the generator takes no prompts"}],
        "searched": "2,000 images of each attack were compared with all 1,200 training images, also mirrored and "
        "shifted by one pixel. Crops, rotations and copies of parts of an image were not looked for.",
        "seconds": {"similarity": 12.31, "side": 161.2, "membership": 44.0, "blind baseline": 3.7},
        "software": {"sfumato": "0.1.0", "torch": "2.13.0"},
    }  # fmt: skip


def pass_result():
    result = fail_result()
    result |= {
        "verdict": "pass",
        "sentence": "No attack found more of the training images than the policy allows.",
        "reasons": ["Every excess lies below 1 %.", "The lower bound on ε, 0.41, is below the claimed 8."],
        "attacks": {
            "random": found(2000, 21, 19, 0.0004, [-0.0061, 0.0068]),
            "side": found(2000, 24, 17, 0.0011, [-0.0057, 0.0081]),
            "side-shuffled": found(2000, 19, 18, -0.0008, [-0.0072, 0.006]),
        },
        "membership": {"sima": inferred(0.503, 0.48, 0.526, (1, 11))},
        "skipped": [],
    }
    result["epsilon_lower_bound"] |= {"epsilon": 0.4199, "correct": 61, "guesses": 100}
    result["epsilon_claimed"] |= {"epsilon": 8.0}
    return result


def black_box_result():
    result = fail_result()
    why = "it needs the model, and only its images were given"
    result |= {
        "verdict": "undecided",
        "sentence": "It cannot be decided: the interval of the excess reaches across the 1 % that the policy allows.",
        "reasons": ["About 6,000 images instead of 400 would decide it."],
        "target": {
            "description": "made.npz",
            "kind": "images",
            "identity": "77" * 32,
            "images": "/data/out/made.npz",
        },
        "attacks": {"random": found(400, 9, 7, 0.012, [-0.006, 0.034])},
        "side": {"skipped": why},
        "membership": {},
        "blind": None,
        "epsilon_lower_bound": None,
        "epsilon_claimed": None,
        "guidance_extractor": None,
        "skipped": [{"attack": "side", "why": why}, {"attack": "membership", "why": why}],
    }
    return result


def nothing_result():
    """Every attack skipped, no held-out images."""
    result = black_box_result()
    result |= {
        "sentence": "Nothing can be decided without held-out images.",
        "reasons": ["give --holdout"],
        "holdout": None,
        "threshold": None,
        "attacks": {},
        "side": {},
        "skipped": [
            {"attack": name, "why": "no held-out images"}
            for name in ("random", "side", "carlini", "membership")
        ],
    }
    return result


RESULTS = {
    "pass": pass_result, "fail": fail_result, "black box": black_box_result, "nothing": nothing_result, "empty": dict,
}  # fmt: skip


def pairs(value, count, side=16, channels=1):
    rng = np.random.default_rng(value)
    made = rng.integers(0, 256, (count, side, side, channels), dtype=np.uint8)
    return [
        Pair(image, np.full_like(image, value), similarity=-0.01 - 0.002 * row, repeats=row)
        for row, image in enumerate(made)
    ]


@pytest.fixture
def gallery():
    return {"train": pairs(77, 3), "holdout": pairs(99, 3)}


def owners(result, gallery):
    page = audit_report(result, gallery)
    assert isinstance(page, OwnerOnly)
    return page.value


def redacted_page(result):
    page = redacted_report(result)
    assert isinstance(page, OwnerOnly)
    return page.value


@pytest.mark.parametrize("name", RESULTS)
def test_every_page_is_well_formed_and_needs_nothing_else(name, gallery):
    for page in (
        owners(RESULTS[name](), gallery),
        owners(RESULTS[name](), {}),
        redacted_page(RESULTS[name]()),
    ):
        read = _Balanced(page)
        assert all(each.startswith("data:image/png;base64,") for each in read.references)
        assert not {"script", "link", "iframe", "object", "form"} & set(read.tags)
        assert "http" not in re.sub(r"base64,[A-Za-z0-9+/=]+", "", page) and "@import" not in page
        assert not re.search(r"url\(", page) and not re.search(r"\bon\w+=", page)
        for unsaid in ("None", "nan", "Undefined", "inf "):
            assert unsaid not in read.text


def test_both_pages_are_marked_and_no_release_takes_them(gallery):
    for page in (audit_report(fail_result(), gallery), redacted_report(fail_result())):
        with pytest.raises(InputError):
            refuse_private(page, "report.html")
    page = owners(fail_result(), gallery)
    assert page.index(BANNER) < page.index("<main>")
    page = redacted_page(fail_result())
    assert page.index("images without a guarantee. The owner of the images decides") < page.index("<main>")
    assert "until then it is not for release" in page


@pytest.mark.parametrize(
    ("name", "word", "sign", "css"),
    [
        ("pass", "PASS", "✓", "verdict pass"),
        ("fail", "FAIL", "✕", "verdict fail"),
        ("black box", "UNDECIDED", "?", "verdict undecided"),
        ("empty", "NO VERDICT", "–", "verdict none"),
    ],
)
def test_the_verdict_comes_first_in_words_a_sign_and_a_colour(name, word, sign, css, gallery):
    result = RESULTS[name]()
    page = owners(result, gallery)
    said = words(page)
    assert f'class="{css}"' in page and f'aria-hidden="true">{sign}<' in page
    place = said.index(word, said.index("What did this generator memorise?", 100))
    for text in [*filter(None, [result.get("sentence")]), *result.get("reasons", [])]:
        assert (
            place <= said.index(re.sub(r"\s+", " ", text)) < said.index("Does it give training images away?")
        )
    assert ("It is no guarantee of privacy" in said) == (name == "pass")


def test_a_failure_is_said_in_plain_words(gallery):
    result = fail_result()
    assert "than its privacy claim (ε) promises." in words(owners(result, gallery))
    result["epsilon_claimed"] = None
    assert "Do not release: this generator repeats images that it was trained on (374 of 2,000" in words(
        owners(result, gallery)
    )
    result["attacks"] = {"conditioned": result["attacks"]["conditioned"]}  # which is not judged
    assert "Do not release: one can tell from this generator which images" in words(owners(result, gallery))


def test_a_reason_that_is_the_sentence_is_not_said_twice(gallery):
    result = fail_result() | {
        "sentence": "Fails: this. And 1 further reason.",
        "reasons": ["this.", "and that."],
    }
    page = owners(result, gallery)
    assert "<li>and that.</li>" in page and "<li>this.</li>" not in page


def test_an_unknown_verdict_is_never_a_pass(gallery):
    said = words(owners(fail_result() | {"verdict": "passed"}, gallery))
    assert "NO VERDICT" in said and "PASS" not in said


def test_every_figure_is_told_with_its_count_and_interval(gallery):
    said = words(owners(fail_result(), gallery))
    for text in (
        "374 = 18.7 %", "17.3 to 20.2 %", "88 = 4.4 %", "12.9 to 21.4 % (99.2 % interval)", "✕ above the limit",
        "? reaches across the limit", "✓ within the limit", "0 = 0 %", "0 to 0.18 %", "3 blank ones count as no match",
        "for comparison, not judged",
        "ratio of 0.41 or less", "0.3 to 0.41",
        "SIDE against plain sampling: 374 matches against 154, 2.4 times as many.",
        "SIDE against SIDE, shuffled groups: 374 matches against 171", "groups coherent enough to steer by: 31",
        "0.740", "0.718 to 0.762", "112 of 1,000 found, 10 of 1,000 false alarms", "23 of 1,000 found, 1 of 1,000",
        "blind baseline", "0.478 to 0.536", "A low bound is no evidence of privacy.",
        "187 of 192 guesses right, about 1,000 canaries", "it could not have gone above 5.78",
        "at most 0.0412", "of 988 of them", "10 (1.0 %)", "0.49 to 1.9 %", "0.02 to 0.041", "12 removed",
        "of 1,003 given",
        "1,150 once near-duplicates count as one", "the generator takes no prompts", "Crops, rotations and copies",
        "161.2 s", "221.2 s", "torch 2.13.0", "for their owner only", "maximum_excess", "0.05",
    ):  # fmt: skip
        assert text in said, text


def test_bars_and_whiskers_stand_where_their_figures_are(gallery):
    page = owners(fail_result(), gallery)
    top = 1.05 * 0.202  # the axis of AMS and UMS: the highest interval's end and a little room
    row = page[page.index(">SIDE<small>") : page.index(">SIDE, shuffled groups <code>")]
    width, left, wide = (float(each) for each in re.search(
        r'class="bar" style="left:0.0%;width:([\d.]+)%".*?class="whisker" style="left:([\d.]+)%;width:([\d.]+)%', row
    ).groups())  # fmt: skip
    assert width == pytest.approx(100 * 0.187 / top, abs=0.02)
    assert left == pytest.approx(100 * 0.173 / top, abs=0.02) and left + wide == pytest.approx(
        100 / 1.05, abs=0.02
    )
    limit = re.search(r'class="mark limit" style="left:([\d.]+)%"', row)
    assert float(limit.group(1)) == pytest.approx(100 * 0.01 / (1.05 * 0.214), abs=0.02)


def test_the_gallery_shows_each_pair_side_by_side_and_training_first(gallery):
    page = owners(fail_result(), gallery)
    shown = [
        np.asarray(Image.open(io.BytesIO(base64.b64decode(each))))[..., :3]
        for each in re.findall(r"data:image/png;base64,([A-Za-z0-9+/=]+)", page)
    ]
    expected = [
        image
        for pair in [*gallery["train"], *gallery["holdout"]]
        for image in (pair.generated, pair.reference)
    ]
    assert len(shown) == len(expected) == 12
    for got, image in zip(shown, expected, strict=True):
        assert np.array_equal(got, np.repeat(image, 3, axis=2))
    assert page.count("distance 0.012 · 1 generated image matches") == 2
    assert page.count("distance 0.014 · 2 generated images match<") == 2


def test_large_pictures_are_reduced_and_many_pairs_are_cut():
    rng = np.random.default_rng(0)
    large = [Pair(*rng.integers(0, 256, (2, 512, 256, 3), dtype=np.uint8), 0.91, 1)] * (PAIRS_SHOWN + 5)
    result = fail_result()
    result["extractor"]["direction"] = "cosine, higher is closer"
    page = owners(result, {"train": large, "holdout": []})
    first = re.search(r"data:image/png;base64,([A-Za-z0-9+/=]+)", page).group(1)
    assert Image.open(io.BytesIO(base64.b64decode(first))).size == (MOST_PIXELS // 2, MOST_PIXELS)
    assert page.count("<figcaption>similarity 0.91") == PAIRS_SHOWN
    assert f"the closest {PAIRS_SHOWN} of {PAIRS_SHOWN + 5}" in page
    assert "Without held-out images there is nothing to compare" in page


def test_a_similarity_is_told_as_it_is_and_a_distance_without_its_sign(gallery):
    result = fail_result()
    assert "distance to a training image is at most 0.0412" in words(owners(result, gallery))
    result["extractor"]["direction"], result["threshold"]["value"] = "cosine, higher is closer", 0.874
    assert "similarity to a training image is at least 0.874" in words(owners(result, gallery))


def test_charts_have_a_line_for_each_attack_told_apart_by_colour_and_dash(gallery):
    page = owners(fail_result(), gallery)
    assert page.count('<svg class="chart" role="img"') == 3
    styles = re.findall(r"\.(s\d) \{ stroke: var\((--c\d)\)(; stroke-dasharray: [\d ]+)?; \}", page)
    assert len({color for _, color, _ in styles}) == len({dash for _, _, dash in styles}) == len(styles) == 8
    found_chart = page[page.index("Different training images found over") :]
    assert re.findall(r"<title>([^<]+)</title></polyline>", found_chart)[:4] == [
        "plain sampling", "SIDE", "SIDE, shuffled groups", "steered by real labels",
    ]  # fmt: skip
    assert "ROC curves of membership inference, both axes logarithmic" in page


def test_the_lower_bound_is_rounded_down_and_set_against_the_claim(gallery):
    result = pass_result()
    said = words(owners(result, gallery))
    assert (
        "ε ≥ 0.41" in said
        and "does not hold" not in said
        and "A low bound is no evidence of privacy." in said
    )
    result["epsilon_claimed"]["epsilon"] = 1.0
    result["epsilon_lower_bound"]["epsilon"] = 1.0004  # rounding must not hide that the claim is broken
    said = words(owners(result, gallery))
    assert (
        "The lower bound 1.0004 is above the claimed 1.0000: with 95 % confidence the claim does not hold."
        in said
    )
    result["epsilon_lower_bound"] = None
    said = words(owners(result, gallery))
    assert "No canaries were given" in said and "Claimed: ε 1, δ 1e-05" in said
    result["epsilon_claimed"] = None
    assert "no claim of a guarantee" in words(owners(result, gallery))


@pytest.mark.parametrize("change", [{"delta": 1e-4}, {"relation": "replace_one"}])
def test_a_bound_that_is_not_about_the_claim_breaks_nothing(change, gallery):
    result = fail_result()
    result["epsilon_claimed"] |= change
    said = words(owners(result, gallery))
    assert (
        "The two cannot be compared" in said
        and "does not hold" not in said
        and "privacy claim (ε)" not in said
    )


def test_a_black_box_says_what_it_could_not_try(gallery):
    said = words(owners(black_box_result(), gallery))
    assert (
        said.count("it needs the model, and only its images were given") == 3
    )  # SIDE's place, and two skipped rows
    assert "Not tried: it needs the model" in said and "membership" in said and "made.npz" in said


def test_the_comparison_that_knows_the_labels_is_not_judged(gallery):
    result = fail_result()
    result["attacks"]["conditioned"] |= {"excess": 0.9, "ci": [0.88, 0.92], "distinct": 17}
    result["attacks"]["released"] = found(5000, 1, 1, 0.0, [-0.001, 0.01])
    page = owners(result, gallery)
    assert words(page).index("17.3 % excess of copies, at worst by SIDE") > 0
    row = page[
        page.index(">steered by real labels <code>conditioned") : page.index(">Carlini&#39;s ratio <code>")
    ]
    assert "limit</small>" not in row and "17 <span" in row
    assert "the images that came with the generator" in page
    assert page.count("✓ within the limit") == 2  # the interval may end at the limit


def test_a_rate_that_too_few_images_cannot_show_is_not_shown_as_nothing(gallery):
    result = fail_result()
    result["membership"]["sima"]["tpr"]["0.001"] |= {"value": None, "true_positives": None}
    assert words(owners(result, gallery)).count("too few images") == 1


def test_few_unseen_images_are_said_to_be_few(gallery):
    result = fail_result()
    result["membership"] = {"sima": inferred(0.6, 0.5, 0.7, (1, 4), members=300, nonmembers=300)}
    assert "With 300 unseen images, 0.1 % allows not one false alarm" in words(owners(result, gallery))


@pytest.mark.parametrize("part", PARTS)
def test_any_part_may_be_missing(part, gallery):
    missing, none = fail_result(), fail_result() | {part: None}
    del missing[part]
    for page in (owners(missing, gallery), redacted_page(none)):
        assert "None" not in words(page)


def hollow(value):
    """Every dictionary kept, every other value None."""
    return {key: hollow(inner) for key, inner in value.items()} if isinstance(value, dict) else None


def test_every_single_value_may_be_none(gallery):
    for page in (owners(hollow(fail_result()), gallery), redacted_page(hollow(fail_result()))):
        assert "None" not in words(page)


def spoilt(value):
    """Markup in every text."""
    if isinstance(value, dict):
        return {key: spoilt(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [spoilt(inner) for inner in value]
    return f"{value} <script>&'\"x" if isinstance(value, str) else value


def test_no_text_can_inject_markup(gallery):
    result = spoilt(fail_result())
    for part in ("attacks", "membership", "policy", "seconds", "software"):
        result[part]["<script>bad</script>"] = next(iter(result[part].values()))
    for page in (owners(result, gallery), redacted_page(result)):
        assert "<script" not in page and "bad</script" not in page
        assert "&lt;script&gt;" in page
        _Balanced(page)
    assert "<b>scans" not in owners(fail_result(), gallery) and "&lt;b&gt;scans" in owners(
        fail_result(), gallery
    )


def test_the_redacted_page_names_nothing_of_the_owners(gallery):
    result = fail_result()
    result["sentence"] += (
        " Trained on '/data/my other scans/x', /data/ward-7/<b>scans</b> and runs/ward-7 scans."
    )
    result["reasons"].append(
        "the held-out images of kept & aside.zip and C:\\Users\\me\\held out.npz are few"
    )
    result["searched"] += " Canaries of /secret/place/sealed.json were read; faces.parquet was not."
    result["searched"] += " 1,200 different training images were compared in wardnet, with flips."
    result["attacks"]["side"]["says"] = "saved under 'runs/ward-7 scans/internal/audit'"
    result["side"]["says"] = "see ../ward-7/side"
    result["skipped"].append({"attack": "copy", "why": "'/models/copy net.onnx' could not be opened"})
    result["extractor"]["name"] = "wardnet"
    result["extractor"]["preprocessing"] = "as in /models/wardnet.pt"
    before = deepcopy(result)
    page = redacted_page(result)
    assert result == before  # the owner's own copy stays whole
    for secret in (
        "ward-7", "wardnet", "scans", "kept &", "aside", "secret", "sealed.json", "faces", "Users", "npz", "/data",
        "models", "my other", "copy net", "internal/audit",
    ):  # fmt: skip
        assert secret not in page, secret
    assert "<img" not in page and "base64" not in page
    said = words(page)
    for kept in (
        "374 = 18.7 %",
        "12.9 to 21.4 %",
        "187 of 192",
        "The generator",
        "ab12" * 16,
        "an encoder of the owner's",
    ):
        assert kept in said, kept
    assert "sfumato-audit/1" in said and "[withheld]" in said
    assert "SIDE's excess is 17.3 %." in said and "lies above the 1 % that the policy allows" in said


def test_redaction_leaves_figures_and_plain_words_alone():
    plain = pass_result()
    for part in ("target", "train", "holdout"):
        plain[part]["description"] = "random"  # a word that is also an attack's name
    clean = redacted(plain)
    assert clean["attacks"]["random"] == plain["attacks"]["random"] and clean["verdict"] == "pass"
    assert clean["epsilon_lower_bound"] == plain["epsilon_lower_bound"] and clean["policy"] == plain["policy"]
    assert clean["reasons"] == plain["reasons"] and "description" not in clean["train"]
    text = {"says": "values / 255, odds of 1/2 (1/3 at least), isn't 0.25 or 12.5 % what it can't be"}
    assert redacted(text) == text
    paths = {"says": "/a b/c, d/e \\f g\\h ~/i ./j (k/l) x=/m 3/scan 10/2020/x scan.png"}
    assert redacted(paths) == {"says": " ".join(["[withheld]"] * 12)}
    assert redacted({}) == {} and redacted({"train": None, "extractor": None}) == {
        "train": None,
        "extractor": None,
    }


def test_shares_in_words():
    said = [
        percent(share) for share in (0, 1, 0.5, 0.9999, 0.0305, 0.00049, -0.0061, 1.236, None, float("nan"))
    ]
    assert said == ["0 %", "100 %", "50 %", "> 99.9 %", "3.0 %", "0.049 %", "−0.61 %", "123.6 %", "–", "–"]


def test_the_page_and_the_guide_know_every_key_attack_and_bystander():
    from sfumato.audit.attacks import SAYS
    from sfumato.audit.policy import BYSTANDERS, EXIT_STATUS, Policy
    from sfumato.report import audit, audit_figures

    guide = (Path(__file__).parents[2] / "docs" / "audit.md").read_text(encoding="utf-8")
    fields = {field.name: field.default for field in dataclasses.fields(Policy)}
    assert set(audit.POLICY) == set(fields)
    for key, default in fields.items():
        assert f"| `{key}` | {str(default).lower()} |" in guide, key
    assert set(SAYS) <= set(audit_figures.ATTACKS) and audit_figures.BYSTANDERS == BYSTANDERS
    for name in SAYS:
        assert f"| `{name}` |" in guide, name
    for verdict, status in EXIT_STATUS.items():
        assert verdict in audit.VERDICTS and f"| {status} | {verdict} |" in guide
