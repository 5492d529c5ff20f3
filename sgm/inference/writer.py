"""Files of a sample: where they lie, its record, its latents. A file appears complete or not at all."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from sgm.errors import SgmError
from sgm.files import advising, replacing, require_writable, write_failed

ANOTHER_FOLDER = "Choose another --output-dir."


class OutputError(SgmError):
    """Results that cannot be read again; the message says which and why."""


@dataclass(frozen=True)
class SampleFiles:
    """The original's layout: `OUT/{index}_{prompt}/{sample}/000000.mp4`, and what we put beside it."""

    folder: Path

    @property
    def video(self) -> Path:
        return self.folder / "000000.mp4"

    @property
    def record(self) -> Path:
        return self.folder / "000000.json"

    @property
    def sheet(self) -> Path:
        return self.folder / "000000.png"

    @property
    def latents(self) -> Path:
        return self.folder / "latents.safetensors"

    def done(self, latents_only: bool) -> bool:
        """Whether the results are there (the record is written last)."""
        return self.record.is_file() and (self.latents if latents_only else self.video).is_file()


@contextmanager
def writing_into(folder: Path) -> Iterator[None]:
    """Make `folder`; a write that fails within the block says what to do.

    Raises:
        SaveError: `folder` cannot be made, or that of the block.
    """
    with advising(ANOTHER_FOLDER):
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise write_failed(folder, error) from error
        yield


def check_writable(folder: Path) -> None:
    """Fail before an hour of sampling, not after it. Raises SaveError."""
    with advising(ANOTHER_FOLDER):
        require_writable(folder)


def read_record(path: Path) -> dict[str, Any]:
    """The facts that a sample's JSON holds; nothing where there is no readable one."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def write_latents(path: Path, latents: Tensor, facts: Mapping[str, Any]) -> None:
    """Scaled latents (t, c, h, w) of one sample; `facts` go into the header as JSON text."""
    from safetensors.torch import save_file

    with writing_into(path.parent), replacing(path) as temporary:
        save_file({"latents": latents.cpu().contiguous()}, str(temporary), {"facts": json.dumps(facts)})


def read_latents(path: Path) -> tuple[Tensor, dict[str, Any]]:
    """(scaled latents (t, c, h, w), facts) that `write_latents` stored.

    Raises:
        OutputError: not such a file.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            return file.get_tensor("latents"), json.loads((file.metadata() or {}).get("facts", "{}"))
    except (SafetensorError, OSError, ValueError) as error:
        raise OutputError(f"{path} holds no saved latents: {error}") from error


def latents_digest(latents: Tensor) -> str:
    """SHA-256 (16 hex digits) of latents as float32 bytes; equal seeds give equal digests."""
    return hashlib.sha256(latents.detach().cpu().float().contiguous().numpy().tobytes()).hexdigest()[:16]


def find_latents(path: Path) -> Sequence[Path]:
    """Latent files named by `path`: itself, or all below the folder.

    Raises:
        OutputError: none.
    """
    found = [path] if path.is_file() else sorted(path.rglob("latents.safetensors"))
    if not found:
        raise OutputError(f"no latents.safetensors at or below {path}; save some with --only-save-latents.")
    return found
