"""A local server that speaks the hub's protocol for one repository, and fails in the ways that hubs and networks do."""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

COMMIT = "c0ffee" + "0" * 34
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:{}\nsize {}\n"
LARGE = 5000  # bytes from which files lie elsewhere


class HubServer:
    """Serves `folder` as the repository `name`: small files itself, large ones by a redirect to a second address.

    Attributes:
        broken: path -> how many of its answers end in the middle.
        wrong: path -> how many of its answers have another byte.
        pointers: paths that are answered by their LFS pointers.
        hidden: paths that are neither listed nor given. failing: how many of the next answers are 503.
        ranges: whether parts are given. token: that is asked for. pause: seconds between two blocks of an answer.
        asked: (path, Range) of each request for a file. tokens: what came to each of the two addresses.
    """

    def __init__(self, folder: Path, name: str):
        self.folder, self.name = folder, name
        self.broken, self.wrong = Counter[str](), Counter[str]()
        self.pointers: set[str] = set()
        self.hidden: set[str] = set()
        self.failing, self.ranges, self.token = 0, True, None
        self.pause = threading.Event()
        self.seconds = 0.0
        self.asked: list[tuple[str, str]] = []
        self.tokens: dict[str, set[str | None]] = {"hub": set(), "elsewhere": set()}
        self.endpoint, self.elsewhere = "", ""

    def tree(self) -> list[dict]:
        files = [p for p in sorted(self.folder.rglob("*")) if p.is_file()]
        return [{"type": "directory", "path": "vae", "oid": "0" * 40, "size": 0}, *map(self._entry, files)]

    def _entry(self, file: Path) -> dict:
        content = file.read_bytes()
        sha1 = hashlib.sha1(f"blob {len(content)}\0".encode() + content).hexdigest()
        entry = {"type": "file", "path": file.relative_to(self.folder).as_posix(), "oid": sha1, "size": len(content)}
        if len(content) > LARGE:
            entry["lfs"] = {"oid": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 134}
        return entry

    def listed(self) -> list[dict]:
        return [entry for entry in self.tree() if entry["path"] not in self.hidden]


class _Answers(BaseHTTPRequestHandler):
    """Of `hub` at one of its two addresses, `place`."""

    hub: HubServer
    place: str
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        self.hub.tokens[self.place].add(self.headers.get("Authorization"))
        if self.place == "hub" and self.hub.token and self.headers.get("Authorization") != f"Bearer {self.hub.token}":
            return self.answer(401, b'{"error": "Invalid credentials"}')
        if self.hub.failing:
            self.hub.failing -= 1
            return self.answer(503, b"later", {"Retry-After": "0"})
        address = urlsplit(self.path)
        path, api = unquote(address.path), f"/api/models/{self.hub.name}"
        if path == f"{api}/revision/main":
            return self.json({"id": self.hub.name, "sha": COMMIT})
        if path == f"{api}/tree/{COMMIT}":
            return self.tree("cursor=2" in address.query)
        if match := re.fullmatch(rf"/{self.hub.name}/resolve/{COMMIT}/(.+)", path):
            return self.file(match[1])
        if self.place == "elsewhere":
            return self.content(path[1:])
        return self.answer(404, b'{"error": "Repository not found"}')

    def tree(self, second: bool) -> None:
        entries, link = self.hub.listed(), {}
        half = len(entries) // 2
        if not second:
            link = {
                "Link": f'<{self.hub.endpoint}/api/models/{self.hub.name}/tree/{COMMIT}?recursive=true&cursor=2>; rel="next"'
            }
        self.json(entries[half:] if second else entries[:half], link)

    def file(self, path: str) -> None:
        if path in self.hub.hidden or not (self.hub.folder / path).is_file():
            return self.answer(404, b"Entry not found")
        if (self.hub.folder / path).stat().st_size > LARGE:
            return self.answer(302, b"", {"Location": f"{self.hub.elsewhere}/{path}"})
        return self.content(path)

    def content(self, path: str) -> None:
        self.hub.asked.append((path, self.headers.get("Range", "")))
        content = (self.hub.folder / path).read_bytes()
        if path in self.hub.pointers:
            content = POINTER.format(hashlib.sha256(content).hexdigest(), len(content)).encode()
        if self.hub.wrong[path] > 0:
            self.hub.wrong[path] -= 1
            content = bytes([content[0] ^ 1]) + content[1:]
        wish = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        start = int(wish[1]) if wish and self.hub.ranges else 0
        headers = {"Content-Range": f"bytes {start}-{len(content) - 1}/{len(content)}"} if start else {}
        self.send_response(206 if start else 200)
        for name, value in {**headers, "Content-Length": str(len(content) - start)}.items():
            self.send_header(name, value)
        self.end_headers()
        body = content[start:]
        if self.hub.broken[path] > 0:
            self.hub.broken[path] -= 1
            body = body[: len(body) // 2]
            self.close_connection = True
        with suppress(ConnectionError):  # who asked was killed
            for begin in range(0, len(body), 1 << 16):
                self.wfile.write(body[begin : begin + (1 << 16)])
                self.hub.pause.wait(self.hub.seconds)

    def json(self, content: object, headers: dict[str, str] | None = None) -> None:
        self.answer(200, json.dumps(content).encode(), headers)

    def answer(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {**(headers or {}), "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)


@contextmanager
def hub_server(folder: Path, name: str) -> Iterator[HubServer]:
    """The server at work, on two free ports of this machine."""
    server = HubServer(folder, name)
    kinds = [type("Answers", (_Answers,), {"hub": server, "place": place}) for place in ("hub", "elsewhere")]
    listeners = [ThreadingHTTPServer(("127.0.0.1", 0), kind) for kind in kinds]
    server.endpoint, server.elsewhere = (f"http://127.0.0.1:{listener.server_port}" for listener in listeners)
    for listener in listeners:
        listener.daemon_threads = True
        threading.Thread(target=listener.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    try:
        yield server
    finally:
        server.pause.set()
        for listener in listeners:
            listener.shutdown()
            listener.server_close()
