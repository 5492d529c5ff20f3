"""Videos of many kinds beside FFmpeg's own frames: hidden ones, uneven times, turned, interlaced, live, ..."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from sgm.data.clips import ClipSettings, load_frames
from sgm.data.frames import ClipError, frame_indices
from sgm.data.video_io import VideoError, probe, read_frames
from tools.bench.kinds import compare, encoded, make, shown_by_ffmpeg

QUICK = [
    "h264-10bit.mkv", "cut-both.mp4", "cut-end.mov", "cut-open-gop.mp4", "negative-start.mp4", "uneven.mp4", "av1.mp4",
    "h264.avi", "mirrored-h.mp4", "turned-90-mirrored-v.mov", "turned-wide-pixels.mp4", "narrow-pixels.mkv", "interlaced.mp4",
    "open-gop.mpg", "open-gop-60fps.mp4", "intra-refresh.mp4", "live.webm", "fragments-cut-off.mp4", "two-tracks.mkv", "cover.mp4",
]  # fmt: skip


@pytest.fixture(scope="module")
def videos(tmp_path_factory) -> dict[str, Path]:
    return {path.name: path for path in make(tmp_path_factory.mktemp("kinds"), QUICK)}


@pytest.mark.parametrize("name", QUICK)
def test_frames_are_those_that_ffmpeg_shows_at_the_same_times(videos, name):
    found = compare(videos[name])
    assert found.same and found.apart <= (80 if "interlaced" in name else 0), found  # bwdif's first frame: its version


@pytest.mark.parametrize(
    "name", ["h264.avi", "open-gop.mpg", "open-gop-60fps.mp4", "intra-refresh.mp4", "interlaced.mp4"]
)
def test_any_frame_can_be_jumped_to(videos, name):
    info = probe(videos[name])
    expected, _ = shown_by_ffmpeg(videos[name], info.interlaced)
    for indices in ([info.frames // 2], [info.frames - 1, info.frames // 3, info.frames // 3 + 1], [31, 7, 31]):
        got = read_frames(videos[name], indices).permute(0, 2, 3, 1).numpy()
        assert np.array_equal(got, expected[indices])


def test_what_a_player_heeds_is_said(videos):
    info = {name: probe(path) for name, path in videos.items()}
    assert info["cut-both.mp4"].hidden > 20 and info["h264.avi"].hidden == 0
    assert info["mirrored-h.mp4"].turned == ["hflip"] and info["turned-90-mirrored-v.mov"].turned[0].startswith("c")
    turned = info["turned-wide-pixels.mp4"]
    assert turned.pixel_aspect == pytest.approx(4 / 3, abs=1e-3) and (turned.height, turned.width) == (128, 72)
    assert [name for name, found in info.items() if found.interlaced] == ["interlaced.mp4"]
    assert [name for name, found in info.items() if found.tracks > 1] == ["two-tracks.mkv"]
    assert (info["two-tracks.mkv"].height, info["cover.mp4"].height) == (240, 96)
    assert info["av1.mp4"].codec == "av1" and info["live.webm"].fps == pytest.approx(30, abs=0.1)


def test_frames_are_taken_by_their_times(videos):
    """30 frames a second for one second, then five."""
    info = probe(videos["uneven.mp4"])
    for wanted in (4, 8):
        used = ClipSettings((16, 16), wanted, 13, 0, "timestamps").indices(info)
        instants = info.times[0] + np.arange(len(used)) / wanted
        assert used == [int(np.abs(info.times - at - 1e-6).argmin()) for at in instants] and len(used) == 13
    even = [frame_indices(100, 24, 16, 49, 3, "timestamps", np.arange(100) / 24 + 0.7)]
    assert even == [frame_indices(100, 24, 16, 49, 3, "timestamps")]


def test_interlaced_videos_by_choice(videos):
    settings = {way: ClipSettings((96, 128), 8, 5, interlaced=way) for way in ("deinterlace", "keep", "skip")}
    combs = {}
    for way in ("deinterlace", "keep"):
        rows = load_frames(videos["interlaced.mp4"], settings[way]).float()
        combs[way] = float((2 * rows[:, :, 1:-1] - rows[:, :, :-2] - rows[:, :, 2:]).abs().mean())
    assert combs["deinterlace"] < 0.85 * combs["keep"]
    with pytest.raises(ClipError, match="interlaced: skip leaves out"):
        load_frames(videos["interlaced.mp4"], settings["skip"])


def test_a_picture_that_grows_is_brought_to_one_size(tmp_path):
    """Screens and calls are recorded so; a player scales the picture to its window."""
    whole = tmp_path / "both.ts"
    for size, late in (("128x96", "0"), ("160x120", "1")):
        encoded("-output_ts_offset", late, seconds=1, size=size)(tmp_path / f"{size}.ts")
        with whole.open("ab") as file:
            file.write((tmp_path / f"{size}.ts").read_bytes())
    clip = load_frames(whole, ClipSettings((48, 64), 8, 13, 0.0, "timestamps"))
    assert clip.shape == (13, 3, 48, 64) and clip[12].float().std() > 20
    with pytest.raises(VideoError, match=r"change from \(96, 128\) to \(120, 160\) pixels"):
        read_frames(whole, [0, 50])
    assert read_frames(whole, [0]).shape == (1, 3, 96, 128)  # the decoder goes on


def test_a_clip_is_read_one_frame_at_a_time(videos):
    """Brought to the training size as they come, frames are those of the whole clip."""
    info = probe(videos["two-tracks.mkv"])
    settings = ClipSettings((48, 80), 8, 9)
    indices = settings.indices(info)
    from sgm.data.video_io import resize_crop

    whole = resize_crop(read_frames(videos["two-tracks.mkv"], indices), (48, 80))
    assert torch.equal(load_frames(videos["two-tracks.mkv"], settings), whole)
