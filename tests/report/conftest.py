"""Facts of a small made-up release."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from sfumato.report.facts import AccuracyRow, OwnerFacts, ReleaseFacts, Stage

CERTIFICATE: dict[str, Any] = {
    "format": "sfumato-privacy/1",
    "unit": "image",
    "relation": "add_or_remove_one",
    "public_size": 4000,
    "epsilon": 7.981,
    "delta": 1e-5,
    "epsilon_rdp": 8.61,
    "epsilon_replace_one": 15.2,
    "budget": {"epsilon": 8, "delta": 1e-5},
    "reservations": [
        {
            "label": "synthesize",
            "epsilon": 7.981,
            "delta": 1e-5,
            "events": [
                {
                    "mechanism": "semantic_histogram",
                    "says": "top-2 public classes of each image",
                    "event": {"type": "GaussianDpEvent", "noise_multiplier": 50.0},
                },
                {
                    "mechanism": "dp_sgd",
                    "says": "150 steps, clip norm 1e-3, 8 noise levels per image",
                    "event": {
                        "type": "SelfComposedDpEvent",
                        "count": 150,
                        "event": {
                            "type": "PoissonSampledDpEvent",
                            "sampling_probability": 0.33,
                            "event": {"type": "GaussianDpEvent", "noise_multiplier": 2.3},
                        },
                    },
                },
            ],
        }
    ],
    "software": {"sfumato": "0.1.0", "dp_accounting": "0.6.0", "torch": "2.13.0"},
    "ledger": {"head": "9f2c" * 16},
}


@pytest.fixture
def facts() -> ReleaseFacts:
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (9, 8, 8, 1), dtype=np.uint8)
    histogram = np.array([[90.0, 40, -3, 8], [1, 2, 80, -9], [0, 50, 5, 60]])
    return ReleaseFacts(
        method="privimage",
        private_description="three kinds of <i>shapes</i>",
        public_description="drawn & printed letters",
        unit="image",
        size=(8, 8),
        channels=1,
        label_names=("round", "square", "sharp|edged"),
        has_labels=True,
        num_images=4000,
        certificate=CERTIFICATE,
        sample_images=images,
        sample_labels=np.repeat([0, 1, 2], 3),
        public_only_images=images[::-1].copy(),
        selection=[["A", "B"], ["C"], ["D", "B"]],
        noisy_histogram=histogram,
        public_class_names=["A", "B", "C", "D"],
        mean_images=images.reshape(3, 3, 8, 8, 1)[:, :2].copy(),
        stages=[Stage("pre-training", 61.7, "400 steps of 128"), Stage("dp-sgd", 287.3, "150 steps")],
        options={
            "epsilon": 8.0,
            "method": "privimage",
            "private": "/home/somebody/scans",
            "ledger": "postgresql://me:secret@host/db",
            "seed": 20260101,
            "size": None,
        },
        warnings=["the release is below the floor"],
    )


@pytest.fixture
def public_only(facts: ReleaseFacts) -> ReleaseFacts:
    nothing = CERTIFICATE | {"epsilon": 0.0, "delta": 0.0, "epsilon_replace_one": 0.0, "reservations": []}
    return replace(
        facts,
        method="public-only",
        certificate=nothing,
        noisy_histogram=None,
        mean_images=None,
        selection=None,
    )


@pytest.fixture
def owner() -> OwnerFacts:
    return OwnerFacts(
        holdout_description="1,000 images kept aside",
        accuracy=[
            AccuracyRow("this release", 0.861),
            AccuracyRow("public-only", 0.702, "floor"),
            AccuracyRow("selected public classes", 0.783, "floor"),
            AccuracyRow("real data", 0.971, "ceiling"),
        ],
        private_examples=np.full((6, 8, 8, 1), 77, np.uint8),
        notes=["mean of three classifiers"],
    )
