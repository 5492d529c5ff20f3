"""What a run reports: a bar or lines for people, `metrics.jsonl` for programs, a picture of the loss, and boards
(TensorBoard, Weights & Biases).
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, Self, TextIO

import numpy as np

from sgm.cli import print_line
from sgm.errors import SgmError
from sgm.files import write_failed
from sgm.training.step import BIN_NAMES, BINS, StepOutcome, bin_means
from sgm.training.watch.curve import draw_losses, read_records
from sgm.typed import ConfigError


class Board(Protocol):
    """What a run reports to."""

    def scalars(self, values: Mapping[str, float], iteration: int) -> None:
        """Numbers by name ("group/name")."""

    def video(self, name: str, path: Path, frames: np.ndarray, fps: int, iteration: int) -> None:
        """A clip: its mp4, and the same as uint8 frames (f, h, w, 3)."""

    def close(self) -> None: ...


class TensorBoard:
    """Event files for `tensorboard --logdir FOLDER`; clips appear as a strip of their frames.

    Args:
        iteration: a resumed run's; what an earlier process wrote beyond it is hidden.
    """

    STRIP_FRAMES = 8

    def __init__(self, folder: Path, iteration: int = 0):
        self._folder, self._files = folder, 0
        self._writer: Any = None
        try:
            folder.mkdir(parents=True, exist_ok=True)
            if iteration:
                self._write(iteration + 1, {"session_log": {"status": "START"}})
        except OSError as error:
            raise ConfigError(f"cannot write TensorBoard's files to {folder}: {error.strerror or error}") from error

    def scalars(self, values: Mapping[str, float], iteration: int) -> None:
        from tensorboardX import summary

        self._write(iteration, *({"summary": summary.scalar(name, value)} for name, value in values.items()))

    def video(self, name: str, path: Path, frames: np.ndarray, fps: int, iteration: int) -> None:
        from tensorboardX import summary

        picked = np.linspace(0, len(frames) - 1, min(self.STRIP_FRAMES, len(frames))).round().astype(int)
        strip = np.concatenate(list(frames[picked]), axis=1)
        self._write(iteration, {"summary": summary.image(name, strip, dataformats="HWC")})

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()

    def _write(self, iteration: int, *contents: Mapping[str, Any]) -> None:
        """Append events, here and now: tensorboardX's SummaryWriter leaves that to a thread, which dies where the disk
        is full; the run would wait for ever for room in its queue.
        """
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto.event_pb2 import Event

        try:
            if self._writer is None or not Path(self._writer._file_name).exists():
                self._files += 1
                self._writer = EventsWriter(str(self._folder / "events"), f".{os.getpid()}.{self._files}")
            for content in contents:
                self._writer.write_event(Event(step=iteration, wall_time=time.time(), **content))
            self._writer.flush()
        except OSError as error:
            self._writer = None  # nothing is read behind an event that was cut short: go on in another file
            raise write_failed(self._folder, error) from error


class WeightsAndBiases:
    """A run of wandb; one that is resumed goes on in the same.

    Args:
        folder: the run's folder, which names it; wandb keeps its files there.
    Raises:
        ConfigError: not logged in, or wandb cannot start.
    """

    def __init__(self, folder: Path, project: str, config: Mapping[str, Any]):
        import wandb

        self._wandb = wandb
        identity = hashlib.sha256(str(folder.absolute()).encode()).hexdigest()[:16]
        try:
            self._run = wandb.init(
                project=project, name=folder.name, id=identity, resume="allow", dir=str(folder), config=dict(config)
            )
        except (wandb.Error, OSError) as error:
            raise ConfigError(
                f"args.wandb: wandb does not start: {error}. Log in with `wandb login`, set WANDB_MODE=offline to "
                "upload later with `wandb sync`, or set args.wandb: false."
            ) from error

    def scalars(self, values: Mapping[str, float], iteration: int) -> None:
        self._run.log(dict(values), step=iteration)

    def video(self, name: str, path: Path, frames: np.ndarray, fps: int, iteration: int) -> None:
        self._run.log({name: self._wandb.Video(str(path), format="mp4")}, step=iteration)

    def close(self) -> None:
        self._run.finish()


Kinds = type[Exception] | tuple[type[Exception], ...]
METRICS, CURVE = "metrics.jsonl", "loss.png"
DRAW_SECONDS = 60.0  # between two drawings of the loss, at least
AVERAGE_STEPS = 50  # the moving average of the loss: a plain mean so far, then one that forgets 1/50 a step


@dataclass
class Interval:
    """Sums over the iterations since the last progress line."""

    losses: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    bin_sums: list[float] = field(default_factory=lambda: [0.0] * BINS)
    bin_counts: list[float] = field(default_factory=lambda: [0.0] * BINS)
    started: float = field(default_factory=time.monotonic)
    waited: float = 0.0
    iterations: int = 0
    skipped: int = 0

    def add(self, outcome: StepOutcome) -> None:
        self.iterations += 1
        self.skipped += not outcome.applied
        self.waited += outcome.data_wait
        if math.isfinite(outcome.loss):
            self.losses.append(outcome.loss)
        if outcome.grad_norm is not None and math.isfinite(outcome.grad_norm):
            self.norms.append(outcome.grad_norm)
        sums, counts = outcome.by_timestep
        self.bin_sums = [a + b for a, b in zip(self.bin_sums, sums)]
        self.bin_counts = [a + b for a, b in zip(self.bin_counts, counts)]

    def means(self) -> dict[str, Any]:
        """Of what was finite: mean loss and gradient norm, losses by timestep; seconds a step, also of waiting."""
        steps = max(1, self.iterations)
        return {
            "loss": _mean(self.losses),
            "grad_norm": _mean(self.norms),
            "seconds_per_step": (time.monotonic() - self.started) / steps,
            "data_wait": self.waited / steps,
            "loss_by_timestep": bin_means(self.bin_sums, self.bin_counts),
        }


class RunLog:
    """Progress of a run on rank 0; other ranks stay silent. Use as a context manager.

    On a terminal a bar with the time left follows every iteration, and lines appear above it.

    Args:
        folder: run folder for `metrics.jsonl` and `loss.png`; None writes no file.
        out: where lines go; None for no lines, files or boards (other ranks).
        boards: what else is told; closed at the end.
        show_phases: print the seconds by phase as well (they are recorded in any case).
    """

    def __init__(
        self,
        folder: Path | None,
        total: int,
        out: TextIO | None,
        boards: Sequence[Board] = (),
        show_phases: bool = False,
    ):
        self.total, self.out, self.boards, self.show_phases = total, out, list(boards), show_phases
        self.interval = Interval()
        self.average: float | None = None  # moving average of the loss
        self._averaged = 0  # losses in it
        self._samples = 0
        self._drawn = time.monotonic()
        self._folder = folder if out is not None else None
        self._bar: Any = None
        self._failed: dict[str, int] = {}  # what could not be written, and how often
        if self._folder is not None:
            self._folder.mkdir(parents=True, exist_ok=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.draw()
        self._on_boards(lambda board: board.close())
        if self._bar is not None:
            self._bar.close()
        for place, times in self._failed.items():
            self.line(f"note: {place} lacks what was to be written {times} times, see the warning above")

    @contextmanager
    def or_warn(self, place: object, kinds: Kinds = (OSError, SgmError)) -> Iterator[None]:
        """What cannot be written inside ends no training: the first time it is told, later ones are counted."""
        try:
            yield
        except kinds as error:
            reason = write_failed(Path(error.filename or str(place)), error) if isinstance(error, OSError) else error
            if str(place) not in self._failed:
                self.line(f"warning: {place} is not written, training goes on: {reason}")
            self._failed[str(place)] = self._failed.get(str(place), 0) + 1

    # --- iterations -----------------------------------------------------------------------------------------------

    def begin(self, iteration: int, samples: int) -> None:
        """The loop starts after `iteration`; a resumed run's average goes on."""
        self._samples = samples
        self.interval = Interval()
        if iteration and self._folder is not None:
            with self.or_warn(self._folder / METRICS):
                past = [r for r in read_records(self._folder / METRICS, "train") if r["iteration"] <= iteration]
                self.average = past[-1].get("loss_average") if past else None
                self._averaged = iteration if self.average is not None else 0
        if self.out is not None and self.out.isatty():
            from tqdm import tqdm

            self._bar = tqdm(
                total=self.total, initial=iteration, unit="step", file=self.out, dynamic_ncols=True, smoothing=0.1
            )

    def step(self, outcome: StepOutcome, lr: float) -> None:
        """One iteration is done."""
        self.interval.add(outcome)
        if math.isfinite(outcome.loss):
            self._averaged += 1
            before = self.average or 0.0
            self.average = before + (outcome.loss - before) / min(self._averaged, AVERAGE_STEPS)
        if self._bar is not None:
            self._bar.set_postfix_str(f"loss {_shown(self.average, '.4f')}, lr {lr:.3g}", refresh=False)
            self._bar.update()

    @contextmanager
    def aside(self) -> Iterator[None]:
        """Time in the block (evaluation, saving) does not count as the steps'."""
        since = time.monotonic()
        try:
            yield
        finally:
            self.interval.started += time.monotonic() - since

    def line(self, text: str) -> None:
        if self._bar is not None:
            self._bar.write(text, file=self.out)
        elif self.out is not None:
            print_line(text, self.out)

    def record(self, kind: str, **values: Any) -> None:
        """One line of `metrics.jsonl`."""
        if self._folder is not None:
            with self.or_warn(self._folder / METRICS):
                # JSON has no NaN and no infinity
                odd = {name: None for name, v in values.items() if isinstance(v, float) and not math.isfinite(v)}
                stamped = {"kind": kind, "time": round(time.time(), 3), **values, **odd}
                _append(self._folder / METRICS, json.dumps(stamped))

    def train(
        self,
        iteration: int,
        lr: float,
        scale: float | None,
        samples: int,
        phases: Mapping[str, float],
        memory: Mapping[str, int],
    ) -> None:
        """Progress line over the iterations since the last one.

        Args:
            lr: learning rate of the last step. scale: loss scale; None where the loss is not scaled.
            samples: clips used so far by all ranks.
            phases: seconds by phase since the last line. memory: bytes by name, see `timing.memory_facts`.
        """
        means, skipped, steps = self.interval.means(), self.interval.skipped, max(1, self.interval.iterations)
        rate = (samples - self._samples) / max(1e-9, means["seconds_per_step"] * steps)
        self._samples, self.interval = samples, Interval()
        phases = {name: seconds / steps for name, seconds in phases.items()}
        values = {"lr": lr, "loss_scale": scale, "samples": samples, "samples_per_second": rate}
        values |= {"skipped": skipped, "loss_average": self.average, **means, "phases": phases, **memory}
        self.line(self._progress(iteration, values))
        if phases and self.show_phases:
            self.line("  seconds a step: " + ", ".join(f"{name} {seconds:.3f}" for name, seconds in phases.items()))
        self.record("train", iteration=iteration, **values)
        self._report(_train_scalars(values), iteration)
        if time.monotonic() - self._drawn > DRAW_SECONDS:
            self.draw()

    def _progress(self, iteration: int, values: Mapping[str, Any]) -> str:
        seconds, wait, scale = values["seconds_per_step"], values["data_wait"], values["loss_scale"]
        text = f"iteration {iteration:>{len(str(self.total))}}/{self.total} | loss {_shown(values['loss'], '.4f')}"
        text += f" (average {_shown(self.average, '.4f')}) | lr {values['lr']:.3g}"
        text += f" | grad norm {_shown(values['grad_norm'], '.3g')} | {seconds:.2f} s/step"
        text += f", {wait:.2f} s of it waiting for data" if wait >= 0.005 else ""
        text += f" | ETA {duration((self.total - iteration) * seconds)}"
        text += f" | loss scale {scale:g}" if scale is not None else ""
        text += f" | {values['skipped']} skipped" if values["skipped"] else ""
        return text + (f" | peak {values['peak_bytes'] / 2**30:.2f} GiB" if "peak_bytes" in values else "")

    # --- evaluation -----------------------------------------------------------------------------------------------

    def valid(self, iteration: int, loss: float, by_timestep: Sequence[float | None]) -> None:
        """Result of an evaluation."""
        self.line(f"validation loss at iteration {iteration}: {loss:.6f}")
        self.record("valid", iteration=iteration, loss=loss, loss_by_timestep=list(by_timestep))
        self._report({"valid/loss": loss, **_bin_scalars("valid_by_timestep", by_timestep)}, iteration)
        self.draw()

    def video(self, name: str, path: Path, frames: np.ndarray, fps: int, iteration: int) -> None:
        """A clip that was written to `path`: uint8 frames (f, h, w, 3)."""
        self._on_boards(lambda board: board.video(name, path, frames, fps, iteration))

    def draw(self) -> None:
        """Bring `loss.png` up to date."""
        if self._folder is None:
            return
        self._drawn = time.monotonic()
        with self.or_warn(self._folder / CURVE):
            draw_losses(self._folder / METRICS, self._folder / CURVE)

    def _report(self, values: Mapping[str, float | None], iteration: int) -> None:
        known = {name: value for name, value in values.items() if value is not None and math.isfinite(value)}
        self._on_boards(lambda board: board.scalars(known, iteration))

    def _on_boards(self, tell: Callable[[Board], None]) -> None:
        for board in self.boards if self.out is not None else ():
            with self.or_warn(type(board).__name__, Exception):  # other people's code, and its servers
                tell(board)


def _train_scalars(values: Mapping[str, Any]) -> dict[str, float | None]:
    """What boards get of a progress record, by group."""
    groups = {
        "train": ("loss", "loss_average", "grad_norm", "lr", "loss_scale", "skipped"),
        "speed": ("seconds_per_step", "samples_per_second", "data_wait"),
    }
    found = {f"{group}/{name}": values[name] for group, names in groups.items() for name in names}
    found |= {f"seconds/{name}": seconds for name, seconds in values["phases"].items()}
    found |= {f"memory/{n.removesuffix('_bytes')}_gib": v / 2**30 for n, v in values.items() if n.endswith("_bytes")}
    return found | _bin_scalars("loss_by_timestep", values["loss_by_timestep"])


def _bin_scalars(group: str, means: Sequence[float | None]) -> dict[str, float | None]:
    return {f"{group}/{name}": mean for name, mean in zip(BIN_NAMES, means)}


def duration(seconds: float) -> str:
    """1:02:03, or 2:03."""
    whole = round(seconds)
    hours, minutes = whole // 3600, whole // 60 % 60
    return f"{hours}:{minutes:02d}:{whole % 60:02d}" if hours else f"{minutes}:{whole % 60:02d}"


def _append(path: Path, line: str) -> None:
    """Add a line to a file; one that a crash or a full disk cut off is ended first."""
    with path.open("ab+") as file:
        if file.tell():
            file.seek(-1, os.SEEK_END)
            line = line if file.read(1) == b"\n" else f"\n{line}"
        file.write(f"{line}\n".encode())


def _mean(values: list[float]) -> float | None:
    return sum(values) / len(values) if values else None


def _shown(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)
