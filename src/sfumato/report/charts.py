"""Line charts and interval tracks as plain coordinates, for templates that draw them as inline SVG or HTML."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from sfumato.report.words import number

LEFT, RIGHT, TOP, BOTTOM = 58, 14, 10, 40  # room for tick labels and axis names, in pixels
STYLES = 8  # line styles s0 to s7 in the template: each has a colour and a dash of its own


def ticks(low: float, high: float, about: int = 5) -> list[float]:
    """Round numbers (1, 2 or 5 times a power of ten apart) between low and high."""
    if not high > low:
        return [low]
    rough = (high - low) / about
    power = 10.0 ** math.floor(math.log10(rough))
    step = next((factor * power for factor in (1, 2, 5) if factor * power >= rough * (1 - 1e-9)), 10 * power)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [index * step for index in range(first, last + 1)]


def line_chart(
    lines: Mapping[str, Sequence[tuple[float, float]]],
    *,
    across: str,
    up: str,
    percent: bool = False,
    width: int = 460,
    height: int = 270,
) -> dict[str, Any] | None:
    """Lines over a linear axis from zero: name -> (x, y) points. None where there is nothing to draw.

    across, up: names of the axes. percent: y are shares of one, and labelled as per cent.
    """
    points = [point for line in lines.values() for point in line]
    if not points:
        return None
    far = max(x for x, _ in points) or 1.0
    top = max(y for _, y in points) * 1.05 or (0.01 if percent else 1.0)
    wide, tall = width - LEFT - RIGHT, height - TOP - BOTTOM

    def place(x: float, y: float) -> tuple[float, float]:
        return LEFT + wide * x / far, TOP + tall * (1 - y / top)

    return {
        "width": width, "height": height, "across": across, "up": up,
        "frame": (LEFT, TOP, wide, tall),
        "x": [(round(place(x, 0)[0], 1), number(round(x, 9))) for x in ticks(0, far)],
        "y": [
            (round(place(0, y)[1], 1), f"{100 * y:.3g} %" if percent else number(round(y, 9)))
            for y in ticks(0, top, 6)
        ],
        "lines": [
            (name, place_in_legend % STYLES, _path(place(x, y) for x, y in line))
            for place_in_legend, (name, line) in enumerate(lines.items())
            if line
        ],
        "straight": [],
    }  # fmt: skip


def roc_chart(
    lines: Mapping[str, Sequence[tuple[float, float]]],
    *,
    least: float,
    upright: Sequence[float] = (0.001, 0.01),
    side: int = 400,
) -> dict[str, Any] | None:
    """ROC curves, name -> (false positive rate, true positive rate) points, both axes in powers of ten.

    least: the smallest rate that can be told from zero (1 / number of non-members); the axes begin at the
    power of ten below it, between 1e-5 and 1e-2, and what is smaller is drawn on the edge. Curves are stairs:
    between two points the true positive rate is the lower one's. upright: rates marked with a line.
    """
    if not any(lines.values()):
        return None
    decades = min(5, max(2, math.ceil(-math.log10(max(least, 1e-9)) - 1e-9)))
    wide = side - LEFT - RIGHT

    def along(rate: float) -> float:
        return max(0.0, 1 + math.log10(max(rate, 1e-12)) / decades)

    def place(fpr: float, tpr: float) -> tuple[float, float]:
        return LEFT + wide * along(fpr), TOP + wide * (1 - along(tpr))

    marks = [10.0**power for power in range(-decades, 1)]
    drawn = []
    for style, (name, line) in enumerate(lines.items()):
        stairs, before = [], None
        for fpr, tpr in line:
            if before is not None and fpr != before[0]:
                stairs.append((fpr, before[1]))
            stairs.append((fpr, tpr))
            before = (fpr, tpr)
        if stairs:
            drawn.append((name, style % STYLES, _path(place(*point) for point in stairs)))
    return {
        "width": side, "height": TOP + wide + BOTTOM,
        "across": "false alarms: share of unseen images called members",
        "up": "hits: share of members found",
        "frame": (LEFT, TOP, wide, wide),
        "x": [(round(place(mark, 1)[0], 1), f"{100 * mark:g} %") for mark in marks],
        "y": [(round(place(1, mark)[1], 1), f"{100 * mark:g} %") for mark in marks],
        "lines": drawn,
        "straight": [
            ("guess", _path([place(marks[0], marks[0]), place(1, 1)])),
            *(("upright", _path([place(rate, marks[0]), place(rate, 1)])) for rate in upright if rate >= marks[0]),
        ],
    }  # fmt: skip


def span(values: Sequence[float | None], *, least: float = 0.0) -> tuple[float, float]:
    """Ends of an axis that holds zero, `least` and all the values, with a little room above."""
    known = [value for value in values if value is not None and math.isfinite(value)]
    low, high = min([0.0, *known]), max([0.0, least, *known])
    return low * 1.05, high * 1.05 or 1.0


def track(
    value: float | None,
    low: float | None,
    high: float | None,
    axis: tuple[float, float],
    marks: Mapping[str, float | None] | None = None,
    base: float = 0.0,
) -> dict[str, Any] | None:
    """One row of an interval plot in per cent of its width: bar from `base` to `value`, whisker low to high.

    marks: name of a mark (its CSS class) -> where it stands. None when there is no value.
    """

    def place(at: float) -> float:
        return round(100 * min(1.0, max(0.0, (at - axis[0]) / (axis[1] - axis[0]))), 2)

    if value is None or not math.isfinite(value):
        return None
    ends = sorted((place(base), place(value)))
    whisker = None
    if low is not None and high is not None and math.isfinite(low) and math.isfinite(high):
        whisker = (place(low), round(max(place(high) - place(low), 0.0), 2))
    return {
        "left": ends[0],
        "width": round(ends[1] - ends[0], 2),
        "whisker": whisker,
        "marks": [(name, place(at)) for name, at in (marks or {}).items() if at is not None],
    }


def _path(places: Any) -> str:
    return " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
