"""Comparison: one clip for each combination of some options, on a page and a picture in rows and columns.

`--grid seeds=1,2,3 lora=0,0.5,1`: the last axis runs along the columns, the one before it along the rows, and each
combination of further ones is a table of its own. Several prompts are an axis, too, before all others.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from sgm.config import ConfigError, RunConfig
from sgm.files import advising, unfinished_names
from sgm.inference.adapters import adapter_files
from sgm.inference.grid_page import Cell, Table, write_page, write_picture
from sgm.inference.model import TextToVideo
from sgm.inference.options import SampleArgs
from sgm.inference.prompts import gather, listed, safe_name
from sgm.inference.runner import ANOTHER_FOLDER
from sgm.inference.video import Video
from sgm.weights.release import Adapter

FOLDER = "grid"  # below args.output_dir
MOST = 400  # clips of a grid


@dataclass(frozen=True)
class Value:
    """One value of an axis: what its clips are asked for, and how that reads."""

    label: str
    asked: Mapping[str, Any]
    prompt: str = ""


@dataclass(frozen=True)
class Axis:
    """What differs along rows, columns or tables."""

    name: str
    values: Sequence[Value]


def comparison_of(texts: Sequence[str], config: RunConfig[SampleArgs]) -> tuple[RunConfig[SampleArgs], list[Axis]]:
    """The run's configuration with the prompts of `--grid`, and its axes, that of the prompts first.

    Raises:
        ConfigError: an axis that there is not, or values that it does not take, or a run that makes no single clips.
        PromptError: no prompt.
    """
    given: dict[str, str] = {}
    for text in texts:
        name, equals, values = text.partition("=")
        if not equals or not values.strip():
            raise ConfigError(
                f"--grid {text!r}: expected AXIS=VALUES, such as seeds=1,2,3 (configuration files stand before it)."
            )
        if name in given:
            raise ConfigError(f"--grid has two axes {name}; write its values behind one.")
        given[name] = values
    unknown = [name for name in given if name not in (*_NUMBERS, "lora", "prompts")]
    if unknown:
        raise ConfigError(f"--grid has no axis {unknown[0]!r}; there are {', '.join((*_NUMBERS, 'lora', 'prompts'))}.")
    args = config.args
    if file := given.pop("prompts", None):
        args = replace(args, prompts=[], input_file=file)
    prompts = listed(args.prompts, args.input_file, config.files)[0]
    axes = [Axis("prompts", [Value(prompt.text, {}, prompt.text) for prompt in prompts])]
    axes += [_axis(name, values, args) for name, values in given.items()]
    wrong = {"batch_size above 1": args.batch_size > 1, "refine": args.refine, "skip_done": args.skip_done,
             "only_save_latents": args.only_save_latents, "decode_latents": args.decode_latents}  # fmt: skip
    if found := [name for name, on in wrong.items() if on]:
        raise ConfigError(f"--grid makes one clip of each combination; leave out args.{found[0]}.")
    count = count_of(axes)
    if count > MOST:
        raise ConfigError(f"--grid asks for {count} clips; {MOST} at most fit a page. Leave out some values.")
    return replace(config, args=args), axes


def count_of(axes: Sequence[Axis]) -> int:
    """Clips of all combinations."""
    return math.prod(len(axis.values) for axis in axes)


# Of the axes whose values are numbers: the word before one, what a call is asked for, and their type.
_NUMBERS: dict[str, tuple[str, str, Callable[[str], float]]] = {
    "seeds": ("seed", "seed", int), "steps": ("steps", "steps", int), "guidance": ("guidance", "guidance_scale", float)
}  # fmt: skip


def _axis(name: str, values: str, args: SampleArgs) -> Axis:
    texts = [text.strip() for text in values.split(",") if text.strip()]
    if repeated := [text for text in texts if texts.count(text) > 1]:
        raise ConfigError(f"--grid {name}: {repeated[0]} stands there twice.")
    if name == "lora":
        student = adapter_files(args.student) if args.few_steps and args.student else None
        kept = [text for text in args.lora if adapter_files(text) == student]
        adapters = [text for text in args.lora if text not in kept]
        return Axis(name, [_lora(text, adapters, kept) for text in texts])
    word, option, kind = _NUMBERS[name]
    try:
        return Axis(name, [Value(f"{word} {text}", {option: kind(text)}) for text in texts])
    except ValueError as error:
        raise ConfigError(f"--grid {name}={values}: {error}.") from error


def _lora(text: str, adapters: Sequence[str], kept: Sequence[str]) -> Value:
    """A factor on the run's adapters (0: without them), or an adapter in their place; `kept`, the student, stays."""
    try:
        factor = float(text)
    except ValueError:
        return Value(f"lora {Path(text).name}", {"lora": [*kept, text]})
    if not adapters:
        raise ConfigError(f"--grid lora={text}: a factor on which adapter? Name it by --lora PATH, or here: lora=PATH.")
    scaled = [f"{a.path}:{a.scale * factor:g}" for a in map(Adapter.parse, adapters)] if factor else []
    return Value(f"lora {text}", {"lora": [*kept, *scaled]})


# --- making it -------------------------------------------------------------------------------------------------------


def make_grid(model: TextToVideo, axes: Sequence[Axis], check: Callable[[], None], say: Callable[[str], None]) -> Path:
    """Make and write the clips of all combinations, then page and picture; returns the page.

    Args:
        check: called at every step; stops the work by raising.
    Raises:
        SamplingError, ...: what is asked for cannot be.
    """
    folder = Path(model.config.args.output_dir) / FOLDER
    axes = [_with_pictures(axes[0], model), *axes[1:]]
    first = axes[0].values[0]
    for value in (value for axis in axes for value in axis.values):  # before an hour of sampling
        model.check(value.prompt or first.prompt, **{**first.asked, **value.asked})
    with advising(ANOTHER_FOLDER.partition(";")[0] + "."), unfinished_names(folder):
        cells = list(_cells(model, axes, folder, check, say))
        tables = list(_tables(axes, cells))
        write_picture(folder / "grid.png", tables)
        write_page(folder / "index.html", tables)
    return folder / "index.html"


def _with_pictures(prompts: Axis, model: TextToVideo) -> Axis:
    """The axis of the prompts with the pictures that they name. Raises PromptError, as `gather`."""
    args, pictures = model.config.args, model.pipeline.visual.pictures
    values = []
    for value, prompt in zip(prompts.values, gather(args.prompts, args.input_file, model.config.files, pictures)[0]):
        picture = {"image": str(prompt.picture.path)} if prompt.picture else {}
        values.append(Value(value.label, picture, prompt.text))
    return Axis(prompts.name, values)


def _cells(
    model: TextToVideo, axes: Sequence[Axis], folder: Path, check: Callable[[], None], say: Callable[[str], None]
) -> Iterator[Cell]:
    combinations = list(itertools.product(*(axis.values for axis in axes)))
    for number, values in enumerate(combinations):
        asked: dict[str, Any] = {}
        for value in values:
            asked |= value.asked
        named = safe_name(" ".join(value.label for value in values[1:]) or "clip")
        video = model(values[0].prompt, on_step=lambda _: check(), **asked)
        file = video.save(folder / f"{number:03d}_{named}.mp4")
        say(f"  {number + 1} of {len(combinations)}: {file}")
        yield _cell(video, file)


def _cell(video: Video, file: Path) -> Cell:
    told = ("prompt", "seed", "num_steps", "guidance", "size", "lora", "sampler", "latents_sha256")
    height, width = video.frames.shape[1:3]
    facts = {name: video.record[name] for name in told if name in video.record}
    return Cell(file.name, video.frames[len(video.frames) // 2], (width, height), facts)


def _tables(axes: Sequence[Axis], cells: Sequence[Cell]) -> Iterator[Table]:
    """The last axis along columns, the one before along rows; one value alone is a title, not an axis."""
    alone = [axis for axis in axes if len(axis.values) == 1]
    shown = [axis for axis in axes if len(axis.values) > 1]
    *further, rows, columns = [*[Axis("", [Value("", {})])] * (2 - min(2, len(shown))), *shown]
    titles = [value.label for axis in alone for value in axis.values]
    left = iter(cells)
    for combination in itertools.product(*(axis.values for axis in further)):
        title = ", ".join([*titles, *(value.label for value in combination)])
        lines = [[next(left) for _ in columns.values] for _ in rows.values]
        yield Table(title, [v.label for v in rows.values], [v.label for v in columns.values], lines)
