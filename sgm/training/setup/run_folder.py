"""The folder that a run writes into: a new one, or that of the run to go on from; held by one command at a time."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from datetime import datetime
from functools import partial
from pathlib import Path

from sgm.config import ConfigError, RunConfig
from sgm.distributed import from_first
from sgm.files import SaveError, require_writable
from sgm.lock import try_lock
from sgm.training.checkpoints.folder import LOCK, new_run
from sgm.training.checkpoints.load import find_resume
from sgm.training.checkpoints.same_run import CONFIG_FILE, differences, resume_hash
from sgm.training.checkpoints.state import CheckpointError
from sgm.training.options import TrainArgs


def find_checkpoint(config: RunConfig[TrainArgs], say: Callable[[str], None]) -> Path | None:
    """The iteration folder to go on from, if asked for and found."""
    args = config.args
    if not args.resume:
        return None
    explain = partial(differences, config=config)
    if args.resume != "auto":
        return find_resume(Path(args.resume), None, resume_hash(config), explain)
    if not args.save:
        raise ConfigError("--resume looks for runs in args.save, which is not set; set it or give the run's folder")
    found = find_resume(Path(args.save), args.experiment_name, resume_hash(config))
    if found is None:
        say(f"no earlier run of this configuration in {args.save}: starting a new one")
        other = find_resume(Path(args.save), args.experiment_name, None)
        if other:
            changed = "; ".join(explain(other.parent)) or f"see its {CONFIG_FILE}"
            say(f"warning: {other} is of another configuration: {changed}")
    return found


def new_run_folder(args: TrainArgs) -> Path | None:
    """save/NAME-MM-DD-HH-MM, new, chosen by rank 0."""
    if not args.save:
        return None
    runs = Path(args.save).expanduser()
    return from_first(lambda: new_run(runs / f"{args.experiment_name}-{datetime.now():%m-%d-%H-%M}"))


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
