"""Clips in rows and columns: a page on which they play together, and a picture. Both need no network."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from string import Template
from typing import Any
from urllib.parse import quote

import numpy as np

from sgm.files import replacing, write_text

CELL = 240  # pixels of the longer side of a clip in the picture, at most
_MARGIN, _LINE, _SIZE = 8, 18, 14  # pixels: between cells, of a line of text, of its letters
_LABEL = 160  # pixels: width of the rows' labels


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


# --- page ------------------------------------------------------------------------------------------------------------


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


# --- picture ---------------------------------------------------------------------------------------------------------


def write_picture(path: Path, tables: Sequence[Table]) -> Path:
    """Write a PNG of the clips' middle frames, table below table. Raises SaveError."""
    from PIL import Image

    drawn = [_drawn(table) for table in tables]
    whole = Image.new("RGB", (max(d.width for d in drawn), sum(d.height for d in drawn)), "white")
    top = 0
    for table in drawn:
        whole.paste(table, (0, top))
        top += table.height
    with replacing(path) as temporary:
        whole.save(temporary)
    return path


def _drawn(table: Table) -> Any:
    from PIL import Image, ImageDraw, ImageFont

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
