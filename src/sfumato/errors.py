"""Errors a user can act on. The command line prints their message as one line and exits with their status."""

from __future__ import annotations


class SfumatoError(Exception):
    """Base of every error raised on purpose; the message is one line that says what to do next."""

    exit_status = 2


class InputError(SfumatoError, ValueError):
    """A file or an option that cannot be used as it is."""


class BudgetError(SfumatoError):
    """The privacy budget does not allow what was asked."""


class LedgerError(SfumatoError):
    """The ledger is damaged, locked, or used against its own record."""


class AuditRefusal(SfumatoError):
    """An audit did not let a release pass: exit status 3 when its policy is failed, 4 when nothing could be decided."""

    def __init__(self, message: str, exit_status: int) -> None:
        super().__init__(message)
        self.exit_status = exit_status
