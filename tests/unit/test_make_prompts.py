"""Prompts of the demo's kind without clips."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.sampling_tiny import REPO
from tools.demo.attributes import read_withheld
from tools.demo.captions import parse
from tools.demo.make_prompts import main

WITHHELD = REPO / "tools" / "demo" / "withheld.json"


def made(folder: Path, *options: str) -> list[tuple[str, str]]:
    """(prompt, what it means) of each line."""
    out, meant = folder / "p.txt", folder / "p.jsonl"
    assert main([str(out), "--meant", str(meant), "--withheld", str(WITHHELD), *options]) == 0
    lines = [json.loads(line) for line in meant.read_text().splitlines()]
    assert out.read_text().splitlines() == [line["prompt"] for line in lines]
    return [(line["prompt"], line["caption"]) for line in lines]


def test_each_prompt_means_a_caption_and_none_a_withheld_one(tmp_path):
    lines, withheld = made(tmp_path, "--count", "40"), read_withheld(WITHHELD)
    assert len({prompt for prompt, _ in lines}) == 40 and any(prompt != caption for prompt, caption in lines)
    shapes = [shape for _, caption in lines for shape in parse(caption)[0]]
    assert not {(shape.shape, shape.colour, shape.motion) for shape in shapes} & withheld
    assert sum(all(s.motion == "rotate" for s in parse(caption)[0]) for _, caption in lines) >= 10
    assert made(tmp_path, "--count", "20") == lines[:20]


def test_only_withheld_ones(tmp_path):
    lines = made(tmp_path, "--count", "12", "--two", "0", "--rotating", "0", "--only-withheld", "--other-words", "1")
    found = [parse(caption)[0] for _, caption in lines]
    assert {(shape.shape, shape.colour, shape.motion) for (shape,) in found} <= read_withheld(WITHHELD)


def test_contradictions_are_refused(tmp_path):
    with pytest.raises(SystemExit):
        main([str(tmp_path / "p.txt"), "--only-withheld", "--withheld", str(WITHHELD)])
