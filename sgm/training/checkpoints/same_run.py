"""What makes two configurations one run, and in what they differ where they do not."""

from __future__ import annotations

import dataclasses
import json
import shlex
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from sgm.config import ConfigError, RunConfig, load_run_config
from sgm.places import real_path
from sgm.secrets import hidden_in
from sgm.training.checkpoints.state import CheckpointError
from sgm.training.options import RESUME_MAY_CHANGE
from sgm.training.setup.places import with_found_places

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
