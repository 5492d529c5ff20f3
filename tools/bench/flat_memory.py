"""Does memory grow with the data set? Trains the same number of steps on generated sets of several sizes.

    python tools/bench/flat_memory.py CONFIG.yaml --clips 200 2000 --iterations 200

Each size is a process of its own; peak resident memory is that of the training process and of its largest worker.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

REPO = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(REPO))
DISTINCT = 16  # different videos; the others are links to them with captions of their own


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", metavar="CONFIG.yaml", help="training configuration")
    parser.add_argument("--clips", type=int, nargs="+", default=[200, 2000], metavar="N", help="sizes of the data sets")
    parser.add_argument("--iterations", type=int, default=200, help="steps with each")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override a key of CONFIG")
    parser.add_argument("--one", metavar="FOLDER", help=argparse.SUPPRESS)  # train on this folder, here
    return parser.parse_args(arguments)


def write_clips(folder: Path, count: int, size: tuple[int, int], frames: int, fps: float) -> None:
    """`count` captioned videos of moving gradients, of (height, width) pixels."""
    import imageio.v2 as imageio

    (folder / "videos").mkdir(parents=True)
    (folder / "labels").mkdir()
    y, x = np.mgrid[0 : size[0], 0 : size[1]]
    for k in range(count):
        path = folder / "videos" / f"{k:06d}.mp4"
        (folder / "labels" / f"{k:06d}.txt").write_text(f"clip number {k} of a moving gradient\n")
        if k >= DISTINCT:
            os.link(folder / "videos" / f"{k % DISTINCT:06d}.mp4", path)
            continue
        with imageio.get_writer(path, fps=fps, codec="libx264", macro_block_size=2) as writer:
            for t in range(frames):
                picture = np.stack([(x * 4 + 9 * t + 16 * k) % 256, (y * 8 + 5 * t) % 256, (x + y + 10 * k) % 256], -1)
                writer.append_data(picture.astype(np.uint8))


def train_one(options: argparse.Namespace) -> None:
    """Train here, and print the peaks in MiB as JSON."""
    from sgm.config import load_run_config
    from sgm.training.options import TrainArgs
    from sgm.training.run import train

    flags = {"train_data": [options.one], "valid_data": [], "train_iters": options.iterations, "save": ""}
    code = train(load_run_config([options.config], TrainArgs, overrides=options.set, flags=flags))
    who = {"process": resource.RUSAGE_SELF, "largest worker": resource.RUSAGE_CHILDREN}
    print(json.dumps({"code": code, **{name: resource.getrusage(of).ru_maxrss / 1024 for name, of in who.items()}}))


def main(arguments: list[str]) -> int:
    options = parse(arguments)
    if options.one:
        train_one(options)
        sys.stdout.flush()
        os._exit(0)
    from sgm.config import merge_yaml

    params = (merge_yaml([options.config], options.set).get("data") or {})["params"]
    frames, fps = int(params["max_num_frames"]) + 2 * int(params.get("skip_frms_num", 3)) + 1, params.get("fps", 8)
    peaks: dict[int, float] = {}
    with tempfile.TemporaryDirectory(prefix="flat-memory-") as scratch:
        for count in options.clips:
            folder = Path(scratch) / str(count)
            write_clips(folder, count, tuple(params["video_size"]), frames, fps)
            passed = [part for text in options.set for part in ("--set", text)]
            command = [sys.executable, __file__, options.config, "--one", str(folder), *passed]
            line = [*command, "--iterations", str(options.iterations)]
            result = subprocess.run(line, stdout=subprocess.PIPE, text=True, check=True, cwd=REPO)
            facts = json.loads(result.stdout.splitlines()[-1])
            peaks[count] = facts["process"] + facts["largest worker"]
            print(f"{count} clips: peak {facts['process']:.0f} MiB, largest worker {facts['largest worker']:.0f} MiB")
    first, *others = options.clips
    for count in others:
        print(f"{count} clips take {peaks[count] / peaks[first] - 1:+.1%} of {first}'s memory")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
