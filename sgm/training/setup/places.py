"""Files and folders that a training configuration names: found, made where they can be, and checked."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

from sgm.config import ConfigError, RunConfig
from sgm.data.sources import exists
from sgm.distributed import DistInfo, wait_for_all
from sgm.inference.preflight import check_paths, placeholders_in, with_found_paths
from sgm.places import found_path, lies_in_demo
from sgm.training.options import TrainArgs


def with_found_places(config: RunConfig[TrainArgs]) -> RunConfig[TrainArgs]:
    """Relative paths that are not below the current folder are looked for in the project's."""
    args = config.args
    valid = args.valid_data and [found_path(folder) for folder in args.valid_data]
    args = dataclasses.replace(
        args,
        train_data=[found_path(folder) for folder in args.train_data],
        prior_data=[found_path(folder) for folder in args.prior_data],
        valid_data=valid,
        cache_dir=args.cache_dir and found_path(args.cache_dir),
    )
    return with_found_paths(dataclasses.replace(config, args=args))


def make_missing_data(config: RunConfig[TrainArgs], info: DistInfo, make_data: Callable[[Path], bool] | None) -> None:
    """The demo's clips, by the first process of a machine while the others wait."""
    if make_data and info.local_rank == 0:
        for folder in map(Path, config.args.data_folders):
            if not folder.expanduser().exists():
                make_data(folder.expanduser())
    wait_for_all()


def check_places(config: RunConfig[TrainArgs], dry_run: bool) -> None:
    """Every path edited and there; a dry run has made nothing, so the demo's may be absent.

    Raises:
        ConfigError: names each that is not.
    """
    # With a cache only what is missing from it needs the encoders, whose absence is noticed then.
    check_paths({} if config.args.cache_dir else config.model, config.args.load)
    args = config.args
    folders = {"train_data": args.train_data, "prior_data": args.prior_data, "valid_data": args.valid_data or []}
    problems = [f"args.{place} is still the placeholder {text!r}" for place, text in placeholders_in(folders)]
    problems += [
        f"args.{name}: no folder {path}, nor a manifest or shard"
        for name, paths in folders.items()
        for path in paths
        if not problems and not exists(Path(path).expanduser()) and not (dry_run and lies_in_demo(path))
    ]
    if problems:
        raise ConfigError(
            "\n".join([*problems, "A data folder holds videos/NAME.mp4 and labels/NAME.txt (README, 'Fine-tuning')."])
        )
