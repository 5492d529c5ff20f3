"""A diffusers pipeline folder into SAT's release layout, or another trainer's LoRA into a SAT adapter.

python tools/convert_weight_hf2sat.py --input_path CogVideoX-2b --output_path CogVideoX-2b-sat
python tools/convert_weight_hf2sat.py --lora_only --input_path pytorch_lora_weights.safetensors --output_path OUT
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--input_path", type=Path, required=True, help="local diffusers folder; with --lora_only the adapter")
    add("--output_path", type=Path, required=True, help="folder to write")
    kinds = parser.add_mutually_exclusive_group()
    for name in ("fp16", "bf16", "fp32"):
        kinds.add_argument(f"--{name}", dest="dtype", action="store_const", const=name, help="default: as the files")
    add("--lora", action="append", default=[], metavar="PATH[:SCALE]", help="fold in an adapter; may be repeated")
    add("--lora_only", action="store_true", help="convert an adapter alone")
    add("--lora_alpha", type=float, help="with --lora_only: alpha of the training, if the file does not say")
    add("--sat_alpha", type=float, help="with --lora_only: scale the matrices for this alpha (upstream's SAT: 1)")
    add("--linear_patches", action="store_true", help="patch embedding as a linear layer, as SAT's later 5B code")
    add("--partial", action="store_true", help="convert the components that there are")
    add("--max_shard_size", default="5GiB", help="largest weight file of the text encoder (5GiB, 500MB)")
    add("--overwrite", action="store_true", help="replace an existing output folder")
    return parser.parse_args(arguments)


def run(options: argparse.Namespace) -> None:
    from sgm.convert.output import parse_size
    from sgm.convert.to_sat import ToSat, convert, import_lora
    from sgm.weights import DTYPES
    from sgm.weights.release import Adapter

    request = ToSat(
        source=options.input_path,
        output=options.output_path,
        dtype=DTYPES.get(options.dtype),
        adapters=[Adapter.parse(text) for text in options.lora],
        lora_alpha=options.lora_alpha,
        sat_alpha=options.sat_alpha,
        linear_patches=options.linear_patches,
        partial=options.partial,
        shard_bytes=parse_size(options.max_shard_size),
        overwrite=options.overwrite,
    )
    print("\n".join(import_lora(request) if options.lora_only else convert(request)))


def main(arguments: list[str]) -> int:
    options = parse(arguments)
    from sgm.cli import exit_code

    return exit_code(lambda: run(options), "stopped; nothing was written")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
