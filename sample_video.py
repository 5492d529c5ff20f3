"""Text, picture or clip to video by a CogVideoX model: `python sample_video.py [CONFIG.yaml ...] [--prompt "..."]`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable

from sgm.cli import Interrupts, exit_code
from sgm.flags import add_flags, run_config, run_parser
from sgm.inference.options import DEMO_CONFIG, SHIPPED_CONFIG, SampleArgs

FLAGS = (  # options of `args:` that have one
    "prompts", "image", "video", "strength", "extend", "negative_prompt", "refine", "refine_model", "input_file",
    "output_dir", "load", "lora", "merge_lora", "batch_size", "max_batch", "num_steps", "guidance_scale",
    "sampling_image_size", "sampling_num_frames", "window_frames", "window_overlap", "seed", "seed_mode", "placement",
    "device", "decoder", "vae_tiling", "skip_done", "only_save_latents", "decode_latents",
)  # fmt: skip
CALLED = {
    "prompts": "--prompt",
    "num_steps": "--steps",
    "sampling_image_size": "--image-size",
    "sampling_num_frames": "--num-frames",
}


def parse(arguments: list[str], prog: str | None = None) -> argparse.Namespace:
    parser = run_parser(prog, __doc__, SHIPPED_CONFIG)
    told = "a released model, such as zai-org/CogVideoX-2b, fetched at first use; or a folder with an infer.yaml"
    parser.add_argument("--model", metavar="OWNER/NAME", help=told)
    told = "compare, on one page, clips of all combinations: seeds=1,2 lora=0,0.5,1 steps=... guidance=... prompts=FILE"
    parser.add_argument("--grid", nargs="+", default=[], metavar="AXIS=VALUES", help=told)
    add_flags(parser, SampleArgs, FLAGS, CALLED)
    return parser.parse_args(arguments)


def main(arguments: list[str], prog: str | None = None, listen: bool = False) -> int:
    """Returns the exit code.

    Args:
        prog: how the command is called in its help; by default as the script is.
        listen: this is the process's own program, which Ctrl-C and SIGTERM stop without a half-written file, and which
            an error ends without waiting for other ranks.
    """
    options = parse(arguments, prog)
    interrupts = Interrupts().listen() if listen else Interrupts()
    onward = "" if options.grid else " (--skip-done goes on from there)"
    code = exit_code(lambda: run(options, interrupts.check), f"stopped; finished videos are kept{onward}")
    if listen and code and "sgm.distributed" in sys.modules:  # else nothing was begun
        from sgm.distributed import leave

        leave(code)
    return code


def run(options: argparse.Namespace, check: Callable[[], None]) -> int:
    if options.model:
        from sgm.hub.release import run_file_of

        options.configs = [str(run_file_of(options.model, may_download=not options.dry_run)), *options.configs]
    config = run_config(options, SampleArgs, SHIPPED_CONFIG, DEMO_CONFIG)

    from sgm.inference.run import sample

    return sample(config, check, dry_run=options.dry_run, grid=options.grid)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:], listen=True))
