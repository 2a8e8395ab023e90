from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sfumato.data.records import LazyRecords, Record, bad_source, file_stamp, fingerprint, names_of, printable


def test_lazy_records_behave_like_a_sequence() -> None:
    made: list[int] = []

    def make(index: int) -> Record:
        made.append(index)
        return Record(str(index), None, None, None, lambda: b"")

    records = LazyRecords(5, make)
    assert len(records) == 5
    assert made == []
    assert [record.where for record in records] == list("01234")
    assert records[-1].where == "4"
    assert [record.where for record in records[1:3]] == ["1", "2"]
    for outside in (5, -6):
        with pytest.raises(IndexError):
            records[outside]


@given(st.lists(st.text()), st.lists(st.text()))
def test_fingerprints_tell_sequences_apart(one: list[str], other: list[str]) -> None:
    assert (fingerprint(one) == fingerprint(other)) == (one == other)


def test_fingerprints_do_not_run_parts_together() -> None:
    assert fingerprint(["ab", "c"]) != fingerprint(["a", "bc"])


def test_names_are_sorted_by_kind() -> None:
    assert names_of([10, 9, 10]) == ("9", "10")
    assert names_of(["b", "a", "B"]) == ("B", "a", "b")


def test_messages_stay_on_one_line() -> None:
    assert printable("a\nb\x1b[31m") == "a\\nb\\x1b[31m"
    assert printable("Zoë/x y.png") == "Zoë/x y.png"
    assert str(bad_source("x\n", "is bad", "mend it")) == "'x\\n' is bad; no budget was spent; mend it"


def test_the_stamp_of_a_file_is_that_of_what_a_link_points_to(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("1")
    (tmp_path / "b").symlink_to(tmp_path / "a")
    assert file_stamp(tmp_path / "a") == file_stamp(tmp_path / "b")
    before = file_stamp(tmp_path / "a")
    os.utime(tmp_path / "a", ns=(5, 5))
    assert file_stamp(tmp_path / "a") != before
