"""Write a data set of captioned clips of moving shapes, with the truth about each.

    python tools/demo/make_dataset.py OUT --count 1000 --withheld tools/demo/withheld.json

gives OUT/videos/000000.mp4 ..., OUT/labels/000000.txt ..., and OUT/meta.jsonl, one line a clip: file, caption, and
every attribute (`ClipSpec.from_dict(line["spec"])` renders it again). Clip i depends on the seed, i and the options
only, so a longer set begins with the shorter one. With --other-words SHARE that share of the labels is worded more
freely than captions are (tools/demo/wordings.py), and with --motion-words SHARE that share says the motion alone;
meta.jsonl then has the label as "prompt" beside the caption. --pictures adds each clip's first frame,
OUT/pictures/000000.png ..., and OUT/prompts.txt with a line LABEL@@pictures/000000.png for each.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import sys
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import numpy as np
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from sgm.data import video_out
from tools.demo.attributes import MOTIONS, STYLES, read_withheld, write_withheld
from tools.demo.captions import motion_caption
from tools.demo.shapes import ClipSpec, caption, render_clip, sample_spec
from tools.demo.wordings import HELD_OUT, TRAINING, reword

FRAME_COUNTS = (1, 17, 33, 49)
PICTURES = "pictures"  # folder of first frames


@dataclass(frozen=True)
class Options:
    """What decides a clip and its caption beside its number. Fields as in `sample_spec`."""

    seed: int = 0
    frames: int = 49
    height: int = 128
    width: int = 192
    fps: float = 8
    two: float = 0.25
    withheld: frozenset[tuple[str, str, str]] = frozenset()
    only_withheld: bool = False
    style: str | None = None
    motions: tuple[str, ...] = MOTIONS


@dataclass(frozen=True)
class Words:
    """Which labels are worded freely: a share, of which `held_out` as the text encoder's training never sees them; and
    which say the motion alone, as one does beside a picture: the share `motion`, taken first.
    """

    share: float = 0.0
    held_out: bool = False
    motion: float = 0.0


def make_clip(index: int, options: Options) -> tuple[ClipSpec, str]:
    """Clip number `index` of a data set, and its caption."""
    rng = np.random.default_rng([options.seed, index])
    settings = {name: value for name, value in vars(options).items() if name != "seed"}
    spec = sample_spec(rng, **settings)
    return spec, caption(spec, rng)


def write_video(path: Path, frames: np.ndarray, fps: float, crf: int = 8) -> None:
    """Write frames, uint8 (f, h, w, 3), as H.264 in yuv420p; the same bytes each time."""
    options = ["-crf", str(crf), "-preset", "fast", "-threads", "1", "-bitexact", "-f", "mp4"]
    video_out.write_video(path, frames, fps, options)


def other_words(index: int, spec: ClipSpec, seed: int, words: Words) -> str | None:
    """A free wording of clip number `index`, or its motion alone, for the shares of clips that get these."""
    if random.Random(f"{seed}/{index}/motion").random() < words.motion:
        return motion_caption(spec, np.random.default_rng([seed, index, 1]))
    rng = random.Random(f"{seed}/{index}")
    if rng.random() >= words.share:
        return None
    return reword(spec, rng, HELD_OUT if words.held_out else TRAINING)


def write_clip(index: int, out: Path, options: Options, crf: int, words: Words, pictures: bool = False) -> str:
    """Write one clip and its label, and its first frame if wanted; returns its line of meta.jsonl."""
    spec, text = make_clip(index, options)
    other = other_words(index, spec, options.seed, words)
    name = f"{index:06d}"
    frames = render_clip(spec)
    write_video(out / "videos" / f"{name}.mp4", frames, spec.fps, crf)
    if pictures:
        Image.fromarray(frames[0]).save(out / PICTURES / f"{name}.png")
    (out / "labels" / f"{name}.txt").write_text((other or text) + "\n", encoding="utf-8")
    line = {"file": f"videos/{name}.mp4", "caption": text} | ({"prompt": other} if other else {})
    return json.dumps(line | {"spec": asdict(spec)})


def write_dataset(
    out: Path,
    count: int,
    options: Options,
    workers: int = 1,
    crf: int = 8,
    words: Words | None = None,
    pictures: bool = False,
) -> Iterator[int]:
    """Write a data set; yields the number of clips done. `pictures`: first frames and prompts with these, too."""
    for folder in ("videos", "labels", *([PICTURES] if pictures else [])):
        (out / folder).mkdir(parents=True, exist_ok=True)
    task = partial(write_clip, out=out, options=options, crf=crf, words=words or Words(), pictures=pictures)
    temporary = out / ".meta.jsonl"
    with temporary.open("w", encoding="utf-8") as meta:
        if workers == 1:
            lines = map(task, range(count))
            yield from _write_lines(meta, lines)
        else:
            with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
                yield from _write_lines(meta, pool.map(task, range(count), chunksize=4))
    temporary.replace(out / "meta.jsonl")
    if pictures:
        texts = ((out / "labels" / f"{k:06d}.txt").read_text("utf-8").strip() for k in range(count))
        lines = [f"{text}@@{PICTURES}/{k:06d}.png\n" for k, text in enumerate(texts)]
        (out / "prompts.txt").write_text("".join(lines), encoding="utf-8")


def _write_lines(meta, lines) -> Iterator[int]:
    for done, line in enumerate(lines, start=1):
        meta.write(line + "\n")
        yield done


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, nargs="?", help="folder of the data set")
    parser.add_argument("--count", type=int, default=100, help="clips to write (100)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--frames", type=int, choices=FRAME_COUNTS, default=49, help="frames of each clip (49)")
    parser.add_argument("--height", type=int, default=128)
    parser.add_argument("--width", type=int, default=192)
    parser.add_argument("--fps", type=float, default=8)
    parser.add_argument("--two", type=float, default=0.25, help="share of clips with two shapes (0.25)")
    parser.add_argument("--withheld", type=Path, help="list of (shape, colour, motion) to leave out")
    parser.add_argument("--only-withheld", action="store_true", help="make clips of the withheld list only")
    parser.add_argument("--style", choices=tuple(STYLES), help="a look that clips never have otherwise")
    parser.add_argument("--motion", choices=MOTIONS, action="append", help="this motion only (may be repeated)")
    parser.add_argument("--other-words", type=float, default=0.0, metavar="SHARE", help="share of freely worded labels")
    parser.add_argument("--motion-words", type=float, default=0.0, metavar="SHARE", help="share that says motion alone")
    parser.add_argument("--pictures", action="store_true", help="write first frames, and prompts with them, as well")
    parser.add_argument("--held-out-words", action="store_true", help="of these, forms that no training text has")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--crf", type=int, default=8, help="H.264 quality, lower is better (8)")
    parser.add_argument("--write-withheld", type=Path, metavar="FILE", help="write the withheld list and stop")
    args = parser.parse_args(arguments)
    if args.out is None and args.write_withheld is None:
        parser.error("name the folder OUT to write to")
    if args.only_withheld and (args.withheld is None or args.frames == 1):
        parser.error("--only-withheld needs --withheld FILE, and more than one frame")
    if args.motion and (args.only_withheld or args.frames == 1):
        parser.error("--motion goes with neither --only-withheld, whose list names motions, nor one frame, without any")
    if args.motion and args.style and STYLES[args.style].motion:
        parser.error(f"--motion does not go with --style {args.style}, which has a motion of its own")
    if args.count < 1 or args.workers < 1 or min(args.height, args.width) < 32 or args.height % 2 or args.width % 2:
        parser.error("--count and --workers must be positive, --height and --width even and at least 32")
    if args.seed < 0 or not 0 <= args.two <= 1 or not args.fps > 0:
        parser.error("--seed must not be negative, --two lie in 0 to 1, --fps be positive")
    if not 0 <= args.other_words <= 1 or (args.held_out_words and not args.other_words):
        parser.error("--other-words must lie in 0 to 1, and be above 0 for --held-out-words")
    if not 0 <= args.motion_words <= 1 or (args.motion_words and args.frames == 1):
        parser.error("--motion-words must lie in 0 to 1, and is for clips of more than one frame")
    return args


def main(arguments: list[str] | None = None) -> int:
    args = parse_arguments(arguments)
    if args.write_withheld is not None:
        write_withheld(args.write_withheld)
        return 0
    try:
        withheld = read_withheld(args.withheld) if args.withheld else frozenset()
    except (ValueError, OSError) as error:
        print(f"make_dataset.py: {error}", file=sys.stderr)
        return 2
    fields = (args.seed, args.frames, args.height, args.width, args.fps, args.two)
    options = Options(*fields, withheld, args.only_withheld, args.style, tuple(args.motion or MOTIONS))
    words = Words(args.other_words, args.held_out_words, args.motion_words)
    workers = min(args.workers, args.count)
    for done in write_dataset(args.out, args.count, options, workers, args.crf, words, args.pictures):
        if done % 100 == 0 or done == args.count:
            print(f"{done} of {args.count} clips", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
