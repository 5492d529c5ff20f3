"""Comparison: one clip for each combination of some options, on a page and a picture in rows and columns.

`--grid seeds=1,2,3 lora=0,0.5,1`: the last axis runs along the columns, the one before it along the rows, and each
combination of further ones is a table of its own. Several prompts are an axis, too, before all others.
"""

from __future__ import annotations

import itertools
import json
import math
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from html import escape
from pathlib import Path
from string import Template
from typing import Any
from urllib.parse import quote

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from sgm.config import ConfigError, RunConfig
from sgm.files import advising, replacing, unfinished_names, write_text
from sgm.inference.adapters import adapter_files
from sgm.inference.model import TextToVideo
from sgm.inference.options import SampleArgs
from sgm.inference.prompts import gather, listed, safe_name
from sgm.inference.runner import ANOTHER_FOLDER
from sgm.inference.video import Video
from sgm.weights.release import Adapter

FOLDER = "grid"  # below args.output_dir
MOST = 400  # clips of a grid
CELL = 240  # pixels of the longer side of a clip in the picture, at most
_MARGIN, _LINE, _SIZE = 8, 18, 14  # pixels: between cells, of a line of text, of its letters
_LABEL = 160  # pixels: width of the rows' labels


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
        made = [_lora(text, adapters, kept) for text in texts]
        if len({value.label for value in made}) < len(made):  # files of one name, such as two of a run
            made = [replace(value, label=f"lora {text}") for value, text in zip(made, texts)]
        return Axis(name, made)
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


# --- what is shown: a page on which the clips play together, and a picture; both need no network ----------------------


@dataclass(frozen=True)
class Cell:
    """A clip: its file beside the page, a frame (h, w, 3), its width and height, and what its record says."""

    file: str
    frame: np.ndarray = field(repr=False)
    size: tuple[int, int]
    facts: Mapping[str, Any]


@dataclass(frozen=True)
class Table:
    """Clips in lines; labels may be empty where there is one row or column alone."""

    title: str
    rows: Sequence[str]
    columns: Sequence[str]
    lines: Sequence[Sequence[Cell]]


def write_page(path: Path, tables: Sequence[Table]) -> Path:
    """Write the page, which names the clips' files relative to itself. Raises SaveError."""
    template = Template(Path(__file__).with_name("grid.html").read_text(encoding="utf-8"))
    return write_text(path, template.substitute(tables="\n".join(map(_table, tables))))


def _table(table: Table) -> str:
    head = "".join(f"<th>{escape(label)}</th>" for label in table.columns)
    lines = [
        f"<tr><th>{escape(label)}</th>{''.join(map(_clip, line))}</tr>" for label, line in zip(table.rows, table.lines)
    ]
    return f"<h2>{escape(table.title)}</h2>\n<table>\n<tr><td></td>{head}</tr>\n" + "\n".join(lines) + "\n</table>"


def _clip(cell: Cell) -> str:
    facts, (width, height) = escape(json.dumps(cell.facts, indent=1, ensure_ascii=False)), cell.size
    place = quote(cell.file)
    clip = f'<video src="{place}" width="{width}" height="{height}" muted loop playsinline preload="auto"></video>'
    return f'<td title="{facts}">{clip}</td>'


def write_picture(path: Path, tables: Sequence[Table]) -> Path:
    """Write a PNG of the clips' middle frames, table below table. Raises SaveError."""
    drawn = [_drawn(table) for table in tables]
    whole = Image.new("RGB", (max(d.width for d in drawn), sum(d.height for d in drawn)), "white")
    top = 0
    for table in drawn:
        whole.paste(table, (0, top))
        top += table.height
    with replacing(path) as temporary:
        whole.save(temporary)
    return path


def _drawn(table: Table) -> Image.Image:
    font = ImageFont.load_default(_SIZE)
    scale = min(1.0, CELL / max(max(cell.size) for line in table.lines for cell in line))
    sizes = [[(round(c.size[0] * scale), round(c.size[1] * scale)) for c in line] for line in table.lines]
    width, height = (max(size[k] for line in sizes for size in line) for k in (0, 1))
    left = _LABEL if any(table.rows) else 0
    across = left + len(table.columns) * (width + _MARGIN) + _MARGIN
    title = _wrapped(table.title, across - 2 * _MARGIN)
    columns = [_wrapped(label, width) for label in table.columns]
    top = _MARGIN + _LINE * (len(title) + max(map(len, columns), default=0)) + _MARGIN
    picture = Image.new("RGB", (across, top + len(table.lines) * (height + _MARGIN)), "white")
    draw = ImageDraw.Draw(picture)

    def write(lines: Sequence[str], x: int, y: int) -> None:
        draw.multiline_text((x, y), "\n".join(lines), "black", font, spacing=_LINE - _SIZE)

    write(title, _MARGIN, _MARGIN)
    for k, lines in enumerate(columns):
        write(lines, left + _MARGIN + k * (width + _MARGIN), _MARGIN + _LINE * len(title))
    for j, (label, line) in enumerate(zip(table.rows, table.lines)):
        y = top + j * (height + _MARGIN)
        write(_wrapped(label, left - _MARGIN)[: height // _LINE], _MARGIN, y)
        for k, cell in enumerate(line):
            small = Image.fromarray(cell.frame).resize(sizes[j][k], Image.Resampling.LANCZOS)
            picture.paste(small, (left + _MARGIN + k * (width + _MARGIN), y))
    return picture


def _wrapped(text: str, width: int) -> list[str]:
    return textwrap.wrap(text, max(8, width // 8)) if text else []
