"""Write a complete release folder with random weights: `python tools/make_weights.py --config C.yaml --out DIR`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", required=True, help="YAML with the model section")
    parser.add_argument("--out", required=True, type=Path, help="folder to write")
    parser.add_argument("--dtype", default="fp16", choices=("fp32", "fp16", "bf16"), help="transformer and T5")
    parser.add_argument("--device", default="cpu", help="where values are drawn; a GPU is faster")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--t5-name", default="t5", help="name of the text encoder's folder")
    parser.add_argument("--allow-target", action="append", default=[], metavar="PREFIX", help="see sample_video.py")
    options = parser.parse_args(arguments)

    from sgm.cli import exit_code

    return exit_code(lambda: write(options))


def write(options: argparse.Namespace) -> None:
    from sgm.config import merge_yaml
    from sgm.util import allow_target
    from sgm.weights import DTYPES
    from tools.random_release import write_random_release

    for prefix in options.allow_target:
        allow_target(prefix)
    model = merge_yaml([options.config]).get("model") or {}
    write_random_release(
        model, options.out, dtype=DTYPES[options.dtype], device=options.device, seed=options.seed,
        t5_name=options.t5_name,
    )  # fmt: skip
    print(f"random weights in {options.out}: args.load {options.out / 'transformer'}, "
          f"ckpt_path {options.out / 'vae' / '3d-vae.pt'}, model_dir {options.out / options.t5_name}")  # fmt: skip


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
