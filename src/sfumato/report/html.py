"""Self-contained HTML reports: one for everybody, one for the owner. No network, no scripts, prints well."""

from __future__ import annotations

import base64
import io
import math
from pathlib import Path
from typing import Any

import numpy as np

from sfumato.report.facts import OwnerFacts, ReleaseFacts, releasable_options
from sfumato.report.words import (
    RELATIONS,
    UNITS,
    claim,
    costs,
    delta_claim,
    event_text,
    guessing_limit,
    number,
)

TEMPLATES = Path(__file__).parent / "templates"
DISPLAY_PIXELS = 48  # side of one picture on the page
IMAGES_A_LABEL = 10
LABELS_SHOWN = 40
CLASSES_SHOWN = 52  # as many as fit across the page; all that were chosen are shown in any case


def release_report(facts: ReleaseFacts) -> str:
    """The page that goes with a release; holds nothing but declared, public and paid-for values."""
    return render("report.html", _page(facts), owner=None)


def internal_report(facts: ReleaseFacts, owner: OwnerFacts) -> str:
    """The owner's page, marked "not for release": accuracy, real pictures, then all of the release's page.

    Write it under `internal/` only: it holds private pixels and figures without a guarantee.
    """
    page = _page(facts)
    best = max((row.accuracy for row in owner.accuracy), default=1.0) or 1.0
    gallery = []
    if owner.private_examples is not None and len(owner.private_examples):
        count = min(len(owner.private_examples), len(facts.sample_images), 40)
        real, made = (
            images[np.linspace(0, len(images) - 1, count).round().astype(int)]
            for images in (np.asarray(owner.private_examples), facts.sample_images)
        )
        gallery = [
            ("real", sheet(real)),
            ("synthetic, this release", sheet(made)),
        ]
    own = {
        "holdout": owner.holdout_description,
        "accuracy": [
            {
                "name": row.name,
                "percent": f"{100 * row.accuracy:.1f} %",
                "width": 100 * row.accuracy / best,
                "note": row.note,
            }
            for row in owner.accuracy
        ],
        "gallery": gallery,
        "notes": owner.notes,
        "stages": [(stage.name, f"{stage.seconds:,.0f} s", stage.detail) for stage in facts.stages],
    }
    return render("report.html", page, owner=own)


def strip(images: np.ndarray) -> dict[str, Any]:
    """Images [n, H, W, C] in one row, as an inline PNG with its size on the page."""
    return sheet(images, columns=max(1, len(images)))


def sheet(images: np.ndarray, columns: int = 10) -> dict[str, Any]:
    """Images uint8 [n, H, W, C] in rows of `columns` with a transparent gap, as an inline PNG."""
    from PIL import Image

    count, height, width, channels = images.shape
    gap = max(1, width // 14)
    columns = min(columns, max(1, count))
    rows = max(1, math.ceil(count / columns))
    canvas = np.zeros((rows * (height + gap) - gap, columns * (width + gap) - gap, 4), np.uint8)
    for position, image in enumerate(images):
        top, left = position // columns * (height + gap), position % columns * (width + gap)
        canvas[top : top + height, left : left + width, :3] = (
            image if channels == 3 else np.repeat(image, 3, axis=2)
        )
        canvas[top : top + height, left : left + width, 3] = 255
    held = io.BytesIO()
    Image.fromarray(canvas).save(held, "PNG", optimize=True)
    scale = max(1.0, DISPLAY_PIXELS / width)
    return {
        "source": "data:image/png;base64," + base64.b64encode(held.getvalue()).decode("ascii"),
        "width": round(canvas.shape[1] * scale),
        "height": round(canvas.shape[0] * scale),
    }


def _page(facts: ReleaseFacts) -> dict[str, Any]:
    """Everything the template needs, from the release's facts alone."""
    return {
        **guarantee(facts.certificate, facts.unit),
        "title": f"Synthetic images from {facts.private_description}",
        "facts": facts,
        "samples": _samples(facts),
        "last_stage": "the votes" if facts.method == "pe" else "DP-SGD",
        "labels_left_out": max(0, len(facts.label_names) - LABELS_SHOWN) if facts.has_labels else 0,
        "selection": _selection(facts),
        "histogram": _histogram(facts),
        "means": _means(facts),
        "stages": [(stage.name, stage.detail) for stage in facts.stages],
        "options": sorted(releasable_options(facts.options).items()),
    }


def guarantee(certificate: dict[str, Any], unit: str) -> dict[str, Any]:
    """What guarantee.html and events.html say of a certificate, on every release's page."""
    epsilon, delta = certificate["epsilon"], certificate["delta"]
    return {
        "epsilon": claim(epsilon),
        "delta": delta_claim(delta),
        "spent_nothing": not any(reservation["events"] for reservation in certificate["reservations"]),
        "statement": _statement(certificate),
        "factor": _factor(epsilon),
        "guess": f"{_percent_up(guessing_limit(epsilon, delta))} %",
        "unit": UNITS.get(unit, unit),
        "unit_word": unit,
        "numbers": _numbers(certificate, unit),
        "bars": _bars(certificate),
        "events": [
            (
                reservation["label"],
                claim(reservation["epsilon"]),
                delta_claim(reservation["delta"]),
                [
                    (entry["mechanism"], entry.get("says", ""), event_text(entry["event"]))
                    for entry in reservation["events"]
                ],
            )
            for reservation in certificate["reservations"]
        ],
        "software": sorted(certificate.get("software", {}).items()),
        "ledger_head": certificate.get("ledger", {}).get("head", ""),
        "number": number,
    }


def _statement(certificate: dict[str, Any]) -> str:
    from sfumato.report.certificate import statement

    return statement(certificate)


def _percent_up(share: float) -> str:
    """A share as per cent, rounded up and never to 100 by rounding alone."""
    for digits in (0, 1, 2, 4):
        up = math.ceil(share * 100 * 10**digits - 1e-9) / 10**digits
        if up < 100:
            return f"{up:.{digits}f}"
    return "100"


def _factor(epsilon: float) -> str:
    """e^ε, rounded up to three digits."""
    power = math.exp(min(epsilon, 700.0))
    step = 10.0 ** (math.floor(math.log10(power)) - 2)
    up = math.ceil(power / step - 1e-9) * step
    return number(float(f"{up:.3g}")) if epsilon < 12 else f"{up:.2e}"


def _numbers(certificate: dict[str, Any], unit: str) -> list[tuple[str, str, str]]:
    relation = RELATIONS.get(certificate["relation"], certificate["relation"])
    rows = [
        ("ε (epsilon)", claim(certificate["epsilon"]), f"{relation} {unit}; the figure to quote"),
        ("δ (delta)", delta_claim(certificate["delta"]), "probability with which the bound may fail"),
    ]
    if certificate.get("epsilon_replace_one") is not None:
        rows.append(
            ("ε, replace one", claim(certificate["epsilon_replace_one"]), f"replacing one {unit} by another")
        )
    if certificate.get("epsilon_rdp") is not None:
        rows.append(
            ("ε by RDP", claim(certificate["epsilon_rdp"]), "the same events by an older, looser accountant")
        )
    budget = certificate.get("budget")
    if budget:
        rows.append(
            (
                "budget",
                f"ε {budget['epsilon']:g}, δ {budget['delta']:.2g}",
                "what the run was allowed to spend",
            )
        )
    if certificate.get("public_size") is not None:
        rows.append(
            (
                "public size",
                number(certificate["public_size"]),
                f"declared or noisy number of {unit}s; the divisor",
            )
        )
    return rows  # fmt: skip


def _bars(certificate: dict[str, Any]) -> list[dict[str, Any]]:
    """Bars: what each mechanism would cost alone, what they cost together, the budget."""
    bars = [
        {"name": cost.mechanism, "note": cost.event, "epsilon": cost.epsilon_alone, "kind": "alone"}
        for cost in costs(certificate)
    ]
    if not bars:
        return []
    bars.append(
        {
            "name": "composed",
            "note": "all of them together",
            "epsilon": certificate["epsilon"],
            "kind": "whole",
        }
    )
    if certificate.get("budget"):
        bars.append(
            {"name": "budget", "note": "", "epsilon": certificate["budget"]["epsilon"], "kind": "budget"}
        )
    longest = max(bar["epsilon"] for bar in bars if math.isfinite(bar["epsilon"])) or 1.0
    for bar in bars:
        finite = math.isfinite(bar["epsilon"])
        bar["width"] = 100 * min(1.0, bar["epsilon"] / longest) if finite else 100
        bar["text"] = claim(bar["epsilon"]) if finite else "∞"
    return bars


def _samples(facts: ReleaseFacts) -> list[dict[str, Any]]:
    """Rows of the sample grid: a label's name, a strip of the release, one of the public-only generator."""
    beside = facts.public_only_images
    if not facts.has_labels:
        return [
            {
                "name": "",
                "release": sheet(facts.sample_images[:60]),
                "public": sheet(beside[:60]) if beside is not None and len(beside) else None,
            }
        ]
    rows = []
    for label, name in enumerate(facts.label_names[:LABELS_SHOWN]):
        chosen = np.flatnonzero(np.asarray(facts.sample_labels) == label)[:IMAGES_A_LABEL]
        if len(chosen):
            public = strip(beside[chosen]) if beside is not None and len(beside) > chosen.max() else None
            rows.append({"name": name, "release": strip(facts.sample_images[chosen]), "public": public})
    return rows


def _selection(facts: ReleaseFacts) -> list[tuple[str, list[str]]]:
    if facts.selection is None:
        return []
    return list(zip(facts.label_names, facts.selection, strict=False))


def _histogram(facts: ReleaseFacts) -> dict[str, Any] | None:
    """The noisy histogram as cells: selected and largest public classes, in the public set's order."""
    if facts.noisy_histogram is None or facts.public_class_names is None:
        return None
    values = np.asarray(facts.noisy_histogram, dtype=float)
    names = list(facts.public_class_names)
    selected = [set(classes) for classes in facts.selection or [[] for _ in range(len(values))]]
    named = {name for classes in selected for name in classes}
    weight = np.where([name in named for name in names], np.inf, values.max(axis=0, initial=-np.inf))
    columns = np.sort(np.argsort(-weight, kind="stable")[: max(CLASSES_SHOWN, len(named))])
    largest = np.maximum(values.max(axis=1, initial=0.0), 1e-9)
    side = 18
    cells = [
        {
            "x": across * side,
            "y": row * side,
            "heat": round(float(max(0.0, values[row, column]) / largest[row]), 3),
            "chosen": names[column] in selected[row],
            "says": f"{facts.label_names[row]}: {names[column]}, {values[row, column]:.0f}",
        }
        for row in range(len(values))
        for across, column in enumerate(columns)
    ]
    return {
        "cells": cells,
        "side": side,
        "width": len(columns) * side,
        "height": len(values) * side,
        "labels": [
            (name, row * side + side * 0.7) for row, name in enumerate(facts.label_names[: len(values)])
        ],
        "classes": [(names[column], across * side + side * 0.68) for across, column in enumerate(columns)],
        "left": 12 + 7 * max((len(name) for name in facts.label_names[: len(values)]), default=1),
        "below": 12 + 7 * max((len(names[column]) for column in columns), default=1),
        "left_out": len(names) - len(columns),
    }


def _means(facts: ReleaseFacts) -> list[tuple[str, dict[str, Any]]]:
    if facts.mean_images is None:
        return []
    return [
        (name, strip(images))
        for name, images in zip(facts.label_names, facts.mean_images[:LABELS_SHOWN], strict=False)
    ]


def render(template: str, page: dict[str, Any], **more: Any) -> str:
    """A template of this folder as self-contained HTML."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(template).render(**page, **more)
