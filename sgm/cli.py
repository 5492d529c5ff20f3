"""What every command line here does with the end of its work: an exit code, and one line where a person is at fault.

Of several ranks that `sgm.launch` started, the first to say something says it for all: a file that they share holds
what was said. It is written after the words are out and under a lock: a rank that is ended half way silences no other.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import hashlib
import os
import platform
import re
import shlex
import signal
import sys
import threading
import time
from collections.abc import Callable
from typing import IO, Any, NoReturn

from sgm.errors import SgmError
from sgm.places import INSTALLED, PROJECT
from sgm.secrets import hidden

BAD_INPUT, MOSTLY_SKIPPED, INTERRUPTED, TERMINATED = 2, 3, 130, 143
PATIENCE = 5.0  # seconds, with a launcher that is to see first which rank fell
_LEFT_BEHIND = ("Connection closed by peer", "Connection reset by peer")  # what gloo makes of another rank's end
SAID = "COGVIDEOX_SAID"  # environment: the file of what the ranks have said
LAUNCHER = "COGVIDEOX_LAUNCHER"  # environment: process id of the launcher, for its ranks alone


class Parser(argparse.ArgumentParser):
    """Options and file names in any order; ranks that are given the same command line say the same once.

    Attributes:
        instead: what to write in place of an option that there is not, by its name with underscores.
    """

    def __init__(self, *args: Any, **options: Any):
        super().__init__(*args, **options)
        self.instead: dict[str, str] = {}

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        """With options between the file names, too: `a.yaml --seed 7 b.yaml`."""
        return self.parse_intermixed_args(args, namespace)

    def print_help(self, file: object = None) -> None:
        """On the standard output, whatever `file` is."""
        _say_once(self.format_help().rstrip("\n"), sys.stdout)

    def error(self, message: str) -> NoReturn:
        if message.startswith("unrecognized arguments: "):
            names = [word.partition("=")[0][2:].replace("-", "_") for word in message.split() if word.startswith("--")]
            message += "".join(f"; write {self.instead[name]}" for name in names if name in self.instead)
        _say_once(f"{self.format_usage()}{self.prog}: error: {message}", sys.stderr)
        sys.exit(BAD_INPUT)


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

    @staticmethod
    def let_go() -> None:
        """Give back what was taken over: a signal that comes while the process leaves ends it without a word."""
        for number in (signal.SIGINT, signal.SIGTERM):
            if isinstance(getattr(signal.getsignal(number), "__self__", None), Interrupts):
                signal.signal(number, signal.SIG_DFL)

    def check(self) -> None:
        """Raises KeyboardInterrupt if a signal has come."""
        if self.received:
            raise KeyboardInterrupt


def exit_code(run: Callable[[], int | None], interrupted: str = "interrupted") -> int:
    """Run a command and give its exit code: what it returns (None is 0), 2 for bad input, 130 after Ctrl-C, 143 where
    another rank has left.

    An `SgmError` says what to do and is printed alone, and so is what to do about a package that is not installed; any
    other error is a bug and keeps its traceback.

    Args:
        interrupted: what is said after Ctrl-C: what was kept, and how to go on.
    """
    try:
        if os.environ.pop(LAUNCHER, None) == str(os.getppid()):
            threading.Thread(target=_end_with_parent, args=(os.getppid(),), daemon=True).start()
        code = run() or 0
        Interrupts.let_go()
        return code
    except KeyboardInterrupt:
        Interrupts.let_go()
        _say_once(f"\n{interrupted}", sys.stderr, only_first=True)
        return INTERRUPTED
    except SgmError as error:
        Interrupts.let_go()
        report(error)
        return BAD_INPUT
    except ModuleNotFoundError as error:
        if not error.name or error.name.split(".")[0] in ("sgm", "tools") or "." in error.name:
            raise
        Interrupts.let_go()
        _say_once(f"error: {_how_to_install(error.name)}", sys.stderr)
        return BAD_INPUT
    except RuntimeError as error:
        if not any(end in str(error) for end in _LEFT_BEHIND):
            raise
        Interrupts.let_go()
        time.sleep(PATIENCE)  # the launcher, which knows the process, ends this one before
        _say_once("error: another process of this run is not there any more", sys.stderr, only_first=True)
        return TERMINATED


def _end_with_parent(launcher: int) -> None:
    """End this rank when its launcher was killed, as that would: by SIGTERM, and by SIGKILL if it stays."""
    while os.getppid() == launcher:
        time.sleep(0.5)
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(float(os.environ.get("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "30")))
    os.kill(os.getpid(), signal.SIGKILL)


OPTIONAL = {  # package -> script that installs it, and where it is listed
    **dict.fromkeys(("fastapi", "gradio", "python_multipart", "uvicorn"), ("serve.sh", "sgm/serve/requirements.txt")),
    **dict.fromkeys(("accelerate", "diffusers", "peft", "pytest"), ("tests/run.sh", "tests/requirements.txt")),
}


def _how_to_install(package: str) -> str:
    lacks = f"{sys.executable} (Python {platform.python_version()}) lacks the package {package!r}"
    script, file = OPTIONAL.get(package, ("inference.sh", "requirements.txt"))
    if INSTALLED:
        extra = "[serve]" if script == "serve.sh" else ""
        return f"{lacks}: install this project again, with its requirements (pip install 'FOLDER{extra}')"
    listed = PROJECT / file
    return (
        f"{lacks}. `bash {script}` sets up an environment that has it; "
        f"in one of your own (Python 3.11 to 3.14): pip install -r {shlex.quote(str(listed))}"
    )


def report(error: Exception) -> None:
    """Print an error without its traceback; once where several ranks have the same."""
    _say_once(" ".join([f"error: {error}", *(f"({note})" for note in getattr(error, "__notes__", ()))]), sys.stderr)


def _say_once(text: str, out: IO[str], only_first: bool = False) -> None:
    """Print `text` unless another rank has said the same of itself; with `only_first`, unless one has said anything.

    A rank that the launcher ends because another one failed has nothing to add to that one's error.
    """
    shared = os.environ.get(SAID)
    if not shared:
        print_line(text, out)
        return
    mark = hashlib.sha256(re.sub(r"\brank \d+", "rank", text).encode()).hexdigest()
    try:
        handle = open(shared, "a+", encoding="ascii")  # noqa: SIM115  # below
    except OSError:  # the launcher is gone
        print_line(text, out)
        return
    with handle:
        with contextlib.suppress(OSError):  # no locks on this file system: at worst it is said twice
            fcntl.flock(handle, fcntl.LOCK_EX)
        handle.seek(0)
        said = handle.read().split()
        if mark in said or (only_first and said):
            return
        print_line(text, out)
        handle.write(f"{mark}\n")


def print_line(text: str, out: IO[str] | None = None) -> None:
    """Print at once. Work does not end where nobody hears of it: `| head` has seen enough, a log's disk is full."""
    with contextlib.suppress(OSError):
        print(hidden(text), file=out, flush=True)


def flush_output() -> None:
    """Bring out what was printed; what cannot be written is thrown away, and spoils no exit code."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
