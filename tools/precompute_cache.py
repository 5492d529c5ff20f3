"""Encode the clips of a training configuration into a cache: `python tools/precompute_cache.py CONFIG --cache-dir DIR`.

Run again, it goes on where it was interrupted. Several GPUs share the work under torchrun.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("configs", nargs="+", metavar="CONFIG.yaml", help="training configuration; later files win")
    parser.add_argument("--cache-dir", required=True, metavar="DIR", help="folder to fill, made if absent")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override a key")
    parser.add_argument("--data", nargs="+", metavar="FOLDER", help="encode these in place of train_data, valid_data")
    parser.add_argument("--device", help="cpu or cuda; default: the GPU if there is one")
    parser.add_argument("--dtype", choices=("fp32", "fp16", "bf16"),
                        help="arithmetic of the encoders; default: that of the training")  # fmt: skip
    parser.add_argument("--storage", choices=("fp32", "fp16", "bf16"), help="type of the stored values; default fp16")
    parser.add_argument("--workers", type=int, help="decoding processes; default: args.num_workers")
    parser.add_argument("--batch-size", type=int, help="clips of one shape at a time; default: by their size")
    parser.add_argument("--allow-target", action="append", default=[], metavar="PREFIX", help="see train_video.py")
    return parser.parse_args(arguments)


def main(arguments: list[str]) -> int:
    from sgm.cli import exit_code

    return exit_code(lambda: run(parse(arguments)), "interrupted; the same command goes on from here")


def run(options: argparse.Namespace) -> int:
    from sgm import distributed
    from sgm.cache.ready import ready_cache
    from sgm.config import load_run_config
    from sgm.training.options import TrainArgs
    from sgm.training.run import device_type, rank_zero_printer
    from sgm.training.setup.places import with_found_places
    from sgm.util import allow_target
    from sgm.weights.preflight import check_paths

    for prefix in options.allow_target:
        allow_target(prefix)
    flags = {
        "cache_dir": options.cache_dir, "cache_dtype": options.storage, "num_workers": options.workers,
        "device": options.device, "cache_fill": True, "mode": "pretrain", "train_data": options.data,
        "valid_data": [] if options.data else None,
    }  # fmt: skip
    config = with_found_places(load_run_config(options.configs, TrainArgs, overrides=options.set, flags=flags))
    check_paths(config.model, None)
    info = distributed.init_distributed(device_type(config.args.device))
    dtype = options.dtype or _training_dtype(config.deepspeed or {})
    ready = ready_cache(config, dtype, info, rank_zero_printer(info.rank), options.batch_size)
    if info.rank == 0:
        _tell(ready)
    return 0


def _training_dtype(deepspeed: dict) -> str:
    enabled = [name for name in ("fp16", "bf16") if (deepspeed.get(name) or {}).get("enabled")]
    return enabled[0] if enabled else "fp32"


def _tell(ready) -> None:
    from sgm.data.sources import passed_over_line

    for scan in ready.scans.values():
        for rejection in scan.rejected[:20]:
            print(f"rejected: {rejection.path}: {rejection.reason}")
        if scan.passed_over:
            print(f"{scan.folder}: {passed_over_line(scan.passed_over)}")
    store = ready.store
    size = sum(path.stat().st_size for path in store.shards)
    pictures = f" with {len(store.names('frame'))} first frames" if store.first_frames else ""
    what = f"{len(store.names('video'))} videos{pictures} and {len(store.names('text'))} captions"
    print(f"complete: {store.folder}, {what}, {size / 2**30:.2f} GiB in {len(store.shards)} files, {store.storage}; "
          f"train with --cache-dir {shlex.quote(str(store.folder))}", flush=True)  # fmt: skip


if __name__ == "__main__":
    code = main(sys.argv[1:])
    from sgm.training.run import exit_quietly

    exit_quietly(code)
