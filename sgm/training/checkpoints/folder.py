"""A run's folder of checkpoints: what makes one complete, how a new one takes its place, which are deleted.

    RUN/.lock                                     held while a command trains into the run
    RUN/latest                                    iteration that SAT's loader takes
    RUN/model_config.json                         class name and number of tensor-parallel parts, as SAT writes it
    RUN/100/mp_rank_00_model_states.pt            weights, one file a tensor-parallel part
    RUN/100/lora.safetensors                      the adapter in one file, for adapter-only checkpoints
    RUN/100/resume/rank_00000.pt                  state for exact resume, one file a process
    RUN/100/run.json                              facts, and every file with its size
    RUN/100-ema/mp_rank_00_model_states.pt        averaged weights
    RUN/merged/                                   the same layout again, adapter folded into the weights

A checkpoint is written under `.partial-100` and renamed when all of it is on the disk, `100` itself last but for
`latest`. Whatever stops a save half-way, `100` is either absent or complete.
"""

from __future__ import annotations

import json
import logging
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, fields
from datetime import datetime
from pathlib import Path
from typing import Any

from sgm.distributed import from_first
from sgm.files import (
    PARTIAL,
    REPLACED,
    SaveError,
    exchange,
    remove,
    remove_leftovers,
    replaced,
    require_writable,
    restore_replaced,
    try_lock,
    write_text,
)
from sgm.training.checkpoints.state import CheckpointError

logger = logging.getLogger(__name__)

RECORD = "run.json"
RESUME = "resume"
MERGED = "merged"
LOCK = ".lock"  # held by the command that trains into the run


_ADDED = {"clips_per_step", "identity", "sequence_parallel_size"}  # fields that earlier versions did not write


@dataclass(frozen=True)
class RunRecord:
    """`run.json`: written last, it makes a checkpoint complete.

    Attributes:
        saved_at: seconds since 1970.
        config_hash: of what the run learns.
        world_size, model_parallel_size, zero_stage: set-up that the resume state belongs to.
        files: path inside the iteration's folder -> bytes.
        clips_per_step: of all processes and micro-batches; 0: of a version that did not write it.
        identity: every key of the run with its value, see `same_run.identity`; empty as above.
        sequence_parallel_size: processes that shared the tokens of a clip.
    """

    iteration: int
    saved_at: float
    config_hash: str
    world_size: int
    model_parallel_size: int
    zero_stage: int
    lora_only: bool
    files: dict[str, int]
    clips_per_step: int = 0
    identity: dict[str, Any] = field(default_factory=dict)
    sequence_parallel_size: int = 1

    @property
    def clip_processes(self) -> int:
        """Processes that trained on one clip."""
        return self.sequence_parallel_size * self.model_parallel_size

    def rank_of(self, data: int, share: int, part: int) -> int | None:
        """Rank of the process that had this share of the clips of data-parallel rank `data`, or else their last share,
        and this part of the model. None: nobody had these clips.
        """
        replica = data * self.sequence_parallel_size + min(share, self.sequence_parallel_size - 1)
        rank = replica * self.model_parallel_size + part
        return rank if rank < self.world_size else None

    def write(self, folder: Path) -> None:
        write_text(folder / RECORD, json.dumps(asdict(self), indent=1, sort_keys=True))

    @classmethod
    def read(cls, folder: Path) -> RunRecord:
        """The record of a complete checkpoint.

        Raises:
            CheckpointError: it is incomplete; says in what.
        """
        try:
            content: Any = json.loads((folder / RECORD).read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise CheckpointError(f"{folder} is incomplete: it has no {RECORD}") from None
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{folder / RECORD} is unreadable: {error}") from error
        names = {f.name for f in fields(cls)}
        known = isinstance(content, dict) and names - _ADDED <= content.keys() <= names
        if not known or not isinstance(content["files"], dict):
            raise CheckpointError(f"{folder / RECORD} is no record of this version")
        record = cls(**content)
        for name, size in record.files.items():
            path = folder / name
            found = path.stat().st_size if path.is_file() else None
            if found != size:
                state = "missing" if found is None else f"{found} bytes long"
                raise CheckpointError(f"{folder} is incomplete: {name} is {state}, {size} bytes were written")
        return record


def files_in(folder: Path) -> dict[str, int]:
    """Every file below `folder` with its size."""
    found = (p for p in sorted(folder.rglob("*")) if p.is_file() and p.name != RECORD)
    return {str(p.relative_to(folder)): p.stat().st_size for p in found}


def iterations(run: Path) -> list[Path]:
    """The iteration folders of a run, complete or not, in order."""
    if not run.is_dir():
        return []
    return sorted((p for p in run.iterdir() if p.is_dir() and p.name.isdigit()), key=lambda p: int(p.name))


# --- writing -----------------------------------------------------------------------------------------------------


def new_run(wanted: Path) -> Path:
    """Make the folder `wanted`, or WANTED-2, WANTED-3, ...: the first that is not there yet.

    It is made here and not only named, so that commands started in the same minute get one each. Its parent is there.
    """
    run, number = wanted, 1
    while True:
        try:
            run.mkdir()
        except FileExistsError:
            number += 1
            run = wanted.with_name(f"{wanted.name}-{number}")
        else:
            return run


def new_run_folder(save: str, name: str) -> Path:
    """save/NAME-MM-DD-HH-MM, new, chosen by rank 0."""
    runs = Path(save).expanduser()
    return from_first(lambda: new_run(runs / f"{name}-{datetime.now():%m-%d-%H-%M}"))


def check_writable(save: str) -> None:
    """Raises CheckpointError, on every rank."""

    def problem() -> str | None:
        try:
            require_writable(Path(save).expanduser())
        except SaveError as error:
            return str(error)
        return None

    reason = from_first(problem)
    if reason:
        raise CheckpointError(f"{reason} Set args.save to another folder.")


def hold(folder: Path, stack: ExitStack) -> None:
    """Keep other commands from training into the same folder until `stack` is left.

    Raises:
        CheckpointError: on every rank; another command does so already.
    """
    if not from_first(lambda: stack.enter_context(try_lock(folder / LOCK))):
        raise CheckpointError(
            f"another command is still training into {folder}; end it or wait for it. To go on from another run, give "
            "its folder to --resume."
        )


def state_file(checkpoint: Path, rank: int) -> Path:
    """Where a process's state for exact resume lies in an iteration's folder."""
    return checkpoint / RESUME / f"rank_{rank:05d}.pt"


def staging_folder(run: Path, iteration: int) -> Path:
    """Where a checkpoint grows; same file system as its final place."""
    return run / f"{PARTIAL}{iteration}"


def recover(run: Path) -> None:
    """Undo what a killed save left: a folder moved aside comes back, unfinished ones are deleted."""
    for place in (run, run / MERGED):
        restore_replaced(place)
        remove_leftovers(place)


def restore_unless_live(run: Path) -> None:
    """`restore_replaced`, but not under the hands of a command that is saving into this run."""
    if any(run.glob(f"{REPLACED}*")):
        with try_lock(run / LOCK) as alone:
            if alone:
                restore_replaced(run)


def publish(run: Path, staging: Path, iteration: int) -> Path:
    """Move what is staged to its places: `ema` and `merged` where there are such, then `main`, whose name counts.

    If a move fails, those before it are undone.
    """
    place, averaged, merged = run / str(iteration), run / f"{iteration}-ema", run / MERGED / str(iteration)
    new = [target for target in (averaged, merged) if not target.exists()]
    try:
        for source, target in ((staging / "ema", averaged), (staging / MERGED, merged), (staging / "main", place)):
            if source.is_dir():
                exchange(source, target)
            elif target.exists():
                target.rename(replaced(target))
    except OSError:
        if (staging / "main").exists():
            for target in (averaged, merged):
                if target in new or replaced(target).exists():
                    remove(target)
        recover(run)
        raise
    staging.rmdir()
    recover(run)
    return place


def announce(run: Path, iteration: int, model_class: str, parts: int) -> None:
    """`model_config.json` and, last of all, `latest`: what SAT's loader reads."""
    config = json.dumps({"model_class": model_class, "model_parallel_size": parts}, indent=4)
    for place in (run / MERGED, run):
        if (place / str(iteration)).is_dir():
            write_text(place / "model_config.json", config)
            write_text(place / "latest", str(iteration))


def prune(run: Path, keep_last: int, newest: int) -> None:
    """Delete complete checkpoints but the last `keep_last`; never `newest`, and never an incomplete one.

    What cannot be deleted is named in the log: the new checkpoint is none the worse for it.
    """
    complete = [p for p in iterations(run) if _is_complete(p)]
    for old in complete[:-keep_last]:
        if int(old.name) == newest:
            continue
        try:
            asides = [  # all gone at once, however long the deletion takes; after a kill `recover` deletes the rest
                path.rename(path.with_name(f"{PARTIAL}old-{path.name}"))
                for path in (old, run / f"{old.name}-ema", run / MERGED / old.name)
                if path.exists()
            ]
            for aside in asides:
                remove(aside)
        except OSError as error:
            logger.warning("iteration %d was saved, but %s could not be deleted: %s", newest, old, error)


def _is_complete(folder: Path) -> bool:
    try:
        RunRecord.read(folder)
    except CheckpointError:
        return False
    return True
