"""Captioned clips for training as torch data sets, and the `data:` section that asks for one."""

from __future__ import annotations

import inspect
import json
import logging
import os
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from functools import partial
from pathlib import Path
from typing import Annotated, Any, TypeVar, overload

import numpy as np
import torch
from torch.utils.data import Dataset

from sgm.config import ConfigError
from sgm.data.buckets import parse_buckets
from sgm.data.clips import CLIP_FAULTS, CaptionError, ClipSettings, load_clip, picture_size
from sgm.data.frames import DatasetError, frame_indices  # noqa: F401  # `frame_indices`: the name that others use
from sgm.data.report import LEVELS, Report, append_broken, list_source, scan
from sgm.data.sources import ListedClip, Listing, base_of
from sgm.data.video_io import DECODE_TIMEOUT
from sgm.typed import Misfit, coerce, listing
from sgm.util import Role, get_obj_from_str, split_config

T = TypeVar("T")


class Packed(Sequence[T]):
    """A sequence whose items are made when they are asked for."""

    @abstractmethod
    def item(self, index: int) -> T:
        """The item at `index` from 0 to below the length."""

    @overload
    def __getitem__(self, index: int) -> T: ...
    @overload
    def __getitem__(self, index: slice) -> list[T]: ...
    def __getitem__(self, index: int | slice) -> T | list[T]:
        if isinstance(index, slice):
            return [self.item(k) for k in range(len(self))[index]]
        return self.item(range(len(self))[index])  # checks the range, counts negative ones from the end


class PackedShapes(Packed[tuple[int, ...]]):
    """Shapes of one length."""

    def __init__(self, shapes: Sequence[tuple[int, ...]]):
        self._values = np.array(shapes, np.int32)

    def __len__(self) -> int:
        return len(self._values)

    def item(self, index: int) -> tuple[int, ...]:
        return tuple(self._values[index].tolist())

    def equal(self, index: int) -> np.ndarray:
        """For each clip whether it has the shape of clip `index`."""
        return (self._values == self._values[index]).all(1)


class PackedStrings(Packed[str]):
    """Strings, also such that are no valid UTF-8 (file names)."""

    def __init__(self, strings: Sequence[str]):
        encoded = [os.fsencode(string) for string in strings]
        self._bytes = np.frombuffer(b"".join(encoded), np.uint8)
        self._ends = np.cumsum([0, *map(len, encoded)], dtype=np.int64)

    def __len__(self) -> int:
        return len(self._ends) - 1

    def item(self, index: int) -> str:
        start, end = self._ends[index], self._ends[index + 1]
        return os.fsdecode(self._bytes[start:end].tobytes())


VALIDATION = (*LEVELS, "report", "none")
logger = logging.getLogger(__name__)


class SFTDataset(Dataset):
    """Captioned videos of a folder (`videos/*.mp4`, `labels/*.txt`), manifest or shard, decoded when asked for.

    A clip that cannot be read is replaced by the next one in order, logged once, and added to the report. Parameters up
    to `skip_frms_num` are the original's.

    Args:
        data_dir: folder with the videos, nested folders included; or another source, see `sgm.data.sources`.
        video_size: [height, width] of the clips in pixels.
        fps, max_num_frames, skip_frms_num, sampling, missing_caption, decode_timeout, caption_lines, interlaced: see
            `ClipSettings`.
        file_order: "sorted", or "walk" for the file system's order, which the original uses.
        validate: "probe" opens every video first; "captions" reads the captions; "none" lists the files only;
            "report" takes the usable videos from the file `report` instead of looking, so that all ranks agree.
        report: file for `sgm.data.report`: written by "probe" and "captions", read by "report", and in all cases added
            to when a clip turns out broken later.
        buckets: `[[frames, height, width], ...]`: mixed clips, in place of video_size and max_num_frames; see
            `sgm.data.buckets`.
        max_crop: with buckets, the largest share of a picture that may be cropped away.
        images: take a folder's pictures too (`images/*.png`), as clips of one frame.
        txt_key: extension of the captions in shards.

    Raises:
        DatasetError: the source holds no usable clip, the report is of other data, or a manifest, shard or bucket is
            none.
    """

    def __init__(
        self,
        data_dir: str | Path,
        video_size: Sequence[int] = (480, 720),
        fps: float = 8,
        max_num_frames: int = 49,
        skip_frms_num: float = 3.0,
        sampling: str = "upstream",
        missing_caption: str = "skip",
        decode_timeout: float = DECODE_TIMEOUT,
        file_order: str = "sorted",
        validate: str = "probe",
        report: str | Path | None = None,
        buckets: Sequence[Sequence[int]] = (),
        max_crop: float = 0.25,
        images: bool = False,
        txt_key: str = "txt",
        caption_lines: str = "first",
        interlaced: str = "deinterlace",
    ):
        self.data_dir = Path(data_dir)
        self.settings = ClipSettings(
            picture_size(video_size), fps, max_num_frames, skip_frms_num, sampling, missing_caption, decode_timeout,
            parse_buckets(buckets), max_crop, caption_lines, interlaced,
        )  # fmt: skip
        self._list_source = partial(list_source, order=file_order, images=images, txt_key=txt_key)
        self.report_path = None if report is None else Path(report)
        self.report = self._examine(validate)
        self.report.require_usable()
        base = base_of(self.data_dir.absolute())
        self.base = base_of(self.data_dir)
        clips = self.report.usable
        self.paths = PackedStrings([os.path.relpath(clip.path, base) for clip in clips])
        # A manifest may name a caption for some clips only; the others have files.
        self._has_caption = np.array([clip.caption is not None for clip in clips], bool)
        held = self._has_caption.any()
        self._captions = PackedStrings([clip.caption or "" for clip in clips]) if held else None
        shapes = [clip.shape for clip in clips if clip.shape is not None]
        self.shapes = PackedShapes(shapes) if len(shapes) == len(self.paths) else None
        # One flag a clip, shared by all workers: none waits for a clip that another has found broken.
        self._broken = torch.zeros(len(self.paths), dtype=torch.uint8).share_memory_()
        self.report.usable = []  # `paths` and the others have them, in a form that forked workers do not copy
        self.prior = False

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """A clip: `mp4` float32 (f, 3, h, w) in [-1, 1], `txt`, `num_frames` (f), `fps` (that of the clip), and
        `path` and `index` of the clip that was in fact read, and `prior`, this object's attribute: whether the clips
        are to keep what the model knows.

        Raises:
            IndexError: no such clip.
            DatasetError: no clip at all can be read any more.
            CaptionError: a caption is missing and `missing_caption` is "error".
        """
        if not -len(self) <= index < len(self):
            raise IndexError(f"clip {index} of {len(self)}")
        for candidate in self._candidates(index % len(self)):
            if self._broken[candidate]:
                continue
            path = self.base / self.paths[candidate]
            try:
                frames, caption = load_clip(self._listed(candidate, path), self.settings)
            except CLIP_FAULTS as fault:
                if isinstance(fault, CaptionError) and self.settings.missing_caption == "error":
                    raise
                self._broken[candidate] = 1
                logger.warning("clip left out: %s", fault)
                if self.report_path:
                    append_broken(self.report_path, path, str(fault))
                continue
            size = {"num_frames": len(frames), "fps": self.settings.fps}
            return {"mp4": frames, "txt": caption, **size, "path": str(path), "index": candidate, "prior": self.prior}
        where = f"; see {self.report_path}" if self.report_path else ""
        raise DatasetError(f"{self.data_dir}: none of the {len(self)} clips can be read any more{where}")

    def _candidates(self, index: int) -> Iterator[int]:
        """The clip, then those that can take its place: of its shape first, since a batch may count on that."""
        yield index
        following = (index + 1 + np.arange(len(self) - 1)) % len(self)
        alike = np.ones(len(following), bool) if self.shapes is None else self.shapes.equal(index)[following]
        yield from map(int, (*following[alike], *following[~alike]))

    def _listed(self, index: int, path: Path) -> ListedClip:
        if self._captions is None or not self._has_caption[index]:
            return ListedClip(str(path))
        return ListedClip(str(path), self._captions[index])

    def _list_all(self, source: Path) -> Listing:
        return self._list_source(source)

    def _examine(self, validate: str) -> Report:
        if validate not in VALIDATION:
            raise ValueError(f"unknown validation {validate!r}; choose one of {', '.join(VALIDATION)}")
        if self.settings.buckets and validate not in ("probe", "report"):
            raise DatasetError(f"buckets need to know each video's length and size: validate 'probe', not {validate!r}")
        if validate == "report":
            return self._known_report()
        if validate == "none":
            clips = self._list_all(self.data_dir)
            return Report(str(self.data_dir), asdict(self.settings), clips, passed_over=clips.passed_over)
        report = scan(self.data_dir, self._list_all(self.data_dir.absolute()), self.settings, validate)
        if self.report_path:
            report.write(self.report_path)
        logger.info(report.summary())
        report.warn_of_passed_over()
        return report

    def _known_report(self) -> Report:
        if self.report_path is None:
            raise ValueError("validate='report' needs the file: give report=PATH")
        report = Report.read(self.report_path)
        if Path(report.data_dir).resolve() != self.data_dir.resolve():
            raise DatasetError(f"{self.report_path} is the report of {report.data_dir}, not of {self.data_dir}")
        settings = json.loads(json.dumps(asdict(self.settings)))  # as they come back from a file
        known = asdict(ClipSettings()) | report.settings  # one written before there was a setting lacks it
        other = sorted(name for name in settings if known[name] != settings[name])
        if other:
            raise DatasetError(f"{self.report_path} was made with another {', '.join(other)}; check the data set again")
        return report


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


# What the classes call otherwise than `ClipSettings` does.
SETTING_OF = {"skip_frms_num": "skip_frames", "image_size": "video_size", "num_frames": "max_num_frames"}

FROM_THE_RUN = ("data_dir", "report")
DATASET = Annotated[Mapping[str, Any], Role(Dataset, ("sgm.data.",), FROM_THE_RUN)]


@dataclass(frozen=True)
class DataSection:
    """A `data:` section whose parameters its class takes."""

    target: str
    cls: type
    params: dict[str, Any]

    @classmethod
    def parse(cls, data: Mapping[str, Any]) -> DataSection:
        """Raises ConfigError: no data set, or parameters that it does not take."""
        try:
            node = coerce(data, DATASET, "data")
        except Misfit as error:
            raise ConfigError(listing(error.problems, "the data section")) from error
        target, params = split_config(node)
        return cls(target, get_obj_from_str(target), params)

    def names_of(self, *settings: str) -> list[str]:
        """What the class calls these fields of `ClipSettings`."""
        names = {SETTING_OF[name]: name for name in SETTING_OF if name in inspect.signature(self.cls).parameters}
        return [names.get(setting, setting) for setting in settings]

    def settings(self) -> ClipSettings | None:
        """How clips are taken; None where the class is none of ours.

        Raises:
            ConfigError: wrong settings.
        """
        if not issubclass(self.cls, SFTDataset):
            return None
        renamed = {SETTING_OF.get(name, name): value for name, value in self.params.items()}
        given = {field.name: renamed[field.name] for field in fields(ClipSettings) if field.name in renamed}
        try:
            if "video_size" in given:
                given["video_size"] = picture_size(given["video_size"])
            given["buckets"] = parse_buckets(given.get("buckets") or ())
            return ClipSettings(**given)
        except ValueError as error:
            raise ConfigError(str(error)) from error
        except TypeError as error:
            raise ConfigError(f"data.params: a value of another kind than expected ({error})") from error


@dataclass(frozen=True)
class ClipSource:
    """How clips are taken from videos, and how a source's clips are listed."""

    settings: ClipSettings
    list_all: Callable[[Path], Listing]

    @classmethod
    def of(cls, section: DataSection) -> ClipSource:
        """What an `SFTDataset` of this section would do.

        Raises:
            ConfigError: a section of another class, or wrong settings.
        """
        settings = section.settings()
        if section.cls is not SFTDataset or settings is None:
            hint = "; it reads shards too (set txt_key)" if settings else ""
            raise ConfigError(
                f"only clips of data_video.SFTDataset can be checked and cached{hint}; data.target is {section.target}"
            )
        listing = {name: section.params[name] for name in ("images", "txt_key") if name in section.params}
        return cls(settings, partial(list_source, order=section.params.get("file_order", "sorted"), **listing))
