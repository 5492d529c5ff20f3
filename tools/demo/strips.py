"""One picture of many sampled clips: a strip of frames for each, its prompt above.

python tools/demo/strips.py outputs/demo --out demo/strips.jpg --count 12
python tools/demo/strips.py teacher student few_steps --out beside.jpg    # the clips of a prompt below one another
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont, ImageOps

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from sgm.data.images import ImageError, read_image
from sgm.data.video_io import VideoError, probe, read_frames

GAP = 2  # pixels between frames
TEXT = 15  # height of a line of text


def strip(frames: np.ndarray, text: str, width: int) -> Image.Image:
    """Frames (k, h, w, 3), uint8, side by side and together `width` pixels wide, under their text."""
    count, height, frame_width, _ = frames.shape
    each = (width - GAP * (count - 1)) // count
    scaled = (each, round(height * each / frame_width))
    picture = Image.new("RGB", (width, TEXT + scaled[1] + 3 * GAP), "white")
    ImageDraw.Draw(picture).text((0, 0), text, "black", ImageFont.load_default(size=TEXT - 3))
    for k, frame in enumerate(frames):
        picture.paste(Image.fromarray(frame).resize(scaled, Image.Resampling.LANCZOS), (k * (each + GAP), TEXT + GAP))
    return picture


def spread(video: Path, count: int) -> np.ndarray:
    """`count` frames of a video from first to last, uint8 (count, h, w, 3). Raises VideoError."""
    numbers = np.linspace(0, probe(video).frames - 1, count).round().astype(int).tolist()
    return read_frames(video, numbers).permute(0, 2, 3, 1).numpy()


def _tiles(video: Path, facts: dict, count: int) -> np.ndarray:
    """`count` frames of a clip, and in front of them the picture that it began with, where there was one."""
    frames = spread(video, count)
    if not facts.get("image"):
        return frames
    height, width = frames.shape[1:3]
    given = ImageOps.fit(read_image(Path(facts["image"])), (width, height))
    return np.concatenate([np.asarray(given)[None], frames])


def picture(folders: Sequence[Path], count: int, frames: int, width: int) -> Image.Image:
    """The first `count` clips of runs of `sample_video.py`, in the order of their prompts; pictures in front.

    Clips of one prompt and number in several runs stand below one another, in the order of `folders`.

    Raises:
        VideoError: no clips, or one that cannot be read. ImageError: a picture that is not there any more.
    """
    rows = []
    for place, folder in enumerate(folders):
        videos = list(folder.rglob("*.mp4"))
        if not videos:
            raise VideoError(folder, "no .mp4 files in it; name the --output-dir that sample_video.py had")
        of_run = [(json.loads(video.with_suffix(".json").read_text("utf-8")), video) for video in videos]
        of_run.sort(key=lambda row: (row[0]["prompt_index"], row[0]["sample_index"]))
        rows += [(k, place, video, facts) for k, (facts, video) in enumerate(of_run[:count])]
    strips = []
    for _, place, video, facts in sorted(rows, key=lambda row: row[:2]):
        said = facts["prompt"] if len(folders) == 1 else f"{folders[place].name}: {facts['prompt']}"
        strips.append(strip(_tiles(video, facts, frames), said, width))
    whole = Image.new("RGB", (width, sum(part.height for part in strips)), "white")
    top = 0
    for part in strips:
        whole.paste(part, (0, top))
        top += part.height
    return whole


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", type=Path, help="output folders of sampling runs, of the same prompts")
    parser.add_argument("--out", type=Path, required=True, help="picture to write (.jpg, .png, .webp)")
    parser.add_argument("--count", type=int, default=12, help="clips (12)")
    parser.add_argument("--frames", type=int, default=7, help="frames of each clip (7)")
    parser.add_argument("--width", type=int, default=896, help="pixels (896)")
    args = parser.parse_args(arguments)
    if min(args.count, args.frames, args.width) < 1:
        parser.error("--count, --frames and --width must be positive")
    try:
        made = picture(args.folders, args.count, args.frames, args.width)
    except (OSError, VideoError, ImageError, KeyError, ValueError) as error:
        print(f"strips.py: {error}", file=sys.stderr)
        return 2
    args.out.parent.mkdir(parents=True, exist_ok=True)
    made.save(args.out, quality=85)
    return 0


if __name__ == "__main__":
    sys.exit(main())
