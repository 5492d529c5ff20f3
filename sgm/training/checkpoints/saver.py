"""Gathers everything a run needs to go on exactly, and hands it to `checkpoints.checkpoint`; and puts it back."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sgm.config import RunConfig
from sgm.training.checkpoints.checkpoint import load_state, save_checkpoint
from sgm.training.checkpoints.partitions import (
    ema_state,
    load_ema_state,
    load_optimizer_state,
    load_scaler_state,
    optimizer_state,
    scaler_state,
)
from sgm.training.checkpoints.state import TrainState, capture_rng, restore_rng
from sgm.training.options import TrainArgs

if TYPE_CHECKING:
    from sgm.training.trainer import Trainer


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

    def save(self, trainer: Trainer, consumed_samples: int) -> Path:
        """Write a checkpoint; collective. Returns the iteration's folder.

        Raises:
            CheckpointError: it cannot be written (raised on every rank).
        """
        args = self.config.args
        return save_checkpoint(
            self.folder,
            trainer.ds_engine,
            snapshot(trainer, consumed_samples),
            config=self.config,
            lora_only=self.lora and args.lora_only,
            keep_last=args.keep_last,
            full_merged=self.lora and args.save_merged,
            save_frozen=args.save_frozen,
        )


def snapshot(trainer: Trainer, consumed_samples: int) -> TrainState:
    """This rank's state. Tensors are the live ones."""
    engine: Any = trainer.ds_engine
    return TrainState(
        iteration=trainer.iteration,
        consumed_samples=consumed_samples,
        sampler=trainer.loader.state_dict(),
        schedule=trainer.schedule.state_dict(),
        scaler=scaler_state(engine),
        skipped_steps=trainer.guard.total,
        optimizer=optimizer_state(engine),
        ema=ema_state(engine),
        rng=capture_rng(),
    )


def resume(trainer: Trainer, path: Path) -> None:
    """Put a trainer where the checkpoint `path` was taken. Collective.

    Raises:
        CheckpointError: the checkpoint is incomplete or damaged.
        OptimizerStateError: it is of another run set-up.
        ValueError: its data position is of other data.
    """
    state = load_state(path, zero_stage=int(trainer.ds_engine.zero_optimization_stage()))
    load_optimizer_state(trainer.ds_engine, state.optimizer)
    load_ema_state(trainer.ds_engine, state.ema)
    load_scaler_state(trainer.ds_engine, state.scaler)
    trainer.schedule.load_state_dict(state.schedule)
    trainer.loader.load_state_dict(state.sampler)
    trainer.guard.total = state.skipped_steps
    trainer.iteration = state.iteration
    restore_rng(state.rng)
