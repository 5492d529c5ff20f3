"""Files and folders that a training configuration names: found, made where they can be, and checked."""

from __future__ import annotations

import dataclasses
import shlex
import sys
from collections.abc import Callable
from pathlib import Path

from sgm.cache.ready import starts_from_picture
from sgm.config import ConfigError, RunConfig
from sgm.data.sources import exists
from sgm.placeholders import placeholders_in
from sgm.places import INSTALLED, PROJECT, found_path, lies_in_demo, shown
from sgm.training.evaluate import eval_prompts
from sgm.training.options import TrainArgs
from sgm.weights.preflight import check_paths, with_found_paths


def with_found_places(config: RunConfig[TrainArgs], find: Callable[[str], str] = found_path) -> RunConfig[TrainArgs]:
    """Every path as `find` gives it: by default the project's where only these are."""
    args = config.args
    valid = args.valid_data and [find(folder) for folder in args.valid_data]
    distill = args.distill and dataclasses.replace(args.distill, prompts=[*map(find, args.distill.prompts)])
    args = dataclasses.replace(
        args,
        distill=distill,
        train_data=[find(folder) for folder in args.train_data],
        prior_data=[find(folder) for folder in args.prior_data],
        valid_data=valid,
        cache_dir=args.cache_dir and find(args.cache_dir),
    )
    return with_found_paths(dataclasses.replace(config, args=args), find)


def check_places(config: RunConfig[TrainArgs], dry_run: bool) -> None:
    """Every path edited and there, pictures of prompts too; a dry run has made nothing, so the demo's may be absent.

    Raises:
        ConfigError: names each that is not.
    """
    # With a cache only what is missing from it needs the encoders, whose absence is noticed then.
    parts = ("network_config",) if config.args.cache_dir else config.model
    check_paths({name: config.model[name] for name in parts}, config.args.load)
    args = config.args
    read = [] if args.distill and args.distill.prompts else args.train_data
    folders = {"train_data": read, "prior_data": args.prior_data, "valid_data": args.valid_data or []}
    problems = [f"args.{place} is still the placeholder {text!r}" for place, text in placeholders_in(folders)]
    problems += [
        f"args.{name}: no folder {path}, nor a manifest or shard"
        for name, paths in folders.items()
        for path in paths
        if not problems and not exists(Path(path).expanduser()) and not (dry_run and lies_in_demo(path))
    ]
    if args.distill and (absent := [path for path in args.distill.prompts if not Path(path).expanduser().is_file()]):
        raise ConfigError(f"args.distill.prompts: no file {absent[0]}; name text files with a prompt a line")
    if problems:
        raise ConfigError("\n".join([*problems, _how_to_get_data(args.data_folders)]))
    eval_prompts(args.eval_prompts, starts_from_picture(config.model))


def _how_to_get_data(folders: list[str]) -> str:
    undrawn = [folder for folder in folders if lies_in_demo(folder) and not Path(folder).expanduser().exists()]
    if not undrawn:
        return "A data folder holds videos/NAME.mp4 and labels/NAME.txt (docs/data.md)."
    if INSTALLED:
        return (
            "The demo's clips are drawn by tools/, which is not part of the installed package. In a checkout: bash "
            "finetune.sh configs/demo_lora.yaml"
        )
    words = [Path(sys.executable), PROJECT / "tools" / "demo" / "clips.py", *map(Path, undrawn)]
    return f"finetune.sh draws the demo's clips before it trains; without it: {shlex.join(map(shown, words))}"
