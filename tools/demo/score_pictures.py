"""How well clips that begin with a picture keep to it, and to the motion that their prompts name.

    python tools/demo/make_dataset.py UNSEEN --count 64 --two 0 --pictures
    python sample_video.py configs/demo_i2v_infer.yaml --input-file UNSEEN/prompts.txt --output-dir SAMPLES
    python tools/demo/score_pictures.py UNSEEN --samples SAMPLES
    python tools/demo/score_pictures.py UNSEEN               the drawn clips: what the scorer makes of the truth

Of each clip: the first frame's PSNR to the picture; the motion, by `tools/demo/measure.py`; colour and shape of each
shape, and the background, as the last frame alone shows them. A sample's JSON names its picture, and the data set's
meta.jsonl says what that shows, whatever the prompt says.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from sgm.data.images import ImageError, read_image
from sgm.data.sources import VIDEO_SUFFIXES, list_files
from sgm.data.video_io import VideoError, probe, read_frames
from tools.bench.quality import psnr
from tools.demo.captions import parse
from tools.demo.make_dataset import PICTURES
from tools.demo.measure import measure
from tools.demo.score import ScoreError, compare

KEPT = ("colour", "shape", "background")  # to the last frame


@dataclass(frozen=True)
class Clip:
    """A clip, the picture that it began with, and what it is to show, in the captions' grammar."""

    file: str
    picture: str
    caption: str


@dataclass(frozen=True)
class Kept:
    """What a clip has: the first frame's PSNR in dB, and what is right, one entry a shape."""

    file: str
    caption: str
    psnr: float
    right: dict[str, list[bool]]


def score_clip(clip: Clip) -> Kept:
    """Raises ScoreError: the clip or its picture cannot be read."""
    try:
        frames = read_frames(clip.file, range(probe(clip.file).frames)).permute(0, 2, 3, 1).numpy()
        given = np.asarray(read_image(Path(clip.picture)))
    except (VideoError, ImageError) as error:
        raise ScoreError(str(error)) from error
    if given.shape != frames.shape[1:]:
        raise ScoreError(
            f"{clip.picture} is {given.shape[1]}x{given.shape[0]}, the clip {clip.file} is of another size"
        )
    said, ground = parse(clip.caption)
    moving = compare(said, ground, *measure(frames))
    last = compare([replace(words, motion=None) for words in said], ground, *measure(frames[-1:]))
    return Kept(
        clip.file,
        clip.caption,
        psnr(frames[0], given),
        {"motion": moving["motion"]} | {name: last[name] for name in KEPT},
    )


def find_clips(folder: Path, samples: Path | None) -> list[Clip]:
    """Samples from a data set's pictures, or its own clips. Raises ScoreError: there are none, or no such pictures."""
    try:
        lines = [json.loads(line) for line in (folder / "meta.jsonl").read_text("utf-8").splitlines()]
    except (OSError, json.JSONDecodeError) as error:
        raise ScoreError(f"{folder} is no data set of tools/demo/make_dataset.py --pictures: {error}") from error
    captions = {Path(line["file"]).stem: line["caption"] for line in lines}
    of_picture = {stem: folder / PICTURES / f"{stem}.png" for stem in captions}
    if samples is None:
        return [Clip(str(folder / "videos" / f"{s}.mp4"), str(of_picture[s]), text) for s, text in captions.items()]
    clips = []
    for video in list_files(samples, VIDEO_SUFFIXES):
        named = json.loads(video.with_suffix(".json").read_text("utf-8")).get("image")
        stem = Path(named or "").stem
        if named is None or stem not in captions or Path(named).resolve() != of_picture[stem].resolve():
            raise ScoreError(f"{video} began with {named or 'no picture'}, which is none of {folder / PICTURES}")
        clips.append(Clip(str(video), named, captions[stem]))
    if not clips:
        raise ScoreError(f"{samples}: no .mp4 files; name the --output-dir that sample_video.py had")
    return clips


def score_clips(clips: Sequence[Clip], workers: int = 1) -> list[Kept]:
    """Score all clips, in order."""
    if workers == 1:
        return [score_clip(clip) for clip in clips]
    with ProcessPoolExecutor(workers, get_context("spawn"), torch.set_num_threads, (1,)) as pool:
        return list(pool.map(score_clip, clips, chunksize=4))


def summarize(results: Sequence[Kept]) -> dict[str, float]:
    """Mean and least PSNR in dB; shares of what is right, `kept`: of clips whose colours and shapes all are."""
    levels = [result.psnr for result in results]
    shares = {name: [value for result in results for value in result.right[name]] for name in ("motion", *KEPT)}
    shares["kept"] = [all(result.right["colour"]) and all(result.right["shape"]) for result in results]
    found = {"clips": len(results), "psnr": float(np.mean(levels)), "least psnr": min(levels)}
    return found | {name: float(np.mean(values)) for name, values in shares.items()}


def table(summary: dict[str, float]) -> str:
    """The summary for a terminal."""
    shares = "\n".join(f"{name:12} {summary[name]:7.1%}" for name in ("motion", *KEPT, "kept"))
    return f"first frame: {summary['psnr']:.2f} dB, least {summary['least psnr']:.2f}\n{shares}"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dataset", type=Path, help="data set with pictures/")
    parser.add_argument("--samples", type=Path, help="output folder of sample_video.py; default: the data set's clips")
    parser.add_argument("--json", type=Path, help="write the summary and every clip's result here")
    parser.add_argument("--wrong", type=int, default=0, metavar="N", help="list the first N clips with a fault")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    args = parser.parse_args(arguments)
    try:
        clips = find_clips(args.dataset, args.samples)
        results = score_clips(clips, max(1, min(args.workers, len(clips))))
    except (ScoreError, OSError, ValueError) as error:
        print(f"score_pictures.py: {error}", file=sys.stderr)
        return 2
    summary = summarize(results)
    print(f"{len(results)} clips\n{table(summary)}")
    faulty = [result for result in results if not all(map(all, result.right.values()))]
    for result in faulty[: args.wrong]:
        missed = ", ".join(name for name, values in result.right.items() if not all(values))
        print(f"\n{result.file}: {missed}\n  said: {result.caption}")
    if args.json:
        args.json.write_text(json.dumps({"summary": summary, "clips": [asdict(r) for r in results]}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
