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
from typing import Any, Self

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from sgm.cache.shards import CacheError
from sgm.cache.store import CacheStore, FileStamp, ScannedClip, Seen, frame_key, text_key, video_key
from sgm.data.clips import CLIP_FAULTS, ClipSettings, load_frames, to_unit_range
from sgm.data.loader import leave_signals_to_parent, meet_in_short_folder
from sgm.data.report import reason_of
from sgm.models.autoencoder import VideoAutoencoderInferenceWrapper
from sgm.modules.encoders.modules import FrozenT5Embedder
from sgm.modules.ops.choice import Kernels
from sgm.progress import Tally
from sgm.util import instantiate_from_config
from sgm.weights import DTYPES
from sgm.weights.save import is_finite
from sgm.weights.streaming import Download

SHARD_BYTES = 256 << 20
SHARD_SECONDS = 120.0  # longest time of work that an interruption can cost


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

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is None or not issubclass(kind, CacheError):
                self.flush()  # what is encoded is kept, also when interrupted
            self._wait()
        finally:
            self._thread.shutdown()


BATCH_PIXELS = 49 * 480 * 720  # one clip at full size
TEXTS_AT_ONCE = 64
CLIPS_WAITING = 256  # decoded clips of all shapes, waiting for their batch to fill; each holds a file descriptor


@dataclass(frozen=True)
class FillSettings:
    """How a cache is filled.

    Attributes:
        workers: decoding processes of this rank; 0 decodes here.
        batch_size: clips of one shape through the VAE at a time; None: as many as one clip of 49x480x720 has pixels, on
            a CPU one (several gain nothing there, and their memory is fetched from the system again and again).
        low_memory: the VAE takes a few frames at a time (the same result).
        rank, ranks: this process's share of the work.
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
    """What has to be encoded: the key of a video's content, its path, frames uint8 (f, 3, h, w)."""

    key: str
    path: str
    frames: Tensor


@dataclass(frozen=True)
class Examined:
    """What a worker found: the file's state, what it holds, and the clip unless there is none or it is known."""

    stamp: FileStamp
    seen: Seen
    clip: DecodedClip | None = None


def fill(
    store: CacheStore,
    model: Mapping[str, Any],
    clips: Sequence[ScannedClip],
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
    videos = [clip for clip in clips if not clip.key]
    _fill_videos(store, model, videos[how.rank :: how.ranks], clip_settings, how, say)


# --- captions -----------------------------------------------------------------------------------------------------


def _fill_texts(
    store: CacheStore, model: Mapping[str, Any], captions: Sequence[str], how: FillSettings, say: Callable[[str], None]
) -> None:
    if not captions:
        return
    embedder = _load_text_encoder(model, store.encoded_as, how.device)
    progress = Tally("cache", "captions", len(captions), say)
    with ShardWriter(store, "text") as writer:
        for start in range(0, len(captions), TEXTS_AT_ONCE):
            texts = captions[start : start + TEXTS_AT_ONCE]
            for text, embedding in zip(texts, embedder.encode(texts).cpu(), strict=True):
                writer.put(text_key(text), embedding)
            progress.update(len(texts))
    progress.finish()


def _load_text_encoder(model: Mapping[str, Any], dtype: str, device: torch.device) -> FrozenT5Embedder:
    entry = model["conditioner_config"]["params"]["emb_models"][0]
    with torch.device("meta"):
        embedder: FrozenT5Embedder = instantiate_from_config(
            {"target": entry["target"], "params": entry.get("params") or {}}
        )
    embedder.load_weights(device=device, dtype=DTYPES[dtype])
    return embedder.to(device, DTYPES[dtype]).eval().requires_grad_(False)


# --- videos -------------------------------------------------------------------------------------------------------


def _fill_videos(
    store: CacheStore,
    model: Mapping[str, Any],
    clips: Sequence[ScannedClip],
    settings: ClipSettings,
    how: FillSettings,
    say: Callable[[str], None],
) -> None:
    if not clips:
        return
    encode = Encoder(model, store.encoded_as, how)
    progress = Tally("cache", "videos", len(clips), say)
    encoded = set(store.names("video"))
    known = {key for key in encoded if store.holds_clip(key)}
    waiting: defaultdict[tuple[int, ...], list[DecodedClip]] = defaultdict(list)
    with ShardWriter(store, "video") as writer, ShardWriter(store, "frame") as pictures:
        for found in _examined(clips, settings, frozenset(known), how.workers):
            progress.update(1)
            writer.note(how.rank, found.stamp, found.seen)
            clip = found.clip
            if clip is None or clip.key in known:
                continue
            known.add(clip.key)
            if store.first_frames:
                pictures.put(frame_key(clip.key), clip.frames[0].clone())  # a view would keep the clip
            if clip.key in encoded:
                continue
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


class Encoder:
    """The VAE, loaded when the first clip asks for it. A batch's results are fetched when the next is under way."""

    def __init__(self, model: Mapping[str, Any], dtype: str, how: FillSettings):
        self._model, self._dtype, self._how = model, dtype, how
        self._stage: VideoAutoencoderInferenceWrapper | None = None
        self._pending: tuple[list[tuple[str, str]], Download] | None = None  # keys and paths, moments (b, t, 2c, h, w)

    @torch.no_grad()
    def __call__(self, clips: Sequence[DecodedClip], writer: ShardWriter) -> None:
        """Send clips of one shape through the VAE."""
        stage = self._stage = self._stage or self._load()
        device = self._how.device
        frames = torch.stack([clip.frames for clip in clips]).to(device)
        pixels = to_unit_range(frames).to(DTYPES[self._dtype]).transpose(1, 2)
        with torch.autocast(device.type, enabled=False):
            moments = stage.moments(pixels)
        coming = Download(moments.transpose(1, 2))
        self.finish(writer)
        self._pending = [(clip.key, clip.path) for clip in clips], coming

    def finish(self, writer: ShardWriter) -> None:
        """Hand the last batch to the writer. Raises CacheError: inf or nan in the moments."""
        if self._pending is None:
            return
        (names, coming), self._pending = self._pending, None
        for (key, path), moments in zip(names, coming.read(), strict=True):
            if not is_finite(moments):
                raise CacheError(
                    f"{path}: the VAE gave inf or nan in {self._dtype}; encode in "
                    "another type (tools/precompute_cache.py --dtype bf16 or fp32)"
                )
            writer.put(key, moments)

    def _load(self) -> VideoAutoencoderInferenceWrapper:
        from sgm.models.loading import load_first_stage

        with torch.device("meta"):
            stage: VideoAutoencoderInferenceWrapper = instantiate_from_config(self._model["first_stage_config"])
        load_first_stage(stage, device=self._how.device, dtype=DTYPES[self._dtype])
        stage = stage.to(self._how.device, DTYPES[self._dtype]).eval().requires_grad_(False)
        stage.set_low_memory(self._how.low_memory)
        stage.use_ops(self._how.kernels.vae)
        if self._how.kernels.fused:
            stage.set_channels_last()
        return stage


def _examined(
    clips: Sequence[ScannedClip], settings: ClipSettings, known: frozenset[str], workers: int
) -> Iterator[Examined]:
    """Videos as workers finish them, one after the other."""
    videos = _Videos([clip.path for clip in clips], settings, known)
    if workers:
        meet_in_short_folder()
    loader: DataLoader[Examined] = DataLoader(
        videos,
        batch_size=None,
        num_workers=workers,
        worker_init_fn=leave_signals_to_parent,
        prefetch_factor=4 if workers else None,
        in_order=not workers,
    )
    return iter(loader)


class _Videos(Dataset[Examined]):
    """Files to look at, in worker processes."""

    def __init__(self, paths: Sequence[str], settings: ClipSettings, known: frozenset[str]):
        self.paths, self.settings, self.known = paths, settings, known

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Examined:
        path = self.paths[index]
        stamp = FileStamp.of(path)
        try:
            key = video_key(path)
            clip = None if key in self.known else DecodedClip(key, path, load_frames(path, self.settings))
        except CLIP_FAULTS as fault:
            return Examined(stamp, Seen(None, reason_of(fault), getattr(fault, "passing", False)))
        except OSError as error:
            return Examined(stamp, Seen(None, f"it cannot be read: {error.strerror}", passing=True))
        return Examined(stamp, Seen(key), clip)
