"""Run by `tests.training_tiny.run_ranks`: FOLDER RANKS WORKER ARGUMENTS... Imports once what WORKER imports, then is as
many processes, each of which runs `WORKER RANK ARGUMENTS...` and writes into FOLDER what it says.
"""

from __future__ import annotations

import os
import runpy
import sys


def main(folder: str, ranks: int, worker: str, *arguments: str) -> None:
    runpy.run_path(worker, run_name="imported")
    for rank in range(ranks):
        if os.fork() == 0:
            for number, name in ((1, "out"), (2, "err")):
                os.dup2(os.open(f"{folder}/{rank}.{name}", os.O_WRONLY | os.O_CREAT), number)
            sys.argv[1:] = [str(rank), *arguments]
            runpy.run_path(worker, run_name="__main__")
            return
    for _ in range(ranks):
        os.wait()


if __name__ == "__main__":
    folder, ranks, *rest = sys.argv[1:]
    main(folder, int(ranks), *rest)
