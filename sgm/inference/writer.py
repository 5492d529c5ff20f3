"""Files of a sample: where they lie, its record, its latents. A file appears complete or not at all."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from torch import Tensor

from sgm.files import remove_leftovers, saving, sync_folder
from sgm.weights import read_checkpoint
from sgm.weights.checksums import WeightsError, read_header
from sgm.weights.save import save_safetensors


class SampleFiles:
    """The original's layout: `OUT/{index}_{prompt}/{sample}/000000.mp4`, and what we put beside it.

    Args:
        prefix: of the names, while the files are not finished.
    Attributes:
        all: those that can be, the record last.
    """

    def __init__(self, folder: Path, prefix: str = ""):
        self.folder, self.prefix = folder, prefix
        self.video, self.sheet = folder / f"{prefix}000000.mp4", folder / f"{prefix}000000.png"
        self.latents, self.record = folder / f"{prefix}latents.safetensors", folder / f"{prefix}000000.json"
        self.all = self.video, self.sheet, self.latents, self.record

    def done(self, record: Mapping[str, Any], latents_only: bool) -> bool:
        """Whether the video, or else the latents, that the sample's `record` tells of are there, and whole."""
        result = self.latents if latents_only else self.video
        sizes = record.get("file_bytes", {result.name: None})  # None: from before it was written down
        if not record or result.name not in sizes or not result.is_file():
            return False
        return sizes[result.name] in (None, result.stat().st_size)

    def sizes(self) -> dict[str, int]:
        """Bytes of the files that are there, but for the record."""
        return {p.name.removeprefix(self.prefix): p.stat().st_size for p in self.all[:-1] if p.is_file()}

    def make_folder(self) -> None:
        """Unless it is there. Raises SaveError."""
        with saving(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)

    def discard(self) -> None:
        """Delete what is there."""
        for path in self.all:
            with suppress(OSError):
                path.unlink()

    @contextmanager
    def replaced_together(self, prefix: str) -> Iterator[SampleFiles]:
        """New files, to be written under names with `prefix`; if the block succeeds they take their places.

        There is no record while they do: one that is there tells of a whole sample.

        Raises:
            SaveError: they cannot be written or renamed.
        """
        new = SampleFiles(self.folder, prefix)
        try:
            self.make_folder()
            yield new
            with saving(self.folder):
                remove_leftovers(self.folder, "[0-9]*-[0l]*")  # of earlier versions
                self.record.unlink(missing_ok=True)
                for source in filter(Path.exists, new.all):
                    source.replace(self.folder / source.name.removeprefix(prefix))
                sync_folder(self.folder)
        finally:
            new.discard()


def read_record(path: Path) -> dict[str, Any]:
    """The facts that a sample's JSON holds; nothing where there is no readable one."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def write_latents(path: Path, latents: Tensor, facts: Mapping[str, Any]) -> None:
    """Scaled latents (t, c, h, w) of one sample; `facts` go into the header as JSON text."""
    save_safetensors(path, {"latents": latents}, {"facts": json.dumps(facts)})


def read_latents(path: Path) -> tuple[Tensor, dict[str, Any]]:
    """(scaled latents (t, c, h, w), facts) that `write_latents` stored.

    Raises:
        WeightsError: not such a file.
    """
    try:
        return read_checkpoint(path)["latents"], json.loads(read_header(path).metadata.get("facts", "{}"))
    except (KeyError, ValueError) as error:
        raise WeightsError(f"{path} holds no saved latents: {error}") from error


def latents_digest(latents: Tensor) -> str:
    """SHA-256 (16 hex digits) of latents as float32 bytes; equal seeds give equal digests."""
    return hashlib.sha256(latents.detach().cpu().float().contiguous().numpy().tobytes()).hexdigest()[:16]


def find_latents(path: Path) -> Sequence[Path]:
    """Latent files named by `path`: itself, or all below the folder.

    Raises:
        WeightsError: none.
    """
    found = [path] if path.is_file() else sorted(path.rglob("latents.safetensors"))
    if not found:
        raise WeightsError(f"no latents.safetensors at or below {path}; save some with --only-save-latents.")
    return found
