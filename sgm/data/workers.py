"""Worker processes: where they meet, what they hand over, and which signals they answer to."""

from __future__ import annotations

import math
import multiprocessing.util
import os
import signal
import tempfile
import threading
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.utils.data import get_worker_info

_SOCKET = len("/pymp-12345678/listener-12345678")  # what multiprocessing puts behind the folder of temporary files
_LONGEST = 100  # bytes of a socket's path; macOS has room for 103


def meet_in_short_folder() -> None:
    """Let this process and its workers exchange tensors although the path of $TMPDIR may be long.

    They do it by sockets in the folder of temporary files. Where its path is too long for one, Python 3.11 raises in a
    thread of the worker, and whoever waits for a batch waits for ever; later releases choose /tmp by themselves, too
    (cpython issue 132124). Without effect where the folder is in use already.
    """
    if len(os.fsencode(tempfile.gettempdir())) + _SOCKET <= _LONGEST:
        return
    before = tempfile.tempdir
    tempfile.tempdir = "/tmp"
    try:
        multiprocessing.util.get_temp_dir()  # made now, known to the workers, removed at the end
    finally:
        tempfile.tempdir = before


def leave_signals_to_parent(worker_id: int) -> None:
    """Let the parent alone stop this worker.

    Schedulers and terminals send SIGTERM and SIGINT to every process of a job; a worker that died of one would take its
    parent along before that has saved. The parent's own SIGTERM (it ends workers so) still counts.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):  # not on macOS
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_exit_on_sigterm_from, args=(os.getppid(),), daemon=True).start()


def _exit_on_sigterm_from(parent: int) -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:
        pass
    os._exit(0)


def empty_to_hand_over(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """A contiguous tensor without values; in a worker it lies in memory that its parent gets without a copy."""
    if get_worker_info() is None:
        return torch.empty(tuple(shape), dtype=dtype)
    storage = torch.UntypedStorage._new_shared(math.prod(shape) * dtype.itemsize)  # as torch's own collate does
    return torch.empty(0, dtype=dtype).set_(storage).view(*shape)
