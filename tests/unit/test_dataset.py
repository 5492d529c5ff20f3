import json
import logging
import multiprocessing
import os
import pickle
import random
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import imageio_ffmpeg
import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Dataset

from sgm.data.clips import CaptionError, caption_of, caption_path, to_unit_range
from sgm.data.dataset import PackedStrings, SFTDataset
from sgm.data.frames import DatasetError
from sgm.data.loader import collate, create_loader
from sgm.data.report import Report, append_broken, per_thread
from sgm.data.sources import VIDEO_SUFFIXES, ListedClip, list_clips, list_files

SMALL = {"video_size": [16, 32], "max_num_frames": 9, "skip_frms_num": 0}


def write_video(path: Path, level: int, frames: int = 12) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    writer = imageio_ffmpeg.write_frames(str(path), (64, 32), fps=8, macro_block_size=1, output_params=["-crf", "4"])
    writer.send(None)
    for _ in range(frames):
        writer.send(np.full((32, 64, 3), level, np.uint8))
    writer.close()


def write_caption(video: Path, text: str | bytes) -> None:
    path = caption_path(video)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text if isinstance(text, bytes) else text.encode())


@pytest.fixture(scope="module")
def template(tmp_path_factory) -> Path:
    """Six clips; clip i is grey of value 20 + 30 i."""
    folder = tmp_path_factory.mktemp("clips")
    for i in range(6):
        video = folder / "videos" / f"c{i}.mp4"
        write_video(video, 20 + 30 * i)
        write_caption(video, f"clip {i} \nsecond line")
    return folder


@pytest.fixture
def folder(template, tmp_path) -> Path:
    """A copy that a test may change."""
    for source in template.rglob("*.*"):
        target = tmp_path / "set" / source.relative_to(template)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(source.read_bytes())
    return tmp_path / "set"


def level(clip: torch.Tensor) -> int:
    """The i of the clip's grey value."""
    return round(((float(clip.mean()) * 127.5 + 127.5) - 20) / 30)


def test_an_item(template):
    item = SFTDataset(template, **SMALL)[2]
    assert item["mp4"].shape == (9, 3, 16, 32) and item["mp4"].dtype == torch.float32
    assert level(item["mp4"]) == 2
    assert item["txt"] == "clip 2 "
    assert (item["num_frames"], item["fps"], item["index"]) == (9, 8, 2)
    assert item["path"] == str(template / "videos" / "c2.mp4")


def test_the_range_is_minus_one_to_one(tmp_path):
    for name, value in (("a", 0), ("b", 255)):
        write_video(tmp_path / "videos" / f"{name}.mp4", value)
        write_caption(tmp_path / "videos" / f"{name}.mp4", name)
    dataset = SFTDataset(tmp_path, **SMALL)
    assert dataset[0]["mp4"].min() == pytest.approx(-1, abs=0.02)
    assert dataset[1]["mp4"].max() == pytest.approx(1, abs=0.02)


def test_pixels_come_into_range_where_they_lie():
    """The cache and pictures bring bytes to a GPU first; `meta` stands for it here."""
    frames = torch.tensor([0, 255, 51], dtype=torch.uint8).expand(2, 4, 3)
    assert to_unit_range(frames)[1, 3].tolist() == pytest.approx([-1.0, 1.0, -0.6])
    moved = to_unit_range(frames.to("meta"))
    assert (moved.device.type, moved.dtype, moved.shape) == ("meta", torch.float32, frames.shape)


def test_torch_s_own_loader_takes_the_items(template):
    dataset = SFTDataset(template, **SMALL)
    assert len(dataset) == 6
    batch = next(iter(DataLoader(dataset, batch_size=2)))
    assert batch["mp4"].shape == (2, 9, 3, 16, 32) and batch["txt"] == ["clip 0 ", "clip 1 "]
    assert batch["num_frames"].tolist() == [9, 9] and batch["fps"].tolist() == [8, 8]


def test_defaults_are_the_originals():
    import inspect

    defaults = {name: p.default for name, p in inspect.signature(SFTDataset).parameters.items()}
    assert (*defaults["video_size"], defaults["fps"], defaults["max_num_frames"]) == (480, 720, 8, 49)
    assert defaults["skip_frms_num"] == 3.0 and defaults["sampling"] == "upstream"


@pytest.mark.parametrize(
    "video, caption",
    [
        ("set/videos/a.mp4", "set/labels/a.txt"),
        ("set/videos/x/y/a.b.mp4", "set/labels/x/y/a.b.txt"),
        ("my_videos/set/videos/a.mp4", "my_videos/set/labels/a.txt"),
        ("videos/set/videos/videos.mp4", "videos/set/labels/videos.txt"),
        ("set/clips/a.mp4", "set/clips/a.txt"),
    ],
)
def test_where_captions_lie(video, caption):
    assert caption_path(video) == Path(caption)


def test_nested_folders_are_found_in_sorted_order(tmp_path):
    for name in ("videos/b/2.mp4", "videos/a/1.MP4", "videos/0.mp4", "videos/b/skip.txt", "part/videos/9.mp4"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    found = [str(path.relative_to(tmp_path)) for path in list_files(tmp_path, VIDEO_SUFFIXES)]
    assert found == ["part/videos/9.mp4", "videos/0.mp4", "videos/a/1.MP4", "videos/b/2.mp4"]
    assert sorted(list_files(tmp_path, VIDEO_SUFFIXES, "walk")) == sorted(list_files(tmp_path, VIDEO_SUFFIXES))
    with pytest.raises(ValueError, match="sorted, walk"):
        list_files(tmp_path, VIDEO_SUFFIXES, "random")


@pytest.mark.parametrize(
    "data, text",
    [
        (b"one line", "one line"),
        (b"first \t\nsecond", "first \t"),
        (b"windows\r\nline", "windows"),
        ("\ufeffwith mark".encode(), "with mark"),
        ("日本語の説明".encode(), "日本語の説明"),
    ],
)
def test_captions(tmp_path, data, text):
    write_caption(tmp_path / "a.mp4", data)
    a = ListedClip(str(tmp_path / "a.mp4"))
    assert caption_of(a).text == text


@pytest.mark.parametrize(
    "data, text, may_be_empty",
    [
        (None, "no such caption", True),
        (b"", "caption is empty", True),
        (b"  \nsecond", "first line is empty", True),
        (b"caf\xe9", "not UTF-8", False),
    ],
)
def test_bad_captions_are_never_silently_empty(tmp_path, data, text, may_be_empty):
    if data is not None:
        write_caption(tmp_path / "a.mp4", data)
    a = ListedClip(str(tmp_path / "a.mp4"))
    with pytest.raises(CaptionError, match=text):
        caption_of(a)
    if may_be_empty:
        assert caption_of(a, missing="empty").text == ""
    else:
        with pytest.raises(CaptionError, match=text):
            caption_of(a, missing="empty")


def test_all_lines_of_a_caption_on_request(folder):
    write_caption(folder / "videos" / "c1.mp4", " first \r\n\n second\nthird \n")
    assert SFTDataset(folder, **SMALL)[1]["txt"] == " first "
    assert SFTDataset(folder, **SMALL, caption_lines="all")[1]["txt"] == "first second third"
    with pytest.raises(ValueError, match="caption_lines is 'both', choose one of first, all"):
        SFTDataset(folder, **SMALL, caption_lines="both")


def test_captions_may_lie_beside_the_videos(folder):
    (folder / "labels").rename(folder / "elsewhere")
    for file in (folder / "elsewhere").iterdir():
        file.rename(folder / "videos" / file.name)
    (folder / "videos" / "c5.mp4").rename(folder / "videos" / "c5.MOV")
    dataset = SFTDataset(folder, **SMALL)
    assert [item["txt"] for item in map(dataset.__getitem__, range(6))] == [f"clip {k} " for k in range(6)]


def damage(folder: Path) -> None:
    """Leave clips 1, 4 and 5 usable."""
    (folder / "videos" / "c0.mp4").write_bytes(b"")
    caption_path(folder / "videos" / "c2.mp4").unlink()
    caption_path(folder / "videos" / "c3.mp4").write_bytes(b"\xff\xfe\xff")


def test_what_is_wrong_is_reported(folder, tmp_path, caplog):
    damage(folder)
    write_video(folder / "videos" / "short.mp4", 0, frames=4)
    write_caption(folder / "videos" / "short.mp4", "short")
    file = tmp_path / "out" / "report.jsonl"
    with caplog.at_level(logging.INFO):
        dataset = SFTDataset(folder, **{**SMALL, "skip_frms_num": 2}, report=file)
    assert [item["txt"] for item in map(dataset.__getitem__, range(3))] == ["clip 1 ", "clip 4 ", "clip 5 "]
    assert "3 clips usable, 4 rejected" in caplog.text
    reasons = {Path(r.path).stem: r.reason for r in Report.read(file).rejected}
    assert "is empty" in reasons["c0"] and "no such caption" in reasons["c2"] and "not UTF-8" in reasons["c3"]
    assert "lower the skipped frames" in reasons["short"]
    assert [json.loads(line)["status"] for line in file.read_text().splitlines()].count("usable") == 3


def test_what_is_passed_over_is_said_and_counts_as_nothing(folder, tmp_path, caplog, monkeypatch):
    (folder / "images").mkdir()
    for name in ("a.jpg", "b.png", "c.PNG"):
        (folder / "images" / name).write_bytes(b"")
    file, walks, walk = tmp_path / "report.jsonl", [], os.walk
    monkeypatch.setattr(os, "walk", lambda top: walks.append(top) or walk(top))
    dataset = SFTDataset(folder, **SMALL, report=file)
    assert len(walks) == 1  # folders may be large
    assert len(dataset) == 6 and dataset.report.rejected == []
    assert caplog.text.count("passed over: 1 .jpg, 2 .png (pictures: data.params.images=true)") == 1
    head = json.loads(file.read_text().splitlines()[0])
    assert (head["usable"], head["rejected"], head["passed_over"]) == (6, 0, {".jpg": 1, ".png": 2})
    again = SFTDataset(folder, **SMALL, validate="report", report=file)  # what other ranks do: they say nothing
    assert again.report.passed_over == head["passed_over"] and caplog.text.count("passed over") == 1


def test_missing_captions_by_choice(folder):
    caption_path(folder / "videos" / "c2.mp4").unlink()
    assert len(SFTDataset(folder, **SMALL, missing_caption="skip")) == 5
    assert SFTDataset(folder, **SMALL, missing_caption="empty")[2]["txt"] == ""
    with pytest.raises(DatasetError, match="1 of 6 captions.*c2.txt.*missing_caption"):
        SFTDataset(folder, **SMALL, missing_caption="error")
    with pytest.raises(CaptionError, match="c2.txt"):
        SFTDataset(folder, **SMALL, missing_caption="error", validate="none")[2]


def test_nothing_usable_is_an_error_with_reasons(tmp_path):
    with pytest.raises(DatasetError, match="no such folder"):
        SFTDataset(tmp_path / "absent", **SMALL)
    with pytest.raises(DatasetError, match="no videos"):
        SFTDataset(tmp_path, **SMALL)
    (tmp_path / "a.png").write_bytes(b"")
    for validate in ("probe", "none"):
        with pytest.raises(DatasetError, match="no videos.*1 .png .*data.params.images=true"):
            SFTDataset(tmp_path, **SMALL, validate=validate)
    for i in range(8):
        (tmp_path / f"{i}.mp4").write_bytes(b"")
        write_caption(tmp_path / f"{i}.mp4", "text")
    with pytest.raises(DatasetError, match="none of the 8 videos is usable: .*0.mp4: the file is empty.*and 3 more"):
        SFTDataset(tmp_path, **SMALL)


def test_captions_only_and_no_validation(folder):
    damage(folder)
    assert len(SFTDataset(folder, **SMALL, validate="captions")) == 4
    assert len(SFTDataset(folder, **SMALL, validate="none")) == 6


def test_another_rank_takes_the_list_from_the_report(folder, tmp_path):
    damage(folder)
    file = tmp_path / "report.jsonl"
    first = SFTDataset(folder, **SMALL, report=file)
    (folder / "videos" / "c1.mp4").write_bytes(b"")  # broken in between: the numbering must not change
    second = SFTDataset(folder, **SMALL, report=file, validate="report")
    assert list(first.paths) == list(second.paths)
    with pytest.raises(DatasetError, match="another max_num_frames"):
        SFTDataset(folder, **{**SMALL, "max_num_frames": 5}, report=file, validate="report")
    with pytest.raises(DatasetError, match="no data set report"):
        SFTDataset(folder, **SMALL, report=tmp_path / "absent", validate="report")
    with pytest.raises(DatasetError, match="not of"):
        SFTDataset(tmp_path, **SMALL, report=file, validate="report")


def broken_clips(report: Path) -> list[str]:
    """The clips that were found broken since a report was written."""
    lines = map(json.loads, report.read_text().splitlines())
    return sorted({line["path"] for line in lines if line["status"] == "broken"})


@pytest.mark.parametrize("workers", [0, 2])
def test_clips_that_break_later_are_replaced_and_counted(folder, tmp_path, workers):
    file = tmp_path / "report.jsonl"
    dataset = SFTDataset(folder, **SMALL, report=file)
    for i in (1, 2):
        (folder / "videos" / f"c{i}.mp4").write_bytes(b"gone bad")
    with create_loader(dataset, num_workers=workers, order="sequential") as loader:
        seen = [level(next(loader)["mp4"]) for _ in range(12)]
    assert seen == [0, 3, 3, 3, 4, 5] * 2
    assert [Path(path).stem for path in broken_clips(file)] == ["c1", "c2"]
    assert len(SFTDataset(folder, **SMALL, report=file, validate="report")) == 6  # another rank's numbering stays


def test_when_all_clips_break_the_run_ends(folder):
    dataset = SFTDataset(folder, **SMALL)
    for path in list_files(folder, VIDEO_SUFFIXES):
        path.write_bytes(b"")
    with pytest.raises(DatasetError, match="none of the 6 clips can be read any more"):
        dataset[0]


def test_many_processes_append_whole_lines(tmp_path):
    file = tmp_path / "report.jsonl"
    Report("data", {}).write(file)
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        pool.starmap(append_broken, [(file, f"clip{i}.mp4", "x" * 500) for i in range(40)])
    assert broken_clips(file) == sorted(f"clip{i}.mp4" for i in range(40))


@pytest.fixture(params=["fork", "spawn"])
def start_method(request):
    """How this test's processes start."""
    before = multiprocessing.get_start_method()
    multiprocessing.set_start_method(request.param, force=True)
    yield request.param
    multiprocessing.set_start_method(before, force=True)


def test_workers_change_neither_order_nor_content(template, start_method):
    dataset = SFTDataset(template, **SMALL)
    dataset[0]  # this process's decoder runs while the workers start
    with create_loader(dataset, 2, seed=7) as loader:
        expected = [next(loader) for _ in range(7)]
    with create_loader(dataset, 2, 2, seed=7) as loader:
        for batch in expected:
            got = next(loader)
            assert got["txt"] == batch["txt"] and torch.equal(got["mp4"], batch["mp4"])
    assert level(dataset[1]["mp4"]) == 1


class Draws(Dataset):
    """Clips of random numbers from the three generators that a worker seeds."""

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> dict:
        drawn = torch.tensor([random.random(), np.random.rand(), torch.rand(()).item()], dtype=torch.float64)
        return {"mp4": drawn.expand(1, 1, 1, 3), "index": index}


def test_workers_draw_as_the_seed_says_and_each_rank_by_itself():
    """Whatever this process has drawn before, which forked workers inherit."""

    def drawn(seed: int, rank: int) -> torch.Tensor:
        random.random(), np.random.rand(), torch.rand(1)
        with create_loader(Draws(), num_workers=1, seed=seed, rank=rank, world_size=2) as loader:
            return next(loader)["mp4"].flatten()

    first = drawn(1, 0)
    assert torch.equal(drawn(1, 0), first)
    assert (drawn(1, 1) != first).all() and (drawn(2, 0) != first).all()


@pytest.mark.parametrize("workers", [0, 2])
def test_resuming_a_loader_ignores_what_was_read_ahead(template, workers):
    dataset = SFTDataset(template, **SMALL)
    with create_loader(dataset, 1, workers, seed=7, prefetch=4) as loader:
        straight = [next(loader)["txt"][0] for _ in range(3)]
        state = pickle.loads(pickle.dumps(loader.state_dict()))
        straight += [next(loader)["txt"][0] for _ in range(8)]
        loader.load_state_dict(state)
        assert [next(loader)["txt"][0] for _ in range(8)] == straight[3:]
    with create_loader(dataset, 1, workers, seed=0) as other:
        other.load_state_dict(state)
        assert [next(other)["txt"][0] for _ in range(8)] == straight[3:]


def test_workers_end_with_the_loader(template):
    before = set(multiprocessing.active_children())
    loader = create_loader(SFTDataset(template, **SMALL), num_workers=2)
    next(loader)
    workers = set(multiprocessing.active_children()) - before
    assert len(workers) == 2
    loader.close()
    assert not any(worker.is_alive() for worker in workers)
    with pytest.raises(RuntimeError, match="closed"):
        next(loader)


def test_several_sources(template, folder):
    sources = [SFTDataset(template, **SMALL), SFTDataset(folder, **SMALL)]
    with create_loader(sources, weights=[1, 3], seed=1) as loader:
        paths = [next(loader)["path"][0] for _ in range(24)]
    assert sum(path.startswith(str(folder)) for path in paths) == 18


def test_unequal_lengths_cannot_share_a_batch(folder):
    write_video(folder / "videos" / "c1.mp4", 50, frames=5)
    dataset = SFTDataset(folder, **SMALL)
    with pytest.raises(DatasetError, match=r"c0.mp4 has 9 frames.*c1.mp4 has 5 frames.*batch size of 1"):
        collate([dataset[0], dataset[1]])
    with create_loader(dataset, 2, 1, order="sequential") as loader, pytest.raises(DatasetError, match="c1.mp4"):
        next(loader)
    with create_loader(dataset, 1, order="sequential") as loader:
        assert [next(loader)["num_frames"].item() for _ in range(3)] == [9, 5, 9]


@pytest.mark.parametrize(
    "change, text",
    [
        ({"video_size": [480]}, "height, width"),
        ({"max_num_frames": 48}, "4k . 1"),
        ({"sampling": "newest"}, "timestamps, upstream"),
        ({"missing_caption": "ignore"}, "skip, error, empty"),
        ({"decode_timeout": 0}, "decode_timeout is 0"),
        ({"validate": "all"}, "probe, captions, report, none"),
        ({"validate": "report"}, "report=PATH"),
    ],
)
def test_wrong_settings_are_named(template, change, text):
    with pytest.raises(ValueError, match=text):
        SFTDataset(template, **{**SMALL, **change})
    with pytest.raises(IndexError):
        SFTDataset(template, **SMALL, validate="none")[6]


@pytest.mark.parametrize("threads", [1, 4])
def test_many_clips_are_looked_at_at_a_time_in_their_order(template, threads):
    """With a decoding process for each thread, ended afterwards."""
    clips, decoders = list_clips(template), {}

    def look(clip, decoder):
        frames = len(decoder.probe(Path(clip.path), 60)[1])
        decoders.setdefault(decoder.pid, decoder)
        return clip.path, frames

    assert per_thread(clips, look, threads) == [(clip.path, 12) for clip in clips] and len(clips) == 6
    assert 1 <= len(decoders) <= threads and all(decoder.pid is None for decoder in decoders.values())


def test_paths_take_little_memory_and_survive_spawning():
    strings = ["a.mp4", "", "日本/b.mp4", os.fsdecode(b"bad\xff.mp4")]
    packed = pickle.loads(pickle.dumps(PackedStrings(strings)))
    assert list(packed) == strings and len(packed) == 4
    many = PackedStrings([f"videos/{i:07}.mp4" for i in range(10000)])
    assert sys.getsizeof(pickle.dumps(many)) < 10000 * 30


def test_a_data_set_can_be_used_by_threads(template):
    dataset = SFTDataset(template, **SMALL)
    with ThreadPoolExecutor(3) as pool:
        assert [level(item["mp4"]) for item in pool.map(dataset.__getitem__, range(6))] == list(range(6))
