"""The folder that a run writes into: a new one, or that of the run to go on from; held by one command at a time."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from datetime import datetime
from pathlib import Path
from typing import Any

from sgm.config import ConfigError, RunConfig
from sgm.distributed import from_first
from sgm.files import SaveError, require_writable
from sgm.lock import try_lock
from sgm.training.checkpoints.folder import LOCK, new_run
from sgm.training.checkpoints.load import Earlier, find_resume
from sgm.training.checkpoints.same_run import identity
from sgm.training.checkpoints.state import CheckpointError
from sgm.training.options import TrainArgs
from sgm.training.setup.deepspeed import DeepSpeedPlan


def find_checkpoint(config: RunConfig[TrainArgs], say: Callable[[str], None]) -> Earlier | None:
    """The checkpoint to go on from, if asked for and found.

    Raises:
        CheckpointError: there are checkpoints, but none of this configuration or none complete; or the run is past
            `train_iters` already.
    """
    args = config.args
    if not args.resume:
        return None
    if args.resume == "auto" and not args.save:
        raise ConfigError("--resume looks for runs in args.save, which is not set; set it or give the run's folder")
    place = args.save if args.resume == "auto" else args.resume
    found = find_resume(place or "", args.experiment_name if args.resume == "auto" else None, config)
    if found is None:
        runs = Path(place or "").expanduser().absolute() / f"{args.experiment_name}-*"
        say(f"no run {runs} has a checkpoint: starting a new one")
        return None
    earlier = Earlier.read(found, config, identity(config))
    if args.epochs is None:
        require_longer(earlier, args.train_iters)
    return earlier


def require_longer(earlier: Earlier, train_iters: int) -> None:
    """Raises CheckpointError where a run is past its new end."""
    if earlier.record.iteration > train_iters:
        raise CheckpointError(
            f"{earlier.folder} is at iteration {earlier.record.iteration}, beyond the {train_iters} asked for: a "
            "run can be made longer, not shorter. Raise args.train_iters (or epochs), or resume an earlier checkpoint."
        )


def keep_clips_per_step(plan: DeepSpeedPlan, earlier: Earlier, section: Mapping[str, Any], ranks: int) -> DeepSpeedPlan:
    """`plan` with the accumulation that gives a step as many clips as the earlier run's had.

    Args:
        section: the configuration's `deepspeed:`. Its `train_batch_size` says that the batch is to be what it says.
        ranks: data-parallel processes now.
    Raises:
        CheckpointError: the batch would be another one, and nothing says that it is meant to be.
    """
    wanted, share, now = earlier.clips_per_step, plan.micro_batch * ranks, plan.clips_per_step(ranks)
    if wanted == now or section.get("train_batch_size"):
        return plan
    if wanted % share or any(change.key == "deepspeed.gradient_accumulation_steps" for change in earlier.changes):
        raise CheckpointError(
            f"{earlier.folder} took {wanted} clips a step, now it would be {now} ({plan.micro_batch} x "
            f"{ranks} processes x {plan.accumulation} accumulation). Start a number of processes that divides "
            f"{wanted / plan.micro_batch:g}, with the accumulation of before; or say that the batch is to change: "
            f"--set deepspeed.train_batch_size={now}"
        )
    config = {**plan.config, "gradient_accumulation_steps": wanted // share}
    return dataclasses.replace(plan, config=config, accumulation=wanted // share)


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
