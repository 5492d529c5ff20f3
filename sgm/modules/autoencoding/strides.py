"""How sizes of a clip and of its latents belong together. Needs nothing: data and options import it, too."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Strides:
    """What one latent stands for. The first latent frame is one pixel frame, so f = time * (t - 1) + 1.

    Attributes:
        time: pixel frames of every other latent frame.
        space: pixels along each side of a latent pixel.
        patch: latent pixels along each side of what the transformer takes as one token.
    """

    time: int = 4
    space: int = 8
    patch: int = 2

    @classmethod
    def from_coder(cls, ch_mult: Sequence[int], temporal_compress_times: int) -> Strides:
        """Those of an encoder or decoder: each level but the last halves height and width."""
        return cls(time=temporal_compress_times, space=2 ** (len(ch_mult) - 1))

    @property
    def size_step(self) -> int:
        """Pixels that a clip's height and width must be multiples of."""
        return self.space * self.patch

    @property
    def clip_lengths(self) -> str:
        """The rule for pixel frames, as texts state it: 4k + 1."""
        return f"{self.time}k + 1"

    def latent_frames(self, pixel_frames: int) -> int:
        """t of a clip of f frames, f whole."""
        return (pixel_frames - 1) // self.time + 1

    def pixel_frames(self, latent_frames: int) -> int:
        """f of a clip of t latent frames."""
        return self.time * (latent_frames - 1) + 1

    def is_whole(self, pixel_frames: int) -> bool:
        """Whether so many frames are a clip: 1, 5, 9, ..."""
        return pixel_frames >= 1 and (pixel_frames - 1) % self.time == 0

    def longest_clip(self, pixel_frames: int) -> int:
        """The most of these frames that are a clip; 0 without any."""
        return self.pixel_frames(self.latent_frames(pixel_frames)) if pixel_frames >= 1 else 0

    def latent_size(self, height: int, width: int) -> tuple[int, int]:
        """(height, width) in latent pixels."""
        return height // self.space, width // self.space

    def pixel_size(self, height: int, width: int) -> tuple[int, int]:
        """(height, width) in pixels of latent ones."""
        return height * self.space, width * self.space


STRIDES = Strides()  # of the CogVideoX releases, all of them
