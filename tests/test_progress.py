"""Progress off a terminal: plain lines, and only from the first of several processes."""

from __future__ import annotations

import pytest

from sfumato import progress
from sfumato.progress import Progress


def test_a_line_at_the_end_with_the_latest_note(capsys):
    with Progress("work", total=3, unit="steps") as shown:
        for number in range(3):
            shown.advance(note=f"loss {number}")
    captured = capsys.readouterr()
    assert captured.err == "work: 3/3 steps in 0 s, loss 2\n" and not captured.out


def test_lines_on_the_way_tell_the_time_left(capsys, monkeypatch):
    monkeypatch.setattr(progress, "SECONDS_BETWEEN_PLAIN_LINES", 0.0)
    with Progress("work", total=2) as shown:
        shown.advance()
    assert "1/2" in (line := capsys.readouterr().err) and " s left" in line


def test_an_interruption_prints_nothing_more(capsys):
    with pytest.raises(KeyboardInterrupt), Progress("work", total=2):
        raise KeyboardInterrupt
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(("rank", "lines"), [("0", 1), ("1", 0)])
def test_only_the_first_of_several_processes_speaks(capsys, monkeypatch, rank, lines):
    monkeypatch.setenv("RANK", rank)
    with Progress("work", total=1) as shown:
        shown.advance()
    assert capsys.readouterr().err.count("\n") == lines
