"""Put a distilled adapter beside the bundled demo, in half precision, with its header and its hash.

    python tools/demo/bundle_student.py RUN/2500-ema --out demo

writes OUT/student/lora.safetensors and OUT/SHA256SUMS.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from sgm.files import SaveError
from sgm.training.checkpoints.weights import as_metadata
from sgm.weights import WeightsError
from sgm.weights.release import ADAPTER_FILE, NETWORK_PREFIX, read_transformer
from sgm.weights.save import save_safetensors
from tools.demo.bundle import narrowed, write_hashes

LIMIT = 2 * 2**20  # bytes


def bundle_student(source: Path, folder: Path) -> int:
    """Write `folder/lora.safetensors`; returns its bytes.

    Raises:
        WeightsError: unreadable, no adapter alone, or one that was not distilled.
    """
    checkpoint = read_transformer(source)
    if "few_steps" not in checkpoint.lora or any(".matrix_" not in name for name in checkpoint.network):
        raise WeightsError(
            f"{source} is no distilled adapter alone (args.lora_only: True); give its folder, RUN/N-ema."
        )
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
    parser.add_argument("run", type=Path, help="checkpoint folder of the adapter; the -ema one is best")
    parser.add_argument("--out", type=Path, default=Path("demo"))
    args = parser.parse_args(arguments)
    try:
        size = bundle_student(args.run, args.out / "student")
        write_hashes(args.out)
    except (WeightsError, SaveError, OSError) as error:
        print(f"bundle_student.py: {error}", file=sys.stderr)
        return 2
    print(f"{args.out / 'student'}: {size / 2**20:.2f} MiB")
    if size > LIMIT:
        print(f"bundle_student.py: that is more than {LIMIT / 2**20:.0f} MiB; lower the rank", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
