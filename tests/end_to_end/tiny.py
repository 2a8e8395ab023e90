"""`sfumato` with settings so small that a whole run takes seconds, and a way to stop it at a chosen moment.

As a script, in a process of its own: `python tiny.py MOMENT VERB ...`. MOMENT is where it kills itself
(SIGKILL), sends itself Ctrl-C (MOMENT ends in "^C"), or "-".
"""

from __future__ import annotations

import os
import signal
import sys
from dataclasses import replace
from functools import partial
from unittest import mock

import numpy as np

STEPS = 6


def settings():
    """Patches: a tiny preset, known machine settings and speeds. What is charged is computed as ever."""
    from sfumato.evaluation import downstream
    from sfumato.machine import Defaults
    from sfumato.synthesis import presets
    from sfumato.synthesis.planner import Speeds

    fixed = Defaults(1, "cpu", "float32", "fast", "2026-01-01")
    speeds = Speeds(5000.0, 5000.0, 5000.0)
    demo = replace(
        presets.PRESETS["demo"], size=8, query_steps=30, public_steps=8, public_batch=32, sampler_steps=3,
        enough_steps=STEPS, noise_levels=1, num_images=None, time_bound=False, means_steps=4,
        votes=3, population=8, votes_encoder="pixels",
    )  # fmt: skip
    yield mock.patch.dict(presets.PRESETS, demo=demo)
    for module in ("run", "privimage"):
        yield mock.patch(f"sfumato.synthesis.{module}.best_defaults", lambda *_: fixed)
        yield mock.patch(f"sfumato.synthesis.{module}.measure_speeds", lambda *_, **__: speeds)
    quick = partial(downstream.downstream_accuracy, steps=20)
    yield mock.patch("sfumato.synthesis.owner_figures.downstream_accuracy", quick)


def write_images(path, labels, *, per_label=60, seed=0, labelled=True):
    """An npz of 8x8 images: each label a bar at another place, in noise."""
    rng = np.random.default_rng(seed)
    targets = np.repeat(np.arange(len(labels)), per_label)
    images = rng.integers(0, 60, (len(targets), 8, 8), np.uint8)
    for image, target in zip(images, targets, strict=True):
        if labels[target] % 2:
            image[:, labels[target] // 2 * 2] = 255
        else:
            image[labels[target] // 2 * 2] = 255
    arrays = {"images": images} | ({"labels": targets} if labelled else {})
    np.savez(path, **arrays)
    return path


def stop_at(moment: str) -> None:
    """Patch the program so that it stops itself at a moment of its run."""
    place = moment.removesuffix("^C")

    def die(*_, **__):
        if moment.endswith("^C"):
            signal.raise_signal(signal.SIGINT)
        else:
            os.kill(os.getpid(), signal.SIGKILL)

    from sfumato.data import release
    from sfumato.diffusion import generator
    from sfumato.privacy import dp_sgd, mechanisms
    from sfumato.progress import Progress

    advance = Progress.advance

    def advance_and_die(description, after):
        def advanced(self, n=1, note=""):
            advance(self, n, note)
            if self.description == description and self.done >= after:
                die()

        return mock.patch.object(Progress, "advance", advanced)

    add_noise = dp_sgd.ClippedSum.add_noise
    calls = []

    def noise_then_die(self, *given):
        calls.append(1)
        if len(calls) == 3:
            die()
        return add_noise(self, *given)

    patches = {
        "query training": advance_and_die("query classifier", 5),
        "count": mock.patch.object(mechanisms, "discrete_laplace", die),
        "answer": mock.patch.object(mechanisms, "discrete_gaussian", die),
        "public training": advance_and_die("public training", 4),
        "step": mock.patch.object(dp_sgd.ClippedSum, "add_noise", noise_then_die),
        "steps": advance_and_die("dp-sgd", 4),
        "generation": mock.patch.object(generator, "to_uint8", die),
        "release": mock.patch.object(release.ReleaseWriter, "complete", die),
        "evaluation": advance_and_die("this release: training", 5),
    }
    patches[place].start()


def main() -> int:
    from sfumato.cli.main import main as sfumato

    signal.signal(signal.SIGINT, signal.default_int_handler)  # a background parent leaves it ignored
    for patch in settings():
        patch.start()
    if sys.argv[1] != "-":
        stop_at(sys.argv[1])
    return sfumato(sys.argv[2:])


if __name__ == "__main__":
    raise SystemExit(main())
