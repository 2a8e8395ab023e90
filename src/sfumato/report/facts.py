"""What a report is made from: facts for everybody, and facts for the owner alone, kept in two types."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np

from sfumato.data.release import refuse_private

# Options that name the owner's files, account or seeds, or say nothing about the result.
OWNERS_OPTIONS = frozenset({
    "private", "public", "ledger", "out", "config", "holdout", "seed", "dry_run", "skip_unreadable", "audit",
    "audit_policy",
})  # fmt: skip


@dataclass(frozen=True)
class Stage:
    """One stage of the run: `seconds` of wall-clock time (shown to the owner only) and a public remark."""

    name: str
    seconds: float
    detail: str = ""


@dataclass(frozen=True)
class ReleaseFacts:
    """Everything the release's report and card say: public, declared, or paid for in the certificate.

    Shapes: `sample_images` and `public_only_images` uint8 [n, H, W, C] with int labels [n] shared by both;
    `noisy_histogram` float [labels, public classes]; `mean_images` uint8 [labels, m, H, W, C].

    Raises:
        InputError: something marked as for the owner only is among the facts, at any depth.
    """

    method: str
    private_description: str
    public_description: str | None
    unit: str
    size: tuple[int, int]
    channels: int
    label_names: tuple[str, ...]
    has_labels: bool
    num_images: int
    certificate: dict[str, Any]
    sample_images: np.ndarray
    sample_labels: np.ndarray
    public_only_images: np.ndarray | None = None
    selection: list[list[str]] | None = None
    noisy_histogram: np.ndarray | None = None
    public_class_names: list[str] | None = None
    mean_images: np.ndarray | None = None
    stages: list[Stage] = field(default_factory=list)
    options: dict[str, Any] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        refuse_private([getattr(self, each.name) for each in fields(self)], "the report's facts")


@dataclass(frozen=True)
class AccuracyRow:
    """Accuracy, 0 to 1, of classifiers trained on `name` and tested on real held-out images."""

    name: str
    accuracy: float
    note: str = ""


@dataclass(frozen=True)
class OwnerFacts:
    """What touches private data without a guarantee; `for_owner_only` makes every release writer refuse it.

    `private_examples`: uint8 [n, H, W, C] real images, private or held out, for the gallery.
    """

    holdout_description: str
    accuracy: list[AccuracyRow] = field(default_factory=list)
    private_examples: np.ndarray | None = None
    notes: list[str] = field(default_factory=list)
    for_owner_only: bool = field(default=True, init=False)


def releasable_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """The options of a run that may be shown to anybody: no paths, no account, no seeds, nothing unset."""
    return {
        name: value for name, value in options.items() if name not in OWNERS_OPTIONS and value is not None
    }
