"""How much a server takes on."""

from __future__ import annotations

from dataclasses import dataclass

DAY = 86400.0


@dataclass(frozen=True)
class Limits:
    """Attributes:
    queued: jobs that may wait.
    clip: a video's pixels in all frames, as a multiple of those of the model's own size and length.
    steps: sampling steps.
    upload_bytes: of one request.
    keep_days: how long a finished video is kept; None for ever.
    """

    queued: int = 100
    clip: float = 2.0
    steps: int = 200
    upload_bytes: int = 64 << 20
    keep_days: float | None = None

    @property
    def keep_seconds(self) -> float | None:
        return None if self.keep_days is None else self.keep_days * DAY
