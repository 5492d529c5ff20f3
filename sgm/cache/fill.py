"""Filling a cache: captions through the text encoder, then videos, decoded by workers, through the VAE in batches.

Axes: b batch, f pixel frames, t latent frames, c channels, h w height and width.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from sgm.cache.dataset import CaptionedVideo
from sgm.cache.store import CacheError, CacheStore, FileStamp, Seen, text_key, video_key
from sgm.data.clips import CLIP_FAULTS, ClipSettings, load_frames, to_unit_range
from sgm.data.loader import prepare_worker
from sgm.models.diffusion import DTYPES
from sgm.modules.ops.choice import Kernels
from sgm.util import instantiate_from_config

SHARD_BYTES = 256 << 20
SHARD_SECONDS = 120.0  # longest time of work that an interruption can cost
BATCH_PIXELS = 49 * 480 * 720  # one clip at full size
TEXTS_AT_ONCE = 64
CLIPS_WAITING = 256  # decoded clips of all shapes, waiting for their batch to fill; each holds a file descriptor


@dataclass(frozen=True)
class FillSettings:
    """How a cache is filled.

    Attributes:
        device: of the encoders.
        workers: decoding processes of this rank; 0 decodes here.
        batch_size: clips of one shape through the VAE at a time; None: as many as one clip of 49x480x720 has pixels, on
            a CPU one (several gain nothing there, and their memory is fetched from the system again and again).
        low_memory: the VAE takes a few frames at a time (the same result).
        rank, ranks: this process's share of the work.
        kernels: of the VAE.
    """

    device: torch.device
    workers: int = 8
    batch_size: int | None = None
    low_memory: bool = False
    rank: int = 0
    ranks: int = 1
    kernels: Kernels = Kernels()

    def batch_of(self, frames: Tensor) -> int:
        """Clips like these (f, 3, h, w) in a batch."""
        fitting = 1 if self.device.type == "cpu" else max(1, min(64, BATCH_PIXELS * 3 // frames.numel()))
        return self.batch_size or fitting


@dataclass(frozen=True)
class DecodedClip:
    """What a worker found: the file's state, the key of its content, and frames uint8 (f, 3, h, w) unless the moments
    are known already, or the reason why there is no clip, which may be `passing`."""

    stamp: FileStamp
    key: str | None
    frames: Tensor | None
    reason: str = ""
    passing: bool = False


def fill(
    store: CacheStore,
    model: Mapping[str, Any],
    clips: Sequence[CaptionedVideo],
    clip_settings: ClipSettings,
    how: FillSettings,
    say: Callable[[str], None],
) -> None:
    """Encode what is missing of `clips` (the same list on all ranks); this rank takes its share.

    Raises:
        WeightsError, NonFiniteEmbeddingError, CacheError, SaveError: see their places.
    """
    captions = sorted({clip.caption for clip in clips if text_key(clip.caption) not in store})
    _fill_texts(store, model, captions[how.rank :: how.ranks], how, say)
    videos = [clip for clip in clips if clip.key is None]
    _fill_videos(store, model, videos[how.rank :: how.ranks], clip_settings, how, say)


# --- captions -----------------------------------------------------------------------------------------------------


def _fill_texts(
    store: CacheStore, model: Mapping[str, Any], captions: Sequence[str], how: FillSettings, say: Callable[[str], None]
) -> None:
    if not captions:
        return
    embedder = _load_text_encoder(model, store.encoded_as, how.device)
    progress = Progress("captions", len(captions), say)
    with ShardWriter(store, "text") as writer:
        for start in range(0, len(captions), TEXTS_AT_ONCE):
            texts = captions[start : start + TEXTS_AT_ONCE]
            for text, embedding in zip(texts, embedder.encode(texts).cpu(), strict=True):
                writer.put(text_key(text), embedding)
            progress.add(len(texts))
    progress.finish()


def _load_text_encoder(model: Mapping[str, Any], dtype: str, device: torch.device) -> Any:
    entry = model["conditioner_config"]["params"]["emb_models"][0]
    with torch.device("meta"):
        embedder = instantiate_from_config({"target": entry["target"], "params": entry.get("params") or {}})
    embedder.load_weights(device=device, dtype=DTYPES[dtype])
    return embedder.to(device, DTYPES[dtype]).eval().requires_grad_(False)


# --- videos -------------------------------------------------------------------------------------------------------


def _fill_videos(
    store: CacheStore,
    model: Mapping[str, Any],
    clips: Sequence[CaptionedVideo],
    settings: ClipSettings,
    how: FillSettings,
    say: Callable[[str], None],
) -> None:
    if not clips:
        return
    encode = Encoder(model, store.encoded_as, how)
    progress = Progress("videos", len(clips), say)
    known = set(store.names("video"))
    waiting: defaultdict[tuple[int, ...], list[DecodedClip]] = defaultdict(list)
    with ShardWriter(store, "video") as writer:
        for clip in _decoded(clips, settings, frozenset(known), how.workers):
            progress.add(1)
            if clip.frames is None or clip.key in known:
                writer.note(how.rank, clip.stamp, Seen(clip.key, clip.reason or None, clip.passing))
                continue
            known.add(clip.key)
            writer.note(how.rank, clip.stamp, Seen(clip.key))
            same = waiting[tuple(clip.frames.shape)]
            same.append(clip)
            if len(same) == how.batch_of(clip.frames):
                encode(same, writer)
                same.clear()
            elif sum(map(len, waiting.values())) > CLIPS_WAITING:
                longest = max(waiting.values(), key=len)
                encode(longest, writer)
                longest.clear()
        for same in waiting.values():
            if same:
                encode(same, writer)
        encode.finish(writer)
    progress.finish()


class _Encoded:
    """A batch on its way back from the GPU."""

    def __init__(self, clips: list[DecodedClip], moments: Tensor):
        self.clips = [DecodedClip(clip.stamp, clip.key, None) for clip in clips]
        self._moments = moments
        self._arrived = torch.cuda.Event() if moments.is_pinned() else None
        if self._arrived is not None:
            self._arrived.record()

    def fetch(self) -> Tensor:
        """Moments (b, t, 2c, h, w) on the CPU."""
        if self._arrived is not None:
            self._arrived.synchronize()
        return self._moments


class Encoder:
    """The VAE, loaded when the first clip asks for it. A batch's results are fetched when the next is under way."""

    def __init__(self, model: Mapping[str, Any], dtype: str, how: FillSettings):
        self._model, self._dtype, self._how = model, dtype, how
        self._stage: Any = None
        self._pending: _Encoded | None = None

    @torch.no_grad()
    def __call__(self, clips: Sequence[DecodedClip], writer: ShardWriter) -> None:
        """Send clips of one shape through the VAE."""
        stage = self._stage = self._stage or self._load()
        device = self._how.device
        frames = torch.stack([clip.frames for clip in clips]).to(device)  # type: ignore[misc]
        pixels = to_unit_range(frames).to(DTYPES[self._dtype]).transpose(1, 2)
        with torch.autocast(device.type, enabled=False):
            moments = stage.moments(pixels)
        encoded = _Encoded(list(clips), moments.transpose(1, 2).to("cpu", non_blocking=True))
        self.finish(writer)
        self._pending = encoded

    def finish(self, writer: ShardWriter) -> None:
        """Hand the last batch to the writer.

        Raises:
            CacheError: inf or nan in the moments.
        """
        if self._pending is None:
            return
        encoded, self._pending = self._pending, None
        for clip, moments in zip(encoded.clips, encoded.fetch(), strict=True):
            if not bool(torch.isfinite(moments).all()):
                path = clip.stamp.path
                raise CacheError(f"{path}: the VAE gave inf or nan in {self._dtype}; encode in another type")
            writer.put(clip.key, moments)  # type: ignore[arg-type]

    def _load(self) -> Any:
        from sgm.models.loading import load_first_stage

        with torch.device("meta"):
            stage = instantiate_from_config(self._model["first_stage_config"])
        load_first_stage(stage, device=self._how.device, dtype=DTYPES[self._dtype])
        stage = stage.to(self._how.device, DTYPES[self._dtype]).eval().requires_grad_(False)
        stage.set_low_memory(self._how.low_memory)
        stage.use_ops(self._how.kernels.vae)
        if self._how.kernels.fused:
            stage.set_channels_last()
        return stage


def _decoded(
    clips: Sequence[CaptionedVideo], settings: ClipSettings, known: frozenset[str], workers: int
) -> Iterator[DecodedClip]:
    """Clips as workers finish them, one after the other."""
    parallel = {"prefetch_factor": 4, "in_order": False} if workers else {}
    loader = DataLoader(
        _Videos([clip.path for clip in clips], settings, known),
        batch_size=None,
        num_workers=workers,
        collate_fn=_as_it_is,
        worker_init_fn=prepare_worker,
        **parallel,  # type: ignore[arg-type]
    )
    return iter(loader)


def _as_it_is(item: DecodedClip) -> DecodedClip:
    return item


class _Videos(Dataset):
    """Files to look at, in worker processes."""

    def __init__(self, paths: Sequence[str], settings: ClipSettings, known: frozenset[str]):
        self.paths, self.settings, self.known = paths, settings, known

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> DecodedClip:
        path = self.paths[index]
        stamp = FileStamp.of(path)
        try:
            key = video_key(path)
            frames = None if key in self.known else load_frames(path, self.settings)
        except CLIP_FAULTS as fault:
            reason = getattr(fault, "reason", str(fault))
            return DecodedClip(stamp, None, None, reason, getattr(fault, "passing", False))
        except OSError as error:
            return DecodedClip(stamp, None, None, f"it cannot be read: {error.strerror}", passing=True)
        return DecodedClip(stamp, key, frames)


# --- writing ------------------------------------------------------------------------------------------------------


class ShardWriter:
    """Collects tensors into shards, which one thread writes while the next one fills; on leaving, all is on the disk.

    What is noted of files goes to the disk together with the shard in hand. A note whose moments come later, or never
    come, does no harm: a clip counts as cached only when its moments are there.
    """

    def __init__(self, store: CacheStore, kind: str):
        self._store, self._kind = store, kind
        self._tensors: dict[str, Tensor] = {}
        self._notes: list[tuple[int, FileStamp, Seen]] = []
        self._bytes, self._since = 0, time.monotonic()
        self._thread = ThreadPoolExecutor(1, "shard")
        self._running: Future | None = None

    def put(self, name: str, tensor: Tensor) -> None:
        """Take a tensor; raises what an earlier shard's writing raised."""
        self._tensors[name] = tensor
        self._bytes += tensor.nbytes
        if self._bytes >= SHARD_BYTES or time.monotonic() - self._since > SHARD_SECONDS:
            self.flush()

    def note(self, rank: int, stamp: FileStamp, seen: Seen) -> None:
        """Record what a file holds, with the shard in hand."""
        self._notes.append((rank, stamp, seen))

    def flush(self) -> None:
        """Start to write what was collected."""
        self._wait()
        tensors, notes = self._tensors, self._notes
        self._tensors, self._notes, self._bytes, self._since = {}, [], 0, time.monotonic()
        self._running = self._thread.submit(partial(self._write, tensors, notes))

    def _write(self, tensors: dict[str, Tensor], notes: list[tuple[int, FileStamp, Seen]]) -> None:
        if tensors:
            self._store.add(self._kind, tensors)
        for rank in {rank for rank, _, _ in notes}:
            self._store.record(rank, [(stamp, seen) for r, stamp, seen in notes if r == rank])

    def _wait(self) -> None:
        running, self._running = self._running, None
        if running is not None:
            running.result()

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, kind: type | None, *_: object) -> None:
        try:
            if kind is None or not issubclass(kind, CacheError):
                self.flush()  # what is encoded is kept, also when interrupted
            self._wait()
        finally:
            self._thread.shutdown()


class Progress:
    """A line now and then: how much is done, how fast, how long it will take."""

    def __init__(self, what: str, total: int, say: Callable[[str], None], every: float = 10.0):
        self.what, self.total, self._say, self._every = what, total, say, every
        self.done, self._start = 0, time.monotonic()
        self._next = self._start + every

    def add(self, count: int) -> None:
        self.done += count
        now = time.monotonic()
        if now >= self._next:
            self._next = now + self._every
            rate = self.done / (now - self._start)
            left = (self.total - self.done) / rate
            self._say(f"cache: {self.done} of {self.total} {self.what}, {rate:.1f} a second, {left:.0f} s to go")

    def finish(self) -> None:
        seconds = time.monotonic() - self._start
        self._say(f"cache: {self.done} {self.what} in {seconds:.1f} s ({self.done / max(seconds, 1e-9):.1f} a second)")
