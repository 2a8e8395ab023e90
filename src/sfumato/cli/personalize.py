"""`sfumato personalize`: one style token from private images."""

from __future__ import annotations

from collections.abc import Sequence

from sfumato.cli.parsing import parse, say
from sfumato.personalization.options import PersonalizeOptions


def run(arguments: Sequence[str]) -> int:
    """Parse, check, learn, and say what it cost."""
    options = parse(PersonalizeOptions, "sfumato personalize", arguments)
    options.check()
    from sfumato.personalization.run import personalize

    result = personalize(options)
    if result is not None:
        say(result.statement)
        say(f"token:  {result.release / 'learned_embeds.safetensors'}")
        say(f"report: {result.release / 'report.html'}")
    return 0
