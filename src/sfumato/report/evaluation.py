"""The page of `sfumato evaluate`: figures, pictures of feature spaces, synthetic beside real images.

For its owner's eyes unless everything on it was declared public. No network, no scripts, prints well.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from sfumato.data.images import OwnerOnly
from sfumato.data.release import refuse_private
from sfumato.report.html import render, sheet, strip
from sfumato.report.words import number

Gallery = Sequence[tuple[str, np.ndarray, np.ndarray]]
Points = Mapping[str, Mapping[str, Sequence[Sequence[float]]]]

# Figure -> (name, which way is better, what it is).
FIGURES = {
    "frechet": ("Fréchet distance", "lower", "between Gaussians with the mean and covariance of each set"),
    "kid": ("kernel distance (KID)", "lower", "unbiased; may be below 0; with its 95 % interval"),
    "precision": ("precision", "higher", "share of synthetic images within the real ones' neighbourhoods"),
    "recall": ("recall", "higher", "share of real images within the synthetic ones' neighbourhoods"),
    "density": ("density", "higher", "how many real neighbourhoods a synthetic image lies in; 1 for real images"),
    "coverage": ("coverage", "higher", "share of real neighbourhoods with a synthetic image inside"),
    "authenticity": ("authenticity", "", "share of synthetic images that are no closer copies than real images are of "
                     "each other; far below the held-out images' share they are copies"),
    "fld": ("feature likelihood divergence", "lower", "FLD on held-out images; about 0 for fresh real images"),
    "fld_gap": ("FLD gap", "lower", "FLD on held-out less FLD on the real images; large for memorised images"),
}  # fmt: skip
BARS = ("precision", "recall", "density", "coverage", "authenticity")
SCATTER_SIDE, SCATTER_REACH = 340, 3.0  # pixels; standard deviations from the middle
CLASSIFIERS = {
    "logistic-regression": "logistic regression", "mlp": "MLP", "cnn": "CNN", "resnet": "ResNet", "mean": "mean",
}  # fmt: skip


def evaluation_report(
    summary: Mapping[str, Any] | OwnerOnly[dict[str, Any]],
    gallery: Gallery | OwnerOnly[Any],
    points: Points | OwnerOnly[dict[str, Any]],
) -> str | OwnerOnly[str]:
    """The page as HTML; wrapped in `OwnerOnly` when the summary is, and then marked "NOT FOR RELEASE".

    summary: the content of summary.json. gallery: for each label its name, synthetic and real examples, uint8
    [n, H, W, C]. points: feature space -> set -> coordinates [n, 2] in standard deviations of the real set.

    Raises:
        InputError: a summary for everybody beside pictures or points that are for the owner only.
    """
    if isinstance(summary, OwnerOnly):
        return OwnerOnly(_page(summary.value, _inside(gallery), _inside(points), owner=True))
    refuse_private([summary, gallery, points], "the evaluation's page")
    return _page(summary, gallery, points, owner=False)


def _inside(value: Any) -> Any:
    return value.value if isinstance(value, OwnerOnly) else value


def _page(summary: Mapping[str, Any], gallery: Any, points: Any, *, owner: bool) -> str:
    page = {
        "title": "Synthetic images beside real ones",
        "summary": summary,
        "notes": notes(summary),
        "accuracy": _accuracy(summary),
        "features": [_feature(name, of, points.get(name, {})) for name, of in summary["features"].items()],
        "gallery": [_row(name, np.asarray(made), np.asarray(real)) for name, made, real in gallery],
        "side": SCATTER_SIDE,
        "labels_left_out": max(0, len(summary["label_names"] or ()) - len(gallery)) if gallery[0][0] else 0,
        "number": number,
    }  # fmt: skip
    return render("evaluation.html", page, owner=owner)


def _row(name: str, made: np.ndarray, real: np.ndarray) -> dict[str, Any]:
    drawn = strip if name else sheet
    return {
        "name": name,
        "synthetic": drawn(made) if len(made) else None,
        "real": drawn(real) if len(real) else None,
    }


def notes(summary: Mapping[str, Any]) -> list[str]:
    """What has to be said beside the figures: notes on the sets, then warnings of each feature space."""
    warnings = [
        f"{name}: {warning}" for name, of in summary["features"].items() for warning in of["warnings"]
    ]
    return [*summary["notes"], *warnings]


def _accuracy(summary: Mapping[str, Any]) -> dict[str, Any] | None:
    """Bars of each classifier trained on the synthetic images, with marks for real images and for guessing."""
    if not summary["accuracy"]:
        return None
    ceiling = summary.get("ceiling", {}).get("accuracy", {})
    rows = []
    for name, of in summary["accuracy"].items():
        best = ceiling.get(name)
        rows.append(
            {
                "name": CLASSIFIERS.get(name, name),
                "width": 100 * of["mean"],
                "text": spread(of),
                "mark": None if best is None else 100 * best["mean"],
                "ceiling": "" if best is None else spread(best),
            }
        )
    floor = summary.get("floor", {}).get("accuracy")
    seeds = len(next(iter(summary["accuracy"].values()))["seeds"])
    return {
        "rows": rows,
        "floor": None if floor is None else 100 * floor,
        "seeds": seeds,
        "ceiling": bool(ceiling),
    }


def spread(accuracy: Mapping[str, Any]) -> str:
    """`86.1 %`, or `86.1 ± 0.4 %` with several seeds."""
    if accuracy["std"] is None:
        return f"{100 * accuracy['mean']:.1f} %"
    return f"{100 * accuracy['mean']:.1f} ± {100 * accuracy['std']:.1f} %"


def _feature(name: str, of: Mapping[str, Any], points: Mapping[str, Any]) -> dict[str, Any]:
    attainable = of.get("attainable", {})
    rows, bars = [], []
    for key, (said, better, meaning) in FIGURES.items():
        if of.get(key) is None:
            continue
        value, best = of[key], attainable.get(key)
        interval = of.get("kid_interval") if key == "kid" else None
        rows.append(
            {
                "name": f"{said}, {of['encoder']['distance']}" if key == "frechet" else said,
                "better": better,
                "meaning": meaning,
                "value": figure(value)
                + (f" ({figure(interval[0])} to {figure(interval[1])})" if interval else ""),
                "attainable": "" if best is None else figure(best),
            }
        )
        if key in BARS:
            bars.append({"name": said, "value": value, "text": figure(value), "mark": best})
    longest = max([1.0, *(bar["value"] for bar in bars), *(bar["mark"] or 0.0 for bar in bars)])
    for bar in bars:
        bar["width"] = 100 * bar["value"] / longest
        bar["mark"] = None if bar["mark"] is None else 100 * bar["mark"] / longest
    return {
        "name": name,
        "encoder": of["encoder"],
        "rows": rows,
        "bars": bars,
        "has_attainable": bool(attainable),
        "scatter": _scatter(points),
    }


def figure(value: float) -> str:
    """A figure with four digits that count."""
    return f"{value:.4f}" if 0.1 <= abs(value) < 10 else f"{value:.4g}"


def _scatter(points: Mapping[str, Any]) -> list[tuple[str, list[tuple[float, float]]]]:
    """Where each set's images lie on the page; what is further out than SCATTER_REACH is put on the edge."""
    placed = []
    for name in ("real", "held-out", "synthetic"):
        if points.get(name):
            inside = np.clip(np.asarray(points[name], float), -SCATTER_REACH, SCATTER_REACH)
            pixels = (inside / SCATTER_REACH * 0.97 + 1) * SCATTER_SIDE / 2
            placed.append((name, [(round(x, 1), round(SCATTER_SIDE - y, 1)) for x, y in pixels.tolist()]))
    return placed
