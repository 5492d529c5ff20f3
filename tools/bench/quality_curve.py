"""Table and picture of what `quality.py --curve` printed.

    python tools/bench/quality_curve.py 1.log 2.log 3.log --out curve.png

Several logs (of several seeds) count together. A point for each setting: part of the exact run's layers against the
PSNR of the decoded clips, mean and least. `--without SEED:PROMPT` leaves a clip out, of the log at that place (from 1).
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections import defaultdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from sgm.training.watch.curve import Curve, draw_curves

OURS, THEIRS = "reuse_error", "cache-dit"
PASS_S = 0.2216  # of one branch of CogVideoX-2B on an H200, of which an exact run of 50 steps makes 100


def read(logs: list[Path], without: set[tuple[int, int]]) -> dict[str, list[tuple[float, float]]]:
    """(part of the layers, PSNR) of each clip, by setting."""
    found: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for number, log in enumerate(logs, 1):
        for line in log.read_text(encoding="utf-8").splitlines():
            record = json.loads(line) if line.startswith("{") else {}
            if "psnr" in record and (number, record["prompt"]) not in without:
                found[record["variant"]].append((record["blocks"], record["psnr"]))
    return {name: clips for name, clips in found.items() if name.startswith((OURS, THEIRS))}


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("logs", nargs="+", type=Path)
    parser.add_argument("--out", type=Path, help="PNG")
    parser.add_argument("--without", action="append", default=[], metavar="SEED:PROMPT")
    options = parser.parse_args(arguments)
    without = {(int(a), int(b)) for a, b in (text.split(":") for text in options.without)}
    rows = []
    for name, clips in read(options.logs, without).items():
        share, figures = statistics.mean(part for part, _ in clips), [psnr for _, psnr in clips]
        rows.append((name, share, statistics.mean(figures), min(figures), len(clips)))
    rows.sort(key=lambda row: (row[0].startswith(THEIRS), row[1]))
    print("| rule | part of the layers | mean | least | clips | 2B on an H200, computed |\n|---|---|---|---|---|---|")
    for name, share, mean, least, count in rows:
        print(f"| `{name}` | {share:.3f} | {mean:.1f} dB | {least:.1f} dB | {count} | {100 * PASS_S * share:.1f} s |")
    if options.out:
        curves = []
        for start, dark, light in ((OURS, "#1f4e8c", "#9db8d9"), (THEIRS, "#c0392b", "#e8a9a0")):
            own = [row for row in rows if row[0].startswith(start)]
            curves.append(Curve(f"{start}: mean", [(share, mean) for _, share, mean, _, _ in own], dark, 3))
            curves.append(Curve("least", [(share, least) for _, share, _, least, _ in own], light, 3))
        draw_curves(options.out, "PSNR (dB)", [curve for curve in curves if curve.points], "part of the layers")
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
