"""The decoding process: a script that answers requests on its standard input until that is closed.

Run by `sgm.data.decoder` as a file, so that it imports decord and numpy only. A request is one JSON line, `{"op":
"probe" | "read", "path": str, "begin": int, "size": int | null, "indices": [int], "limit": seconds}`; with a size the
video is that part of the file. An answer is the length (4 bytes, little-endian) of
a JSON text, that text, and for a "read" the frames as raw bytes, uint8 (f, h, w, 3). A failure is an answer too:
`{"error": reason}`. The first answer, `{}`, says that the process is ready.
"""

from __future__ import annotations

import io
import json
import os
import re
import signal
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, BinaryIO

if TYPE_CHECKING:
    import numpy as np

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path[:] = [p for p in sys.path if os.path.abspath(p) != HERE]  # our neighbours' names must not hide other modules


class Videos:
    """The last opened video stays open: a clip is probed, then read."""

    def __init__(self) -> None:
        import decord

        decord.logging.set_level(decord.logging.QUIET)
        self.decord = decord
        self.key: tuple[Any, ...] | None = None
        self.reader: Any = None  # decord's, which carries no types

    def open(self, request: dict[str, Any]) -> Any:
        path, begin, size = request["path"], request["begin"], request["size"]
        stat = os.stat(path)
        key = (path, begin, size, stat.st_size, stat.st_mtime_ns)
        if key != self.key:
            self.key = self.reader = None
            source = path if size is None else part_of(path, begin, size)
            reader = self.decord.VideoReader(source, ctx=self.decord.cpu(0), num_threads=1)
            self.height, self.width, channels = reader[0].shape  # decodes: proves that the stream is readable at all
            # decord gives rows padded by the scaler as additional channels (widths 2, 8, 16, 24, 48, 72), and
            # get_batch fails on them.
            self.padded = channels != 3
            self.reader, self.key = reader, key
        return self.reader

    def probe(self, request: dict[str, Any]) -> dict[str, Any]:
        reader = self.open(request)
        size = {"height": self.height, "width": self.width}
        return {"frames": len(reader), "fps": float(reader.get_avg_fps()), **size}

    def read(self, request: dict[str, Any]) -> np.ndarray:
        reader, indices = self.open(request), request["indices"]
        unique = sorted(set(indices))
        frames = self.unpadded(unique) if self.padded else reader.get_batch(unique).asnumpy()
        if unique == list(indices):
            return frames
        place = {index: i for i, index in enumerate(unique)}
        return frames[[place[i] for i in indices]]

    def unpadded(self, indices: Sequence[int]) -> np.ndarray:
        import numpy as np

        rows = np.stack([self.reader[index].asnumpy().reshape(self.height, -1) for index in indices])
        return np.ascontiguousarray(rows[:, :, : 3 * self.width]).reshape(-1, self.height, self.width, 3)

    def forget(self) -> None:
        self.key = self.reader = None


def part_of(path: str, begin: int, size: int) -> io.BytesIO:
    """Bytes of a file as a file in memory, which decord reads too."""
    with open(path, "rb") as file:
        file.seek(begin)
        return io.BytesIO(file.read(size))


def reason(error: Exception) -> str:
    """The cause without decord's source positions and stack trace."""
    text = str(error).split("Stack trace")[0].strip() or type(error).__name__
    return " ".join(re.sub(r"\[\d\d:\d\d:\d\d\] \S+:\d+: ", "", text).split())[:300]


def answer(videos: Videos, request: dict[str, Any], out: BinaryIO) -> None:
    # The kernel ends this process should the decoder hang and our parent be gone: no one else would.
    signal.setitimer(signal.ITIMER_REAL, request["limit"])
    payload: np.ndarray | None = None
    try:
        if request["op"] == "probe":
            head = videos.probe(request)
        else:
            payload = videos.read(request)
            head = {"shape": payload.shape}
    except Exception as error:  # noqa: BLE001  # whatever the decoder raises is the answer; the parent makes it a VideoError
        videos.forget()
        head = {"error": reason(error)}
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
    send(out, head)
    if payload is not None:
        out.write(payload.data.cast("B"))
        out.flush()


def send(out: BinaryIO, head: dict[str, Any]) -> None:
    text = json.dumps(head).encode()
    out.write(len(text).to_bytes(4, "little") + text)
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
        send(out, {"error": f"decord cannot be imported ({error})"})
        return
    send(out, {})
    for line in sys.stdin.buffer:
        answer(videos, json.loads(line), out)


if __name__ == "__main__":
    main()
