"""`sfumato retrieve`: text prompts answered from a private image collection, on one budget for all of them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from sfumato.cli.parsing import act, parse, say
from sfumato.retrieval import options as o

HELP = """usage: sfumato retrieve ACTION [options]

Answer text prompts from a private image collection (DP-RDM), within one budget for all answers together.

actions:
  index      make an index of private images; it is as private as they are
  ask        draw a prompt; charged the first time, free when asked again
  batch      draw every line of a file; resumes, stops cleanly when the budget is spent
  codebook   release a codebook once, and ask it for ever
  serve      answer prompts over HTTP, with a page to try it
  status     questions asked and left
  add        add images to an index
  delete     delete images from an index

options:
  -h, --help  show this help, or an action's: sfumato retrieve ACTION --help

first steps:
  sfumato retrieve index PRIVATE --epsilon 10 --out index
  sfumato retrieve ask index "a portrait with curly hair" --out pictures
"""


def run(arguments: Sequence[str]) -> int:
    """Run one action and return its exit status."""
    actions = {
        "index": _index, "ask": _ask, "batch": _batch, "codebook": _codebook, "serve": _serve, "status": _status,
        "add": _add, "delete": _delete,
    }  # fmt: skip
    return act(
        "sfumato retrieve", HELP, actions, ["--num-images" if part == "-n" else part for part in arguments]
    )


def _index(arguments: Sequence[str]) -> int:
    options = parse(o.IndexOptions, "sfumato retrieve index", arguments)
    options.check()
    from sfumato.retrieval.build import build_index

    return _said(build_index(options))


def _ask(arguments: Sequence[str]) -> int:
    options = parse(o.AskOptions, "sfumato retrieve ask", arguments)
    options.check()
    from sfumato.retrieval.draw import ask

    return _said(ask(options))


def _batch(arguments: Sequence[str]) -> int:
    options = parse(o.BatchOptions, "sfumato retrieve batch", arguments)
    options.check()
    from sfumato.retrieval.draw import batch

    return _said(batch(options))


def _codebook(arguments: Sequence[str]) -> int:
    options = parse(o.CodebookOptions, "sfumato retrieve codebook", arguments)
    options.check()
    from sfumato.retrieval.build import release_codebook

    return _said(release_codebook(options))


def _add(arguments: Sequence[str]) -> int:
    options = parse(o.AddOptions, "sfumato retrieve add", arguments)
    from sfumato.retrieval.build import add

    return _said(add(options))


def _delete(arguments: Sequence[str]) -> int:
    options = parse(o.DeleteOptions, "sfumato retrieve delete", arguments)
    from sfumato.retrieval.build import delete

    return _said(delete(options))


def _status(arguments: Sequence[str]) -> int:
    options = parse(o.StatusOptions, "sfumato retrieve status", arguments)
    from sfumato.retrieval.collection import open_source

    status = open_source(options.index).status()
    if status["queries_left"] is None:
        say("a codebook: asking it is free, however often")
    else:
        say(
            f"{status['queries_asked']:,} of {status['queries_planned']:,} questions asked, {status['queries_left']:,} "
            f"left ({status['mechanism']})"
        )
    say(status["statement"])
    return 0


def _serve(arguments: Sequence[str]) -> int:
    options = parse(o.ServeOptions, "sfumato retrieve serve", arguments)
    from sfumato.retrieval.serving import serve  # first: it says what to install where something is missing

    from sfumato.retrieval.gate import read_token  # isort: skip

    serve(
        Path(options.index), generator=options.generator, host=options.host, port=options.port,
        workers=options.workers, token=read_token(options.token_file),
        ready=lambda url: say(f"serving {options.index} on {url} (Ctrl-C ends it)"),
    )  # fmt: skip
    return 0


def _said(lines: Sequence[str]) -> int:
    for line in lines:
        say(line)
    return 0
