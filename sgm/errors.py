"""The base of every error that is a person's to mend."""

from __future__ import annotations


class SgmError(ValueError):
    """Bad input, or a place that cannot be read or written. The message says what is wrong, where, and what to do.

    Entries print it without a traceback and leave with code 2; any other error is a bug, and keeps its traceback.
    """
