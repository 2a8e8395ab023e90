"""Chart coordinates: round ticks, points where their figures are, stairs that never flatter."""

from __future__ import annotations

import math

import pytest

from sfumato.report.charts import LEFT, RIGHT, TOP, line_chart, roc_chart, span, ticks, track


def places(path):
    return [tuple(float(each) for each in point.split(",")) for point in path.split()]


@pytest.mark.parametrize(
    ("low", "high", "about", "expected"),
    [
        (0, 2000, 5, [0, 500, 1000, 1500, 2000]),
        (0, 92, 6, [0, 20, 40, 60, 80]),
        (0, 0.19, 5, [0, 0.05, 0.1, 0.15]),
        (-0.012, 0.03, 5, [-0.01, 0, 0.01, 0.02, 0.03]),
        (0, 0, 5, [0]),
        (0, 1, 10, [each / 10 for each in range(11)]),
    ],
)
def test_ticks_are_round_and_inside(low, high, about, expected):
    assert ticks(low, high, about) == pytest.approx(expected)


def test_lines_lie_where_their_figures_are():
    chart = line_chart({"a": [(0, 0), (50, 1), (100, 2)], "b": [(100, 1)], "none": []}, across="x", up="y")
    assert chart is not None
    left, top, wide, tall = chart["frame"]
    first, second = chart["lines"]
    assert [name for name, _, _ in chart["lines"]] == ["a", "b"] and first[1] != second[1]
    (x0, y0), (x1, y1), (x2, y2) = places(first[2])
    assert (x0, y0) == (left, top + tall) and x2 == left + wide
    assert x1 == pytest.approx(left + wide / 2, abs=0.1)
    assert y0 - y1 == pytest.approx(y1 - y2, abs=0.2) and y2 >= top
    assert places(second[2]) == [(x2, y1)]
    assert dict(chart["x"])[left] == "0" and chart["x"][-1][1] == "100"


def test_lines_without_points_or_height():
    assert line_chart({}, across="x", up="y") is None and line_chart({"a": []}, across="x", up="y") is None
    flat = line_chart({"a": [(10, 0.0), (20, 0.0)]}, across="x", up="y", percent=True)
    assert flat is not None and flat["y"][0][1] == "0 %"
    assert all(math.isfinite(each) for point in places(flat["lines"][0][2]) for each in point)


def test_roc_axes_are_powers_of_ten_down_to_what_can_be_told():
    for least, marks in ((1 / 1000, 4), (1 / 988, 4), (1 / 20_000, 6), (1 / 5, 3), (0.0, 6)):
        chart = roc_chart({"a": [(0, 0), (1, 1)]}, least=least)
        assert chart is not None and len(chart["x"]) == marks, least
        assert chart["x"][-1][1] == "100 %"
        uprights = [points for kind, points in chart["straight"] if kind == "upright"]
        assert len(uprights) == (2 if marks > 3 else 1)
    assert roc_chart({}, least=0.1) is None and roc_chart({"a": []}, least=0.1) is None


def test_roc_points_are_in_place_and_stairs_take_the_lower_rate():
    chart = roc_chart({"a": [(0.0, 0.0), (0.01, 0.1), (1.0, 1.0)]}, least=1e-3, side=400)
    assert chart is not None
    wide = 400 - LEFT - RIGHT
    path = places(chart["lines"][0][2])
    at = lambda rate: (3 + math.log10(rate)) / 3 * wide  # noqa: E731
    assert path[0] == (LEFT, TOP + wide)  # what is below the axes lies on their edge
    assert (pytest.approx(LEFT + at(0.01), abs=0.1), pytest.approx(TOP + wide - at(0.1), abs=0.1)) in path
    assert path[-2] == (LEFT + wide, pytest.approx(TOP + wide - at(0.1), abs=0.1))  # across before up
    assert path[-1] == (LEFT + wide, TOP)
    guess = places(dict(chart["straight"])["guess"])
    assert guess == [(LEFT, TOP + wide), (LEFT + wide, TOP)]


def test_a_track_places_bar_whisker_and_marks():
    drawn = track(0.5, 0.25, 0.75, (0.0, 1.0), {"limit": 0.1, "absent": None})
    assert drawn == {"left": 0, "width": 50, "whisker": (25, 50), "marks": [("limit", 10)]}
    below = track(-0.1, -0.2, 0.1, (-0.2, 0.2))
    assert below == {"left": 25, "width": 25, "whisker": (0, 75), "marks": []}
    assert track(0.75, None, None, (0.0, 1.0), base=0.5) == {
        "left": 50,
        "width": 25,
        "whisker": None,
        "marks": [],
    }
    beyond = track(5.0, -1.0, math.inf, (0.0, 1.0))
    assert beyond == {"left": 0, "width": 100, "whisker": None, "marks": []}
    assert track(None, 0.0, 1.0, (0.0, 1.0)) is None and track(math.nan, 0, 1, (0.0, 1.0)) is None


def test_a_span_holds_zero_and_everything():
    assert span([0.2, None, math.inf]) == pytest.approx((0, 0.21))
    assert span([-0.1, 0.1]) == pytest.approx((-0.105, 0.105))
    low, high = span([])
    assert low == 0 and high > 0
    assert span([None, 0.0])[1] > 0 and span([0.1], least=0.5)[1] == pytest.approx(0.525)
