"""The model and data card of a release: its README.md, with the YAML front matter that model hubs read."""

from __future__ import annotations

from typing import Any

from sfumato.report.facts import ReleaseFacts, releasable_options
from sfumato.report.html import TEMPLATES
from sfumato.report.words import RELATIONS, UNITS, claim, delta_claim, event_text, guessing_limit, number


def card(facts: ReleaseFacts) -> str:
    """The release's README.md: what it is, what is promised, what it is for, its limits, how to load it."""
    import yaml

    from sfumato.report.certificate import statement

    certificate = facts.certificate
    header: dict[str, Any] = {
        "license": "other",
        "license_name": "set-by-the-owner-of-the-data",
        "library_name": "diffusers",
        "pipeline_tag": "unconditional-image-generation",
        "tags": [
            "differential-privacy",
            "synthetic-data",
            "diffusers",
            "image-generation",
            f"sfumato-{facts.method}",
        ],
    }
    return markdown("card.md").render(
        header=yaml.safe_dump(header, sort_keys=False, allow_unicode=True).strip(),
        facts=facts,
        statement=statement(certificate),
        epsilon=claim(certificate["epsilon"]),
        delta=delta_claim(certificate["delta"]),
        relation=RELATIONS.get(certificate["relation"], certificate["relation"]),
        unit=UNITS.get(facts.unit, facts.unit),
        certain=guessing_limit(certificate["epsilon"], certificate["delta"]) > 0.95,
        replace_one=certificate.get("epsilon_replace_one"),
        claim=claim,
        events=[
            (entry["mechanism"], entry.get("says", ""), event_text(entry["event"]))
            for reservation in certificate["reservations"]
            for entry in reservation["events"]
        ],
        options=sorted(releasable_options(facts.options).items()),
        software=sorted(certificate.get("software", {}).items()),
        number=number,
    )


def markdown(template: str) -> Any:
    """A Markdown template of this folder."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=False,  # Markdown, not HTML; `cell` keeps names from breaking out of their place
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["cell"] = cell
    return environment.get_template(template)


def cell(value: object) -> str:
    """Text that stays inside its table cell or sentence: no line breaks, no pipes, no markup."""
    text = " ".join(str(value).split())
    return "".join("\\" + character if character in "\\`*_[]<>|#" else character for character in text)
