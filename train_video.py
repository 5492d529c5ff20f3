"""Fine-tune a CogVideoX model from YAML: `python train_video.py [CONFIG.yaml ...]`. Several processes: finetune.sh."""

from __future__ import annotations

import argparse
import os
import sys
from typing import TYPE_CHECKING

from sgm.cli import Parser, exit_code
from sgm.places import CONFIGS

if TYPE_CHECKING:
    from sgm.config import RunConfig
    from sgm.training.options import TrainArgs

SHIPPED = CONFIGS / "cogvideox_2b_sft.yaml"
DEMO = CONFIGS / "demo_lora.yaml"


def parse(arguments: list[str], prog: str | None = None) -> argparse.Namespace:
    parser = Parser(prog, description=__doc__)
    parser.add_argument("configs", nargs="*", metavar="CONFIG.yaml", help=f"later files win; default {SHIPPED.name}")
    parser.add_argument("--base", nargs="+", default=[], metavar="CONFIG.yaml", help="the same, in the original's form")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override a key: args.seed=7")
    parser.add_argument("--dry-run", action="store_true", help="print the resolved configuration and plan, then stop")
    parser.add_argument("--resume", nargs="?", const="auto", metavar="FOLDER",
                        help="go on exactly: the newest run of this configuration, or the run in FOLDER")  # fmt: skip
    parser.add_argument("--device", help="cpu or cuda; default: the GPU if there is one")
    parser.add_argument("--cache-dir", metavar="DIR", help="train from encoded clips in DIR; fills it where needed")
    parser.add_argument("--seed", type=int, help="base seed")
    parser.add_argument("--allow-target", action="append", default=[], metavar="PREFIX",
                        help="also accept classes of your own package as YAML targets")  # fmt: skip
    parser.add_argument("--local_rank", "--local-rank", type=int, help=argparse.SUPPRESS)  # DeepSpeed's launcher
    return parser.parse_args(arguments)


def main(arguments: list[str], prog: str | None = None, leave: bool = False) -> int:
    """Returns the exit code.

    Args:
        prog: how the command is called in its help; by default as the script is.
        leave: end the process with that code where it is not 0, without waiting for other ranks.
    """
    options = parse(arguments, prog)
    code = exit_code(lambda: run(options), "stopped before training began")
    if leave and "sgm.training.run" in sys.modules:  # else nothing was begun
        from sgm.training.run import exit_quietly

        exit_quietly(code)
    return code


def run(options: argparse.Namespace) -> int:
    config = configuration(options)

    from sgm.training.run import train

    return train(config, dry_run=options.dry_run)


def configuration(options: argparse.Namespace) -> RunConfig[TrainArgs]:
    """The run that a command line asks for."""
    from sgm.config import load_run_config
    from sgm.placeholders import config_files
    from sgm.training.options import TrainArgs
    from sgm.util import allow_target

    if options.local_rank is not None:
        os.environ.setdefault("LOCAL_RANK", str(options.local_rank))
    for prefix in options.allow_target:
        allow_target(prefix)
    files = config_files([*options.base, *options.configs], SHIPPED, DEMO)
    flags = {"resume": options.resume, "device": options.device, "seed": options.seed,
             "cache_dir": options.cache_dir}  # fmt: skip
    return load_run_config(files, TrainArgs, overrides=options.set, flags=flags)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:], leave=True))
