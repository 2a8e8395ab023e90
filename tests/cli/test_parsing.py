"""Options from dataclasses."""

from __future__ import annotations

from dataclasses import dataclass, fields

import pytest
from tyro.conf import Positional

from sfumato.cli.parsing import field_help, parse
from sfumato.errors import InputError
from sfumato.synthesis.options import SynthesizeOptions


@dataclass(frozen=True)
class Sample:
    """A sample."""

    thing: Positional[str]
    """The thing."""

    weight: float
    """Its weight, over
    two lines, in kg."""

    colour: str | None = None
    """Its colour. Default: none."""

    big: bool = False
    """Is it big?"""


def test_help_shows_every_option_with_its_default(capsys):
    with pytest.raises(SystemExit) as end:
        parse(Sample, "prog", ["--help"])
    assert end.value.code == 0
    out = " ".join(capsys.readouterr().out.replace("│", " ").split())
    for text in (
        "A sample.",
        "Its weight, over two lines, in kg. (required)",
        "Default: none.",
        "(default: off)",
    ):
        assert text in out
    assert "default: None" not in out


def test_arguments_win_over_what_is_given():
    assert parse(Sample, "prog", ["a", "--weight", "2"]) == Sample("a", 2.0)
    given = {"thing": "b", "weight": 3.0, "colour": "red", "big": True}
    assert parse(Sample, "prog", [], given) == Sample("b", 3.0, "red", True)
    assert parse(Sample, "prog", ["c", "--weight", "4"], given) == Sample("c", 4.0, "red", True)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "--weight FLOAT"),
        (["a"], "Missing from prog: --weight FLOAT; nothing was done. See `prog --help`."),
        (["a", "--weight"], "'--weight'"),
        (["a", "--weight", "x"], "--weight: could not convert string to float: 'x'"),
        (["a", "--weight", "1", "--nope"], "Unrecognized options: --nope;"),
        (["a", "--weight", "1", "--weigth", "2"], "--weight FLOAT"),
        (["a", "b", "--weight", "1"], "b"),
    ],
)
def test_bad_arguments_are_told_in_one_line(arguments, says, capsys):
    with pytest.raises(InputError) as error:
        parse(Sample, "prog", arguments)
    assert says in str(error.value) and "nothing was done" in str(error.value)
    assert "\n" not in str(error.value) and "kg" not in str(error.value)
    captured = capsys.readouterr()
    assert not captured.err and not captured.out


def test_a_field_without_help_is_a_defect():
    @dataclass
    class Silent:
        told: int
        """Told."""
        untold: int = 3

    with pytest.raises(TypeError, match="untold"):
        field_help(Silent)


def test_every_option_of_synthesize_states_its_default():
    help_ = field_help(SynthesizeOptions)
    for field in fields(SynthesizeOptions):
        if field.default is None and field.name != "config":
            assert "Default:" in help_[field.name], field.name
