"""What evaluation samples beside the first clip: prompts, for image-to-video models with pictures."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image
from torch import Tensor

from sgm.data.images import ImageError, cropped, read_image, resized, size_of_short_side
from sgm.data.sources import is_image
from sgm.models.diffusion import SATVideoDiffusionEngine
from sgm.typed import ConfigError, listing

MARK = "@@"  # between text and picture, as in prompts for sampling


@dataclass(frozen=True)
class EvalPrompt:
    """A prompt, and what its video begins with: in memory, since the file may go while training runs."""

    text: str
    picture: Image.Image | None = None

    @classmethod
    def parse(cls, line: str, from_picture: bool) -> EvalPrompt:
        """`TEXT`, or `TEXT@@FILE` for a model that starts `from_picture`.

        Raises:
            ValueError: it is not so.
            ImageError: the picture cannot be read.
        """
        text, *names = (part.strip() for part in line.split(MARK))
        if not from_picture:
            if names and is_image(names[-1]):
                raise ValueError(f"{line!r} names a picture, and this model makes videos from text alone")
            return cls(line)
        if len(names) != 1 or not names[0]:
            raise ValueError(f"{line!r} names no picture, from which this model makes videos; write TEXT{MARK}FILE")
        return cls(text, read_image(Path(os.path.expanduser(names[0]))))

    def pixels(self, engine: SATVideoDiffusionEngine, size: tuple[int, int]) -> Tensor | None:
        """The picture (1, 3, 1, h, w) in [-1, 1] as for sampling: cut to `size`, in 1.5 with the shorter side of it."""
        if self.picture is None:
            return None
        if engine.network.patch.t == 1:
            return cropped(self.picture, size)[None, :, None]
        own = size_of_short_side(self.picture.height, self.picture.width, min(size), engine.strides.size_step)
        return resized(self.picture, own)[None, :, None]


def eval_prompts(lines: Sequence[str], from_picture: bool) -> list[EvalPrompt]:
    """`args.eval_prompts`, whose pictures are read once, here.

    Raises:
        ConfigError: names each line that does not fit the model.
    """
    found, problems = [], []
    for line in lines:
        try:
            found.append(EvalPrompt.parse(line, from_picture))
        except (ValueError, ImageError) as error:
            problems.append(f"args.eval_prompts: {error}")
    if problems:
        raise ConfigError(problems[0] if len(problems) == 1 else listing(problems, "the prompts of evaluation"))
    return found
