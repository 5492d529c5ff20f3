"""Put an adapter beside the bundled demo, in half precision, with its header and its hash.

    python tools/demo/bundle_adapter.py student RUN/2500-ema --out demo
    python tools/demo/bundle_adapter.py i2v RUN/6000-ema --out demo

writes OUT/student/lora.safetensors (a distilled one) or OUT/i2v/lora.safetensors (one that begins with a picture), and
OUT/SHA256SUMS.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from sgm.files import SaveError
from sgm.modules.transformer.patch_embed import PATCHES
from sgm.training.checkpoints.weights import as_metadata
from sgm.weights import WeightsError
from sgm.weights.release import ADAPTER_FILE, NETWORK_PREFIX, Checkpoint, read_transformer
from sgm.weights.save import save_safetensors
from tools.demo.bundle import narrowed, write_hashes

LIMITS = {"student": 2 * 2**20, "i2v": 8 * 2**20}  # bytes


def fault_of(kind: str, checkpoint: Checkpoint) -> str | None:
    """Why a checkpoint is no adapter alone of a kind; None where it is."""
    parts = [name for name in checkpoint.network if ".matrix_" not in name]
    if len(parts) == len(checkpoint.network) or "transformer.final_layernorm.weight" in parts:
        return "no adapter alone (args.lora_only: True)"
    if kind == "student" and ("few_steps" not in checkpoint.lora or parts):
        return "no distilled adapter alone"
    if kind == "i2v" and PATCHES not in parts:
        return "no adapter with a patch projection for pictures (configs/image_to_video.yaml)"
    return None


def bundle_adapter(kind: str, source: Path, folder: Path) -> int:
    """Write `folder/lora.safetensors`; returns its bytes.

    Raises:
        WeightsError: unreadable, or no adapter alone of that kind.
    """
    checkpoint = read_transformer(source)
    if fault := fault_of(kind, checkpoint):
        raise WeightsError(f"{source} is {fault}; give the folder of one, RUN/N-ema.")
    facts = {name: value for name, value in checkpoint.lora.items() if name != "base_path"}
    state = narrowed(checkpoint.network, torch.float16, source)
    folder.mkdir(parents=True, exist_ok=True)
    file = save_safetensors(
        folder / ADAPTER_FILE,
        {NETWORK_PREFIX + name: value.contiguous() for name, value in state.items()},
        {"format": "pt", "iteration": str(checkpoint.iteration), **as_metadata(facts)},
    )
    return file.stat().st_size


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=LIMITS)
    parser.add_argument("run", type=Path, help="checkpoint folder of the adapter; the -ema one is best")
    parser.add_argument("--out", type=Path, default=Path("demo"))
    args = parser.parse_args(arguments)
    try:
        size = bundle_adapter(args.kind, args.run, args.out / args.kind)
        write_hashes(args.out)
    except (WeightsError, SaveError, OSError) as error:
        print(f"bundle_adapter.py: {error}", file=sys.stderr)
        return 2
    print(f"{args.out / args.kind}: {size / 2**20:.2f} MiB")
    if size > (limit := LIMITS[args.kind]):
        print(f"bundle_adapter.py: that is more than {limit / 2**20:.0f} MiB; lower the rank", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
