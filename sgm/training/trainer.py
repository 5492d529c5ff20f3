"""The training loop: iterations, progress, evaluation, checkpoints, and an orderly end."""

from __future__ import annotations

import signal
from dataclasses import dataclass
from pathlib import Path

import torch

from sgm.cli import MOSTLY_SKIPPED
from sgm.config import RunConfig
from sgm.data.loader import ClipLoader
from sgm.distributed import clip_rank, data_parallel_rank, data_parallel_world_size, model_parallel_rank
from sgm.training.checkpoints.folder import RunRecord, state_file
from sgm.training.checkpoints.load import load_state
from sgm.training.checkpoints.partitions import (
    ema_state,
    layout_differences,
    load_ema_state,
    load_optimizer_state,
    load_scaler_state,
    optimizer_state,
    repartitioned,
    scaler_state,
)
from sgm.training.checkpoints.save import save_checkpoint
from sgm.training.checkpoints.state import CheckpointError, TrainState, capture_rng, restore_rng, seed_all
from sgm.training.evaluate import Evaluation
from sgm.training.faults import SkipGuard, StopSignal
from sgm.training.optimizers.schedule import LearningRate
from sgm.training.options import TrainArgs, trains_adapter, trains_lora
from sgm.training.setup.deepspeed import DeepSpeedPlan
from sgm.training.setup.engine import TrainingEngine
from sgm.training.step import StepOutcome, training_step
from sgm.training.watch.run_log import RunLog
from sgm.training.watch.timing import PhaseClock, memory_facts
from sgm.weights.save import require_finite


@dataclass
class Trainer:
    """Runs a DeepSpeed engine from `iteration` to `args.train_iters`.

    Attributes:
        folder: of the run, the same on every rank; None saves nothing. evaluation: None evaluates nothing.
        iteration: optimizer steps taken or skipped so far.
    """

    ds_engine: TrainingEngine
    loader: ClipLoader
    schedule: LearningRate
    config: RunConfig[TrainArgs]
    plan: DeepSpeedPlan
    log: RunLog
    clock: PhaseClock
    folder: Path | None
    evaluation: Evaluation | None
    iteration: int = 0
    _saved: int = -1
    _due: bool = False  # a checkpoint, once a step is not skipped

    def __post_init__(self) -> None:
        self.args, self.stop = self.config.args, StopSignal()
        self.guard = SkipGuard(self.args.max_skipped_steps)

    def fit(self) -> int:
        """Train to the end, or to a signal. Returns the process's exit code: 0, 128 + signal, or `MOSTLY_SKIPPED`.

        Raises:
            TrainingStopped: too many skipped steps in a row.
            CheckpointError: the last checkpoint cannot be written.
        """
        self.ds_engine.train()
        self.log.begin(self.iteration, self.loader.consumed)
        with self.stop.watch():
            while self.iteration < self.args.train_iters:
                lr = self.schedule.current
                stop_wanted = self.stop.received is not None
                outcome = training_step(self.ds_engine, self.loader, self.plan.clipping, stop_wanted, self.clock)
                self.iteration += 1
                self._account(outcome, lr)
                self._at_intervals(lr)
                if outcome.stop:
                    return self._leave_on_signal()
                if self.args.exit_interval and self.iteration % self.args.exit_interval == 0:
                    self.log.line(f"stopping at iteration {self.iteration} (args.exit_interval)")
                    break
            self._save_last()
        return self._sum_up()

    def _account(self, outcome: StepOutcome, lr: float) -> None:
        self.log.step(outcome, lr)
        if outcome.applied:
            self.schedule.step()
            self.guard.applied()
            return
        self.log.line(f"iteration {self.iteration}: step skipped, {outcome.reason}")
        self.log.record("skipped", iteration=self.iteration, reason=outcome.reason)
        self.guard.skipped(outcome.reason, self.iteration, self.plan.dtype)

    def _at_intervals(self, lr: float) -> None:
        if self.iteration % self.args.log_interval == 0:
            scaler = scaler_state(self.ds_engine)
            scale, memory = scaler["cur_scale"] if scaler else None, memory_facts(self.ds_engine.device)
            self.log.train(self.iteration, lr, scale, self.loader.consumed, self.clock.take(), memory)
        with self.log.aside(), self.clock.paused():
            self._save_and_evaluate()

    def _save_and_evaluate(self) -> None:
        if self.folder and self.args.save_interval and self.iteration % self.args.save_interval == 0:
            self._due = True
        if self._due and not self.guard.in_a_row:
            self._save_or_warn()
        if self.evaluation and self.args.eval_interval and self.iteration % self.args.eval_interval == 0:
            loss, by_timestep = self.evaluation.run(self.ds_engine, self.iteration, self.log)
            self.log.valid(self.iteration, loss, by_timestep)

    # --- saving ---------------------------------------------------------------------------------------------------

    def _save(self) -> None:
        """Write a checkpoint; collective. While steps are being skipped no earlier one is deleted for it.

        Raises CheckpointError, on every rank.
        """
        assert self.folder is not None  # who calls has looked
        path = save_checkpoint(
            self.folder,
            self.ds_engine,
            self._state(),
            config=self.config,
            lora_only=trains_adapter(self.config.model) and self.args.lora_only,
            keep_last=None if self.guard.in_a_row else self.args.keep_last,
            clips_per_step=self.plan.clips_per_step(data_parallel_world_size()),
            full_merged=trains_lora(self.config.model) and self.args.save_merged,
            save_frozen=self.args.save_frozen,
        )
        self._saved = self.iteration
        self.log.line(f"saved {path}")
        self.log.record("saved", iteration=self.iteration, path=str(path))

    def _state(self) -> TrainState:
        """This rank's. Tensors are the live ones."""
        return TrainState(
            iteration=self.iteration,
            consumed_samples=self.loader.consumed,
            sampler=self.loader.state_dict(),
            schedule=self.schedule.state_dict(),
            scaler=scaler_state(self.ds_engine),
            skipped_steps=self.guard.total,
            optimizer=optimizer_state(self.ds_engine),
            ema=ema_state(self.ds_engine),
            rng=capture_rng(),
        )

    def _save_or_warn(self) -> None:
        """A checkpoint on the way may fail (a full disk): the earlier ones are intact, and training goes on."""
        self._due = False
        try:
            self._save()
        except CheckpointError as error:
            self.log.line(f"warning: the checkpoint of iteration {self.iteration} was not written: {error}")
            self.log.record("save_failed", iteration=self.iteration, reason=str(error))

    def _save_last(self) -> None:
        if not self.folder or self._saved == self.iteration:
            return
        if self.guard.worth_saving(self.iteration):
            self._save()
            return
        self.log.line(
            f"warning: iteration {self.iteration} is not saved: its last {self.guard.in_a_row} steps were skipped "
            f"({self.guard.reason}). Checkpoints from before are intact."
        )

    def resume(self, path: Path) -> None:
        """Put the training where the checkpoint `path` was taken. Collective.

        Of another number of processes, or another ZeRO stage, the optimizer's state is cut up anew. Generators go on as
        those of the process that had the same clips; where there was none, from this one's own seed and the iteration.

        Raises:
            CheckpointError: the checkpoint is incomplete or damaged.
            WeightsError: optimizer state or weights hold NaN or infinity.
            CheckpointError: it is of another run set-up.
            DatasetError: its data position is of other data.
        """
        record, part = RunRecord.read(path), model_parallel_rank()
        before = record.rank_of(data_parallel_rank(), clip_rank(), part)
        state = load_state(path, part if before is None else before)
        if layout_differences(self.ds_engine, state.optimizer):
            same_part = range(part, record.world_size, record.model_parallel_size)
            cut, state.ema = repartitioned(self.ds_engine, (load_state(path, other) for other in same_part))
            state.optimizer |= cut
        load_optimizer_state(self.ds_engine, state.optimizer)
        load_ema_state(self.ds_engine, state.ema)
        loaded = {"optimizer": optimizer_state(self.ds_engine), "ema": ema_state(self.ds_engine)}
        require_finite(loaded, path if before is None else state_file(path, before))
        load_scaler_state(self.ds_engine, state.scaler)
        self.schedule.load_state_dict(state.schedule)
        self.loader.load_state_dict(state.sampler)
        self.guard.total = state.skipped_steps
        self.iteration = state.iteration
        if before is None:
            seed_all(torch.initial_seed() + 1_000_003 * state.iteration)
        else:
            restore_rng(state.rng)

    def _sum_up(self) -> int:
        if not self.guard.total:
            return 0
        failed = self.guard.mostly_skipped(self.iteration)
        said = f"{self.guard.total} of {self.iteration} steps were skipped, the last one because {self.guard.reason}"
        self.log.line(f"warning: {said}; exit code {MOSTLY_SKIPPED}" if failed else f"note: {said}")
        return MOSTLY_SKIPPED if failed else 0

    def _leave_on_signal(self) -> int:
        name = self.stop.name or "a signal to another process"
        self.log.line(f"{name}: saving at iteration {self.iteration}, then leaving")
        self._save_last()
        return 128 + (self.stop.received or signal.SIGTERM)
