"""The cache's folder: what is written is read back, and what is wrong is refused with the reason."""

from __future__ import annotations

import contextlib
import json
import pickle
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from safetensors.torch import load_file

from sgm.cache import shards
from sgm.cache import store as store_module
from sgm.cache.shards import CacheError, ShardReader
from sgm.cache.store import CacheStore, FileStamp, Seen, text_key, video_key

IDENTITY = {"vae weights": "abc", "video_size": [16, 32], "fps": 8}


def tensors(count: int) -> dict[str, torch.Tensor]:
    return {f"video:{k:032x}": torch.randn(2, 4, 3, 3 + k % 2) for k in range(count)}


def test_tensors_come_back_from_any_process(tmp_path):
    store = CacheStore(tmp_path / "c", IDENTITY, "fp32")
    made = tensors(5)
    store.add("video", made)
    store.add("text", {text_key("a"): torch.ones(3, 8)})
    opened = CacheStore(tmp_path / "c", IDENTITY)
    assert (opened.storage, opened.names("video")) == ("fp32", frozenset(made))
    reader = pickle.loads(pickle.dumps(ShardReader(opened.shards)))
    for name, tensor in made.items():
        assert torch.equal(reader.read(opened.entry(name)), tensor)
    shard = next(p for p in opened.shards if p.name.startswith("video"))
    assert torch.equal(load_file(shard)[f"video:{0:032x}"], made[f"video:{0:032x}"])  # any safetensors reader


def test_more_shards_than_open_files(tmp_path, monkeypatch):
    monkeypatch.setattr("sgm.cache.shards.OPEN_FILES", 2)
    store = CacheStore(tmp_path, IDENTITY)
    made = tensors(6)
    for name, tensor in made.items():
        store.add("video", {name: tensor})
    reader = ShardReader(store.shards)
    for name in [*made, *reversed(made)]:
        assert torch.equal(reader.read(store.entry(name)), made[name].half())
    assert reader._open.cache_info().currsize == 2


def test_the_shard_that_was_not_read_for_longest_is_closed(tmp_path, monkeypatch):
    monkeypatch.setattr("sgm.cache.shards.OPEN_FILES", 2)
    opened = []
    file = shards._OpenFile
    monkeypatch.setattr(shards, "_OpenFile", lambda path: opened.append(path) or file(path))
    store = CacheStore(tmp_path, IDENTITY)
    made = tensors(3)
    for name, tensor in made.items():
        store.add("video", {name: tensor})
    reader = ShardReader(store.shards)
    first, second, third = (store.entry(name) for name in made)
    for entry in (first, second, first, third, first, second):
        reader.read(entry)
    assert opened == [reader.shards[entry.shard] for entry in (first, second, third, second)]


def test_two_commands_that_encode_the_same_clips_leave_each_other_s_places_right(tmp_path):
    """Each replaces the other's shard by one in which the clips arrived in another order."""
    first, second = CacheStore(tmp_path, IDENTITY, "fp32"), CacheStore(tmp_path, IDENTITY, "fp32")
    made = tensors(5)
    first.add("video", made)
    second.add("video", dict(reversed(made.items())))
    reader = ShardReader(first.shards)
    assert all(torch.equal(reader.read(first.entry(name)), tensor) for name, tensor in made.items())
    assert len(list(tmp_path.glob("video-*"))) == 1


def test_two_threads_that_add_at_once_give_each_shard_its_own_number(tmp_path, monkeypatch):
    """As videos and first frames do: while one shard's head is read, the other is ready to be taken in, too."""
    opened, written = CacheStore(tmp_path, IDENTITY, "fp32"), threading.Barrier(2)
    save, read = store_module.save_safetensors, store_module.read_index
    monkeypatch.setattr(store_module, "save_safetensors", lambda *args: (save(*args), written.wait(10)))
    both = threading.Barrier(2)

    def slow(path, number):
        with contextlib.suppress(threading.BrokenBarrierError):
            both.wait(0.2)  # where two could be in here, they meet
        return read(path, number)

    monkeypatch.setattr(store_module, "read_index", slow)
    made = {"video": tensors(2), "frame": {"frame:0": torch.ones(3, 2, 2), "frame:1": torch.zeros(3, 2, 2)}}
    with ThreadPoolExecutor(2) as threads:
        list(threads.map(opened.add, made, made.values()))
    reader = ShardReader(opened.shards)
    for name, tensor in {**made["video"], **made["frame"]}.items():
        assert torch.equal(reader.read(opened.entry(name)), tensor)


def test_a_passing_fault_is_forgotten_when_the_cache_is_opened_again(tmp_path):
    bad, slow = FileStamp("/bad.mp4", 1, 2), FileStamp("/slow.mp4", 1, 2)
    first, second = CacheStore(tmp_path, IDENTITY), CacheStore(tmp_path, IDENTITY)
    first.record(0, [(bad, Seen(None, "too short")), (slow, Seen(None, "took too long", passing=True))])
    second.refresh()  # another rank of the same run
    assert first.seen(slow) == second.seen(slow) == Seen(None, "took too long", passing=True)
    later = CacheStore(tmp_path, IDENTITY)
    later.refresh()
    assert later.seen(slow) is None and later.seen(bad) == Seen(None, "too short")
    later.record(1, [(slow, Seen("video:1"))])
    later.record(0, [(FileStamp("/other.mp4", 1, 2), Seen(None, "took too long", passing=True))])
    later.refresh()
    assert later.seen(slow) == Seen("video:1") and later.seen(FileStamp("/other.mp4", 1, 2)).passing


def test_files_are_known_by_size_and_time(tmp_path):
    video = tmp_path / "a.mp4"
    video.write_bytes(b"one")
    store = CacheStore(tmp_path / "c", IDENTITY)
    store.record(0, [(FileStamp.of(video), Seen(video_key(video)))])
    with (tmp_path / "c" / "files-00000.jsonl").open("a") as file:
        file.write('{"path": "cut o')  # a crash
    store.record(0, [(FileStamp("/other.mp4", 1, 2), Seen(None, "too short"))])
    opened = CacheStore(tmp_path / "c", IDENTITY)
    assert opened.seen(FileStamp.of(video)) == Seen(video_key(video))
    assert opened.seen(FileStamp("/other.mp4", 1, 2)) == Seen(None, "too short")
    video.write_bytes(b"two!")
    assert opened.seen(FileStamp.of(video)) is None and opened.was_seen_before(video)


def test_a_foreign_identity_is_refused_unless_it_cannot_be_known(tmp_path):
    CacheStore(tmp_path, IDENTITY)
    with pytest.raises(CacheError, match=r"fps \(cache: 8; this run: 16\)"):
        CacheStore(tmp_path, {**IDENTITY, "fps": 16})
    with pytest.raises(CacheError, match="new \\(cache: None"):
        CacheStore(tmp_path, {**IDENTITY, "new": 1})
    assert CacheStore(tmp_path, {**IDENTITY, "vae weights": None}).identity["vae weights"] == "abc"
    with pytest.raises(CacheError, match="vae weights are missing"):
        CacheStore(tmp_path / "new", {**IDENTITY, "vae weights": None})


@pytest.mark.parametrize("storage", ["fp16", "bf16"])
def test_values_outside_the_storage_type_are_refused(tmp_path, storage):
    store = CacheStore(tmp_path, IDENTITY, storage)
    if storage == "bf16":
        store.add("text", {text_key("a"): torch.full((2,), 1e6)})
        return
    with pytest.raises(CacheError, match="outside fp16.*bf16"):
        store.add("text", {text_key("a"): torch.full((2,), 1e6)})


def test_damaged_shards_and_those_of_other_caches_are_refused(tmp_path):
    store = CacheStore(tmp_path / "a", IDENTITY)
    store.add("video", tensors(2))
    (shard,) = store.shards
    other = CacheStore(tmp_path / "b", {**IDENTITY, "fps": 9})
    (other.folder / shard.name).write_bytes(shard.read_bytes())
    with pytest.raises(CacheError, match="another cache"):
        other.refresh()
    reader = ShardReader(store.shards)
    shard.write_bytes(shard.read_bytes()[:-4])
    with pytest.raises(CacheError, match="ends too early"):
        reader.read(store.entry(f"video:{1:032x}"))
    with pytest.raises(CacheError, match="delete it"):
        CacheStore(tmp_path / "a", IDENTITY)
    shard.write_bytes(b"x" * 100)
    with pytest.raises(CacheError, match="damaged"):
        CacheStore(tmp_path / "a", IDENTITY)


def test_a_head_that_is_none_is_refused(tmp_path):
    (tmp_path / "cache.json").write_text("[]")
    with pytest.raises(CacheError, match="not the head"):
        CacheStore(tmp_path, IDENTITY)
    content = {"format": 99, "storage": "fp16", "encoded_as": "fp32", "identity": {}}
    (tmp_path / "cache.json").write_text(json.dumps(content))
    with pytest.raises(CacheError, match="format 99"):
        CacheStore(tmp_path, IDENTITY)
