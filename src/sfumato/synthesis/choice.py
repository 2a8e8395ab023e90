"""Choose one of several releases by how well classifiers trained on them do on private images held apart.

Comparing releases on private images is a query: the choice alone leaves, by report-noisy-max, and is charged.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sfumato.data.files import write_whole
from sfumato.data.images import ProtectedImages, PublicImages
from sfumato.data.sources import open_source
from sfumato.encoders.classifier import predict, small_cnn, train_classifier
from sfumato.errors import InputError
from sfumato.evaluation.image_sets import common_shape, label_positions
from sfumato.evaluation.options import find_target
from sfumato.privacy import selection
from sfumato.privacy.answers import Answers
from sfumato.privacy.events import PlannedEvent
from sfumato.privacy.ledger import Ledger
from sfumato.report.certificate import certificate, statement


@dataclass(frozen=True)
class Choice:
    """release: the chosen one, as it was named; position: its place among them; statement: the guarantee."""

    release: str
    position: int
    statement: str


def select(
    releases: Sequence[str],
    *,
    by: str,
    epsilon: float,
    ledger: str,
    out: str | Path,
    unit: str = "image",
    steps: int = 800,
    seed: int = 0,
) -> Choice:
    """Which of the releases (runs, releases or labelled sets) trains the best classifier for the images `by`.

    Writes `selection.json` and `privacy.json` into `out`; the same call again gives the same answer.

    Guarantee: (epsilon, 0)-DP for adding or removing one unit of `by`, charged to `ledger` before the images
    are judged; see `privacy.selection`. Raises InputError, BudgetError, LedgerError.
    """
    if len(releases) < 2:
        raise InputError("give two releases or more to choose from; no budget was spent")
    for option, value, fits in (
        ("--epsilon", epsilon, epsilon > 0 and math.isfinite(epsilon)),
        ("--steps", steps, 1 <= steps <= 1_000_000),
    ):
        if not fits:
            raise InputError(f"{option} {value} cannot be used: it has to be above 0; no budget was spent")
    folder, asked_before = Path(out), Path(out) / "internal" / "asked.json"
    asked = {
        "releases": list(releases),
        "by": by,
        "epsilon": epsilon,
        "unit": unit,
        "steps": steps,
        "seed": seed,
    }
    if asked_before.exists() and json.loads(asked_before.read_text(encoding="utf-8")) != asked:
        raise InputError(
            f"{out} holds another choice than this; no budget was spent now. Repeat that command to see its answer, "
            "or use another --out"
        )
    account = Ledger.open(ledger)
    sources = [open_source(find_target(release).images) for release in releases]
    height, width, channels = common_shape(sources[0], releases[0], size=None, channels=None)
    images: dict[str, Any] = {
        "size": (height, width),
        "channels": channels,
        "cache_dir": folder / "internal" / "cache",
    }
    private = ProtectedImages(by, ledger=account, unit=unit, **images)
    candidates = []
    for name, source in zip(releases, sources, strict=True):
        public = PublicImages(source, **images)
        if public.label_names is None or (public.labels < 0).any() or not private.has_labels:
            raise InputError(
                f"{name if private.has_labels else by} has images without labels, so no classifier can be "
                "judged; no budget was spent. Give labelled images"
            )
        labels = label_positions(public.label_names, private.label_names, name)[np.asarray(public.labels)]
        candidates.append(
            _classifier(np.asarray(public.images), labels, len(private.label_names), steps, seed, name)
        )
    answers = Answers(folder / "internal")
    event = selection.model_selection_event(epsilon)
    says = f"which of {len(candidates)} releases trains the best classifier"
    reservation = answers.reserve(
        account, "select", [PlannedEvent(selection.MODEL_SELECTION, says, event)], 0.0
    )
    write_whole(asked_before, json.dumps(asked, indent=1).encode())
    position = int(
        answers.ask(
            selection.MODEL_SELECTION, reservation,
            lambda: np.array(selection.best_candidate(private, candidates, epsilon, reservation)[0]),
        )
    )  # fmt: skip
    reservation.settle()
    claim = certificate(
        [reservation], unit=unit, public_size=None, budget=None, software={}, ledger_head=account.head
    )
    chosen = releases[position]
    for file, content in (
        ("selection.json", {"chosen": chosen, "among": list(releases)}),
        ("privacy.json", claim),
    ):
        write_whole(folder / file, (json.dumps(content, indent=1) + "\n").encode())
    return Choice(chosen, position, statement(claim))


def _classifier(
    images: np.ndarray, labels: np.ndarray, num_labels: int, steps: int, seed: int, name: str
) -> Any:
    """A small CNN trained on public images: uint8 [B, H, W, C] -> labels [B], each image by itself."""
    torch.manual_seed(seed)
    network = small_cnn(images.shape[-1], num_labels)
    train_classifier(
        network,
        images,
        labels,
        steps=steps,
        seed=seed,
        description=f"classifier of {Path(name).name}",
    )

    def classify(shown: np.ndarray) -> np.ndarray:
        return predict(network, shown)

    return classify
