"""Videos of every kind, each compared with FFmpeg's own frames: `python tools/bench/kinds.py [FOLDER]`.

Makes them in FOLDER (default: a temporary one), takes a clip of each as training with `sampling: timestamps` does, and
prints a Markdown table: frames that FFmpeg's command shows and that were found; the largest difference of a pixel
between the frames used and FFmpeg's at the same times; how far these lie from the instants asked for, beside the
nearest that there is. Exit status 1: something differs.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import imageio_ffmpeg
import numpy as np

from sgm.data.clips import ClipSettings
from sgm.data.video_io import probe, read_frames

FFMPEG = imageio_ffmpeg.get_ffmpeg_exe()
SETTINGS = ClipSettings((64, 96), 8, 33, 3.0, "timestamps")
Make = Callable[[Path], None]


def ffmpeg(*arguments: str | Path) -> None:
    """Run FFmpeg's command."""
    command = [FFMPEG, "-v", "error", "-y", *map(str, arguments)]
    done = subprocess.run(command, check=False, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}: {done.stderr}")


def scene(rate: float = 30, seconds: float = 4, size: str = "128x96", kind: str = "testsrc2") -> list[str]:
    """The input: FFmpeg's moving test picture, with the time in it."""
    return ["-f", "lavfi", "-i", f"{kind}=size={size}:rate={rate}:duration={seconds}"]


def encoded(*arguments: str, rate: float = 30, seconds: float = 4, size: str = "128x96") -> Make:
    """A video of the test picture, encoded with these arguments; H.264 of 4:2:0 unless they say otherwise."""
    plain = [] if "-c:v" in arguments else ["-c:v", "libx264"]
    pixels = [] if "-pix_fmt" in arguments else ["-pix_fmt", "yuv420p"]
    return lambda path: ffmpeg(*scene(rate, seconds, size), *plain, *pixels, *arguments, path)


def copied(*arguments: str, before: tuple[str, ...] = (), source: tuple[str, ...] = (), end: str = "mp4") -> Make:
    """A video whose packets were copied: cut, turned, or put into another container."""

    def make(path: Path) -> None:
        first = path.with_name(f"{path.stem}-source.{end}")
        encoded(*source)(first)
        ffmpeg(*before, "-i", first, "-c", "copy", *arguments, path)
        first.unlink()

    return make


def piped(form: str, *arguments: str) -> Make:
    """A video as a live recording leaves it: written into a pipe, which nobody goes back in."""

    def make(path: Path) -> None:
        command = [FFMPEG, "-v", "error", *scene(), "-pix_fmt", "yuv420p", *arguments, "-f", form, "-"]
        path.write_bytes(subprocess.run(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, check=True).stdout)

    return make


def cut_off(made: Make, share: float) -> Make:
    """What there is of a recording whose end is missing."""

    def make(path: Path) -> None:
        made(path)
        data = path.read_bytes()
        path.write_bytes(data[: int(share * len(data))])

    return make


def two_tracks(first: str, second: str, *arguments: str) -> Make:
    """Two videos of different sizes in one file."""
    inputs = [*scene(size=first), *scene(size=second, kind="testsrc"), "-map", "0", "-map", "1"]
    return lambda path: ffmpeg(*inputs, "-pix_fmt", "yuv420p", *arguments, path)


def with_cover(path: Path) -> None:
    """A video with a large picture attached."""
    cover = path.with_name(f"{path.stem}.jpg")
    ffmpeg(*scene(size="640x480"), "-frames:v", "1", cover)
    attached = ["-c:v:0", "mjpeg", "-disposition:v:0", "attached_pic"]
    ffmpeg(*scene(), "-i", cover, "-map", "1", "-map", "0", "-pix_fmt", "yuv420p", *attached, path)
    cover.unlink()


BT2020 = ("-vf", "scale=out_color_matrix=bt2020nc", "-colorspace", "bt2020nc", "-pix_fmt", "yuv420p10le")
X265 = ("-c:v", "libx265", "-x265-params", "log-level=none")
UNEVEN = ("-vf", "select='lt(t,1)+not(mod(n,6))*gte(t,1)'", "-fps_mode", "vfr")
YUV422 = ("-pix_fmt", "yuv422p")
BOTTOM_FIRST = ("-vf", "tinterlace=5,fieldorder=bff", "-flags", "+ilme+ildct", "-x264opts", "bff=1")
TINTERLACE = ("-vf", "tinterlace=4,fieldorder=tff", "-flags", "+ilme+ildct")
KINDS: dict[str, Make] = {
    # plain ones, of many colours
    "h264.mp4": encoded(),
    "h264-8fps.mp4": encoded(rate=8, seconds=6),
    "h264-ntsc.mp4": encoded(rate=30000 / 1001),
    "h264-60fps.mov": encoded("-bf", "8", "-b_strategy", "2", rate=60),
    "h264-odd-444.mp4": encoded("-pix_fmt", "yuv444p", size="131x97"),
    "h264-422.mkv": encoded("-pix_fmt", "yuv422p"),
    "h264-full-range.mp4": encoded("-color_range", "pc", "-pix_fmt", "yuvj420p"),
    "h264-bt709.mp4": encoded("-vf", "scale=out_color_matrix=bt709", "-colorspace", "bt709"),
    "h264-10bit.mkv": encoded("-pix_fmt", "yuv420p10le"),
    "h264-grey.mp4": encoded("-pix_fmt", "gray"),
    "h264-rgb.mkv": encoded("-c:v", "libx264rgb", "-pix_fmt", "rgb24"),
    "h264-narrow.mp4": encoded(size="48x36"),
    "hevc-bt2020-10bit.mp4": encoded(*X265, *BT2020),
    # hidden frames
    "cut-start.mp4": copied(before=("-ss", "1.3")),
    "cut-both.mp4": copied("-t", "2.3", before=("-ss", "0.77")),
    "cut-end.mov": copied("-t", "2.3"),
    "cut-hevc.mp4": copied(before=("-ss", "1.3"), source=X265),
    "cut-open-gop.mp4": copied(before=("-ss", "1.3"), source=("-x264-params", "open-gop=1:keyint=30:bframes=3")),
    "cut.mkv": copied(before=("-ss", "1.3"), end="mkv"),
    "segment-hevc.mp4": copied("-copyts", before=("-ss", "2", "-noaccurate_seek"), source=(*X265, "-g", "30")),
    "negative-start.mp4": encoded("-output_ts_offset", "-0.7", "-avoid_negative_ts", "disabled"),
    "late-start.mp4": encoded("-output_ts_offset", "2.5"),
    "vp8-invisible.webm": encoded("-c:v", "libvpx", "-b:v", "300k", "-auto-alt-ref", "1", "-lag-in-frames", "16"),
    # variable frame rate
    "uneven.mp4": encoded(*UNEVEN),
    "uneven.mkv": encoded(*UNEVEN),
    "uneven.webm": encoded(*UNEVEN, "-c:v", "libvpx-vp9", "-cpu-used", "8"),
    "1fps.mp4": encoded(rate=1, seconds=12),
    "240fps.mp4": encoded(rate=240),
    # codecs
    "av1.mp4": encoded("-c:v", "libsvtav1", "-preset", "12", seconds=3),
    "av1-10bit.webm": encoded("-c:v", "libaom-av1", "-cpu-used", "8", "-pix_fmt", "yuv420p10le", seconds=3),
    "av1-cut.mp4": copied(before=("-ss", "1.3"), source=("-c:v", "libaom-av1", "-cpu-used", "8")),
    "vp9.webm": encoded("-c:v", "libvpx-vp9", "-cpu-used", "8"),
    "vp9-alpha.webm": encoded("-c:v", "libvpx-vp9", "-cpu-used", "8", "-pix_fmt", "yuva420p"),
    "vvc.mp4": encoded("-c:v", "libvvenc", "-preset", "faster", "-pix_fmt", "yuv420p10le", seconds=2),
    "mpeg2.mpg": encoded("-c:v", "mpeg2video", "-bf", "2"),
    "mpeg4.avi": encoded("-c:v", "libxvid", "-bf", "2"),
    "h264.avi": encoded("-bf", "2"),
    "mjpeg.avi": encoded("-c:v", "mjpeg", "-pix_fmt", "yuvj422p"),
    "prores.mov": encoded("-c:v", "prores_ks", "-pix_fmt", "yuva444p10le"),
    "dnxhr.mxf": encoded("-c:v", "dnxhd", "-profile:v", "dnxhr_hq", "-pix_fmt", "yuv422p", size="256x128"),
    "ffv1.mkv": encoded("-c:v", "ffv1"),
    "animation.mov": encoded("-c:v", "qtrle", "-pix_fmt", "argb"),
    "theora.ogv": encoded("-c:v", "libtheora"),
    "wmv2.wmv": encoded("-c:v", "wmv2"),
    "h264.flv": encoded(),
    "h264.ts": encoded(),
    "hevc.m2ts": encoded(*X265),
    # turned and mirrored
    **{f"turned-{angle}.mp4": copied(before=("-display_rotation", str(angle))) for angle in (90, 180, 270)},
    "mirrored-h.mp4": copied(before=("-display_hflip",)),
    "mirrored-v.mp4": copied(before=("-display_vflip",)),
    "turned-90-mirrored-h.mp4": copied(before=("-display_rotation", "90", "-display_hflip")),
    "turned-90-mirrored-v.mov": copied(before=("-display_rotation", "90", "-display_vflip")),
    "turned-422-odd.mov": copied(before=("-display_rotation", "270"), source=(*YUV422, "-vf", "scale=130:98")),
    # pixels that are not square
    "wide-pixels.mp4": encoded("-vf", "setsar=2/1"),
    "narrow-pixels.mkv": encoded("-vf", "setsar=1/2"),
    "anamorphic.mpg": encoded("-c:v", "mpeg2video", "-vf", "setsar=64/45"),
    "turned-wide-pixels.mp4": copied(before=("-display_rotation", "90"), source=("-vf", "setsar=4/3")),
    # interlaced
    "interlaced.mp4": encoded(*TINTERLACE, rate=60),
    "interlaced-bottom.mov": encoded(*BOTTOM_FIRST, rate=50),
    "interlaced.ts": encoded(*TINTERLACE, "-c:v", "mpeg2video", "-b:v", "2M", rate=50),
    # jumps, pictures that refer far back
    "open-gop-60fps.mp4": encoded(*X265, rate=60),
    "open-gop.mpg": encoded("-c:v", "mpeg2video", "-bf", "2", "-g", "12"),
    "intra-refresh.mp4": encoded("-x264-params", "intra-refresh=1:keyint=30"),
    "long-pyramid.mp4": encoded("-x264-params", "bframes=16:b-pyramid=normal:ref=16:keyint=600"),
    # recorded live, without a duration
    "live.webm": piped("webm", "-c:v", "libvpx-vp9", "-cpu-used", "8"),
    "live.mkv": piped("matroska"),
    "fragments.mp4": piped("mp4", "-movflags", "frag_keyframe+empty_moov", "-g", "15"),
    "fragments-cut-off.mp4": cut_off(piped("mp4", "-movflags", "frag_keyframe+empty_moov", "-g", "15"), 0.7),
    "cut-off.mkv": cut_off(encoded("-g", "15"), 0.7),
    "live.ts": piped("mpegts"),
    # several tracks
    "two-tracks.mp4": two_tracks("128x96", "320x240"),
    "two-tracks.mkv": two_tracks("128x96", "320x240", "-disposition:v:0", "0", "-disposition:v:1", "default"),
    "two-tracks-none-default.mkv": two_tracks("128x96", "320x240", "-default_mode", "passthrough"),
    "cover.mp4": with_cover,
}  # fmt: skip


@dataclass(frozen=True)
class Compared:
    """One video. `shown`, `found`: frames by FFmpeg's command and by the project. `apart`: levels of 255.

    `late`: the largest distance of a used frame from its instant, in seconds; `least`: that of the nearest shown one.
    """

    name: str
    shown: int
    found: int
    used: int
    apart: int
    mean: float
    late: float
    least: float

    @property
    def same(self) -> bool:
        """Whether nothing but roundings sets them apart."""
        return self.shown == self.found and self.mean < 0.5 and self.late <= self.least + 0.002


def shown_by_ffmpeg(path: Path, interlaced: bool) -> tuple[np.ndarray, np.ndarray]:
    """All frames (f, h, w, 3) that FFmpeg's command shows, upright and with square pixels, and their times (f,)."""
    filters = ("bwdif=mode=send_frame:deint=interlaced," if interlaced else "") + "scale=iw*sar:ih,setsar=1,showinfo"
    command = [FFMPEG, "-i", str(path), "-vf", filters, "-fps_mode", "passthrough", "-pix_fmt", "rgb24"]
    command += ["-f", "rawvideo", "-"]
    done = subprocess.run(command, check=False, stdin=subprocess.DEVNULL, capture_output=True)
    said = done.stderr.decode(errors="replace")
    times = np.array([float(time) for time in re.findall(r"pts_time:\s*(-?[\d.]+)", said)])
    width, height = map(int, re.findall(r"\bs:(\d+)x(\d+)", said)[0])
    frames = np.frombuffer(done.stdout, np.uint8)
    count = len(frames) // (3 * width * height)
    return frames[: count * 3 * width * height].reshape(count, height, width, 3), times[:count]


def compare(path: Path) -> Compared:
    """What training uses of a video, beside FFmpeg's frames at the same times."""
    info = probe(path)
    expected, times = shown_by_ffmpeg(path, info.interlaced)
    used = SETTINGS.indices(info)
    got = read_frames(path, used).permute(0, 2, 3, 1).numpy()
    at = info.times[used] - info.times[0] + times[0]
    same = expected[np.abs(times[:, None] - at).argmin(0)]
    apart = np.abs(got.astype(np.int16) - same)
    instants = at[0] + np.arange(len(used)) / SETTINGS.fps
    late, least = np.abs(at - instants).max(), np.abs(times[:, None] - instants).min(0).max()
    pixels = int(apart.max()), float(apart.mean())
    return Compared(path.name, len(expected), info.frames, len(used), *pixels, float(late), float(least))


def make(folder: Path, names: list[str]) -> list[Path]:
    """Videos of these kinds."""
    paths = [folder / name for name in names]
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda path: KINDS[path.name](path), [path for path in paths if not path.exists()]))
    return paths


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", type=Path, help="where the videos are made, or lie since an earlier run")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory(prefix="kinds-") as scratch:
        folder = options.folder or Path(scratch)
        folder.mkdir(parents=True, exist_ok=True)
        print("| video | FFmpeg shows | found | used | largest difference | mean | off its instant, s | nearest, s |")
        print("|---|---|---|---|---|---|---|---|")
        wrong = 0
        for path in make(folder, list(KINDS)):
            try:
                c = compare(path)
            except Exception as error:  # noqa: BLE001  # the others are compared all the same
                print(f"| {path.name} | {type(error).__name__}: {error} |", flush=True)
                wrong += 1
                continue
            wrong += not c.same
            counts, times = (
                (c.name, c.shown, c.found, c.used, c.apart),
                (f"{c.mean:.3f}", f"{c.late:.4f}", f"{c.least:.4f}"),
            )
            print(f"| {' | '.join(map(str, (*counts, *times)))} |", flush=True)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
