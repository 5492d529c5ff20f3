"""Cached clips: many of them start quickly, opened by no one, and take no memory."""

from __future__ import annotations

import shutil
from functools import partial
from pathlib import Path

import pytest
import torch
from torch.utils.data import ConcatDataset, Subset

from sgm.cache.dataset import EMBEDDING, MOMENTS, CachedBatches, CachedClips, in_lengths
from sgm.cache.shards import CacheError
from sgm.cache.store import CacheStore, FileStamp, Seen, scan_cached, text_key
from sgm.data.clips import ClipSettings
from sgm.data.dataset import ClipSource
from sgm.data.frames import DatasetError
from sgm.data.loader import collate, create_loader
from sgm.data.report import Report, list_source

SETTINGS = ClipSettings((64, 64), skip_frames=0)
SOURCE = ClipSource(SETTINGS, list_source)
cached_loader = partial(create_loader, read=CachedBatches)
COUNT = 1000
SHAPE = (4, 32, 8, 8)


def resident() -> int:
    """Bytes of this process in memory."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096


@pytest.fixture(scope="module")
def filled(tmp_path_factory) -> tuple[CacheStore, Path]:
    """Files that are no videos, and encodings of them: clip k has the value k."""
    root = tmp_path_factory.mktemp("cached")
    (root / "data" / "videos").mkdir(parents=True)
    (root / "data" / "labels").mkdir()
    store = CacheStore(root / "cache", {"a": 1}, "fp16")
    videos, seen = {}, []
    for k in range(COUNT):
        path = root / "data" / "videos" / f"{k:05d}.mp4"
        path.write_bytes(b"")
        (root / "data" / "labels" / f"{k:05d}.txt").write_text(f"caption {k}\n")
        videos[f"video:{k:032x}"] = torch.full((1,), float(k)).expand(SHAPE)
        seen.append((FileStamp.of(path), Seen(f"video:{k:032x}")))
    store.add("video", videos)
    store.add("text", {text_key(f"caption {k}"): torch.full((3, 4), float(k)) for k in range(COUNT)})
    store.record(0, seen)
    return CacheStore(root / "cache", {"a": 1}), root / "data"


def scanned(filled) -> CachedClips:
    store, data = filled
    return CachedClips(scan_cached(data, SOURCE, store), store, SETTINGS)


def test_every_clip_has_its_own_encodings(filled):
    dataset = scanned(filled)
    assert len(dataset) == COUNT and set(dataset.shapes) == {SHAPE}
    for k in (0, 7, COUNT - 1, -1):
        item = dataset[k]
        number = k % COUNT
        assert item["txt"] == f"caption {number}" and item["path"].endswith(f"{number:05d}.mp4")
        assert (item[MOMENTS] == number).all() and (item[EMBEDDING] == number).all()
        assert item[MOMENTS].dtype == torch.float16 and item["num_frames"] == 13
    with pytest.raises(IndexError):
        dataset[COUNT]


def test_clips_in_several_lengths_begin_as_the_whole_ones(tmp_path):
    """Clips of 4 and of 2 latent frames, as images, as 5 frames and as 13; whole, and a part of the set."""
    (tmp_path / "data" / "videos").mkdir(parents=True)
    (tmp_path / "data" / "labels").mkdir()
    store = CacheStore(tmp_path / "cache", {"a": 1}, "fp16")
    clips = {k: torch.randn(4 - 2 * (k % 2), 32, 8, 8).half() for k in range(6)}
    seen = []
    for k in clips:
        path = tmp_path / "data" / "videos" / f"{k}.mp4"
        path.write_bytes(b"")
        (tmp_path / "data" / "labels" / f"{k}.txt").write_text(f"caption {k}\n")
        seen.append((FileStamp.of(path), Seen(f"video:{k:032x}")))
    store.add("video", {f"video:{k:032x}": clip for k, clip in clips.items()})
    store.add("text", {text_key(f"caption {k}"): torch.full((3, 4), float(k)) for k in clips})
    store.record(0, seen)
    whole = scanned((CacheStore(tmp_path / "cache", {"a": 1}), tmp_path / "data"))
    for dataset, numbers in ((whole, list(range(6))), (Subset(whole, [1, 4, 5]), [1, 4, 5])):
        cut = in_lengths(dataset, [1, 5, 13])
        long = [k for k in numbers if k % 2 == 0]
        assert [(item["index"], item["num_frames"]) for item in (cut[n] for n in range(len(cut)))] == [
            *((k, 1) for k in numbers), *((k, 5) for k in numbers), *((k, 13) for k in long)
        ]  # fmt: skip
        for n in range(len(cut)):
            item = cut[n]
            assert torch.equal(item[MOMENTS], clips[item["index"]][: len(item[MOMENTS])])
            assert (item[EMBEDDING] == item["index"]).all()
    with cached_loader([in_lengths(whole, [1, 5])], 2, 1, seed=1) as loader:
        kinds = {tuple(next(loader)[MOMENTS].shape) for _ in range(12)}
    assert kinds == {(2, 1, 32, 8, 8), (2, 2, 32, 8, 8)}
    assert [item[MOMENTS].shape[0] for item in (whole[0], whole[1])] == [4, 2]
    with pytest.raises(DatasetError, match="cache_lengths"):
        in_lengths(whole, [17])


@pytest.mark.parametrize("workers", [0, 1])
def test_reading_all_clips_leaves_nothing_in_memory(filled, workers):
    """32 MB pass through; what is kept stays far below."""
    dataset = scanned(filled)
    with cached_loader(dataset, 8, workers, seed=1) as loader:
        for _ in range(20):
            next(loader)
        before = resident()
        for _ in range(2 * COUNT // 8):
            batch = next(loader)
        assert resident() - before < 12 << 20
    assert batch[MOMENTS].shape == (8, *SHAPE)


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_threads_give_the_batches_that_collation_gives(filled, workers):
    """Of parts and joins of data sets too; and a later loader goes on where an earlier one stood."""
    whole = scanned(filled)
    parts = [Subset(whole, range(3, 60, 2)), Subset(ConcatDataset([whole, whole]), [COUNT + 5, 7, 2 * COUNT - 1])]
    items = ConcatDataset(parts)
    with cached_loader(parts, 4, workers, seed=3, rank=1, world_size=2) as loader:
        batches = [next(loader) for _ in range(10)]
        state = loader.state_dict()
        following = next(loader)
        loader.load_state_dict(state)
        assert torch.equal(next(loader)["index"], following["index"])
        order = loader.sampler
    for k, batch in enumerate(batches):
        expected = collate([items[order.at(2 * (4 * k + j) + 1)] for j in range(4)])
        assert list(batch) == list(expected) and batch[MOMENTS].dtype == torch.float16
        for name, values in expected.items():
            assert torch.equal(batch[name], values) if isinstance(values, torch.Tensor) else batch[name] == values


def test_each_thread_reads_so_many_batches_ahead(filled):
    with create_loader(scanned(filled), 4, 2, prefetch=3, read=CachedBatches) as loader:
        next(loader)
        assert (loader.consumed, loader.sampler.consumed) == (4, 2 * 3 * 4)
        next(loader)
        assert (loader.consumed, loader.sampler.consumed) == (8, 4 + 2 * 3 * 4)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_shard_that_goes_away_ends_the_run_with_its_name(filled, tmp_path, workers):
    store, data = filled
    moved = shutil.copytree(store.folder, tmp_path / "cache")
    copy = CacheStore(moved, {"a": 1})
    dataset = CachedClips(scan_cached(data, SOURCE, copy), copy, SETTINGS)
    shutil.rmtree(moved)
    with cached_loader(dataset, 4, workers) as loader, pytest.raises(CacheError, match="video-.*was the cache moved"):
        next(loader)


def test_what_the_cache_does_not_hold_is_told_apart(filled, tmp_path):
    store, _ = filled
    data = tmp_path / "data"
    (data / "videos").mkdir(parents=True)
    (data / "videos" / "new.mp4").write_bytes(b"x")
    (data / "videos" / "new.txt").write_text("not here\n")
    (data / "labels").mkdir()
    (data / "labels" / "new.txt").write_text("caption 1\n")
    (data / "videos" / "mute.mp4").write_bytes(b"x")
    scan = scan_cached(data, SOURCE, store)
    assert [clip.caption for clip in scan.missing] == ["caption 1"] and "1 of the clips" in scan.shortfall()
    assert "no such caption file" in scan.rejected[0].reason and not scan.usable
    with pytest.raises(DatasetError, match="none of the 1 videos"):
        CachedClips(scan, store, SETTINGS)
    with pytest.raises(DatasetError, match="captions are missing"):
        scan_cached(data, ClipSource(ClipSettings((64, 64), missing_caption="error"), list_source), store)
    (tmp_path / "empty").mkdir()
    with pytest.raises(DatasetError, match="no videos"):
        scan_cached(tmp_path / "empty", SOURCE, store)
    (tmp_path / "empty" / "a.png").write_bytes(b"")
    with pytest.raises(DatasetError, match="no videos.*1 .png .*images=true"):
        scan_cached(tmp_path / "empty", SOURCE, store)


def test_what_is_passed_over_is_in_the_report(filled, tmp_path, caplog):
    store, data = filled
    scan = scan_cached(data, SOURCE, store)
    assert scan.passed_over == {}
    CachedClips(scan, store, SETTINGS, tmp_path / "none.jsonl")
    assert "passed_over" not in (tmp_path / "none.jsonl").read_text() and not caplog.text
    scan.passed_over = {".png": 2}
    CachedClips(scan, store, SETTINGS, tmp_path / "some.jsonl", write_report=False)
    assert not caplog.text  # one rank says it
    CachedClips(scan, store, SETTINGS, tmp_path / "some.jsonl")
    assert Report.read(tmp_path / "some.jsonl").passed_over == {".png": 2}
    assert "passed over: 2 .png (pictures: data.params.images=true)" in caplog.text
