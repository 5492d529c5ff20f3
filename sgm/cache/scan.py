"""Which clips of a data folder a cache holds, and which have still to be encoded."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from sgm.cache.store import CacheStore, FileStamp, text_key
from sgm.data.clips import CaptionError, caption_of
from sgm.data.report import DatasetError, Rejection, first_reasons, nothing_in
from sgm.data.section import ClipSource


@dataclass(frozen=True)
class ScannedClip:
    """A video with its caption. `key`: of the video's content, "" unless that is encoded."""

    path: str
    caption: str
    key: str


@dataclass
class CacheScan:
    """What a cache knows of a folder's clips.

    Attributes:
        usable: both encodings are there. missing: something has to be encoded. rejected: with reasons.
        changed: how many of `missing` were in the cache, and have changed since.
        passed_over: see `sgm.data.sources.Listing`.
    """

    folder: str
    usable: list[ScannedClip] = field(default_factory=list)
    missing: list[ScannedClip] = field(default_factory=list)
    rejected: list[Rejection] = field(default_factory=list)
    changed: int = 0
    passed_over: dict[str, int] = field(default_factory=dict)

    def shortfall(self) -> str:
        """What is missing, in a few words."""
        why = f", of which {self.changed} changed since they were cached" if self.changed else ""
        return f"{len(self.missing)} of the clips in {self.folder}{why} (first: {self.missing[0].path})"


def scan_cached(folder: str | Path, source: ClipSource, store: CacheStore) -> CacheScan:
    """Which clips of a folder (or another source) the cache holds. Reads captions and file times, opens no video.

    Raises:
        DatasetError: no such source, nothing in it, or captions missing where `missing_caption` is "error".
    """
    folder = Path(folder).expanduser().absolute()
    clips = source.list_all(folder)
    missing_caption = source.settings.missing_caption
    scan, unnamed = CacheScan(str(folder), passed_over=clips.passed_over), []
    for clip in clips:
        try:
            caption = caption_of(clip, missing_caption, source.settings.caption_lines).text
        except CaptionError as fault:
            unnamed.append(Rejection(str(fault.path), fault.reason))
            scan.rejected.append(Rejection(clip.path, str(fault)))
            continue
        _classify(scan, clip.path, caption, store)
    if unnamed and missing_caption == "error":
        raise DatasetError(
            f"{folder}: {len(unnamed)} captions are missing or unreadable: {first_reasons(unnamed)}; add them, or set "
            "missing_caption to 'skip' or 'empty'"
        )
    if not (scan.usable or scan.missing or scan.rejected):
        raise DatasetError(nothing_in(folder, scan.passed_over))
    return scan


def _classify(scan: CacheScan, path: str, caption: str, store: CacheStore) -> None:
    try:
        stamp = FileStamp.of(path)
    except OSError as error:
        scan.rejected.append(Rejection(path, f"it cannot be read: {error.strerror}"))
        return
    seen = store.seen(stamp)
    if seen is not None and seen.rejected is not None:
        scan.rejected.append(Rejection(path, seen.rejected))
        return
    clip = ScannedClip(path, caption, seen.key if seen and seen.key and store.holds_clip(seen.key) else "")
    if clip.key and text_key(caption) in store:
        scan.usable.append(clip)
        return
    scan.changed += seen is None and store.was_seen_before(path)
    scan.missing.append(clip)
