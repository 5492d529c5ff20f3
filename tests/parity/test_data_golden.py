"""Frame choice, crops and clip order against the original's, on the committed cases and on the full set."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from sgm.data.frames import ClipError, frame_indices
from sgm.data.sampler import ClipSampler, upstream_index
from sgm.data.video_io import resize_crop


def choice(*settings) -> list[int] | None:
    try:
        return frame_indices(*settings)
    except ClipError:
        return None


def parse_case(line: str) -> tuple[tuple, list[int] | None]:
    settings, frames = line.split(": ")
    fps, length, wanted, most, skip = settings.split()
    if frames == "none":
        expected = None
    else:
        first, *runs = frames.split()
        steps = [int(step) for run in runs for step, times in [run.split("x")] for _ in range(int(times))]
        expected = np.cumsum([int(first), *steps]).tolist()
    return (int(length), float(fps), int(wanted), int(most), float(skip)), expected


def test_frame_choice_agrees_with_the_original(golden):
    lines = (golden / "data_frame_cases.txt").read_text().splitlines()
    cases = [parse_case(line) for line in lines if not line.startswith("#")]
    assert len(cases) == 420 and sum(expected is None for _, expected in cases) == 24
    wrong = [settings for settings, expected in cases if choice(*settings) != expected]
    assert not wrong


def test_frame_choice_agrees_with_the_full_set(shared_golden):
    for line in (shared_golden / "frame_index_cases.jsonl").read_text().splitlines():
        case = json.loads(line)
        expected = None if "error" in case or case.get("degenerate") else case["frames"]
        settings = (case["length"], case["fps"], case["wanted_fps"], case["max_num_frames"], case["skip"])
        assert choice(*settings) == expected, case


SIZES = {"wide": (32, 48), "odd": (30, 45), "portrait_target": (48, 32), "upscale": (32, 48)}


@pytest.mark.parametrize("name", SIZES)
def test_crop_gives_the_originals_bytes(golden, name):
    tensors = load_file(golden / "data_crops.safetensors")
    assert torch.equal(resize_crop(tensors[f"{name}.x"], SIZES[name]), tensors[f"{name}.out"])


def test_random_crop_draws_as_the_original(golden):
    tensors = load_file(golden / "data_crops.safetensors")
    expected = tensors["wide.random_np_seed5"]
    explicit = resize_crop(tensors["wide.x"], (32, 48), "random", np.random.RandomState(5))
    np.random.seed(5)
    of_global_state = resize_crop(tensors["wide.x"], (32, 48), "random")
    assert torch.equal(explicit, expected) and torch.equal(of_global_state, expected)
    assert not torch.equal(expected, tensors["wide.out"])


def test_crops_of_the_full_set(shared_golden):
    tensors = load_file(shared_golden / "data_io.safetensors")
    facts = json.loads(Path(shared_golden / "data_facts.json").read_text())["crop"]
    names = [name for name, fact in facts.items() if isinstance(fact, dict) and "size" in fact]
    assert len(names) == 8
    for name in names:
        expected = tensors[f"crop.{name}.out"]
        got = resize_crop(tensors[f"crop.{name}.x"], tuple(facts[name]["size"]))
        assert torch.equal(got, expected.reshape(got.shape)), name  # the original drops a single frame's axis


def test_upstream_order_agrees_with_the_original(golden):
    recorded = json.loads((golden / "data_index.json").read_text())["upstream_index"]
    for length, expected in recorded.items():
        assert [upstream_index(i, int(length)) for i in range(len(expected))] == expected
        sampler = iter(ClipSampler([int(length)], seed=99, order="upstream"))
        assert [next(sampler) for _ in expected] == expected
