"""`sfumato select`: let private images choose one of several releases, for a price."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from tyro.conf import Positional

from sfumato.cli.parsing import parse, say


@dataclass(frozen=True)
class SelectOptions:
    """Choose one of several releases privately: which one trains the best classifier for held-out images.

    A small classifier is trained on each release; the held-out private images then choose among them by
    report-noisy-max. Only the choice leaves, for ε of their budget. Running the same command again shows it.
    """

    releases: Positional[tuple[str, ...]]
    """Two or more runs, releases or labelled image sets to choose from."""

    by: str
    """The private labelled images to choose by, in any form that `sfumato synthesize` takes; best images that
    none of the releases was made from."""

    epsilon: float
    """Price ε of the choice (δ is 0): with m releases the chosen one is most likely right on fewer than about
    ln(m)/ε images less than the best."""

    ledger: str
    """The account of the private images: a file, or an SQLAlchemy URL."""

    out: str
    """Folder for the choice and its certificate, privacy.json."""

    unit: Literal["image", "group"] = "image"
    """What is protected as a whole: each image, or all images of one `group_id` together."""

    steps: int = 800
    """Training steps of each classifier."""

    seed: int = 0
    """Seed of the classifiers' initial weights and batches (public randomness)."""


def run(arguments: Sequence[str]) -> int:
    """Parse, ask, print the choice and what it cost."""
    options = parse(SelectOptions, "sfumato select", arguments)
    from sfumato.synthesis.choice import select

    choice = select(**{field.name: getattr(options, field.name) for field in dataclasses.fields(options)})
    say(choice.statement)
    say(f"chosen: {choice.release}")
    return 0
