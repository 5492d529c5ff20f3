"""Gathers everything a run needs to go on exactly, and hands it to `checkpoints.save`; and puts it back."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch

from sgm.config import RunConfig
from sgm.data.loader import ClipLoader
from sgm.distributed import clip_rank, data_parallel_rank, model_parallel_rank
from sgm.training.checkpoints.folder import RunRecord, state_file
from sgm.training.checkpoints.load import load_state
from sgm.training.checkpoints.partitions import (
    ema_state,
    layout_differences,
    load_ema_state,
    load_optimizer_state,
    load_scaler_state,
    optimizer_state,
    scaler_state,
)
from sgm.training.checkpoints.repartition import repartitioned
from sgm.training.checkpoints.save import save_checkpoint
from sgm.training.checkpoints.state import TrainState, capture_rng, restore_rng, seed_all
from sgm.training.faults import SkipGuard
from sgm.training.optimizers.schedule import LearningRate
from sgm.training.options import TrainArgs, trains_adapter, trains_lora
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
        clips_per_step: of all processes and micro-batches.
    """

    folder: Path
    config: RunConfig[TrainArgs]
    clips_per_step: int

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
            lora_only=trains_adapter(self.config.model) and args.lora_only,
            keep_last=None if run.guard.in_a_row else args.keep_last,
            clips_per_step=self.clips_per_step,
            full_merged=trains_lora(self.config.model) and args.save_merged,
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

    Of another number of processes, or another ZeRO stage, the optimizer's state is cut up anew. Generators go on as
    those of the process that had the same clips; where there was none, from this one's own seed and the iteration.

    Raises:
        CheckpointError: the checkpoint is incomplete or damaged.
        WeightsError: optimizer state or weights hold NaN or infinity.
        OptimizerStateError: it is of another run set-up.
        PositionError: its data position is of other data.
    """
    record, part = RunRecord.read(path), model_parallel_rank()
    before = record.rank_of(data_parallel_rank(), clip_rank(), part)
    state = load_state(path, part if before is None else before)
    if layout_differences(run.ds_engine, state.optimizer):
        same_part = range(part, record.world_size, record.model_parallel_size)
        cut, state.ema = repartitioned(run.ds_engine, (load_state(path, other) for other in same_part))
        state.optimizer |= cut
    load_optimizer_state(run.ds_engine, state.optimizer)
    load_ema_state(run.ds_engine, state.ema)
    loaded = {"optimizer": optimizer_state(run.ds_engine), "ema": ema_state(run.ds_engine)}
    require_finite(loaded, path if before is None else state_file(path, before))
    load_scaler_state(run.ds_engine, state.scaler)
    run.schedule.load_state_dict(state.schedule)
    run.loader.load_state_dict(state.sampler)
    run.guard.total = state.skipped_steps
    run.iteration = state.iteration
    if before is None:
        seed_all(torch.initial_seed() + 1_000_003 * state.iteration)
    else:
        restore_rng(state.rng)
