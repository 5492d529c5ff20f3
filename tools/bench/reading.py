"""How fast are clips read for training? `python tools/bench/reading.py [--other CHECKOUT]`. Prints JSON lines.

Makes H.264 videos of 30 frames a second (nothing but noise moves in a moving gradient), and reads clips of 49x480x720
from them with the loader that training uses: opened, decoded, resized, cropped, in batches of one. With another
checkout, which has a `.venv`, the two take turns, and the last lines say how many times faster this one is: by the
clock, and by what both need of the processor, which other work on the machine hardly disturbs. `mib_a_worker` is the
largest memory of a worker and its decoder together.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from collections import defaultdict
from pathlib import Path

REPO = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(REPO))

# Width, height, and a bit rate as videos on the web have it.
SIZES = {"480x720": (720, 480, "2M"), "720x1280": (1280, 720, "5M"), "1080x1920": (1920, 1080, "8M")}
# Runs in either checkout, with its interpreter: what it imports has been there since.
READ = """
import json, os, resource, sys, time
folder, workers, clips = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
import torch
torch.set_num_threads(1)
from sgm.data.dataset import SFTDataset
from sgm.data.loader import create_loader

def tree(pid):
    with open(f"/proc/{pid}/task/{pid}/children") as file:
        found = [int(child) for child in file.read().split()]
    return found + [pid for child in found for pid in tree(child)]

def cpu(pid):
    fields = open(f"/proc/{pid}/stat").read().rsplit(")", 1)[1].split()
    return sum(map(int, fields[11:13])) / os.sysconf("SC_CLK_TCK")

def peak(pid):
    return next(int(line.split()[1]) for line in open(f"/proc/{pid}/status") if line.startswith("VmHWM")) / 1024

def busy():
    return sum(map(cpu, [os.getpid(), *tree(os.getpid())]))

with create_loader(SFTDataset(folder, validate="none"), 1, workers, seed=1) as loader:
    for _ in range(2 * workers + 1):
        next(loader)
    started, before, frames = time.perf_counter(), busy(), 0
    for _ in range(clips):
        frames += next(loader)["mp4"].shape[1]
    seconds, used = time.perf_counter() - started, busy() - before
    memory = max(sum(map(peak, [worker, *tree(worker)])) for worker in tree(os.getpid()) if tree(worker))
print(json.dumps({"frames_per_second": frames / seconds, "processor_s_a_clip": used / clips, "mib_a_worker": memory}))
sys.stdout.flush()
os._exit(0)
"""


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--other", type=Path, metavar="CHECKOUT", help="compare with this one, which has a .venv")
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=list(SIZES), help="height and width of the videos")
    parser.add_argument("--workers", type=int, nargs="+", default=[2, 8], metavar="N", help="numbers to try")
    parser.add_argument("--clips", type=int, default=24, help="clips to time in each round")
    parser.add_argument("--rounds", type=int, default=3, help="of both checkouts in turn; the median counts")
    parser.add_argument("--videos", type=Path, metavar="FOLDER", help="where the videos lie, or are made and kept")
    return parser.parse_args(arguments)


def make_videos(folder: Path, size: tuple[int, int, str], count: int = 4) -> None:
    """Captioned videos of ten seconds, unless they are there."""
    import imageio_ffmpeg

    if folder.is_dir():
        return
    (folder / "videos").mkdir(parents=True)
    (folder / "labels").mkdir()
    width, height, rate = size
    for k in range(count):
        scene = (
            f"gradients=size={width}x{height}:rate=30:duration=10:speed=0.02:seed={k}:nb_colors=7,"
            f"noise=alls=12:allf=t,zoompan=z='1.2+0.1*sin(on/30)':d=1:fps=30:s={width}x{height}"
        )
        command = [imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", "-f", "lavfi", "-i", scene, "-t", "10"]
        command += ["-c:v", "libx264", "-b:v", rate, "-pix_fmt", "yuv420p", str(folder / "videos" / f"{k}.mp4")]
        subprocess.run(command, check=True, stdin=subprocess.DEVNULL)
        (folder / "labels" / f"{k}.txt").write_text(f"moving colours, number {k}\n")


def read(checkout: Path, python: str, folder: Path, workers: int, clips: int) -> dict[str, float]:
    """Figures of one round."""
    command = [python, "-c", READ, str(folder), str(workers), str(clips)]
    done = subprocess.run(command, cwd=checkout, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def main(arguments: list[str]) -> int:
    from tools.bench.measure import emit

    options = parse(arguments)
    builds = {"this": (REPO, sys.executable)}
    if options.other:
        builds["other"] = (options.other, str(options.other / ".venv" / "bin" / "python"))
    with tempfile.TemporaryDirectory(prefix="bench-reading-") as scratch:
        for size in options.sizes:
            folder = (options.videos or Path(scratch)) / size
            make_videos(folder, SIZES[size])
            for workers in options.workers:
                found: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
                for _ in range(options.rounds):
                    for name, (checkout, python) in builds.items():
                        for figure, value in read(checkout, python, folder, workers, options.clips).items():
                            found[name][figure].append(value)
                middle = {name: {k: statistics.median(v) for k, v in of.items()} for name, of in found.items()}
                for name, figures in middle.items():
                    emit(build=name, video=size, workers=workers, **figures)
                if options.other:
                    this, other = middle["this"], middle["other"]
                    emit(
                        video=size, workers=workers,
                        times_faster=this["frames_per_second"] / other["frames_per_second"],
                        times_less_processor=other["processor_s_a_clip"] / this["processor_s_a_clip"],
                    )  # fmt: skip
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
