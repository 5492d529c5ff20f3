"""How fast does training from a cache get its clips? `python tools/bench/loader.py`. Prints JSON lines.

Writes a cache of random encodings (default: the demo model's sizes) with the cache's own functions, and reads it with
the loader that training uses, first without workers, then with some. The limit is that number of threads which read the
same bytes in random order, each into one buffer, and do nothing else. `main_ms` is what a batch costs the training
process's main thread in CPU time: taking it over and, where there is a GPU, bringing it there in the model's type
(`place_ms`). With `--step-ms` that thread sleeps after each batch, as if a GPU were at work, and `wait_ms` says how
long it then still waits for the next one.
"""

from __future__ import annotations

import argparse
import cProfile
import os
import pstats
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np
import torch

from sgm.cache.dataset import EMBEDDING, MOMENTS, CachedBatches, CachedClips
from sgm.cache.fill import ShardWriter
from sgm.cache.store import CacheStore, FileStamp, Seen, scan_cached, text_key
from sgm.data.clips import ClipSettings
from sgm.data.dataset import ClipSource
from sgm.data.loader import ClipLoader, create_loader
from sgm.data.report import list_source
from sgm.weights import DTYPES
from tools.bench.measure import emit

DISTINCT = 32  # different random encodings; what they hold does not matter
WARM_UP = 8  # batches before the clock starts: workers are up, buffers made


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clips", type=int, default=2000, help="clips in the cache")
    parser.add_argument("--moments", type=_sizes, default=(13, 32, 16, 24), metavar="T,2C,H,W", help="of a clip")
    parser.add_argument("--text", type=_sizes, default=(64, 128), metavar="L,D", help="embedding of a caption")
    parser.add_argument("--storage", choices=sorted(DTYPES), default="fp16", help="type in the cache")
    parser.add_argument("--batch", type=int, default=96, help="clips in a batch")
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 1, 2, 8], metavar="N", help="numbers to try")
    parser.add_argument("--prefetch", type=int, default=4, help="batches that each worker reads ahead")
    parser.add_argument("--batches", type=int, default=100, help="batches to time with each number of workers")
    parser.add_argument("--step-ms", type=float, default=0.0, help="pause after each batch, in place of a step")
    parser.add_argument("--dtype", choices=sorted(DTYPES), default="bf16", help="type of the model")
    parser.add_argument("--folder", type=Path, help="where the cache is, or is written and left; default: nowhere")
    parser.add_argument("--profile", action="store_true", help="say what reading without workers spends its time on")
    return parser.parse_args(arguments)


def _sizes(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(","))


# --- the cache ----------------------------------------------------------------------------------------------------


def open_store(folder: Path, options: argparse.Namespace) -> CacheStore:
    """A cache of random encodings in `folder`, filled unless it is there."""
    identity = {"bench": [options.clips, *options.moments, *options.text]}
    store = CacheStore(folder / "cache", identity, options.storage)
    if len(store.names("video")) < options.clips:
        fill(store, folder / "data", options)
    return store


def fill(store: CacheStore, data: Path, options: argparse.Namespace) -> None:
    """Random encodings for files that are no videos."""
    for name in ("videos", "labels"):
        (data / name).mkdir(parents=True, exist_ok=True)
    draw = torch.Generator().manual_seed(0)
    moments, texts = (
        torch.randn(DISTINCT, *shape, generator=draw).to(DTYPES[options.storage])
        for shape in (options.moments, options.text)
    )
    with ShardWriter(store, "text") as captions, ShardWriter(store, "video") as videos:
        for k in range(options.clips):
            caption, path, key = f"clip number {k}", data / "videos" / f"{k:06d}.mp4", f"video:{k:032x}"
            path.touch()
            (data / "labels" / f"{k:06d}.txt").write_text(caption + "\n")
            captions.put(text_key(caption), texts[k % DISTINCT])
            videos.put(key, moments[k % DISTINCT])
            videos.note(0, FileStamp.of(path), Seen(key))


def open_clips(store: CacheStore) -> CachedClips:
    """The cache as the data set that training makes of it."""
    settings = ClipSettings()
    scan = scan_cached(store.folder.parent / "data", ClipSource(settings, list_source), store)
    return CachedClips(scan, store, settings)


# --- measuring ----------------------------------------------------------------------------------------------------


def raw_rate(store: CacheStore, clips: int, batch: int, threads: int) -> float:
    """Clips a second of threads that read the bytes of clips, a batch of them each, into a buffer each."""
    files = [os.open(path, os.O_RDONLY) for path in store.shards]
    entries = [(store.entry(f"video:{k:032x}"), store.entry(text_key(f"clip number {k}"))) for k in range(clips)]
    sizes = [int(np.prod(e.shape)) * e.dtype.itemsize for e in entries[0]]
    order = np.random.default_rng(0).permutation(clips)

    def read(chosen: np.ndarray) -> None:
        buffer = memoryview(bytearray(max(sizes)))
        for k in chosen:
            for entry, size in zip(entries[k], sizes, strict=True):
                os.preadv(files[entry.shard], [buffer[:size]], entry.begin)

    with ThreadPoolExecutor(threads) as pool:
        started = time.perf_counter()
        list(pool.map(read, np.array_split(order, max(1, clips // batch))))
        seconds = time.perf_counter() - started
    for file in files:
        os.close(file)
    return clips / seconds


def take(loader: ClipLoader, place: Callable[[torch.Tensor], object], pause: float) -> tuple[float, float]:
    """Seconds that one batch took: waiting for it, and placing it."""
    asked = time.perf_counter()
    batch = next(loader)
    came = time.perf_counter()
    for name in (MOMENTS, EMBEDDING):
        place(batch[name])
    placed = time.perf_counter()
    time.sleep(pause)
    return came - asked, placed - came


def bench(clips: CachedClips, store: CacheStore, workers: int, options: argparse.Namespace) -> None:
    """Time the loader with so many workers, and print its line."""
    dtype, cuda = DTYPES[options.dtype], torch.cuda.is_available()
    limit = raw_rate(store, options.clips, options.batch, max(1, workers))
    profile = cProfile.Profile() if options.profile and workers == 0 else None
    more = {"prefetch": options.prefetch, "seed": 1, "read": CachedBatches}
    with create_loader(clips, options.batch, workers, **more) as loader:

        def place(tensor: torch.Tensor) -> object:
            return tensor.to("cuda", non_blocking=True).to(dtype) if cuda else None

        for _ in range(WARM_UP + (workers * options.prefetch if options.step_ms else 0)):
            take(loader, place, options.step_ms / 1e3)
        began, busy = time.perf_counter(), time.thread_time()
        with profile or nullcontext():
            times = [take(loader, place, options.step_ms / 1e3) for _ in range(options.batches)]
        busy, seconds = time.thread_time() - busy, time.perf_counter() - began
    waits, places = zip(*times, strict=True)
    rate = options.batches * options.batch / seconds
    emit(
        workers=workers, clips_per_second=rate, clips_per_second_per_worker=rate / max(1, workers),
        limit_clips_per_second=limit, share_of_limit=rate / limit, main_ms=1e3 * busy / options.batches,
        place_ms=1e3 * float(np.median(places)), wait_ms=1e3 * float(np.mean(waits)),
        longest_wait_ms=1e3 * max(waits), device="cuda" if cuda else None,
    )  # fmt: skip
    if profile:
        pstats.Stats(profile, stream=sys.stderr).sort_stats("tottime").print_stats(20)


def main(arguments: list[str]) -> int:
    options = parse(arguments)
    with tempfile.TemporaryDirectory(prefix="bench-loader-") as scratch:
        store = open_store(options.folder or Path(scratch), options)
        clips = open_clips(store)
        item = clips[0]
        size = item[MOMENTS].nbytes + item[EMBEDDING].nbytes
        emit(clips=len(clips), bytes_a_clip=size, batch=options.batch, batch_mib=size * options.batch / 2**20)
        for workers in options.workers:
            bench(clips, store, workers, options)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
