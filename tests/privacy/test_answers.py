"""What was asked is never asked again, and never taken from another account."""

import numpy as np
import pytest

from sfumato.errors import BudgetError, LedgerError
from sfumato.privacy.answers import Answers
from sfumato.privacy.budget import Budget
from sfumato.privacy.events import PlannedEvent
from sfumato.privacy.ledger import Ledger
from sfumato.privacy.mechanisms import label_histogram_event

EVENT = label_histogram_event(2.0)


def planned(count=1):
    return [PlannedEvent("votes", "votes", EVENT, count=count)]


@pytest.fixture
def ledger(tmp_path):
    return Ledger.open(tmp_path / "l.db", total=Budget(50.0, 1e-3))


def asking(reservation, value):
    def ask():
        reservation.begin("votes", EVENT)
        return np.array([value])

    return ask


def test_an_answer_is_asked_for_once(ledger, tmp_path):
    answers = Answers(tmp_path)
    reservation = answers.reserve(ledger, "run", planned(), 1e-5)
    assert answers.ask("votes", reservation, asking(reservation, 7)) == 7
    again = Answers(tmp_path)
    found = again.reserve(ledger, "run", planned(), 1e-5)
    assert found.id == reservation.id and len(ledger.reservations()) == 1
    assert again.ask("votes", found, lambda: pytest.fail("asked twice")) == 7
    assert [each.id for each in again.reservations] == [reservation.id]


def test_turns_are_separate_answers(ledger, tmp_path):
    answers = Answers(tmp_path)
    reservation = answers.reserve(ledger, "run", planned(3), 1e-5)
    got = [answers.ask("votes", reservation, asking(reservation, turn), turn=turn) for turn in range(3)]
    assert np.concatenate(got).tolist() == [0, 1, 2] and reservation.begun("votes") == 3
    assert answers.ask("votes", reservation, lambda: pytest.fail("asked twice"), turn=1) == 1


@pytest.mark.parametrize("turn", [None, 1])
def test_what_was_charged_and_lost_is_not_asked_again(ledger, tmp_path, turn):
    answers = Answers(tmp_path)
    reservation = answers.reserve(ledger, "run", planned(3), 1e-5)
    if turn:
        answers.ask("votes", reservation, asking(reservation, 0), turn=0)
    reservation.begin("votes", EVENT)
    with pytest.raises(BudgetError, match="its answer was saved"):
        answers.ask("votes", reservation, lambda: pytest.fail("asked again"), turn=turn)


def test_an_answer_that_another_account_paid_for_is_refused(ledger, tmp_path):
    answers = Answers(tmp_path)
    reservation = answers.reserve(ledger, "run", planned(), 1e-5)
    answers.ask("votes", reservation, asking(reservation, 7))
    other = Ledger.open(tmp_path / "other.db", total=Budget(50.0, 1e-3))
    swapped = Answers(tmp_path)
    unpaid = swapped.reserve(other, "run", planned(), 1e-5)
    with pytest.raises(LedgerError, match="another reservation"):
        swapped.ask("votes", unpaid, lambda: pytest.fail("asked"))


def test_files_belong_to_the_reservation_that_paid(ledger, tmp_path):
    answers = Answers(tmp_path)
    reservation = answers.reserve(ledger, "run", planned(), 1e-5)
    answers.own(reservation, ("public",))
    (tmp_path / "public").mkdir()
    answers.own(reservation, ("public",))
    (tmp_path / "run.json").unlink()
    other = Answers(tmp_path)
    unpaid = other.reserve(ledger, "run", planned(), 1e-5)
    with pytest.raises(LedgerError, match="public was made under another reservation"):
        other.own(unpaid, ("public",))
    (tmp_path / "paid_by.json").unlink()
    with pytest.raises(LedgerError, match="another reservation"):
        other.own(unpaid, ("public",))
