"""Put trained parts together as the bundled demo, in the release's layout and half precision, with their hashes.

    python tools/demo/bundle.py --transformer RUN/4000-ema --vae WORK/vae/3d-vae.pt --text WORK/t5 --out demo

    python tools/demo/bundle.py --small-decoder WORK/small/small_decoder.safetensors --out demo

writes OUT/transformer/latest, OUT/transformer/ITERATION/mp_rank_00_model_states.pt (without the computed position
table, as the published file), OUT/vae/3d-vae.pt, OUT/t5 and OUT/SHA256SUMS; the second command adds
OUT/vae/small_decoder.safetensors. What OUT held of these is replaced.
"""

from __future__ import annotations

import argparse
import hashlib
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from sgm.files import SaveError, write_text
from sgm.models.small_decoder import load_small_decoder
from sgm.weights import WeightsError, read_checkpoint
from sgm.weights.files import tensors_of
from sgm.weights.release import NETWORK_PREFIX, read_transformer
from sgm.weights.save import save_pt

COMPUTED = ("mixins.pos_embed.pos_embedding",)  # follows from the configuration
DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}
HASHES = "SHA256SUMS"
SMALL_DECODER = "small_decoder.safetensors"
LIMIT = 30 * 2**20  # bytes of the whole bundle


def bundle_transformer(source: Path, out: Path, dtype: torch.dtype) -> int:
    """Write `out/latest` and `out/ITERATION/...` from a checkpoint of the transformer; returns the iteration.

    Raises:
        WeightsError: unreadable, an adapter alone, without an iteration, or values beyond `dtype`'s range.
    """
    checkpoint = read_transformer(source)
    iteration = checkpoint.iteration
    if iteration is None:
        raise WeightsError(f"{source} says no iteration; give an iteration's folder, such as RUN/4000-ema.")
    state = {name: t for name, t in checkpoint.network.items() if name not in COMPUTED}
    folder = out / str(iteration)
    folder.mkdir(parents=True, exist_ok=True)
    entries = {NETWORK_PREFIX + name: t for name, t in narrowed(state, dtype, source).items()}
    save_pt(folder / "mp_rank_00_model_states.pt", {"module": entries})
    write_text(out / "latest", str(iteration))
    return iteration


def bundle_vae(source: Path, out: Path, dtype: torch.dtype) -> None:
    """Write `out/3d-vae.pt` from such a file. Raises WeightsError."""
    content = read_checkpoint(source)
    if "state_dict" not in content:
        raise WeightsError(f"{source} has no entry `state_dict`, so it is no VAE file of the release.")
    out.mkdir(parents=True, exist_ok=True)
    save_pt(out / "3d-vae.pt", {"state_dict": narrowed(tensors_of(content["state_dict"]), dtype, source)})


def bundle_small_decoder(source: Path, out: Path) -> None:
    """Copy a small decoder beside its VAE. Raises WeightsError where it is none, or of another VAE."""
    load_small_decoder(source, out / "3d-vae.pt", device="cpu", dtype=torch.float32)
    shutil.copyfile(source, out / SMALL_DECODER)


def narrowed(state: Mapping[str, Tensor], dtype: torch.dtype, source: Path) -> dict[str, Tensor]:
    """The tensors in half precision. Raises WeightsError where a value would become infinite or is not finite."""
    result = {name: t.to(dtype) for name, t in state.items()}
    broken = [name for name, t in result.items() if not bool(torch.isfinite(t).all())]
    if broken:
        raise WeightsError(f"{source}: {', '.join(broken[:5])} not finite in {dtype}; choose --dtype bf16.")
    return result


def write_hashes(out: Path) -> int:
    """Write SHA256SUMS over the parts (as `sha256sum -c` reads it), but for pages and pictures; returns their bytes."""
    parts = [out / name for name in ("i2v", "student", "t5", "transformer", "vae")]
    files = sorted(path for part in parts for path in part.rglob("*") if _is_hashed(path))
    lines = [f"{hashlib.sha256(p.read_bytes()).hexdigest()}  {p.relative_to(out).as_posix()}" for p in files]
    write_text(out / HASHES, "\n".join(lines) + "\n")
    return sum(p.stat().st_size for p in files)


def _is_hashed(path: Path) -> bool:
    return path.is_file() and path.suffix not in (".md", ".png", ".jpg")


def _bundle_parts(args: argparse.Namespace) -> str:
    if not (args.text / "spiece.model").is_file():
        raise WeightsError(f"{args.text} is no text encoder's folder: it has no spiece.model.")
    for part in ("transformer", "t5"):
        shutil.rmtree(args.out / part, ignore_errors=True)
    iteration = bundle_transformer(args.transformer, args.out / "transformer", DTYPES[args.dtype])
    bundle_vae(args.vae, args.out / "vae", DTYPES[args.dtype])
    (args.out / "vae" / SMALL_DECODER).unlink(missing_ok=True)  # of another VAE
    shutil.copytree(args.text, args.out / "t5")
    return f"iteration {iteration} in {args.dtype}"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--transformer", type=Path, help="checkpoint folder; the -ema one is best")
    parser.add_argument("--vae", type=Path, help="3d-vae.pt")
    parser.add_argument("--text", type=Path, help="folder of the text encoder")
    parser.add_argument("--small-decoder", type=Path, help="file of tools/train_decoder.py, to be added")
    parser.add_argument("--out", type=Path, default=Path("demo"))
    parser.add_argument("--dtype", choices=tuple(DTYPES), default="fp16")
    args = parser.parse_args(arguments)
    given = [part is not None for part in (args.transformer, args.vae, args.text)]
    if any(given) != all(given) or not (any(given) or args.small_decoder):
        parser.error("give --transformer, --vae and --text, or --small-decoder alone, or all of them")
    try:
        what = _bundle_parts(args) if all(given) else "one more part"
        if args.small_decoder:
            bundle_small_decoder(args.small_decoder, args.out / "vae")
        size = write_hashes(args.out)
    except (WeightsError, SaveError, OSError) as error:
        print(f"bundle.py: {error}", file=sys.stderr)
        return 2
    print(f"{args.out}: {what}, {size / 2**20:.2f} MiB")
    if size > LIMIT:
        print(f"bundle.py: that is more than {LIMIT / 2**20:.0f} MiB", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
