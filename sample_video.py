"""Text to video with a CogVideoX model: `python sample_video.py [CONFIG.yaml ...] [--prompt "..."]`."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable

from sgm.cli import Interrupts, Parser, exit_code
from sgm.places import CONFIGS

SHIPPED = CONFIGS / "cogvideox_2b_infer.yaml"
DEMO = CONFIGS / "demo_infer.yaml"


def parse(arguments: list[str], prog: str | None = None) -> argparse.Namespace:
    parser = Parser(prog, description=__doc__)
    parser.add_argument("configs", nargs="*", metavar="CONFIG.yaml", help=f"later files win; default {SHIPPED.name}")
    add = parser.add_argument
    add("--base", nargs="+", default=[], metavar="CONFIG.yaml", help="the same, in the original's form")
    add("--set", action="append", default=[], metavar="KEY=VALUE", help="override a key: args.sampling_fps=16")
    add("--dry-run", action="store_true", help="print the resolved configuration and the plan, then stop")
    add("--prompt", dest="prompts", action="append", metavar="TEXT", help="a prompt; may be repeated")
    add("--negative-prompt", metavar="TEXT", help="what to steer away from")
    add("--refine", action="store_true", default=None, help="let a language model write out each prompt first")
    add("--refine-model", metavar="NAME", help="that language model (OPENAI_API_KEY, OPENAI_BASE_URL say where)")
    add("--input-file", metavar="FILE", help="one prompt a line")
    add("--output-dir", metavar="DIR", help="folder for results")
    add("--load", metavar="PATH", help="transformer weights")
    add("--lora", action="append", metavar="PATH[:SCALE]", help="an adapter; may be repeated")
    add("--merge-lora", action="store_true", default=None, help="fold adapters into the weights")
    add("--batch-size", type=int, metavar="N", help="samples per prompt")
    add("--max-batch", type=int, metavar="N", help="samples that run together")
    add("--steps", dest="num_steps", type=int, metavar="N", help="sampling steps")
    add("--guidance-scale", type=float, metavar="S", help="guidance scale")
    add("--image-size", dest="sampling_image_size", nargs=2, type=int, metavar=("H", "W"), help="pixels")
    add("--num-frames", dest="sampling_num_frames", type=int, metavar="T", help="latent frames, odd (13: 49 frames)")
    add("--seed", type=int, help="base seed")
    add("--seed-mode", choices=("sample", "upstream"), help="sample: per-sample noise; upstream: one stream")
    add("--placement", choices=("all", "stages", "lean"), help="what lies on the GPU at a time")
    add("--device", help="cpu, cuda or cuda:N")
    add("--vae-tiling", action="store_true", default=None, help="decode in tiles: approximate, needs less memory")
    add("--skip-done", action="store_true", default=None, help="leave out samples that are there already")
    add("--only-save-latents", action="store_true", default=None, help="write latents, no videos")
    add("--decode-latents", metavar="PATH", help="decode latents of an earlier run (file or folder)")
    add("--allow-target", action="append", default=[], metavar="PREFIX", help="accept your own package as YAML target")
    add("--local_rank", "--local-rank", type=int, help=argparse.SUPPRESS)  # DeepSpeed's launcher
    return parser.parse_args(arguments)


NOT_ARGS = ("configs", "base", "set", "dry_run", "allow_target", "local_rank")


def main(arguments: list[str], prog: str | None = None, listen: bool = False) -> int:
    """Returns the exit code.

    Args:
        prog: how the command is called in its help; by default as the script is.
        listen: this is the process's own program, which Ctrl-C and SIGTERM stop without a half-written file.
    """
    options = parse(arguments, prog)
    interrupts = Interrupts().listen() if listen else Interrupts()
    kept = "stopped; finished videos are kept (--skip-done goes on from there)"
    return exit_code(lambda: run(options, interrupts.check), kept)


def run(options: argparse.Namespace, check: Callable[[], None]) -> int:
    from sgm.config import load_run_config
    from sgm.inference.options import SampleArgs
    from sgm.placeholders import config_files
    from sgm.util import allow_target

    if options.local_rank is not None:
        os.environ.setdefault("LOCAL_RANK", str(options.local_rank))
    for prefix in options.allow_target:
        allow_target(prefix)
    files = config_files([*options.base, *options.configs], SHIPPED, DEMO)
    flags = {name: value for name, value in vars(options).items() if name not in NOT_ARGS}
    config = load_run_config(files, SampleArgs, overrides=options.set, flags=flags)

    from sgm.inference.run import sample

    return sample(config, check, dry_run=options.dry_run)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:], listen=True))
