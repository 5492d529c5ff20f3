"""What a run of distillation has in place of clips."""

from __future__ import annotations

import torch

from sgm.config import ConfigError, RunConfig
from sgm.training.distill.engine import DistillationEngine
from sgm.training.distill.prompts import embed, read_prompts
from sgm.training.options import TrainArgs
from sgm.training.setup.clips import check_clips
from sgm.training.setup.data import ClipSets


def check_size(config: RunConfig[TrainArgs], dtype: str) -> list[str]:
    """Whether the network makes clips of the size that a `data:` section asks for, if there is one. Returns warnings.

    Raises:
        ConfigError: it does not; or sizes of several buckets.
    """
    params = (config.data or {}).get("params") or {}
    if params.get("buckets"):
        raise ConfigError(
            "args.distill makes clips of one size: leave out data.params.buckets (--set data.params.buckets=null) and "
            "name max_num_frames and video_size"
        )
    return check_clips(config, dtype) if config.data else []


def prompt_sets(args: TrainArgs, engine: DistillationEngine) -> ClipSets:
    """The prompts of a run, embedded; the engine's text encoder is given up for it.

    `valid`: `args.eval_prompts`, or else those that are trained on; empty where no evaluation is asked for.

    Raises:
        ConfigError: see `read_prompts`.
    """
    sets = []
    for texts in [*read_prompts(args), *([args.eval_prompts] if args.eval_prompts else [])]:
        found, engine.unconditional = embed(engine, texts)
        sets.append(found)
    engine.conditioner = None
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    train, valid = (sets[:-1], sets[-1:]) if args.eval_prompts else (sets, sets)
    return ClipSets([*train], [*valid] if args.eval_interval or args.epochs else [])
