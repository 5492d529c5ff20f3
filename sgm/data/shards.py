"""The original's class for webdataset shards, as a data set with places: any order, any rank, exact continuation."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from sgm.data.dataset import SFTDataset
from sgm.data.report import DatasetError
from sgm.data.sources import Listing
from sgm.data.video_io import DECODE_TIMEOUT


class VideoDataset(SFTDataset):
    """Captioned videos in `.tar` shards, read in place; parameters are the original's.

    The original streams shards through a shuffle buffer; here every clip has a place, so the order is that of the run's
    sampler. As there a clip starts at a random frame, another one each time (drawn from Python's `random`, which each
    worker seeds from the run's seed).

    Args:
        data_dir, path: a shard, or a folder with shards below it (`path` is the original's name).
        image_size: [height, width] in pixels.
        num_frames: frames of a clip, 4k + 1. fps: its rate. skip_frms_num: frames left out at both ends.
        include_dirs: folders below the path to take, comma-separated; None takes all.
        txt_key: extension of the captions, or their name in `NAME.json`.
        nshards, seed, shuffle_buffer, meta_names: of the original's streaming; without effect.
        sampling, validate, report, file_order, missing_caption, decode_timeout, buckets, max_crop, caption_lines,
            interlaced: see `SFTDataset`.
    """

    def __init__(
        self,
        data_dir: str | Path = "",
        image_size: Sequence[int] = (480, 720),
        num_frames: int = 49,
        fps: float = 8,
        skip_frms_num: float = 0.0,
        include_dirs: str | None = None,
        txt_key: str = "caption",
        path: str | Path | None = None,
        nshards: int | None = None,
        seed: int = 1,
        shuffle_buffer: int = 1000,
        meta_names: Sequence[str] | None = None,
        sampling: str = "random",
        missing_caption: str = "skip",
        decode_timeout: float = DECODE_TIMEOUT,
        file_order: str = "sorted",
        validate: str = "probe",
        report: str | Path | None = None,
        buckets: Sequence[Sequence[int]] = (),
        max_crop: float = 0.25,
        caption_lines: str = "first",
        interlaced: str = "deinterlace",
    ):
        self.include_dirs = [name.strip("/ ") for name in include_dirs.split(",")] if include_dirs else None
        super().__init__(
            path or data_dir, image_size, fps, num_frames, skip_frms_num, sampling, missing_caption, decode_timeout,
            file_order, validate, report, buckets, max_crop, False, txt_key, caption_lines, interlaced,
        )  # fmt: skip

    def _list_all(self, source: Path) -> Listing:
        clips = super()._list_all(source)
        if self.include_dirs is None:
            return clips
        folders = [str(source / name) + "/" for name in self.include_dirs]
        kept = Listing(clip for clip in clips if clip.path.startswith(tuple(folders)))
        if not kept:
            raise DatasetError(f"{source}: no clip below {', '.join(self.include_dirs)} (include_dirs)")
        return kept
