"""Fine-tune a CogVideoX model from YAML: `python train_video.py [CONFIG.yaml ...]`. Several processes: finetune.sh."""

from __future__ import annotations

import argparse
import sys

from sgm.cli import exit_code
from sgm.flags import add_flags, run_config, run_parser
from sgm.places import CONFIGS
from sgm.training.options import TrainArgs

SHIPPED = CONFIGS / "cogvideox_2b_sft.yaml"
DEMO = CONFIGS / "demo_lora.yaml"

FLAGS = ("resume", "device", "cache_dir", "seed")  # options of `args:` that have one


def parse(arguments: list[str], prog: str | None = None) -> argparse.Namespace:
    parser = run_parser(prog, __doc__, SHIPPED)
    add_flags(parser, TrainArgs, FLAGS)
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
    config = run_config(options, TrainArgs, SHIPPED, DEMO)

    from sgm.training.run import train

    return train(config, dry_run=options.dry_run)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:], leave=True))
