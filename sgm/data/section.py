"""A configuration's `data:` section: which class, how it takes clips from videos, how it lists those of a source."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import Annotated, Any

from torch.utils.data import Dataset

from sgm.config import ConfigError
from sgm.data.buckets import parse_buckets
from sgm.data.clips import ClipSettings, picture_size
from sgm.data.dataset import SFTDataset
from sgm.data.scan import list_source
from sgm.data.sources import Listing
from sgm.typed import Misfit, coerce, listing
from sgm.util import Role, get_obj_from_str, split_config

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
