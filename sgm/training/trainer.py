"""The training loop: iterations, progress, evaluation, checkpoints, and an orderly end."""

from __future__ import annotations

import signal
from dataclasses import dataclass, field

from sgm.cli import MOSTLY_SKIPPED
from sgm.data.loader import ClipLoader
from sgm.training.checkpoints.partitions import scaler_state
from sgm.training.checkpoints.saver import Saver
from sgm.training.checkpoints.state import CheckpointError
from sgm.training.evaluate import Evaluation
from sgm.training.faults import SkipGuard, StopSignal
from sgm.training.optimizers.schedule import LearningRate
from sgm.training.options import TrainArgs
from sgm.training.setup.engine import TrainingEngine
from sgm.training.step import StepOutcome, training_step
from sgm.training.watch.run_log import RunLog, Standing
from sgm.training.watch.timing import PhaseClock, memory_facts


@dataclass
class Trainer:
    """Runs a DeepSpeed engine from `iteration` to `args.train_iters`.

    Attributes:
        saver: None saves nothing; evaluation: None evaluates nothing.
        iteration: optimizer steps taken or skipped so far.
        dtype: of the weights, for messages. clipping, clock: see `training_step`.
    """

    ds_engine: TrainingEngine
    loader: ClipLoader
    schedule: LearningRate
    args: TrainArgs
    log: RunLog
    guard: SkipGuard
    saver: Saver | None = None
    evaluation: Evaluation | None = None
    iteration: int = 0
    dtype: str = "fp32"
    clipping: float = 0.0
    clock: PhaseClock = field(default_factory=PhaseClock)
    stop: StopSignal = field(default_factory=StopSignal)
    _saved: int = -1
    _due: bool = False  # a checkpoint, once a step is not skipped

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
                outcome = training_step(self.ds_engine, self.loader, self.clipping, stop_wanted, self.clock)
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
        self.guard.skipped(outcome.reason, self.iteration, self.dtype)

    def _at_intervals(self, lr: float) -> None:
        if self.iteration % self.args.log_interval == 0:
            scaler = scaler_state(self.ds_engine)
            scale = scaler["cur_scale"] if scaler else None
            memory = memory_facts(self.ds_engine.device)
            self.log.train(Standing(self.iteration, lr, scale, self.loader.consumed, self.clock.take(), memory))
        with self.log.aside(), self.clock.paused():
            self._save_and_evaluate()

    def _save_and_evaluate(self) -> None:
        if self.saver and self.args.save_interval and self.iteration % self.args.save_interval == 0:
            self._due = True
        if self.saver and self._due and not self.guard.in_a_row:
            self._save_or_warn(self.saver)
        if self.evaluation and self.args.eval_interval and self.iteration % self.args.eval_interval == 0:
            loss, by_timestep = self.evaluation.run(self.ds_engine, self.iteration, self.log)
            self.log.valid(self.iteration, loss, by_timestep)

    # --- saving ---------------------------------------------------------------------------------------------------

    def _save(self, saver: Saver) -> None:
        path = saver.save(self)
        self._saved = self.iteration
        self.log.line(f"saved {path}")
        self.log.record("saved", iteration=self.iteration, path=str(path))

    def _save_or_warn(self, saver: Saver) -> None:
        """A checkpoint on the way may fail (a full disk): the earlier ones are intact, and training goes on."""
        self._due = False
        try:
            self._save(saver)
        except CheckpointError as error:
            self.log.line(f"warning: the checkpoint of iteration {self.iteration} was not written: {error}")
            self.log.record("save_failed", iteration=self.iteration, reason=str(error))

    def _save_last(self) -> None:
        if not self.saver or self._saved == self.iteration:
            return
        if self.guard.worth_saving(self.iteration):
            self._save(self.saver)
            return
        self.log.line(
            f"warning: iteration {self.iteration} is not saved: its last {self.guard.in_a_row} steps were skipped "
            f"({self.guard.reason}). Checkpoints from before are intact."
        )

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
