"""Manifests, pictures, shards, and what buckets make of mixed clips."""

from __future__ import annotations

import io
import json
import random
import tarfile
from pathlib import Path

import imageio_ffmpeg
import numpy as np
import pytest
import torch
from PIL import Image

from sgm.cache.store import FileStamp, video_key
from sgm.config import ConfigError
from sgm.data.dataset import ClipSource, DataSection, SFTDataset, VideoDataset
from sgm.data.frames import DatasetError
from sgm.data.loader import create_loader
from sgm.data.sources import Place, list_clips, read_manifest
from sgm.util import get_obj_from_str

SMALL = {"video_size": [16, 32], "max_num_frames": 5, "skip_frms_num": 0}
MIXED = {"buckets": [[5, 16, 32], [5, 32, 16], [1, 16, 32]], "skip_frms_num": 0, "images": True}


def write_video(path: Path, size: tuple[int, int] = (64, 32), frames: int = 6, level: int = 90) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    writer = imageio_ffmpeg.write_frames(str(path), size, fps=8, macro_block_size=1, output_params=["-crf", "4"])
    writer.send(None)
    for _ in range(frames):
        writer.send(np.full((size[1], size[0], 3), level, np.uint8))
    writer.close()
    return path


@pytest.fixture(scope="module")
def media(tmp_path_factory) -> Path:
    """Wide, tall and short videos and a picture, without captions."""
    folder = tmp_path_factory.mktemp("media")
    write_video(folder / "wide.mp4", level=60)
    write_video(folder / "tall.mp4", (32, 64), level=120)
    write_video(folder / "short.mp4", frames=3, level=180)
    Image.new("RGB", (128, 64), (200, 200, 200)).save(folder / "still.png")
    return folder


def labelled(media: Path, folder: Path, copies: int = 1) -> Path:
    """The media as a data folder."""
    for k in range(copies):
        for source in media.iterdir():
            kind = "images" if source.suffix == ".png" else "videos"
            target = folder / kind / f"{k}-{source.name}"
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(source.read_bytes())
            label = folder / "labels" / f"{k}-{source.stem}.txt"
            label.parent.mkdir(parents=True, exist_ok=True)
            label.write_text(f"a {source.stem} one\n")
    return folder


def levels(dataset) -> dict[str, int]:
    items = [dataset[k] for k in range(len(dataset))]
    return {item["txt"]: float((item["mp4"].mean() + 1) * 127.5) for item in items}


@pytest.mark.parametrize("kind", ["csv", "jsonl"])
def test_manifests_name_clips_and_captions(media, tmp_path, kind):
    manifest = tmp_path / f"list.{kind}"
    rows = [(str(media / "wide.mp4"), "wide, with a comma"), (str(media / "still.png"), "still")]
    if kind == "csv":
        manifest.write_text("video,caption,extra\n" + "".join(f'{path},"{text}",1\n' for path, text in rows))
    else:
        manifest.write_text("".join(json.dumps({"path": path, "text": text}) + "\n" for path, text in rows))
    dataset = SFTDataset(manifest, report=tmp_path / "report.jsonl", **SMALL)
    assert levels(dataset) == pytest.approx({"wide, with a comma": 60, "still": 200}, abs=2)
    again = SFTDataset(manifest, validate="report", report=tmp_path / "report.jsonl", **SMALL)  # what other ranks do
    assert levels(again) == levels(dataset)
    assert [shape[0] for shape in again.shapes] == [5, 1]


def test_manifest_paths_are_relative_to_it_and_captions_may_lie_beside(media, tmp_path):
    (tmp_path / "a.mp4").write_bytes((media / "wide.mp4").read_bytes())
    (tmp_path / "a.txt").write_text("from the file\n")
    (tmp_path / "list.jsonl").write_text('{"file_name": "a.mp4"}\n\n{"file_name": "gone.mp4", "caption": "gone"}\n')
    dataset = SFTDataset(tmp_path / "list.jsonl", **SMALL)
    assert levels(dataset) == pytest.approx({"from the file": 60}, abs=2)
    assert "no such file" in dataset.report.rejected[0].reason


@pytest.mark.parametrize(
    "name, text, word",
    [
        ("a.csv", "name,caption\nx.mp4,hello\n", "line 2: no path; name the column path.*found: name, caption"),
        ("a.jsonl", '{"path": "x.mp4"}\nnot json\n', "line 2: no JSON"),
        ("a.jsonl", "[1]\n", "line 1: expected an object"),
        ("a.csv", b"path\n\xff\xfe\n", "not UTF-8"),
    ],
)
def test_wrong_manifests_say_where(tmp_path, name, text, word):
    path = tmp_path / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(DatasetError, match=word):
        read_manifest(path)


@pytest.mark.parametrize(
    "files",
    [
        {"prompts.txt": "a wide one\na tall one\n", "videos.txt": "videos/wide.mp4\nvideos/tall.mp4\n"},
        {"caption.txt": "a wide one\r\na tall one", "video.txt": "videos/wide.mp4\r\nvideos/tall.mp4"},
        {"metadata.csv": "video_path,prompt,fps\nvideos/wide.mp4,a wide one,8\nvideos/tall.mp4,a tall one,8\n"},
        {"metadata.jsonl": '{"file_name": "videos/wide.mp4", "text": "a wide one"}\n'
                           '{"file_name": "videos/tall.mp4", "text": "a tall one"}\n'},
        {"metadata.json": '[{"file_path": "videos/wide.mp4", "text": "a wide one", "type": "video"},'
                          ' {"file_path": "videos/tall.mp4", "text": "a tall one"}]'},
    ],
    ids=lambda files: next(iter(files)),
)  # fmt: skip
def test_folders_of_other_trainers_are_taken_as_they_are(media, tmp_path, files):
    (tmp_path / "videos").mkdir()
    for name in ("wide.mp4", "tall.mp4", "short.mp4"):
        (tmp_path / "videos" / name).write_bytes((media / name).read_bytes())
    for name, text in files.items():
        (tmp_path / name).write_bytes(text.encode())
    dataset = SFTDataset(tmp_path, **SMALL)
    assert [(Path(item["path"]).name, item["txt"]) for item in map(dataset.__getitem__, range(len(dataset)))] == [
        ("wide.mp4", "a wide one"), ("tall.mp4", "a tall one"),
    ]  # fmt: skip
    (tmp_path / "labels").mkdir()  # then it is one of this project's
    (tmp_path / "labels" / "short.txt").write_text("a short one")
    assert [Path(clip.path).name for clip in list_clips(tmp_path)] == ["short.mp4", "tall.mp4", "wide.mp4"]


def test_lists_of_unequal_length_are_refused(tmp_path):
    (tmp_path / "prompts.txt").write_text("one\ntwo\nthree\n")
    (tmp_path / "videos.txt").write_text("a.mp4\nb.mp4\n")
    with pytest.raises(DatasetError, match=r"videos.txt has 2 lines and prompts.txt 3"):
        list_clips(tmp_path)


def test_a_source_that_is_none(tmp_path):
    with pytest.raises(DatasetError, match="no such folder, manifest"):
        SFTDataset(tmp_path / "none.csv", **SMALL)


def write_shard(path: Path, members: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w") as archive:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


@pytest.fixture(scope="module")
def shards(media, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("shards")
    video = {name: (media / f"{name}.mp4").read_bytes() for name in ("wide", "tall", "short")}
    first = {"./a/001.mp4": video["wide"], "./a/001.caption": b"wide one", "./a/002.caption": b"no video"}
    write_shard(folder / "0.tar", first)
    write_shard(folder / "1.tar", {
        "003.json": json.dumps({"caption": "tall one"}).encode(), "003.mp4": video["tall"],
        "004.mp4": video["short"], "005.mp4": video["wide"][:500], "005.caption": b"cut", "004.caption": b"short one",
    })  # fmt: skip
    return folder


def test_shards_are_read_in_place(shards, media):
    cls = get_obj_from_str("data_video.VideoDataset")
    assert cls is VideoDataset
    dataset = cls(path=str(shards), image_size=[16, 32], num_frames=5, fps=8)
    assert levels(dataset) == pytest.approx({"wide one": 60, "tall one": 120}, abs=2)
    reasons = {rejection.path.rpartition("!")[2]: rejection.reason for rejection in dataset.report.rejected}
    assert "needs 5 frames" in reasons["004.mp4"] and "cut short" in reasons["005.mp4"]
    one = list_clips(shards / "0.tar", txt_key="caption")[0].path
    assert video_key(one) == video_key(media / "wide.mp4")
    assert FileStamp.of(one).size == (shards / "0.tar").stat().st_size
    with Place.of(one).open() as file:
        assert file.read() == (media / "wide.mp4").read_bytes()


def test_shard_clips_start_at_a_random_frame(tmp_path):
    frames = [np.full((32, 64, 3), 10 * k, np.uint8) for k in range(20)]
    path = tmp_path / "ramp.mp4"
    writer = imageio_ffmpeg.write_frames(str(path), (64, 32), fps=8, macro_block_size=1, output_params=["-crf", "2"])
    writer.send(None)
    for frame in frames:
        writer.send(frame)
    writer.close()
    write_shard(tmp_path / "s.tar", {"1.mp4": path.read_bytes(), "1.caption": b"ramp"})
    dataset = VideoDataset(tmp_path / "s.tar", [16, 32], 5, 8, skip_frms_num=2)
    random.seed(0)  # by chance the sixty draws may lack a start
    starts = {round(float((dataset[0]["mp4"][0].mean() + 1) * 12.75)) for _ in range(60)}
    assert len(starts) > 5 and min(starts) == 2 and max(starts) <= 14  # at most 20 - 2 - 5 + the original's one more


def test_a_section_of_shards_says_its_sizes_in_its_own_words():
    """Which the check of clips against a network reads; a cache and the check of a data set take folders' class only."""
    params = {"image_size": [16, 32], "num_frames": 5}
    section = DataSection.parse({"target": "data_video.VideoDataset", "params": params})
    settings = section.settings()
    assert (settings.video_size, settings.max_num_frames) == ((16, 32), 5)
    assert section.names_of("max_num_frames", "video_size") == ["num_frames", "image_size"]
    with pytest.raises(
        ConfigError, match=r"it reads shards too \(set txt_key\); data.target is data_video.VideoDataset"
    ):
        ClipSource.of(section)
    plain = DataSection.parse({"target": "data_video.SFTDataset", "params": SMALL})
    assert plain.names_of("max_num_frames", "video_size") == ["max_num_frames", "video_size"]
    assert ClipSource.of(plain).settings.skip_frames == 0


def test_names_of_members_stay_in_the_archive(media, tmp_path, caplog):
    """A name is normalised or passed over: what is checked in the archive is read from the archive."""
    outside = write_video(tmp_path / "outside" / "secret.mp4", level=220)
    wide = (media / "wide.mp4").read_bytes()
    kept = ["./plain", "a/../b", "c//d", "e/./f", "x.tar!5+5!y/z", "new\nline", "nicht-\udce9-utf8", "-", "a b"]
    out = [
        "q/../../outside/secret",
        "../outside/secret",
        "../../outside/secret",
        "/" + str(outside.with_suffix("")),
        "//g",
    ]
    shard = tmp_path / "d" / "s.tar"
    shard.parent.mkdir()
    write_shard(
        shard, {f"{name}{end}": data for name in [*kept, *out] for end, data in ((".mp4", wide), (".txt", b"x"))}
    )
    with tarfile.open(shard, "a") as archive:
        for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE, tarfile.GNUTYPE_SPARSE):
            info = tarfile.TarInfo(f"special-{kind.decode()}.mp4")
            info.type, info.linkname = kind, str(outside)
            archive.addfile(info)
    dataset = SFTDataset(shard, report=tmp_path / "report.jsonl", **SMALL)
    named = [item.rpartition("!")[2] for item in dataset.paths]
    assert named == ["plain.mp4", "b.mp4", "c/d.mp4", "e/f.mp4", *(f"{name}.mp4" for name in ("y/z", *kept[5:]))]
    assert [float((dataset[k]["mp4"].mean() + 1) * 127.5) for k in range(len(kept))] == pytest.approx([60] * 9, abs=2)
    assert dataset.report.passed_over == {
        "names that lead out of the archive": 10,
        "links, devices or sparse members": 5,
    }
    assert "passed over: 5 links, devices or sparse members, 10 names that lead out of the archive" in caplog.text


def test_no_tar_is_refused(tmp_path):
    (tmp_path / "x.tar").write_bytes(b"\0" * 100 + b"nothing" * 200)
    with pytest.raises(DatasetError, match="no whole tar"):
        VideoDataset(tmp_path / "x.tar")
    with pytest.raises(DatasetError, match="include_dirs"):
        write_shard(tmp_path / "x.tar", {"1.caption": b"x"})
        VideoDataset(tmp_path, include_dirs="a,b")


def test_buckets_bring_mixed_clips_into_batches(media, tmp_path):
    dataset = SFTDataset(labelled(media, tmp_path, 2), **MIXED)
    items = [dataset[k] for k in range(len(dataset))]
    kinds = {item["txt"]: tuple(item["mp4"].shape) for item in items}
    assert kinds == {
        "a wide one": (5, 3, 16, 32), "a tall one": (5, 3, 32, 16), "a short one": (1, 3, 16, 32),
        "a still one": (1, 3, 16, 32),
    }  # fmt: skip
    assert list(dataset.shapes) == [(len(item["mp4"]), *item["mp4"].shape[2:]) for item in items]
    with create_loader(dataset, 2, seed=3) as loader:
        shapes = [tuple(next(loader)["mp4"].shape) for _ in range(8)]
        state = loader.state_dict()
        following = [next(loader)["path"] for _ in range(4)]
    assert set(shapes) == {(2, 5, 3, 16, 32), (2, 5, 3, 32, 16), (2, 1, 3, 16, 32)}
    with create_loader(dataset, 2, seed=0) as loader:
        loader.load_state_dict(state)
        assert [next(loader)["path"] for _ in range(4)] == following


def test_a_broken_clip_is_replaced_by_one_of_its_shape(media, tmp_path):
    dataset = SFTDataset(labelled(media, tmp_path, 3), **MIXED)
    index = next(k for k in range(len(dataset)) if "tall" in dataset.paths[k])
    (tmp_path / dataset.paths[index]).write_bytes(b"")
    item = dataset[index]
    assert item["index"] != index and item["mp4"].shape == (5, 3, 32, 16)


def test_pictures_keep_their_shape_and_their_camera_s_turn(tmp_path):
    image = Image.new("RGB", (64, 32), (0, 0, 0))
    image.paste((255, 255, 255), (32, 0, 64, 32))  # the right half is white
    exif = image.getexif()
    exif[0x0112] = 8  # shown turned to the left: white is above
    (tmp_path / "images").mkdir()
    image.save(tmp_path / "images" / "turned.jpg", exif=exif, quality=95)
    (tmp_path / "images" / "broken.png").write_bytes(b"\x89PNG")
    for name in ("turned", "broken"):
        (tmp_path / "images" / f"{name}.txt").write_text("a picture\n")
    (tmp_path / "labels").mkdir()
    for name in ("turned", "broken"):
        (tmp_path / "images" / f"{name}.txt").rename(tmp_path / "labels" / f"{name}.txt")
    dataset = SFTDataset(tmp_path, images=True, **{**SMALL, "video_size": [32, 16]})
    clip = dataset[0]["mp4"]
    assert clip.shape == (1, 3, 32, 16) and clip[:, :, :10].mean() > 0.9 and clip[:, :, -10:].mean() < -0.9
    assert "no readable picture" in dataset.report.rejected[0].reason
    assert torch.isfinite(clip).all()
