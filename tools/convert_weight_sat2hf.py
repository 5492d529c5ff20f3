"""SAT weights into a diffusers pipeline folder, or a SAT LoRA into `pytorch_lora_weights.safetensors`.

python tools/convert_weight_sat2hf.py --transformer_ckpt_path W/transformer --vae_ckpt_path W/vae/3d-vae.pt \\
    --text_encoder_path W/t5-v1_1-xxl --output_path OUT
python tools/convert_weight_sat2hf.py --transformer_ckpt_path ckpts/run --lora_only --output_path OUT
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))


# Options of the original's later converter, and what takes their place.
SIZES = "is read from the weights and the YAML file beside them; another file is named with --config FILE.yaml"
ELSEWHERE = {"--typecast_fp32": "is --fp32 here"} | dict.fromkeys(
    ("--num_layers", "--num_attention_heads", "--use_rotary_positional_embeddings", "--scaling_factor",
     "--snr_shift_scale", "--i2v", "--version"), SIZES,
)  # fmt: skip


class Elsewhere(argparse.Action):
    """An option that is not needed here: one line that says why."""

    def __call__(self, parser: argparse.ArgumentParser, *_: object, **__: object) -> None:
        (option,) = self.option_strings
        parser.exit(2, f"error: {option} {ELSEWHERE[option]}\n")


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--transformer_ckpt_path", type=Path, help="checkpoint: file, iteration folder, release or training folder")
    add("--vae_ckpt_path", type=Path, help="3d-vae.pt; default: the VAE in the transformer's checkpoint")
    add("--text_encoder_path", help="T5 folder (config.json, weights, spiece.model) or hub id")
    add("--text_encoder_cache_dir", help="the hub's cache folder")
    add("--output_path", type=Path, required=True, help="folder to write")
    kinds = parser.add_mutually_exclusive_group()
    defaults = {"fp16": "default for fp16 files, and 2B's of fp32", "bf16": "default for other files", "fp32": None}
    for name, default in defaults.items():
        kinds.add_argument(f"--{name}", dest="dtype", action="store_const", const=name, help=default)
    add("--push_to_hub", action="store_true", help="upload afterwards, to a repository named as the output folder")
    add("--lora", action="append", default=[], metavar="PATH[:SCALE]", help="fold in an adapter; may be repeated")
    add("--lora_alpha", type=float, help="alpha of the checkpoint's adapter, if the file does not say (SAT: 1)")
    add("--lora_only", action="store_true", help="write the checkpoint's adapter alone")
    scale = parser.add_mutually_exclusive_group()
    scale.add_argument(
        "--fold_scale", action="store_true", help="with --lora_only (default): alpha / r in the matrices"
    )
    scale.add_argument("--keep_scale", action="store_true", help="the matrices as they are, alpha in the header alone")
    add("--config", type=Path, help="YAML of the network, where the tensors do not say enough")
    add("--scheduler", choices=("dpm", "ddim"), default="dpm")
    add("--max_shard_size", default="5GiB", help="largest weight file (5GiB, 500MB)")
    add("--partial", action="store_true", help="convert what is given and diffusers can hold, without a pipeline")
    add("--allow_drift", action="store_true", help="tensor-parallel parts: take part 0's where whole tensors differ")
    for option in ELSEWHERE:
        add(option, nargs="?", action=Elsewhere, help=argparse.SUPPRESS)
    add("--overwrite", action="store_true", help="replace an existing output folder")
    return parser.parse_args(arguments)


def run(options: argparse.Namespace) -> None:
    from sgm.convert.output import parse_size, push_to_hub
    from sgm.convert.to_hf import ToHf, convert, export_lora
    from sgm.weights import DTYPES
    from sgm.weights.release import Adapter

    request = ToHf(
        output=options.output_path,
        transformer=options.transformer_ckpt_path,
        vae=options.vae_ckpt_path,
        text_encoder=options.text_encoder_path,
        cache_dir=options.text_encoder_cache_dir,
        dtype=DTYPES.get(options.dtype),
        adapters=[Adapter.parse(text) for text in options.lora],
        lora_alpha=options.lora_alpha,
        config=options.config,
        scheduler=options.scheduler,
        shard_bytes=parse_size(options.max_shard_size),
        partial=options.partial,
        allow_drift=options.allow_drift,
        overwrite=options.overwrite,
    )
    lines = export_lora(request, not options.keep_scale) if options.lora_only else convert(request)
    print("\n".join(lines))
    if options.push_to_hub:
        print(push_to_hub(options.output_path))


def main(arguments: list[str]) -> int:
    options = parse(arguments)
    from sgm.cli import exit_code

    return exit_code(lambda: run(options), "stopped; nothing was written")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
