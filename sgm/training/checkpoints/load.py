"""Finding the checkpoint to go on from, and reading training states from it."""

from __future__ import annotations

import glob
import logging
import math
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from sgm import distributed
from sgm.config import RunConfig
from sgm.training.checkpoints.folder import RECORD, RunRecord, iterations, restore_unless_live, state_file
from sgm.training.checkpoints.same_run import BATCH_KEYS, Change, changes, identity, identity_of_run
from sgm.training.checkpoints.state import CheckpointError, TrainState
from sgm.training.setup.deepspeed import batch_sizes
from sgm.weights import WeightsError, read_checkpoint

logger = logging.getLogger(__name__)


class Earlier(NamedTuple):
    """A complete checkpoint, its run's keys, and in what these differ from those of the run that is to go on."""

    folder: Path
    record: RunRecord
    then: Mapping[str, Any]
    changes: Sequence[Change]

    @classmethod
    def read(cls, folder: Path, config: RunConfig[Any], now: Mapping[str, Any]) -> Earlier:
        """`now`: `identity(config)`, which looks at every path. Raises CheckpointError."""
        record = RunRecord.read(folder)
        then = record.identity or identity_of_run(folder.parent, config)
        return cls(folder, record, then, changes(then, now, config))

    @property
    def refused(self) -> list[Change]:
        return [change for change in self.changes if not change.allowed]

    @property
    def clips_per_step(self) -> int:
        """Of all processes and micro-batches."""
        ranks = self.record.world_size // self.record.clip_processes
        section = {name: self.then.get(f"deepspeed.{name}") for name in BATCH_KEYS}
        return self.record.clips_per_step or math.prod(batch_sizes(section, ranks, [])) * ranks

    @property
    def worth(self) -> tuple[bool, float, int]:
        """Of several that fit the one is taken that goes as far, then the one saved last."""
        as_far = all(change.key not in ("args.train_iters", "args.epochs") for change in self.changes)
        return as_far, self.record.saved_at, self.record.iteration


def find_resume(save_root: str | Path, experiment_name: str | None, config: RunConfig[Any]) -> Path | None:
    """The iteration folder to go on from, found by rank 0 and told to all.

    Args:
        save_root: folder of runs; or, without `experiment_name`, one run's or one iteration's folder.
        experiment_name: look at the runs `save_root/experiment_name-*`, see `Earlier.worth`.
        config: of the run that is to go on.
    Returns:
        None where a search finds no checkpoint at all. Incomplete ones are named in the log and passed over.
    Raises:
        CheckpointError: there are only checkpoints of other configurations, or incomplete ones.
    """
    root = Path(save_root).expanduser().absolute()

    def look() -> tuple[Path | None, str | None]:
        try:
            return (_newest(root, experiment_name, config) if experiment_name else _named(root, config)), None
        except (CheckpointError, OSError) as error:
            return None, str(error)

    found, problem = distributed.from_first(look)
    if problem:
        raise CheckpointError(problem)
    return found


def _newest(root: Path, name: str, config: RunConfig[Any]) -> Path | None:
    runs = sorted(root.glob(f"{glob.escape(name)}-*"))
    complete, reasons = _complete([folder for run in runs for folder in _iterations(run)], config)
    own = [found for found in complete if all(change.key != "args.experiment_name" for change in found.changes)]
    fitting = [found for found in own if not found.refused]
    if not fitting and (own or reasons):
        raise CheckpointError(_none_fits(f"{root}/{name}-*", own, reasons))
    return max(fitting, key=lambda found: found.worth).folder if fitting else None


def _named(path: Path, config: RunConfig[Any]) -> Path:
    one = (path / RECORD).exists() or path.name.isdigit()
    complete, reasons = _complete([path] if one else _iterations(path)[::-1], config)
    if not complete:
        raise CheckpointError(_none_fits(path, [], reasons or [f"{path} does not exist or is empty"]))
    if complete[0].refused:
        raise CheckpointError(_none_fits(path, complete[:1], reasons))
    return complete[0].folder


def _iterations(run: Path) -> list[Path]:
    restore_unless_live(run)
    return iterations(run)


def _complete(folders: Sequence[Path], config: RunConfig[Any]) -> tuple[list[Earlier], list[str]]:
    """(the complete ones, what the others lack)"""
    complete, reasons, now = [], [], identity(config)
    for folder in folders:
        try:
            complete.append(Earlier.read(folder, config, now))
        except CheckpointError as error:
            logger.warning("passed over: %s", error)
            reasons.append(str(error))
    return complete, reasons


def _none_fits(place: object, found: Sequence[Earlier], reasons: Sequence[str]) -> str:
    """Checkpoints of other configurations: in what they differ from the one that is to go on, and the ways out."""
    lines = [f"--resume: no complete checkpoint of this configuration in {place}", *(f"  {text}" for text in reasons)]
    newest = {other.folder.parent: other for other in sorted(found, key=lambda other: other.worth)}  # of each run
    for other in list(newest.values())[::-1]:
        folder, values = shlex.quote(str(other.folder)), " ".join(change.undone for change in other.refused)
        lines += [f"  {folder} (then -> now)", *(f"    {change}" for change in other.refused)]
        lines.append(f"    go on with it: --resume {folder} {values}")
        if not other.record.lora_only:
            lines.append(f"    a new run from its weights, without --resume: --set args.load={folder}")
    return "\n".join([*lines, "To start a new run, leave out --resume."])


# --- reading -----------------------------------------------------------------------------------------------------


def load_state(path: Path, rank: int | None = None) -> TrainState:
    """A rank's training state (by default this one's) from an iteration folder; tensors lie in the mapped file.

    Raises:
        CheckpointError: incomplete, damaged or unsafe.
    """
    record = RunRecord.read(path)
    file = state_file(path, distributed.own_rank()[0] if rank is None else rank)
    try:
        content: Mapping[str, Any] = read_checkpoint(file)
    except WeightsError as error:
        raise CheckpointError(f"the training state cannot be used: {error}") from error
    state = TrainState.from_dict(content, file)
    if state.iteration != record.iteration:
        raise CheckpointError(f"{file} is of iteration {state.iteration}, not {record.iteration}: files were mixed up.")
    return state
