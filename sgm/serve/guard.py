"""What stands before the application: keys, names of this host, sizes of requests, and a count of the answers."""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import ipaddress
import os
from collections.abc import Iterable
from pathlib import Path
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from sgm.serve.answers import ApiError
from sgm.serve.jobs import ServeError

ENVIRONMENT = "COGVIDEOX_API_KEYS"
OPEN = ("/health",)  # for who watches over the process
SHORTEST_KEY = 16
LOOPBACK = ("127.0.0.1", "localhost", "::1")
UNFRAMED = (b"content-security-policy", b"frame-ancestors 'self'")  # in no page of another site


class Keys:
    """The keys that clients must send, kept as digests; empty where everybody may ask."""

    def __init__(self, keys: Iterable[str] = ()):
        self._digests = [hashlib.sha256(key.encode()).digest() for key in keys]

    def __bool__(self) -> bool:
        return bool(self._digests)

    @classmethod
    def read(cls, file: Path | None) -> Keys:
        """From a file with one key a line, and from the environment (`COGVIDEOX_API_KEYS`, by commas).

        Raises:
            ServeError: the file cannot be read, or a key is too short to be one.
        """
        keys = [key.strip() for key in os.environ.get(ENVIRONMENT, "").split(",")]
        if file is not None:
            try:
                keys += [line.strip() for line in file.read_text(encoding="utf-8").splitlines()]
            except (OSError, UnicodeDecodeError) as error:
                raise ServeError(f"--api-keys {file}: it cannot be read ({type(error).__name__}).") from error
        keys = [key for key in keys if key and not key.startswith("#")]
        if file is not None and not keys:
            raise ServeError(f"--api-keys {file}: it holds no key; write one a line.")
        if any(len(key) < SHORTEST_KEY for key in keys):
            raise ServeError(f"a key has fewer than {SHORTEST_KEY} characters; `openssl rand -hex 16` makes one.")
        return cls(keys)

    def owner(self, authorization: str) -> str | None:
        """A name for the key in an `Authorization` header, None where it is none of ours. All take the same time."""
        scheme, _, value = authorization.partition(" ")
        given = hashlib.sha256(_secret(scheme.lower(), value.strip()).encode()).digest()
        matches = [hmac.compare_digest(given, digest) for digest in self._digests]
        return given.hex()[:16] if any(matches) else None


def _secret(scheme: str, value: str) -> str:
    """The key itself: what follows `Bearer`, or the password of a browser's dialogue."""
    if scheme != "basic":
        return value if scheme == "bearer" else ""
    try:
        return base64.b64decode(value, validate=True).decode().partition(":")[2]
    except (binascii.Error, UnicodeDecodeError):
        return ""


def _hostname(address: str) -> str:
    """Without its port; "" where it is none."""
    try:
        return urlsplit(f"//{address}").hostname or ""
    except ValueError:
        return ""


def _is_address(name: str) -> bool:
    try:
        return bool(ipaddress.ip_address(name))
    except ValueError:
        return False


class Guard:
    """ASGI middleware.

    Args:
        keys: whom to let in.
        hosts: names under which this server may be called, besides addresses; None for any. A page of another site is
            refused: its browser says where it comes from (`Origin`), or calls by a name that its owner has led here.
        most_bytes: of a request's body.
        answers: HTTP status -> how many, counted here.
    """

    def __init__(self, app: ASGIApp, keys: Keys, hosts: Iterable[str] | None, most_bytes: int, answers: dict[int, int]):
        self.app = app
        self.keys = keys
        self.hosts = None if hosts is None else {_hostname(host) for host in hosts} - {""}
        self.most_bytes = most_bytes
        self.answers = answers

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            if scope["type"] == "lifespan":
                await self.app(scope, receive, send)
            return

        started = False

        async def counting(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                message["headers"] = [*message.get("headers", ()), UNFRAMED]
                status = message["status"]
                self.answers[status] = self.answers.get(status, 0) + 1
            await send(message)

        try:
            self._check(scope)
            await self.app(scope, self._limited(receive), counting)
        except ApiError as error:
            if started:
                raise
            await error.response()(scope, receive, counting)

    def _check(self, scope: Scope) -> None:
        headers, is_open = Headers(scope=scope), scope["path"] in OPEN
        if not is_open:
            self._check_site(headers)
        length = headers.get("content-length", "0")
        if length.isdecimal() and int(length) > self.most_bytes:
            raise self._too_large()
        scope["client_name"] = ""
        if self.keys and not is_open:
            owner = self.keys.owner(headers.get("authorization", ""))
            if owner is None:
                raise ApiError(
                    401,
                    "Incorrect API key provided.",
                    None,
                    "invalid_api_key",
                    {"www-authenticate": 'Basic realm="videos"'},
                )
            scope["client_name"] = owner

    def _check_site(self, headers: Headers) -> None:
        """Whether a browser that calls shows our page, and calls us by a name of ours."""
        host, origin = headers.get("host", ""), headers.get("origin")
        name = _hostname(host)
        if self.hosts is not None and name not in self.hosts and not _is_address(name):
            raise ApiError(403, f"This server is not called {host!r} (--allow-host {name}).", None, "unknown_host")
        if origin is not None and origin.partition("://")[2] != host:
            raise ApiError(
                403,
                f"Pages of other sites ({origin}) may not call this server, which is called {host!r} here. A proxy "
                "must pass on the Host that it was asked for.",
                None,
                "cross_origin",
            )

    def _limited(self, receive: Receive) -> Receive:
        taken = 0

        async def limited() -> Message:
            nonlocal taken
            message = await receive()
            taken += len(message.get("body", b""))
            if taken > self.most_bytes:
                raise self._too_large()
            return message

        return limited

    def _too_large(self) -> ApiError:
        return ApiError(413, f"The request is larger than {self.most_bytes >> 20} MiB.", None, "request_too_large")
