"""The counts that the audit's benchmark reports, on generators whose guilt is known exactly."""

import importlib
import sys
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest

FOLDER = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def scripts(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    names = ("audit", "generators")
    yield tuple(importlib.import_module(name) for name in names)
    for name in names:
        sys.modules.pop(name, None)


class Repeats:
    """Draws from its images in turn."""

    def __init__(self, images):
        self.images = images

    def generate(self, num_images, *, seed):
        return self.images[np.arange(num_images) % len(self.images)], None


@pytest.fixture
def options(tmp_path, scripts, monkeypatch):
    audit, _ = scripts
    faces = np.random.default_rng(0).integers(0, 256, (400, 32, 32), dtype=np.uint8)
    np.savez(tmp_path / "faces.npz", images=faces)
    monkeypatch.setattr(audit, "FACES", {"once": 60, "held": 200, "drawn": 50})
    monkeypatch.setattr(audit, "PLANTED", 3)
    return Namespace(faces=str(tmp_path / "faces.npz"), out=tmp_path)


def test_a_repeater_of_the_most_frequent_faces_is_found_to_repeat_them(scripts, options, monkeypatch):
    audit, generators = scripts
    monkeypatch.setattr(generators, "learnt", lambda train, seed, folder: Repeats(train[:300]))
    result = audit.duplicates(options, "plain", 0, options.out)
    by_times = {row["times"]: row for row in result["times"]}
    assert list(by_times) == [0, 1, 5, 20, 100] and result["images"] == 60 + 3 * 125
    assert [by_times[times]["faces"] for times in (1, 5, 20, 100)] == [60, 3, 3, 3]
    # the first 50 rows of 300 are copies of the first face
    assert by_times[100] == {"times": 100, "faces": 3, "matches": 50, "extracted": 1}
    assert not any(by_times[times]["matches"] for times in (0, 1, 5, 20))
    assert result["figures"]["ams"] == 1 and result["figures"]["distinct"] == 1
    assert "| plain | 100× | 3 | 1 | 33.3%" in audit.duplicates_table({"plain": [result]})


def test_a_repeater_of_held_out_faces_is_not(scripts, options, monkeypatch):
    audit, generators = scripts
    with np.load(options.faces) as file:
        held = file["images"][audit.FACE][np.random.default_rng(0).permutation(400)[-200:]][..., None]
    monkeypatch.setattr(generators, "learnt", lambda train, seed, folder: Repeats(held))
    rows = audit.duplicates(options, "plain", 0, options.out)["times"]
    # the threshold itself lets one in a hundred of the held-out 200 match
    assert rows[0]["matches"] > 10 and sum(row["matches"] for row in rows[1:]) <= 2


def test_pictures_in_both_sets_leave_both(scripts):
    audit, _ = scripts
    draw = np.random.default_rng(1).integers(0, 256, (7, 16, 16, 1), dtype=np.uint8)
    train, held = draw[[0, 1, 1, 2, 3]], draw[[4, 3, 5]]
    mine, theirs = audit.each_picture_once(train, held)
    assert mine.tolist() == [0, 1, 3] and theirs.tolist() == [0, 2]


def test_ratios_over_seeds(scripts):
    audit, _ = scripts
    assert audit.ratio_interval([2.0, 2.0, 2.0]).startswith("2.00 (2.00 to 2.00")
    middle, low, _, high = audit.ratio_interval([1.0, 4.0]).replace("(", "").replace(")", "").split()[:4]
    assert float(middle) == 2 and float(low) < 1 and float(high.rstrip(";")) > 4
    assert audit.ratio_interval([0.0, 4.0]) == "0.00 4.00"


def test_alarms_are_counted(scripts):
    audit, _ = scripts
    quiet = {"num_images": 100, "matches": 1, "excess": 0.0, "ci": [-0.01, 0.01]}
    loud = {"num_images": 100, "matches": 9, "excess": 0.05, "ci": [0.02, 0.09]}
    lines = audit.alarms_table({"fresh": [{"runs": [quiet, quiet, quiet, loud]}]}).splitlines()
    assert lines[2].startswith("| fresh images at or above the threshold | 400 | 12 | 3.00%")
    assert "| 4 | 1 | 25.00% |" in lines[3] and "| 4 | 1 | 25.00% |" in lines[4]
