"""The hub's HTTP protocol, as far as downloading takes it: a commit, its files with sizes and checksums, their bytes.

With the standard library alone, so that breaks, resuming and checks are ours. A token goes to the hub's own address and
nowhere else (large files lie with others, to whom the hub redirects), and is in no message.
"""

from __future__ import annotations

import http.client
import json
import os
import re
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from email.message import Message
from typing import IO, Any
from urllib.parse import quote, urljoin, urlsplit

from sgm.errors import SgmError, first_line

DEFAULT_ENDPOINT = "https://huggingface.co"
TIMEOUT = 20.0  # seconds without a byte
Read = Callable[[int], bytes]
_NAME = re.compile(r"[\w.-]+/[\w.-]+")


class HubError(SgmError):
    """A repository cannot be had; the message says which, why, and what to do."""


class UnreachableError(HubError):
    """The hub does not answer, or the network broke off; another attempt may succeed.

    Attributes:
        wait: seconds that the server asks for.
    """

    def __init__(self, message: str, wait: float = 0.0):
        super().__init__(message)
        self.wait = wait


@dataclass(frozen=True)
class HubFile:
    """A file of a commit.

    Attributes:
        size: bytes.
        digest: see `sgm.weights.checksums.new_digest`.
    """

    path: str
    size: int
    digest: str


@dataclass(frozen=True)
class Hub:
    """Where the hub is, and the token of who asks."""

    endpoint: str = DEFAULT_ENDPOINT
    token: str | None = field(default=None, repr=False)

    @classmethod
    def from_environment(cls) -> Hub:
        """The address in HF_ENDPOINT; the token in HF_TOKEN, or that of `hf auth login`.

        Raises:
            HubError: no http(s) address, or HF_HUB_OFFLINE is set.
        """
        from huggingface_hub import get_token

        endpoint = (os.environ.get("HF_ENDPOINT", "").strip() or DEFAULT_ENDPOINT).rstrip("/")
        parts = urlsplit(endpoint)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise HubError(f"HF_ENDPOINT is {endpoint!r}; it must be an address like {DEFAULT_ENDPOINT}.")
        if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "TRUE", "YES", "ON"):
            raise UnreachableError("HF_HUB_OFFLINE is set, so nothing is downloaded.")
        return cls(endpoint, os.environ.get("HF_TOKEN", "").strip() or get_token())

    def commit(self, repository: str, revision: str = "main") -> str:
        """The commit (40 hex digits) that a branch or tag stands for.

        Raises:
            HubError: no such repository, or not for this token.
            UnreachableError: no answer.
        """
        if not _NAME.fullmatch(repository):
            raise HubError(f"{repository!r} is no repository's name, which has the form OWNER/NAME.")
        with self.open(f"/api/models/{repository}/revision/{quote(revision, safe='')}", repository) as (body, _):
            content = self._parsed(body, repository)
        commit = content.get("sha") if isinstance(content, dict) else None
        if not isinstance(commit, str) or not re.fullmatch(r"[0-9a-f]{40}", commit):
            raise HubError(f"{self.endpoint} does not say which commit {repository} has; is it a hub?")
        return commit

    def files(self, repository: str, commit: str) -> list[HubFile]:
        """All files of a commit. Raises HubError, UnreachableError."""
        address: str | None = f"/api/models/{repository}/tree/{commit}?recursive=true"
        found: list[HubFile] = []
        while address is not None:
            with self.open(address, repository) as (body, headers):
                entries = self._parsed(body, repository)
            if not isinstance(entries, list):
                raise HubError(f"{self.endpoint} lists no files of {repository}; is it a hub?")
            found += [_file(entry) for entry in entries if isinstance(entry, dict) and entry.get("type") == "file"]
            following = re.search(r'<([^>]+)>;\s*rel="next"', headers.get("Link", ""))
            address = following[1] if following else None
        return found

    def _parsed(self, body: IO[bytes], repository: str) -> Any:
        with self._reaching():
            text = body.read()
        try:
            return json.loads(text)
        except (ValueError, RecursionError) as error:
            raise HubError(f"what {self.endpoint} says of {repository} is no JSON; look at HF_ENDPOINT.") from error

    @contextmanager
    def content(self, repository: str, commit: str, path: str, start: int = 0) -> Iterator[tuple[Read, int]]:
        """(a function that reads so many bytes of a file, or fewer at its end; the place of the first of them), from
        `start` on where the server can.

        Raises:
            HubError, UnreachableError: reading, too, raises the latter.
        """
        address = f"/{repository}/resolve/{commit}/{quote(path)}"
        with self.open(address, repository, {"Range": f"bytes={start}-"} if start else {}) as (body, headers):
            place = re.match(r"bytes (\d+)-", headers.get("Content-Range", ""))

            def read(size: int) -> bytes:
                with self._reaching():
                    return body.read(size)

            yield read, int(place[1]) if place else 0

    @contextmanager
    def open(
        self, address: str, repository: str, headers: dict[str, str] | None = None
    ) -> Iterator[tuple[IO[bytes], Message]]:
        """(body, headers) of what lies at an address of the hub. Raises HubError, UnreachableError."""
        request = urllib.request.Request(urljoin(self.endpoint + "/", address), headers=headers or {})
        request.add_header("User-Agent", "cogvideox-sat")
        request.add_header("Accept-Encoding", "identity")  # else sizes and ranges are those of packed bytes
        opener = urllib.request.build_opener(_Redirects(self))
        self.authorise(request)
        with self._reaching():
            try:
                response = opener.open(request, timeout=TIMEOUT)
            except urllib.error.HTTPError as error:
                raise self._refusal(error, repository) from error
        with response:
            yield response, response.headers

    @contextmanager
    def _reaching(self) -> Iterator[None]:
        try:
            yield
        except (urllib.error.URLError, http.client.HTTPException, OSError) as error:
            reason = getattr(error, "reason", error)
            said = first_line(reason) if str(reason) else type(reason).__name__
            raise UnreachableError(f"{self.endpoint} cannot be reached: {said}.") from error

    def authorise(self, request: urllib.request.Request) -> None:
        """Add the token, if the request goes to the hub itself."""
        own, other = urlsplit(self.endpoint), urlsplit(request.full_url)
        if self.token and (own.scheme, own.netloc) == (other.scheme, other.netloc):
            request.add_unredirected_header("Authorization", f"Bearer {self.token}")

    def _refusal(self, error: urllib.error.HTTPError, repository: str) -> HubError:
        if passes(error.code):
            wait = retry_after(error.headers)
            return UnreachableError(f"{self.endpoint} answered {error.code} for {repository}.", wait)
        if error.code in (401, 403):
            page = f"{self.endpoint}/{repository}"
            advice = "There is no such repository, or it wants a token: set HF_TOKEN, or run `hf auth login`."
            if self.token:
                advice = f"The token may not read it; where it has conditions, they are accepted at {page}."
            return HubError(f"{self.endpoint} does not give {repository} ({error.code}). {advice}")
        if error.code == 404:
            return HubError(f"{self.endpoint} has no {repository}, or not this revision or file of it (404).")
        return HubError(f"{self.endpoint} answered {error.code} for {repository}.")


class _Redirects(urllib.request.HTTPRedirectHandler):
    """Followed with the token only where they stay at the hub."""

    def __init__(self, hub: Hub):
        self.hub = hub

    def redirect_request(self, *arguments: Any) -> urllib.request.Request | None:
        request = super().redirect_request(*arguments)
        if request is not None:
            self.hub.authorise(request)
        return request


def _file(entry: dict[str, Any]) -> HubFile:
    large = entry.get("lfs")
    told = large if isinstance(large, dict) else entry
    digest, size = told.get("oid"), told.get("size")
    if not (isinstance(entry.get("path"), str) and isinstance(size, int) and isinstance(digest, str)):
        raise HubError(f"the hub's list has an entry without path, size or checksum: {str(entry)[:200]}")
    if entry["path"].startswith("/") or ".." in entry["path"].split("/"):
        raise HubError(f"the hub's list names a file outside the repository: {entry['path'][:200]}")
    return HubFile(entry["path"], size, digest.removeprefix("sha256:"))


def passes(status: int) -> bool:
    """Whether a server that answers so may answer otherwise a little later."""
    return status in (408, 409, 425, 429) or status >= 500


def retry_after(headers: Message) -> float:
    """Seconds that a server asks for before the next attempt."""
    try:
        return max(0.0, float(headers.get("Retry-After", "0")))
    except ValueError:  # a date
        return 0.0
