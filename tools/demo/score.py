"""How often generated clips show what their captions say: colour, shape, size, motion, fill, background.

    python tools/demo/score.py FOLDER                     a data set (videos/, labels/), or sampled clips with JSON
    python tools/demo/score.py --pairs FILE.jsonl         lines {"file": mp4 beside FILE, "caption" or "prompt": text}
    python tools/demo/score.py FOLDER --shuffled          every clip against another one's caption: what chance gives
    python tools/demo/score.py FOLDER --meant tools/demo/other_words.jsonl
                                                          prompts in other words: lines {"prompt", "caption"} say what
                                                          they mean; a data set's meta.jsonl has such lines as well

Captions must be of the demo's grammar (`tools/demo/captions.py`). Each named shape is one count for colour, shape,
size, fill and motion; each clip one for number of shapes, pattern and colours of the background. "all" asks that a
clip has everything right. The last column is what guessing evenly would give.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from sgm.data.clips import CaptionError, caption_of
from sgm.data.sources import VIDEO_SUFFIXES, ListedClip, list_files
from sgm.data.video_io import VideoError, probe, read_frames
from tools.demo.attributes import COLOURS, MOTIONS, PATTERNS, SHAPES, SIZES
from tools.demo.captions import Said, parse
from tools.demo.measure import SeenGround, SeenShape, measure

# Choices that a guess has; None where these differ from clip to clip.
FILLS = ("plain", "striped")
OF_SHAPE = {
    "colour": len(COLOURS), "shape": len(SHAPES), "size": len(SIZES), "motion": len(MOTIONS), "fill": len(FILLS)
}  # fmt: skip
OF_CLIP = {"number": 2, "pattern": len(PATTERNS), "background": None, "all": None}
EITHER_WAY = ("horizontal stripes", "vertical stripes", "checker")  # patterns whose two colours have no order


class ScoreError(ValueError):
    """Clips or captions that cannot be scored."""


@dataclass(frozen=True)
class Pair:
    """A clip and the caption it was made from."""

    file: str
    caption: str


@dataclass(frozen=True)
class Result:
    """What one clip has right: attribute -> one entry for each time it was asked for."""

    file: str
    caption: str
    right: dict[str, list[bool]]
    seen: list[dict]
    ground: dict


def compare(
    said: Sequence[Said], ground: tuple[str, str, str], seen: Sequence[SeenShape], seen_ground: SeenGround
) -> dict[str, list[bool]]:
    """Which of the attributes that a caption names a clip shows; motion is left out where none is named or seen."""
    right: dict[str, list[bool]] = {name: [] for name in (*OF_SHAPE, *OF_CLIP)}
    for words, shape in _matched(said, seen):
        right["colour"].append(shape is not None and shape.colour == words.colour)
        right["shape"].append(shape is not None and shape.shape == words.shape)
        right["size"].append(shape is not None and shape.size == words.size)
        right["fill"].append(shape is not None and shape.fill == words.fill)
        if words.motion is not None:
            right["motion"].append(shape is not None and shape.motion == words.motion)
    right["number"].append(len(said) == len(seen))
    right["pattern"].append(seen_ground.pattern == ground[0])
    right["background"].append(_same_ground(ground, seen_ground))
    right["all"].append(all(all(values) for values in right.values()))
    return right


def _matched(said: Sequence[Said], seen: Sequence[SeenShape]) -> list[tuple[Said, SeenShape | None]]:
    """Give each named shape the seen one that fits it best, each seen one once."""
    if len(said) == 2 and len(seen) == 2:
        straight = sum(_likeness(a, b) for a, b in zip(said, seen, strict=True))
        crossed = sum(_likeness(a, b) for a, b in zip(said, reversed(seen), strict=True))
        return list(zip(said, seen if straight >= crossed else reversed(seen), strict=True))
    if len(said) == 1:
        # Against the largest, so that a clip with more shapes has no second chance.
        return [(said[0], seen[0] if seen else None)]
    if not seen:
        return [(words, None) for words in said]
    best = max(range(len(said)), key=lambda i: _likeness(said[i], seen[0]))
    return [(words, seen[0] if i == best else None) for i, words in enumerate(said)]


def _likeness(words: Said, shape: SeenShape) -> int:
    return 2 * (words.colour == shape.colour) + (words.shape == shape.shape)


def _same_ground(said: tuple[str, str, str], seen: SeenGround) -> bool:
    colours, found = said[1:], (seen.background, seen.second)
    if said[0] in EITHER_WAY:
        return sorted(colours) == sorted(found)
    return colours == found


def score_pair(pair: Pair) -> Result:
    """Measure one clip and compare. Raises ScoreError."""
    try:
        said, ground = parse(pair.caption)
        frames = read_frames(pair.file, range(probe(pair.file).frames)).permute(0, 2, 3, 1).numpy()
    except (VideoError, ValueError) as error:
        raise ScoreError(f"{pair.file}: {error}") from error
    seen, seen_ground = measure(frames)
    right = compare(said, ground, seen, seen_ground)
    return Result(pair.file, pair.caption, right, [asdict(shape) for shape in seen], asdict(seen_ground))


def find_pairs(folder: Path) -> list[Pair]:
    """Clips of a folder with their captions: from the JSON beside a clip if there is one, else from `labels`."""
    pairs = []
    for video in list_files(folder, VIDEO_SUFFIXES):
        record = video.with_suffix(".json")
        try:
            if record.is_file():
                text = json.loads(record.read_text())["prompt"]
            else:
                text = caption_of(ListedClip(str(video))).text
        except (CaptionError, KeyError, json.JSONDecodeError) as error:
            raise ScoreError(f"{video}: no caption ({error})") from error
        pairs.append(Pair(str(video), text))
    if not pairs:
        raise ScoreError(f"{folder}: no .mp4 files; give a data set, a folder of samples, or --pairs FILE")
    return pairs


def read_pairs(path: Path) -> list[Pair]:
    """Clips and captions from JSON Lines, such as the generator's meta.jsonl."""
    pairs = []
    for number, line in enumerate(path.read_text().splitlines(), start=1):
        try:
            fields = json.loads(line)
            text = fields["caption"] if "caption" in fields else fields["prompt"]
            pairs.append(Pair(str(path.parent / fields["file"]), text))
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise ScoreError(f"{path}, line {number}: needs 'file' and 'caption' ({error!r})") from error
    if not pairs:
        raise ScoreError(f"{path} is empty")
    return pairs


def translated(pairs: Sequence[Pair], path: Path) -> list[Pair]:
    """The clips with captions of the demo's grammar in place of prompts in other words, as the lines of `path` say."""
    meant = {}
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            fields = json.loads(line)
            meant[fields.get("prompt", fields["caption"])] = fields["caption"]
        except (json.JSONDecodeError, KeyError, AttributeError) as error:
            raise ScoreError(f"{path}, line {number}: needs 'prompt' and 'caption' ({error!r})") from error
    unknown = [pair.caption for pair in pairs if pair.caption not in meant]
    if unknown:
        raise ScoreError(f"{path} does not say what {len(unknown)} of the prompts mean, such as {unknown[0]!r}")
    return [Pair(pair.file, meant[pair.caption]) for pair in pairs]


def shuffled(pairs: Sequence[Pair], seed: int = 0) -> list[Pair]:
    """The clips with captions of other clips, none with its own."""
    if len(pairs) < 2:
        raise ScoreError("one clip cannot be shuffled")
    order = np.random.default_rng(seed).permutation(len(pairs))
    following = dict(zip(order.tolist(), np.roll(order, -1).tolist(), strict=True))
    return [Pair(pair.file, pairs[following[i]].caption) for i, pair in enumerate(pairs)]


def score_pairs(pairs: Sequence[Pair], workers: int = 1) -> list[Result]:
    """Score all clips, in order."""
    if workers == 1:
        return [score_pair(pair) for pair in pairs]
    with ProcessPoolExecutor(workers, get_context("spawn"), torch.set_num_threads, (1,)) as pool:
        return list(pool.map(score_pair, pairs, chunksize=4))


def summarize(results: Sequence[Result]) -> dict[str, dict[str, float]]:
    """Per attribute: `asked`, `right`, `accuracy`, and `chance`."""
    asked, right = Counter(), Counter()
    for result in results:
        for name, values in result.right.items():
            asked[name] += len(values)
            right[name] += sum(values)
    choices = OF_SHAPE | OF_CLIP
    return {
        name: {
            "asked": asked[name],
            "right": right[name],
            "accuracy": right[name] / asked[name],
            "chance": 1 / choices[name] if choices[name] else 0.0,
        }
        for name in choices
        if asked[name]
    }


def table(summary: dict[str, dict[str, float]]) -> str:
    """The summary for a terminal."""
    lines = [f"{'':12} {'right':>6} {'asked':>6} {'accuracy':>9} {'chance':>7}"]
    for name, row in summary.items():
        chance = f"{row['chance']:7.1%}" if row["chance"] else "      -"
        lines.append(f"{name:12} {row['right']:6d} {row['asked']:6d} {row['accuracy']:9.1%} {chance}")
    return "\n".join(lines)


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?", help="data set, or folder of sampled clips")
    parser.add_argument("--pairs", type=Path, help="JSON Lines with clips and captions, instead of a folder")
    parser.add_argument("--meant", type=Path, help="JSON Lines with a caption for each prompt in other words")
    parser.add_argument("--shuffled", action="store_true", help="score against the captions of other clips")
    parser.add_argument("--json", type=Path, help="write the summary and every clip's result here")
    parser.add_argument("--wrong", type=int, default=0, metavar="N", help="list the first N clips with a fault")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    args = parser.parse_args(arguments)
    if (args.folder is None) == (args.pairs is None):
        parser.error("give either a FOLDER or --pairs FILE")
    return args


def main(arguments: list[str] | None = None) -> int:
    args = parse_arguments(arguments)
    try:
        pairs = read_pairs(args.pairs) if args.pairs else find_pairs(args.folder)
        if args.meant:
            pairs = translated(pairs, args.meant)
        if args.shuffled:
            pairs = shuffled(pairs)
        results = score_pairs(pairs, max(1, min(args.workers, len(pairs))))
    except (ScoreError, OSError) as error:
        print(f"score.py: {error}", file=sys.stderr)
        return 2
    summary = summarize(results)
    print(f"{len(results)} clips{', shuffled captions' if args.shuffled else ''}\n{table(summary)}")
    faulty = [result for result in results if not result.right["all"][0]]
    for result in faulty[: args.wrong]:
        missed = ", ".join(name for name, values in result.right.items() if name != "all" and not all(values))
        print(f"\n{result.file}: {missed}\n  said: {result.caption}\n  seen: {result.seen} {result.ground}")
    if args.json:
        args.json.write_text(json.dumps({"summary": summary, "clips": [asdict(r) for r in results]}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
