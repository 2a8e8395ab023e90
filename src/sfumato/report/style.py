"""The page and the card of a released style token."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np

from sfumato.data.release import refuse_private
from sfumato.report.cards import markdown
from sfumato.report.facts import releasable_options
from sfumato.report.html import guarantee, render, sheet
from sfumato.report.words import RELATIONS, UNITS, claim, delta_claim, event_text

PICTURES_A_ROW = 6


@dataclass(frozen=True)
class StyleFacts:
    """Everything the release of a token says: public, declared, or paid for in the certificate.

    prompts: of the contact sheet; without, with_token: uint8 [prompts, n, H, W, 3], drawn by the model. norms: see
    `personalization.aggregation.norm_report`. noise_share: expected length of the noise over that of a usual style,
    None where no mean was taken. chosen: the public style that was voted for.

    Raises InputError when something for the owner only is among them.
    """

    token: str
    method: str
    model: str
    model_hash: str
    pipeline: str
    vectors: int
    unit: str
    certificate: dict[str, Any]
    prompts: tuple[str, ...]
    without: np.ndarray
    with_token: np.ndarray
    norms: list[dict[str, Any]]
    noise_share: float | None = None
    chosen: str | None = None
    options: dict[str, Any] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        refuse_private([getattr(self, each.name) for each in fields(self)], "the report's facts")


def style_report(facts: StyleFacts) -> str:
    """The page that goes with the token: contact sheet, guarantee, what touched the private images."""
    rows = [
        {
            "prompt": prompt,
            "without": sheet(before, columns=PICTURES_A_ROW),
            "with_token": sheet(after, columns=PICTURES_A_ROW),
        }
        for prompt, before, after in zip(facts.prompts, facts.without, facts.with_token, strict=True)
    ]
    page = guarantee(facts.certificate, facts.unit)
    options = sorted(releasable_options(facts.options).items())
    page |= {"title": f"The style {facts.token}", "facts": facts, "rows": rows, "options": options}
    return render("style.html", page)


def style_card(facts: StyleFacts) -> str:
    """README.md of the release."""
    import yaml

    from sfumato.report.certificate import statement

    certificate = facts.certificate
    header = {
        "license": "other", "license_name": "set-by-the-owner-of-the-data", "library_name": "diffusers",
        "tags": ["differential-privacy", "textual_inversion", "diffusers", f"sfumato-{facts.method}"],
    }  # fmt: skip
    return markdown("style_card.md").render(
        header=yaml.safe_dump(header, sort_keys=False).strip(), facts=facts, statement=statement(certificate),
        epsilon=claim(certificate["epsilon"]), delta=delta_claim(certificate["delta"]),
        relation=RELATIONS.get(certificate["relation"], certificate["relation"]),
        unit=UNITS.get(facts.unit, facts.unit), replace_one=certificate.get("epsilon_replace_one"), claim=claim,
        events=[
            (entry["mechanism"], entry.get("says", ""), event_text(entry["event"]))
            for reservation in certificate["reservations"]
            for entry in reservation["events"]
        ],
        software=sorted(certificate.get("software", {}).items()),
    )  # fmt: skip
