"""Train the demo's 3D VAE from nothing, on clips rendered while it trains.

    python tools/demo/train_vae.py OUT --config configs/demo_infer.yaml --seconds 180

gives OUT/vae/3d-vae.pt (the release's layout, averaged weights, latents of deviation 1 / scale_factor), OUT/report.json
(loss curve, figures of `eval_vae.py`, seconds) and OUT/checkpoint.pt (averaged weights as trained). The learning rate
and the kinds of batches follow the time: the run ends when it is over, plus some seconds to start, measure and write.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tools.demo.attributes import read_withheld
from tools.demo.clip_feed import ClipFeed
from tools.demo.vae_phases import PHASES, parse_phases

# Worker processes import this file again, so what takes long to import waits until `main`.


def default_workers() -> int:
    """All processors that this process may use but two; 14 render faster than any GPU learns."""
    return max(1, min(14, len(os.sched_getaffinity(0)) - 2))


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="folder to write to")
    parser.add_argument("--config", type=Path, required=True, help="YAML whose first_stage_config is trained")
    length = parser.add_mutually_exclusive_group(required=True)
    length.add_argument("--seconds", type=float, help="time of training")
    length.add_argument("--steps", type=int, help="steps of training, whatever time they take")
    parser.add_argument("--phases", default=PHASES, help=f"SHARE:PIECESxFRAMESxHEIGHTxWIDTH,... ({PHASES})")
    parser.add_argument("--init", type=Path, help="weights to start from, such as a checkpoint.pt")
    parser.add_argument("--rate", type=float, default=2e-3, help="highest learning rate (0.002)")
    parser.add_argument("--ema", type=float, default=0.998, help="decay of the averaged weights (0.998)")
    parser.add_argument("--latent-noise", type=float, default=0.1, help="most noise on latents, in deviations (0.1)")
    parser.add_argument("--kl", type=float, default=1e-4, help="weight of the divergence (0.0001)")
    parser.add_argument("--amp", choices=("auto", "bfloat16", "none"), default="auto", help="auto: bfloat16 on a GPU")
    parser.add_argument("--store", choices=("float16", "bfloat16", "float32"), default="float16", help="type stored")
    parser.add_argument("--workers", type=int, default=default_workers(), help="rendering processes")
    parser.add_argument("--withheld", type=Path, default=Path(__file__).with_name("withheld.json"))
    parser.add_argument("--test-clips", type=int, default=48, help="held-out clips to measure on (48)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", help="default cuda where there is one")
    args = parser.parse_args(arguments)
    lengths = (args.seconds if args.steps is None else args.steps, args.test_clips, args.rate)
    if min(lengths) <= 0 or args.workers < 0 or not 0 <= args.ema < 1 or min(args.latent_noise, args.kl, args.seed) < 0:
        parser.error("--seconds, --steps, --test-clips, --rate must be positive, --ema in [0, 1), others not negative")
    return args


def main(arguments: list[str] | None = None) -> int:
    args = parse_arguments(arguments)
    try:
        phases, withheld = parse_phases(args.phases), read_withheld(args.withheld)
        with ClipFeed(
            args.workers, args.workers + 6, max(phase.batch.nbytes for phase in phases), args.seed, withheld
        ) as feed:
            from tools.demo.vae_run import run

            run(args, phases, withheld, feed)
    except (ValueError, OSError) as error:
        print(f"train_vae.py: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
