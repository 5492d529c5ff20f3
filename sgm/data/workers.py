"""In a worker process: which signals it answers to."""

from __future__ import annotations

import os
import signal
import threading


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
