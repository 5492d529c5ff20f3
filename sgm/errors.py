"""The base of every error that is a person's to mend."""

from __future__ import annotations


def first_line(error: object) -> str:
    """What an error says, of other people's code often on many lines; its type's name where it says nothing."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


class SgmError(ValueError):
    """Bad input, or a place that cannot be read or written. The message says what is wrong, where, and what to do.

    Entries print it without a traceback and leave with code 2; any other error is a bug, and keeps its traceback.
    """
