"""From a dataclass to a command line: fields are the options, the docstring below each is its help."""

from __future__ import annotations

import ast
import contextlib
import dataclasses
import inspect
import io
import sys
import textwrap
from collections.abc import Callable, Sequence
from difflib import get_close_matches
from typing import Annotated, Any, TypeVar, get_type_hints

import tyro

from sfumato.errors import InputError

Options = TypeVar("Options")


def parse(
    kind: type[Options], prog: str, arguments: Sequence[str], given: dict[str, Any] | None = None
) -> Options:
    """The options in `arguments`; `given` replaces defaults (values from a file), the arguments win over it.

    Prints help and raises SystemExit(0) when asked for it.

    Raises:
        InputError: in one line, what is wrong with the arguments.
    """
    given = given or {}
    help_ = field_help(kind)
    hints = get_type_hints(kind, include_extras=True)
    fields = []
    for field in dataclasses.fields(kind):  # type: ignore[arg-type]
        shown = tyro.conf.arg(help=help_[field.name], help_behavior_hint=_hint(field, given))
        annotated = Annotated[hints[field.name], shown]
        if field.name in given:
            fields.append((field.name, annotated, dataclasses.field(default=given[field.name])))
        elif field.default is dataclasses.MISSING:
            fields.append((field.name, annotated))
        else:
            fields.append((field.name, annotated, dataclasses.field(default=field.default)))
    required_first = sorted(fields, key=len)
    shape = dataclasses.make_dataclass(kind.__name__, required_first)
    complaint = io.StringIO()
    try:
        with contextlib.redirect_stderr(complaint):
            values = tyro.cli(
                shape,
                prog=prog,
                description=inspect.getdoc(kind),
                args=[_plain(argument) for argument in arguments],
                config=(
                    tyro.conf.FlagCreatePairsOff,
                    tyro.conf.DisallowNone,
                    tyro.conf.PositionalMetavarFromFieldName,
                ),
            )
    except SystemExit as end:
        if end.code in (0, None):
            raise
        raise InputError(
            f"{_one_line(complaint.getvalue())}; nothing was done. See `{prog} --help`."
        ) from None
    return kind(**vars(values))


def _one_line(box: str) -> str:
    """What a box of tyro's says: its sentences and the options it lists, without their help."""
    said: list[str] = []
    for line in box.replace("│", " ").splitlines():
        text = line.strip()
        indent = len(line) - len(line.lstrip())
        if indent < 2 or not text.strip("─-"):  # the box's border, title and rules
            continue
        if "helptext" in text:
            break
        if indent <= 3:
            said.append(text)
        elif indent <= 7:  # an option's name; its help stands further in
            said.append(text + ",")
    return " ".join(said).rstrip(".,: ").replace("Expected 1 values", "It needs one")


def field_help(kind: type) -> dict[str, str]:
    """The docstring under each field of a dataclass, on one line; every field has to have one."""
    body = ast.parse(textwrap.dedent(inspect.getsource(kind))).body[0]
    assert isinstance(body, ast.ClassDef)
    help_ = {}
    for statement, following in zip(body.body, body.body[1:], strict=False):
        if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
            text = ""
            if isinstance(following, ast.Expr) and isinstance(following.value, ast.Constant):
                text = str(following.value.value)
            help_[statement.target.id] = " ".join(text.split())
    missing = [field.name for field in dataclasses.fields(kind) if not help_.get(field.name)]
    if missing:
        raise TypeError(f"{kind.__name__}: no help for {', '.join(missing)}")
    return help_


def _hint(field: dataclasses.Field[Any], given: dict[str, Any]) -> str:
    """What stands behind an option's help; where the default is None its help says what that means."""
    if field.name in given:
        return f"(from the file: {given[field.name]})"
    if field.default is dataclasses.MISSING:
        return "(required)"
    if field.default is None or field.default == "":
        return ""
    return f"(default: {'off' if field.default is False else field.default})"


def _plain(argument: str) -> str:
    """Options may be written with _ too, as in a configuration file."""
    if not argument.startswith("--"):
        return argument
    name, equals, value = argument.partition("=")
    return name.replace("_", "-") + equals + value


def act(
    prog: str, help_: str, actions: dict[str, Callable[[Sequence[str]], int]], arguments: Sequence[str]
) -> int:
    """Run the action that the first argument names and return its exit status; without one, or for -h, print the help.

    Raises:
        InputError: there is no such action.
    """
    if not arguments or arguments[0] in ("-h", "--help"):
        say(help_.rstrip())
        return 0 if arguments else 2
    action = arguments[0]
    if action not in actions:
        near = get_close_matches(action, actions, n=1)
        hint = f" Did you mean `{prog} {near[0]}`?" if near else f" See `{prog} --help`."
        raise InputError(f"unknown action {action!r}; it is one of {', '.join(actions)}.{hint}")
    return actions[action](arguments[1:])


def say(line: str = "") -> None:
    """Print one line of a verb's result on standard output."""
    print(line, file=sys.stdout, flush=True)


def aligned(rows: list[list[str]]) -> list[str]:
    """Rows of a table as lines: the first column to the left, the others to the right."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return [
        "  ".join(
            cell.ljust(width) if column == 0 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
