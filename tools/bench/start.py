"""How long a command takes from its start: `python tools/bench/start.py [--against CHECKOUT]`. Prints JSON lines.

Each command runs in this checkout and, in turn with it, in another one; medians of both and their ratio come out, of
the wall clock and of processor time (`cpu_s`, of use where others load the machine). The first run is not counted.
The part `video` samples two short prompts and tells from what the program says when the first weights are read and the
first step begins, and what sampling and decoding take for the first video and for the second.

    python tools/bench/start.py --against ../before --against-python ../before/.venv/bin/python
    python tools/bench/start.py --only video --against ../before --config configs/cogvideox_2b_infer.yaml \\
        --fresh-kernels -- --set args.load=/weights/transformer ...
"""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import termios
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from sgm.places import PROJECT
from tools.bench.measure import emit

COMMANDS = {
    "help": ["sample_video.py", "--help"],
    "dry_run": ["sample_video.py", "configs/demo_infer.yaml", "--dry-run"],
    "dry_run_training": ["train_video.py", "configs/demo_lora.yaml", "--dry-run"],
}
PARTS = (*COMMANDS, "video")
PROMPTS = ("A small red star moves to the left.", "A large blue ring stands still.")
LOADED = re.compile(rb"load \w+: +([\d.]+) s")  # printed when a part has been read
STEPPING = re.compile(rb"sampling: +0%")

Figures = dict[str, float]


@dataclass(frozen=True)
class Checkout:
    """A copy of the project, and the Python that runs it."""

    folder: Path
    python: str

    def time(self, words: Sequence[str], environment: dict[str, str]) -> Figures:
        """Run a command of the checkout to its end.

        Raises:
            SystemExit: it failed; with its last words.
        """
        marks: Figures = {}
        said = b""
        start = time.perf_counter()
        ours, theirs = os.openpty()  # bars, which tell when the first step begins, are shown to terminals alone
        termios.tcsetwinsize(theirs, (25, 100))
        with (
            open(ours, "rb", buffering=0) as shown,
            subprocess.Popen(
                [self.python, *words], cwd=self.folder, env=environment, stdout=subprocess.DEVNULL, stderr=theirs
            ) as process,
        ):
            os.close(theirs)
            while chunk := _read(shown):
                said += chunk
                _mark(marks, said, time.perf_counter() - start)
            _, status, usage = os.wait4(process.pid, 0)
            process.returncode = os.waitstatus_to_exitcode(status)
        marks |= {"wall_s": time.perf_counter() - start, "cpu_s": usage.ru_utime + usage.ru_stime}
        if process.returncode:
            raise SystemExit(f"{self.folder}: {' '.join(words)} failed\n{said.decode(errors='replace')[-2000:]}")
        return marks


def _read(shown: BinaryIO) -> bytes:
    """What a terminal shows next; nothing once all programs have left it, which Linux reports as an error."""
    try:
        return shown.read(1 << 16)
    except OSError:
        return b""


def _mark(marks: Figures, said: bytes, now: float) -> None:
    loaded = LOADED.search(said)
    if loaded and "to_first_weights_s" not in marks:
        marks["to_first_weights_s"] = now - float(loaded[1])
    if "to_first_step_s" not in marks and STEPPING.search(said):
        marks["to_first_step_s"] = now


def run_part(part: str, checkout: Checkout, options: argparse.Namespace) -> Figures:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    if part != "video":
        return checkout.time(COMMANDS[part], environment)
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder)
        if options.fresh_kernels:
            environment["TRITON_CACHE_DIR"] = str(out / "triton")
        prompts = [word for prompt in PROMPTS for word in ("--prompt", prompt)]
        words = ["sample_video.py", options.config, *prompts, "--output-dir", str(out / "videos"), *options.arguments]
        return checkout.time(words, environment) | _stages(out / "videos")


def _stages(folder: Path) -> Figures:
    """Seconds of each video's sampling and decoding, by the programs' own records."""
    records = [json.loads(file.read_text()) for file in folder.rglob("*.json")]
    first, second = (r["seconds"] for r in sorted(records, key=lambda r: r["prompt_index"]))
    stages = ("sample", "decode")
    more = {f"first_more_to_{stage}_s": first[stage] - second[stage] for stage in stages}
    return {f"{name}_video_s": sum(r[s] for s in stages) for name, r in (("first", first), ("second", second))} | more


def bench(part: str, checkouts: Sequence[Checkout], options: argparse.Namespace) -> None:
    """A line for each figure of a part."""
    runs: list[list[Figures]] = []
    for k in range(options.runs + 1):
        figures = [run_part(part, checkout, options) for checkout in checkouts]
        if k:  # the first run fills the caches
            runs.append(figures)
    for name in runs[0][0]:
        ours, *theirs = (statistics.median(run[c][name] for run in runs) for c in range(len(checkouts)))
        compared = {"against": theirs[0], "ratio": ours / theirs[0]} if theirs else {}
        emit(part=part, figure=name, runs=options.runs, median=ours, **compared)


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=",".join(COMMANDS), help=f"parts, out of {','.join(PARTS)}")
    parser.add_argument("--against", type=Path, metavar="DIR", help="another checkout, measured in turn with this one")
    parser.add_argument("--python", default=sys.executable, help="runs this checkout")
    parser.add_argument("--against-python", metavar="PYTHON", help="runs the other one; default: the same")
    parser.add_argument("--runs", type=int, default=5, help="counted runs of each command")
    parser.add_argument("--config", default="configs/demo_infer.yaml", help="of the part video")
    parser.add_argument("--fresh-kernels", action="store_true", help="an empty Triton cache for each run of video")
    parser.add_argument("arguments", nargs="*", help="after --: handed to sample_video.py in the part video")
    options = parser.parse_args(arguments)
    unknown = [part for part in options.only.split(",") if part not in PARTS]
    if unknown:
        parser.error(f"--only: unknown part {unknown[0]!r}; choose from {', '.join(PARTS)}")
    if options.runs < 1:
        parser.error("--runs: 1 or more")
    return options


def main(arguments: list[str]) -> int:
    options = parse(arguments)
    checkouts = [Checkout(PROJECT, options.python)]
    if options.against:
        checkouts.append(Checkout(options.against, options.against_python or options.python))
    for part in options.only.split(","):
        bench(part, checkouts, options)
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
