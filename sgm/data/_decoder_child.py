"""The decoding process: a script that answers requests on its standard input until that is closed.

Run by `sgm.data.decoder` as a file, so that it imports PyAV only. A request is one JSON line, `{"op": "probe" | "read",
"path": str, "begin": int, "size": int | null, "limit": seconds}`; with a size the video is that part of the file. To
"read" are `"indices"`, ascending, without repeats, and `"deinterlace"`. An answer is the length (4 bytes,
little-endian) of a JSON text, that text, and an array of its `dtype` and `shape` as raw bytes: for a "probe" the times
of the frames in seconds, for a "read" one answer a frame, uint8 (h, w, 3). A failure is an answer too: `{"error":
reason}`. The first answer, `{}`, says that the process is ready.

Frames are those, in number, time and pixels, that FFmpeg's command gives: without the hidden ones, upright, with square
pixels. Times of frames come from the packets; only what is needed is decoded.
"""

from __future__ import annotations

import json
import math
import os
import signal
import struct
import sys
from array import array
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from typing import Any, BinaryIO

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path[:] = [p for p in sys.path if os.path.abspath(p) != HERE]  # our neighbours' names must not hide other modules

# Containers only: a playlist under a video's name would open other files.
FORMATS = "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,mpegts,mpeg,flv,asf,ogg,mxf,ivf,nut,dv"
DEFAULT_WORTH = 5_000_000  # pixels by which FFmpeg's command prefers the track that the file marks as the default
UNLIKE = 0.05  # a frame rate that is further off the frames' own times is not believed
TRANSPOSED = {
    (True, False): "clock", (False, True): "cclock", (True, True): "cclock_flip", (False, False): "clock_flip",
}  # fmt: skip

Frame = Any  # av.VideoFrame; PyAV's types say None of what every video has


class Video:
    """An open video: when its frames are shown, and the frames.

    Attributes:
        facts: what a probe answers, besides the times.
        pts: of the shown frames, ascending, in the stream's time base.
    """

    codec_name = "unknown"

    def __init__(self, source: str):
        self.source = source
        self.container: Any = None
        self.stream: Any = None
        self.first: Frame = None
        self.facts: dict[str, Any] = {}
        self._graph: Any = None
        self._graph_key: tuple[Any, ...] = ()

    def open(self) -> None:
        """Find out everything. Raises ValueError and what PyAV raises."""
        self._start()
        self._index()
        picture = next(self._shown(self.first, False))
        self.facts |= {"height": picture.height, "width": picture.width}

    def _start(self) -> None:
        import av
        from av.stream import Disposition

        self.invalid = av.error.InvalidDataError
        options = {"format_whitelist": FORMATS, "protocol_whitelist": "file,subfile"}
        self.container = av.open(self.source, options=options)
        self.container.flags &= ~av.container.Flags.gen_pts.value  # guesses, wrong where frames are reordered
        self.given_out = 0
        tracks = [s for s in self.container.streams.video if not s.disposition & Disposition.attached_pic]
        if not tracks:
            raise ValueError(f"no video track (only {', '.join(sorted({s.type for s in self.container.streams}))})")

        def worth(track: Any) -> int:
            size = track.width * track.height if track.codec_context else 0
            return size + DEFAULT_WORTH * bool(track.disposition & Disposition.default)

        self.stream, self.tracks = max(tracks, key=worth), len(tracks)
        self.codec = self.stream.codec_context
        if self.codec is None:
            raise ValueError("a codec that this FFmpeg does not know")
        self.codec_name = self.codec.codec.canonical_name
        self.codec.thread_type, self.codec.thread_count = "NONE", 1  # other workers have the other processors

    def _index(self) -> None:
        listed: list[int | None] = []
        self.keys: list[int] = []
        fault, hidden = None, 0
        for packet in self.container.demux(self.stream):
            if self.first is None:
                try:
                    self.first = next(iter(self.codec.decode(packet)), None)
                except self.invalid as error:
                    fault = error
            if packet.size:
                not_shown = self.codec_name == "vp8" and not memoryview(packet)[0] & 0x10  # RFC 6386, 9.1: show_frame
                unseen = packet.is_discard or packet.is_corrupt or not_shown
                hidden += unseen
                listed += [] if unseen else [packet.pts]
                self.keys += [packet.pts] if packet.is_keyframe and packet.pts is not None else []
        if self.first is None:
            raise fault or ValueError("not one frame of it can be decoded")
        self.pts = self._shown_at(listed)
        self.keys.sort()
        turns = upright(display_matrix(self.first))
        self.facts = {
            "codec": self.codec_name, "fps": self._rate(), "hidden": hidden + len(listed) - len(self.pts),
            "tracks": self.tracks, "interlaced": bool(self.first.interlaced_frame or self.codec.field_order > 1),
            "pixel_aspect": float(self.stream.sample_aspect_ratio or 1),
            "turned": [argument or name for name, argument in turns],
        }  # fmt: skip

    def _shown_at(self, listed: list[int | None]) -> list[int]:
        times = {pts for pts in listed if pts is not None}
        self.counted = None in listed
        if self.counted:  # as in AVI, where frames have a number only: that in which they come out
            rate = float(self.stream.average_rate or self.stream.guessed_rate or 1)
            step = max(1, round(1 / (rate * self.stream.time_base)))
            return list(range(0, step * len(listed), step))
        # What precedes the first frame that comes out (it refers to frames cut away) does not come out at all.
        return sorted(pts for pts in times if pts >= self.first.pts)

    def _rate(self) -> float:
        stated = float(self.stream.average_rate or self.stream.guessed_rate or 0)
        if len(self.pts) < 2:
            return stated or 1.0
        mean = (len(self.pts) - 1) / (self.times()[-1] - self.times()[0])
        return stated if abs(stated / mean - 1) < UNLIKE else mean

    def times(self) -> list[float]:
        """When the frames are shown, in seconds."""
        base = self.stream.time_base
        return [pts * base.numerator / base.denominator for pts in self.pts]

    def frames(self, indices: Sequence[int], deinterlace: bool) -> Iterator[Frame]:
        """Frames by their number among those shown, which ascends. Raises IndexError, ValueError."""
        wanted = [self.pts[index] for index in indices]
        given = 0
        # A file may call a frame a key from which not all that follow can be decoded: then again from the beginning.
        key = 0 if self.counted else max(0, bisect_right(self.keys, wanted[0]) - 1)
        for start in dict.fromkeys((key, 0)):
            for picture in self._decoded(start, frozenset(wanted[given:]), deinterlace):
                pts = picture.pts * picture.time_base / self.stream.time_base
                if pts > wanted[given]:
                    break
                if pts == wanted[given]:
                    yield picture
                    given += 1
                    if given == len(wanted):
                        return
        raise ValueError(f"the frame listed at {float(wanted[given] * self.stream.time_base):.3f} s cannot be decoded")

    def _decoded(self, start: int, wanted: frozenset[int], deinterlace: bool) -> Iterator[Frame]:
        self._graph_key = ()  # its filters remember frames
        if start:
            self.container.seek(self.keys[start], stream=self.stream)
        else:
            self._start()
        # In H.264 no frame refers to those marked so: what is not wanted of them need not be decoded.
        skipping = self.codec_name == "h264" and not deinterlace and not self.counted
        for packet in self.container.demux(self.stream):
            if skipping:
                self.codec.skip_frame = "DEFAULT" if packet.pts in wanted or not packet.size else "NONREF"
            for frame in () if packet.is_corrupt else self.codec.decode(packet):
                if self.counted:
                    frame.pts = self.given_out * (self.pts[1] if len(self.pts) > 1 else 1)
                    self.given_out += 1
                if deinterlace or frame.pts in wanted:  # to deinterlace takes the neighbours
                    yield from self._shown(frame, deinterlace)
        if deinterlace:
            self._graph.vpush(None)
            yield from self._pulled()

    def _shown(self, frame: Frame, deinterlace: bool) -> Iterator[Frame]:
        """What comes out of the filters when a frame goes in: uint8 RGB, as a player shows it."""
        key = (frame.width, frame.height, frame.format.name, frame.colorspace, frame.color_range, deinterlace)
        if key != self._graph_key:
            self._graph, self._graph_key = self._filters(frame, deinterlace), key
        self._graph.vpush(frame)
        yield from self._pulled()

    def _pulled(self) -> Iterator[Frame]:
        while True:
            try:
                picture = self._graph.vpull()
            except (BlockingIOError, EOFError):
                return
            yield picture

    def _filters(self, frame: Frame, deinterlace: bool) -> Any:
        from av.filter import Graph

        graph = Graph()
        graph.threads = 1
        base, aspect = self.stream.time_base, self.stream.sample_aspect_ratio
        source = {
            "video_size": f"{frame.width}x{frame.height}", "pix_fmt": frame.format.name,
            "time_base": f"{base.numerator}/{base.denominator}",
            "pixel_aspect": f"{aspect.numerator}/{aspect.denominator}" if aspect else "1/1",
            "colorspace": str(frame.colorspace), "range": str(frame.color_range),
        }  # fmt: skip
        steps = [graph.add("buffer", **source)]
        if deinterlace:
            steps.append(graph.add("bwdif", mode="send_frame", deint="interlaced"))
        steps += [graph.add(*step) for step in upright(display_matrix(frame))]
        steps.append(graph.add("scale", w="iw*sar", h="ih", flags="bicubic"))
        steps += [graph.add("format", pix_fmts="rgb24"), graph.add("buffersink")]
        graph.link_nodes(*steps).configure(auto_buffer=False)
        return graph


def display_matrix(frame: Frame) -> tuple[int, ...]:
    """The nine numbers by which the file wants a frame turned; none where it says nothing."""
    data = frame.side_data.get("DISPLAYMATRIX")
    return struct.unpack("9i", bytes(data)) if data else ()


def upright(matrix: tuple[int, ...]) -> list[tuple[str, str | None]]:
    """The filters that turn and mirror as a display matrix says: (name, argument)."""
    if not any(matrix):
        return []
    right, across, _, down, below = matrix[:5]
    angle = math.degrees(math.atan2(across * math.hypot(right, down), right * math.hypot(across, below)))
    if abs((angle + 45) % 90 - 45) > 1:
        return [("rotate", f"{angle % 360}*PI/180")]
    if abs(right) > abs(across):
        return [(name, None) for name, value in (("hflip", right), ("vflip", below)) if value < 0]
    return [("transpose", TRANSPOSED[across > 0, down > 0])]


class Videos:
    """The last opened video stays open: a clip is probed, then read."""

    def __init__(self) -> None:
        import av  # noqa: F401  # now: a process that cannot work says so at its start

        self.key: tuple[Any, ...] | None = None
        self.video = Video("")

    def open(self, request: dict[str, Any]) -> Video:
        path, begin, size = request["path"], request["begin"], request["size"]
        stat = os.stat(path)
        key = (path, begin, size, stat.st_size, stat.st_mtime_ns)
        if key != self.key:
            self.key = None
            part = "" if size is None else f"subfile,,start,{begin},end,{begin + size},,:"
            self.video = Video(f"{part}file:{path}")
            self.video.open()
            self.key = key
        return self.video

    def answers(self, request: dict[str, Any]) -> Iterator[tuple[dict[str, Any], Any]]:
        video = self.open(request)
        if request["op"] == "probe":
            times = array("d", video.times())
            yield {**video.facts, "dtype": "float64", "shape": [len(times)]}, times
            return
        deinterlace = request["deinterlace"] and video.facts["interlaced"]
        for picture in video.frames(request["indices"], deinterlace):
            yield {"dtype": "uint8", "shape": [picture.height, picture.width, 3]}, pixels(picture)

    def forget(self) -> None:
        self.key, self.video = None, Video("")


def pixels(picture: Frame) -> bytes | memoryview:
    """The bytes of a picture, without what pads its rows."""
    plane, width = picture.planes[0], 3 * picture.width
    data = memoryview(plane)[: plane.line_size * picture.height]
    if plane.line_size == width:
        return data
    return b"".join(data[start : start + width] for start in range(0, len(data), plane.line_size))


def reason(error: Exception) -> str:
    """The cause, without the file's name that PyAV adds."""
    return getattr(error, "strerror", None) or str(error) or type(error).__name__


def answer(videos: Videos, request: dict[str, Any], out: BinaryIO) -> None:
    # The kernel ends this process should the decoder hang and our parent be gone: no one else would.
    signal.setitimer(signal.ITIMER_REAL, request["limit"])
    try:
        for head, data in videos.answers(request):
            send(out, head, data)
    except Exception as error:  # noqa: BLE001  # whatever the decoder raises is the answer; the parent makes it a VideoError
        send(out, {"error": reason(error), "codec": videos.video.codec_name})
        videos.forget()
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


def send(out: BinaryIO, head: dict[str, Any], data: Any = b"") -> None:
    text = json.dumps(head).encode()
    out.write(len(text).to_bytes(4, "little") + text)
    out.write(data)
    out.flush()


def main() -> None:
    for number in (signal.SIGINT, signal.SIGTERM):  # sent to a whole job: the parent's to handle
        signal.signal(number, signal.SIG_IGN)
    # Keep the answers' pipe to ourselves: libraries that print must not disturb it.
    out = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    try:
        videos = Videos()
    except ImportError as error:
        send(out, {"error": f"PyAV cannot be imported ({error})"})
        return
    send(out, {})
    for line in sys.stdin.buffer:
        answer(videos, json.loads(line), out)


if __name__ == "__main__":
    main()
