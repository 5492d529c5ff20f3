"""In a worker process: which signals it answers to, and its random generators."""

from __future__ import annotations

import os
import random
import signal
import threading

import numpy as np
import torch


def prepare_worker(worker_id: int) -> None:
    """Let the parent alone stop this worker, and seed Python's and numpy's generators as torch has seeded its own."""
    leave_signals_to_parent()
    seed = torch.initial_seed()
    random.seed(seed)
    np.random.seed(seed % 2**32)


def leave_signals_to_parent() -> None:
    """Ignore what does not come from the parent.

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
