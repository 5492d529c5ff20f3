"""Several processes of one program: torchrun with an end like that of a single process.

    python sgm/launch.py --standalone --nproc_per_node=2 sample_video.py ...

The options are torchrun's. What the ranks say of an error is not said again, and the exit code is theirs: 2 for bad
input, 3 after a training that skipped most of its steps, 130 after Ctrl-C, 143 after SIGTERM. (torchrun alone ends
with its own traceback and 1, whatever happened.) Ranks whose launcher is killed end by themselves.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

if __name__ == "__main__":
    # Python puts a script's own folder first, where `config`, `data` and others would stand before packages.
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from sgm.cli import BAD_INPUT, INTERRUPTED, LAUNCHER, MOSTLY_SKIPPED, SAID, TERMINATED, exit_code

SPOKEN_FOR = (BAD_INPUT, MOSTLY_SKIPPED, INTERRUPTED, TERMINATED)  # codes of a rank that has said why it left
# What torchrun logs of ends that are told here, or by the ranks.
TOLD = ("Sending process %s closing signal", "failed (exitcode", "Received %s death signal")


def main(arguments: list[str]) -> int:
    """Run torchrun with `arguments`; returns the exit code. Errors of the launch itself keep their traceback."""
    with tempfile.TemporaryDirectory(prefix="cogvideox-launch-") as folder:
        os.environ[SAID] = os.path.join(folder, "said")
        return exit_code(lambda: _launch(arguments))


def _launch(arguments: list[str]) -> int:
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import main as torchrun

    for name in ("multiprocessing", "agent.server"):
        logging.getLogger(f"torch.distributed.elastic.{name}.api").addFilter(_is_news)
    os.environ[LAUNCHER] = str(os.getpid())
    try:
        torchrun(arguments)
    except ChildFailedError as error:
        lines, code = verdict({rank: failure.exitcode for rank, failure in error.failures.items()})
        if lines:
            print("error: " + "; ".join(lines), file=sys.stderr, flush=True)
        return code
    except SignalException as error:
        return 128 + int(error.sigval)
    return 0


def _is_news(record: logging.LogRecord) -> bool:
    return not str(record.msg).startswith(TOLD)


def verdict(codes: Mapping[int, int]) -> tuple[list[str], int]:
    """(what is to be said, exit code of the launch) where ranks ended with these codes, in the order of their ends.

    A code below 0 is that of a signal. The launcher itself ends the other ranks after a failure, with SIGTERM, if they
    have not gone before for want of the failed one; of these ends none is the launch's unless there is no other.
    """
    first, *_ = sorted(codes.values(), key=lambda code: code in (TERMINATED, -signal.SIGTERM))
    lines = [
        f"rank {rank} {_end(code)}"
        for k, (rank, code) in enumerate(codes.items())
        if code not in SPOKEN_FOR and (k == 0 or code != -signal.SIGTERM)
    ]
    code = BAD_INPUT if BAD_INPUT in codes.values() else first
    return lines, 128 - code if code < 0 else code


def _end(code: int) -> str:
    if code >= 0:
        return f"ended with code {code}"
    try:
        return f"was ended by {signal.Signals(-code).name}"
    except ValueError:  # a real-time signal
        return f"was ended by signal {-code}"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
