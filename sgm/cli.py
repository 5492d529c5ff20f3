"""What every command line here does with the end of its work: an exit code, and one line where a person is at fault."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable

BAD_INPUT, INTERRUPTED = 2, 130


class Interrupts:
    """Ctrl-C and a launcher's SIGTERM, both as KeyboardInterrupt.

    Python drops an exception that is raised within a destructor or a callback, and a signal may come just there; so
    long work calls `check` now and then, which raises again what was dropped.
    """

    def __init__(self) -> None:
        self.received = False

    def listen(self) -> Interrupts:
        """Take over both signals, for the rest of the process."""
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._receive)
        return self

    def _receive(self, *_: object) -> None:
        self.received = True
        raise KeyboardInterrupt

    def check(self) -> None:
        """Raises KeyboardInterrupt if a signal has come."""
        if self.received:
            raise KeyboardInterrupt


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
