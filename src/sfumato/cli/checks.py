"""`sfumato checks`: is this machine, with this software, safe and fit to use?"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass

from sfumato.cli.parsing import parse, say


@dataclass(frozen=True)
class ChecksOptions:
    """Show versions, threads, allocator and device, and test the gradient engine on this machine.

    Exit status 1 when the self-test fails: then no private training should be run here.
    """

    json: bool = False
    """Print one JSON object instead of a table."""
