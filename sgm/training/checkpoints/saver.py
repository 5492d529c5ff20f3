"""Gathers everything a run needs to go on exactly, and hands it to `checkpoints.save`; and puts it back."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from sgm.config import RunConfig
from sgm.data.loader import ClipLoader
from sgm.training.checkpoints.folder import state_file
from sgm.training.checkpoints.load import load_state
from sgm.training.checkpoints.partitions import (
    ema_state,
    load_ema_state,
    load_optimizer_state,
    load_scaler_state,
    optimizer_state,
    scaler_state,
)
from sgm.training.checkpoints.ranks import own_rank
from sgm.training.checkpoints.save import save_checkpoint
from sgm.training.checkpoints.state import TrainState, capture_rng, restore_rng
from sgm.training.faults import SkipGuard
from sgm.training.optimizers.schedule import LearningRate
from sgm.training.options import TrainArgs
from sgm.training.setup.engine import TrainingEngine
from sgm.weights.finite import require_finite


class Resumable(Protocol):
    """What of a running training a checkpoint holds."""

    ds_engine: TrainingEngine
    loader: ClipLoader
    schedule: LearningRate
    guard: SkipGuard
    iteration: int


@dataclass
class Saver:
    """Writes the checkpoints of one run into its folder.

    Attributes:
        folder: run folder, the same on every rank.
        lora: the run trains an adapter, which can be saved alone or folded in.
    """

    folder: Path
    config: RunConfig[TrainArgs]
    lora: bool

    def save(self, run: Resumable) -> Path:
        """Write a checkpoint; collective. Returns the iteration's folder.

        While steps are being skipped no earlier one is deleted for it.

        Raises:
            CheckpointError: it cannot be written (raised on every rank).
        """
        args = self.config.args
        return save_checkpoint(
            self.folder,
            run.ds_engine,
            snapshot(run),
            config=self.config,
            lora_only=self.lora and args.lora_only,
            keep_last=None if run.guard.in_a_row else args.keep_last,
            full_merged=self.lora and args.save_merged,
            save_frozen=args.save_frozen,
        )


def snapshot(run: Resumable) -> TrainState:
    """This rank's state. Tensors are the live ones."""
    return TrainState(
        iteration=run.iteration,
        consumed_samples=run.loader.consumed,
        sampler=run.loader.state_dict(),
        schedule=run.schedule.state_dict(),
        scaler=scaler_state(run.ds_engine),
        skipped_steps=run.guard.total,
        optimizer=optimizer_state(run.ds_engine),
        ema=ema_state(run.ds_engine),
        rng=capture_rng(),
    )


def resume(run: Resumable, path: Path) -> None:
    """Put a training where the checkpoint `path` was taken. Collective.

    Raises:
        CheckpointError: the checkpoint is incomplete or damaged.
        WeightsError: optimizer state or weights hold NaN or infinity.
        OptimizerStateError: it is of another run set-up.
        ValueError: its data position is of other data.
    """
    state = load_state(path, zero_stage=int(run.ds_engine.zero_optimization_stage()))
    load_optimizer_state(run.ds_engine, state.optimizer)
    load_ema_state(run.ds_engine, state.ema)
    loaded = {"optimizer": optimizer_state(run.ds_engine), "ema": ema_state(run.ds_engine)}
    require_finite(loaded, state_file(path, own_rank()[0]))
    load_scaler_state(run.ds_engine, state.scaler)
    run.schedule.load_state_dict(state.schedule)
    run.loader.load_state_dict(state.sampler)
    run.guard.total = state.skipped_steps
    run.iteration = state.iteration
    restore_rng(state.rng)
