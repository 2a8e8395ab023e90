"""`sfumato synthesize`: options from the command line and a YAML file, then the work."""

from __future__ import annotations

from collections.abc import Sequence

from sfumato.cli.parsing import parse
from sfumato.errors import InputError
from sfumato.synthesis.options import SynthesizeOptions, read_config


def run(arguments: Sequence[str]) -> int:
    """Parse, check, and run; prints what the run says about itself."""
    options = resolve(arguments)
    options.check()
    from sfumato.synthesis.run import synthesize

    synthesize(options)
    return 0


def resolve(arguments: Sequence[str]) -> SynthesizeOptions:
    """The options of a command line; where it names a --config file, that file's values are the defaults."""
    path = _config_path(arguments)
    given = read_config(path) if path is not None else {}
    return parse(SynthesizeOptions, "sfumato synthesize", arguments, given)


def _config_path(arguments: Sequence[str]) -> str | None:
    for position, argument in enumerate(arguments):
        if argument.startswith("--config="):
            return argument.removeprefix("--config=")
        if argument == "--config":
            if position + 1 == len(arguments):
                raise InputError("--config needs the path of a YAML file; no budget was spent.")
            return arguments[position + 1]
    return None
