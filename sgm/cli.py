"""What every command line here does with the end of its work: an exit code, and one line where a person is at fault."""

from __future__ import annotations

import sys
from collections.abc import Callable

BAD_INPUT, INTERRUPTED = 2, 130


def exit_code(run: Callable[[], int | None], interrupted: str = "interrupted") -> int:
    """Run a command and give its exit code: what it returns (None is 0), 2 for bad input, 130 after Ctrl-C.

    Errors of this package (`ValueError` and `FileNotFoundError` subclasses defined in `sgm`) say what to do and are
    printed alone; any other one is a bug and keeps its traceback.

    Args:
        interrupted: what is said after Ctrl-C: what was kept, and how to go on.
    """
    try:
        return run() or 0
    except KeyboardInterrupt:
        print(f"\n{interrupted}", file=sys.stderr, flush=True)
        return INTERRUPTED
    except (ValueError, FileNotFoundError) as error:
        if not is_ours(error):
            raise
        report(error)
        return BAD_INPUT


def is_ours(error: Exception) -> bool:
    """Whether an error was defined by this package."""
    return type(error).__module__.startswith("sgm.")


def report(error: Exception) -> None:
    print(f"error: {error}", file=sys.stderr, flush=True)
