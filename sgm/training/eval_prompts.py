"""What evaluation samples beside the first clip: prompts, for image-to-video models with pictures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from sgm.config import ConfigError
from sgm.data.images import HeldPicture, ImageError
from sgm.inference.prompts import Pictures, Prompt, PromptError


def eval_prompts(lines: Sequence[str], from_picture: bool) -> list[Prompt]:
    """`args.eval_prompts`: `TEXT`, or `TEXT@@FILE` for a model that starts `from_picture`.

    Pictures are kept in memory, since their files may go while training runs.

    Raises:
        ConfigError: names each line that does not fit the model.
    """
    try:
        prompts = Pictures(from_picture).attach([Prompt(k, line) for k, line in enumerate(lines)])
        return [replace(p, picture=p.picture and HeldPicture.holding(p.picture.image())) for p in prompts]
    except (PromptError, ImageError) as error:
        raise ConfigError(f"args.eval_prompts: {error}") from error
