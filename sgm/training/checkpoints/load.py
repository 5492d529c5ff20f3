"""Finding the checkpoint to go on from, and reading training states from it."""

from __future__ import annotations

import dataclasses
import glob
import json
import logging
import math
import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from sgm import distributed
from sgm.config import ConfigError, RunConfig, load_run_config
from sgm.places import real_path
from sgm.secrets import hidden_in
from sgm.training.checkpoints.folder import RECORD, RunRecord, iterations, restore_unless_live, state_file
from sgm.training.checkpoints.state import CheckpointError, TrainState
from sgm.training.options import RESUME_MAY_CHANGE, TrainArgs
from sgm.training.setup.deepspeed import DeepSpeedPlan, batch_sizes
from sgm.training.setup.places import with_found_places
from sgm.weights import WeightsError, read_checkpoint

CONFIG_FILE = "training_config.yaml"  # of a run's folder
SECTIONS = ("args", "model", "data", "deepspeed")
BATCH_KEYS = ("train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "train_batch_size")
# As RESUME_MAY_CHANGE; what counts of the batch is how many clips a step takes, which is kept.
_MAY_CHANGE = (
    *(f"args.{name}" for name in RESUME_MAY_CHANGE),
    *(f"deepspeed.{name}" for name in (*BATCH_KEYS, "zero_optimization", "wall_clock_breakdown", "steps_per_print")),
    "model.sampler_config",
    "model.first_stage_config.params.small_decoder",
    "model.network_config.params.transformer_args.checkpoint_activations",
)
_BY_EPOCHS = ("args.train_iters", "args.eval_interval", "args.save_interval")  # follow from `epochs` and the data


class Change(NamedTuple):
    """A key of a run and its values, earlier and now."""

    key: str
    old: Any
    new: Any
    distills: bool = False  # the sampler is the teacher's then

    def __str__(self) -> str:
        return f"{self.key}: {json.dumps(self.old)} -> {json.dumps(self.new)}"

    @property
    def undone(self) -> str:
        """What to add to the command to have the old value."""
        return f"--set {shlex.quote(f'{self.key}={json.dumps(self.old)}')}"

    @property
    def allowed(self) -> bool:
        """Whether it may come between a run and its continuation: what is learnt stays the same."""
        if self.distills and self.key.startswith("model.sampler_config"):
            return False
        own = any(self.key == name or self.key.startswith(f"{name}.") for name in _MAY_CHANGE)
        return own or _moved(*([*map(Path, map(str, v if isinstance(v, list) else [v]))] for v in (self.old, self.new)))


def _moved(old: list[Path], new: list[Path]) -> bool:
    """Whether files or folders only lie elsewhere now: the same names, and nothing in the old places."""
    gone = [a.is_absolute() and a.name == b.name and not a.exists() for a, b in zip(old, new)]
    return len(old) == len(new) and all(a == b or away for a, b, away in zip(old, new, gone))


def identity(config: RunConfig[Any]) -> dict[str, Any]:
    """Each key with its value; paths as they really lie on the disk, however they were spelled."""
    found = with_found_places(config, real_path).as_dict()
    content = hidden_in(found, default=str)
    return dict(pair for section in SECTIONS for pair in _flat(section, content.get(section) or {}))


def identity_of_run(run: Path, config: RunConfig[Any]) -> dict[str, Any]:
    """What the folder of a run that kept no identity with its checkpoints says.

    Raises:
        CheckpointError: it does not tell.
    """
    try:
        return identity(load_run_config([run / CONFIG_FILE], type(config.args)))
    except ConfigError as error:
        raise CheckpointError(f"{run} does not say what the run learns: {error}") from error


def changes(then: Mapping[str, Any], now: Mapping[str, Any], config: RunConfig[Any]) -> list[Change]:
    """In what two identities differ. An option of `args` that an earlier version did not have had its default; any
    other key that is absent is null.
    """
    options = dataclasses.fields(config.args)
    fresh = {f"args.{f.name}": f.default_factory() if callable(f.default_factory) else f.default for f in options}
    idle = {"args.resume", "args.save", *(_BY_EPOCHS if config.args.epochs else ())}
    distills = bool(config.args.distill)
    found = [Change(key, then.get(key, fresh.get(key)), now.get(key), distills) for key in {*then, *now} - idle]
    return sorted(change for change in found if change.old != change.new)


def _flat(prefix: str, value: Any) -> Iterator[tuple[str, Any]]:
    """(dotted key, value) of everything below."""
    if isinstance(value, list) and any(isinstance(inner, Mapping) for inner in value):
        value = dict(enumerate(value))
    if isinstance(value, Mapping) and value:
        for name, inner in value.items():
            yield from _flat(f"{prefix}.{name}", inner)
    else:
        yield prefix, value


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
