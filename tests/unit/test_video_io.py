import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import imageio_ffmpeg
import numpy as np
import pytest
import torch

from sgm.data.decoder import DecodeProcess
from sgm.data.video_io import VideoError, probe, read_frames

READY = "import os, sys, time; sys.stdout.buffer.write(b'\\x02\\0\\0\\0{}'); sys.stdout.flush(); "
HANGS = READY + "time.sleep(600)"
DIES = READY + "sys.stdin.readline(); os.abort()"


def write_video(path: Path, frames: np.ndarray, fps: float = 8, arguments: tuple[str, ...] = ("-crf", "4")) -> Path:
    height, width = frames.shape[1:3]
    writer = imageio_ffmpeg.write_frames(
        str(path), (width, height), fps=fps, codec="libx264", macro_block_size=1, output_params=list(arguments)
    )
    writer.send(None)
    for frame in frames:
        writer.send(np.ascontiguousarray(frame))
    writer.close()
    return path


def brightness_ramp(count: int, height: int = 48, width: int = 64) -> np.ndarray:
    """Frame i has the grey value 10 + 5 i."""
    return np.broadcast_to((10 + 5 * np.arange(count, dtype=np.uint8))[:, None, None, None], (count, height, width, 3))


@pytest.fixture(scope="module")
def video(tmp_path_factory) -> Path:
    return write_video(tmp_path_factory.mktemp("video") / "ramp.mp4", brightness_ramp(40))


@pytest.fixture(scope="module")
def fast_start(tmp_path_factory) -> Path:
    """Noise, with the index in front of the frames: a truncated copy still opens."""
    noise = np.random.default_rng(0).integers(0, 256, (24, 48, 64, 3), dtype=np.uint8)
    path = tmp_path_factory.mktemp("video") / "fast.mp4"
    return write_video(path, noise, arguments=("-crf", "4", "-movflags", "+faststart"))


def test_probe(video):
    info = probe(video)
    assert (info.frames, info.fps, info.height, info.width, info.codec) == (40, 8.0, 48, 64, "h264")
    assert info.seconds == 5.0


@pytest.mark.parametrize("indices", [[0], [39], [3, 10, 17], [20, 5, 5, 39, 0], range(40)])
def test_the_right_frames_in_the_right_order(video, indices):
    frames = read_frames(video, indices)
    assert frames.shape == (len(indices), 3, 48, 64) and frames.dtype == torch.uint8
    values = frames.float().mean(dim=(1, 2, 3))
    torch.testing.assert_close(values, torch.tensor([10.0 + 5 * i for i in indices]), atol=2, rtol=0)


def test_colours_and_orientation(tmp_path):
    frames = np.zeros((2, 48, 64, 3), np.uint8)
    frames[:, :24, :, 0] = 230  # red above
    frames[:, 24:, :32, 2] = 230  # blue below left
    out = read_frames(write_video(tmp_path / "c.mp4", frames), [1])[0].float()
    assert out[0, :20].mean() > 200 and out[0, 28:].mean() < 30
    assert out[2, 28:, :28].mean() > 200 and out[2, :, 36:].mean() < 30


@pytest.mark.parametrize("width", [2, 16, 48, 50, 72])
def test_narrow_videos(tmp_path, width):
    """The scaler pads the rows of some."""
    columns = np.linspace(20, 220, width).astype(np.uint8)
    frames = np.broadcast_to(columns[None, None, :, None], (4, 36, width, 3))
    path = write_video(tmp_path / "narrow.mp4", frames)
    assert (probe(path).height, probe(path).width) == (36, width)
    out = read_frames(path, [0, 3]).float()
    torch.testing.assert_close(out, torch.tensor(columns).float().expand(2, 3, 36, width), atol=4, rtol=0)


def test_long_files_are_read_anywhere(tmp_path):
    count = 300
    ramp = (np.arange(count) % 48 * 5 + 8).astype(np.uint8)
    frames = np.broadcast_to(ramp[:, None, None, None], (count, 16, 16, 3))
    path = write_video(tmp_path / "long.mp4", frames, fps=30000 / 1001)
    assert probe(path).fps == pytest.approx(29.97, abs=1e-2)
    picked = [299, 0, 123, 250, 31]
    values = read_frames(path, picked).float().mean(dim=(1, 2, 3))
    torch.testing.assert_close(values, torch.tensor(ramp[picked]).float(), atol=3, rtol=0)


def broken_files(folder: Path, video: Path, fast_start: Path) -> dict[str, tuple[Path, str]]:
    def put(name: str, data: bytes) -> Path:
        path = folder / name
        path.write_bytes(data)
        return path

    ffmpeg = imageio_ffmpeg.get_ffmpeg_exe()
    sound = folder / "sound.mp4"
    command = [ffmpeg, "-v", "error", "-f", "lavfi", "-i", "sine=d=1", "-c:a", "aac", str(sound)]
    subprocess.run(command, check=True, capture_output=True)
    data, moving = video.read_bytes(), fast_start.read_bytes()
    rubbish = np.random.default_rng(1).integers(0, 256, len(moving) - 4000, dtype=np.uint8).tobytes()
    return {
        "zero bytes": (put("zero.mp4", b""), "the file is empty"),
        "only zeros": (put("zeros.mp4", bytes(5000)), "only zeros"),
        "index cut off": (put("cut.mp4", data[: len(data) // 2]), "cut short|no index"),
        "a byte cut off": (put("byte.mp4", data[:-1]), "cut short"),
        "frames cut off": (put("fast.mp4", moving[: len(moving) * 2 // 3]), "cut short"),
        "overwritten": (put("noise.mp4", moving[:4000] + rubbish), "."),
        "text": (put("text.mp4", b"not a video at all\n" * 50), "Invalid data"),
        "picture": (put("picture.mp4", b"\x89PNG\r\n\x1a\n" + bytes(100)), "PNG picture"),
        "web page": (put("page.mp4", b"<!DOCTYPE html><html>404"), "HTML page"),
        "playlist": (put("list.mp4", f"ffconcat version 1.0\nfile {video}\n".encode()), "a playlist"),
        "playlist with a mark": (put("hls.mp4", b"\xef\xbb\xbf#EXTM3U\n#EXTINF:8,\nx.mp4\n"), "Invalid"),
        "unknown codec": (put("codec.mp4", data.replace(b"avc1", b"xyz1")), "codec.*ffmpeg -i .*codec.mp4"),
        "lfs pointer": (put("lfs.mp4", b"version https://git-lfs.github.com/spec/v1\noid sha256:0"), "git lfs pull"),
        "sound only": (sound, "no video track"),
        "folder": (folder, "not a regular file"),
        "absent": (folder / "absent.mp4", "no such file"),
    }


def test_broken_files_are_refused_with_the_reason(tmp_path, video, fast_start):
    for what, (path, text) in broken_files(tmp_path, video, fast_start).items():
        with pytest.raises(VideoError, match=text) as error:
            read_frames(path, range(probe(path).frames))
        assert str(path) in str(error.value) and error.value.reason, what
    assert probe(video).frames == 40  # the decoder goes on


def test_a_pipe_under_a_videos_name_does_not_block(tmp_path):
    os.mkfifo(tmp_path / "pipe.mp4")
    with pytest.raises(VideoError, match="not a regular file"):
        probe(tmp_path / "pipe.mp4")


def test_frames_outside_the_video(video):
    with pytest.raises(VideoError):
        read_frames(video, [0, 40])
    with pytest.raises(ValueError, match="counted from 0"):
        read_frames(video, [-1])
    with pytest.raises(ValueError, match="at least one"):
        read_frames(video, [])


def gone(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    return False


def test_a_hanging_decoder_is_stopped_and_replaced(video):
    decoder = DecodeProcess([sys.executable, "-c", HANGS])
    decoder._start()
    pid = decoder.pid
    with pytest.raises(VideoError, match="longer than 0.3 s"):
        read_frames(video, [0], timeout=0.3, decoder=decoder)
    assert gone(pid) and decoder.pid is None
    decoder.command = DecodeProcess().command
    assert read_frames(video, [0], decoder=decoder).shape == (1, 3, 48, 64)
    decoder.close()


def test_a_stopped_decoder_times_out(video):
    decoder = DecodeProcess()
    assert len(decoder.probe(video, 60)[1]) == 40
    os.kill(decoder.pid, signal.SIGSTOP)
    with pytest.raises(VideoError, match="longer than"):
        probe(video, timeout=0.3, decoder=decoder)
    assert probe(video, decoder=decoder).frames == 40
    decoder.close()


def test_a_crashing_decoder_is_an_error_of_the_file(video):
    decoder = DecodeProcess([sys.executable, "-c", DIES])
    with pytest.raises(VideoError, match="decoder crashed .*exit status -6"):
        probe(video, decoder=decoder)
    decoder.close()


def test_a_decoder_that_cannot_start_is_not_blamed_on_the_file(video):
    with pytest.raises(RuntimeError, match="failed .exit status 3"):
        probe(video, decoder=DecodeProcess([sys.executable, "-c", "raise SystemExit(3)"]))


def test_one_process_serves_many_clips(video, fast_start):
    decoder = DecodeProcess()
    probe(video, decoder=decoder)
    pid = decoder.pid
    for _ in range(3):
        read_frames(video, [1, 2], decoder=decoder)
        read_frames(fast_start, [5], decoder=decoder)
    assert decoder.pid == pid
    decoder.close()
    assert gone(pid)


def test_a_rewritten_file_is_opened_anew(tmp_path):
    path = write_video(tmp_path / "a.mp4", brightness_ramp(8))
    assert probe(path).frames == 8
    write_video(path, brightness_ramp(12))
    assert probe(path).frames == 12


def test_threads_read_at_the_same_time(video):
    results: dict[int, float] = {}

    def work(i: int) -> None:
        results[i] = float(read_frames(video, [i]).float().mean())

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(abs(results[i] - (10 + 5 * i)) < 3 for i in range(4))


def test_decoders_end_with_their_parent(video):
    code = (
        "import os, sys; from sgm.data.decoder import thread_decoder; from pathlib import Path; "
        "d = thread_decoder(); d.probe(Path(sys.argv[1]), 60); print(d.pid, flush=True); os._exit(0)"
    )
    repo = Path(__file__).resolve().parents[2]
    command = [sys.executable, "-c", code, str(video)]
    done = subprocess.run(command, cwd=repo, capture_output=True, text=True, check=True)
    pid, deadline = int(done.stdout), time.monotonic() + 20
    while not gone(pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert gone(pid)
