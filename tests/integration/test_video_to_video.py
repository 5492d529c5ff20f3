"""Videos made from a clip (--video FILE --strength S): what is kept of it, what is recorded, what does not fit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import imageio.v3 as iio
import pytest
import torch

from sgm.inference.noise import SampleId
from sgm.inference.options import SampleArgs
from sgm.inference.source_clip import SourceClip, SourceError
from tests.family_tiny import kind_section, write_kind, write_short
from tests.sampling_tiny import main
from tests.training_tiny import write_clips

LATENTS = {"2b": 3, "1.5_5b": 4}  # both of 9 frames


@pytest.fixture(scope="module")
def sections(tmp_path_factory) -> dict[str, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("family")
    made = {kind: write_kind(folder / kind, kind) for kind in LATENTS}
    return made | {"5b_i2v": kind_section(folder / "2b", "5b_i2v")}


@pytest.fixture(scope="module")
def clip(tmp_path_factory) -> Path:
    """Ten frames of 16x32."""
    return write_clips(tmp_path_factory.mktemp("clip"), 1, 9) / "videos" / "0.mp4"


@pytest.fixture
def config(sections, tmp_path):
    """Writes a sampling configuration of four steps for a kind."""

    def write(kind: str, **args: Any) -> Path:
        asked = {"num_steps": 4, "sampling_num_frames": LATENTS.get(kind, 3), **args}
        return write_short(sections[kind], tmp_path, **asked)

    return write


@pytest.mark.parametrize("kind", LATENTS)
def test_a_clip_becomes_a_video_of_its_length(config, clip, tmp_path, kind, capsys):
    words = [config(kind), "--prompt", "a fox", "--video", clip, "--strength", "0.5", "--seed", "3"]
    assert main(*words) == 0
    said = capsys.readouterr().err
    assert "has 10 frames, of which the first 9 are taken" in said
    (file,) = (tmp_path / "out").rglob("*.json")
    record = json.loads(file.read_text())
    assert iio.imread(file.with_suffix(".mp4")).shape[:3] == (9, 16, 32)
    assert (record["strength"], record["num_steps"], record["steps_taken"]) == (0.5, 4, 2)
    assert record["video"] == str(clip)
    assert record["video_sha256"] == SourceClip.of(clip).sha256
    assert main(*words, "--skip-done") == 0 and "1 of 1 prompts are done already" in capsys.readouterr().err
    assert main(*words, "--skip-done", "--strength", "0.8") == 0
    assert "strength 0.5, now 0.8" in capsys.readouterr().err


def test_as_many_steps_of_another_number_are_another_request(config, clip, capsys):
    words = [config("2b"), "--prompt", "a fox", "--video", clip, "--strength", "0.5", "--only-save-latents"]
    assert main(*words) == main(*words, "--skip-done", "--steps", "5") == 0
    assert "num_steps 4, now 5" in capsys.readouterr().err


def test_a_clip_that_changes_meanwhile_is_not_taken(clip, tmp_path):
    copy = tmp_path / "clip.mp4"
    copy.write_bytes(clip.read_bytes())
    source = SourceClip.of(copy)
    assert source.pixels(range(2), (16, 32)).shape == (1, 3, 2, 16, 32)
    copy.write_bytes(clip.read_bytes() + b" ")
    with pytest.raises(SourceError, match="has changed since this run began; start it again"):
        source.pixels(range(2), (16, 32))
    copy.unlink()
    with pytest.raises(SourceError, match="No such file"):
        source.pixels(range(2), (16, 32))


def test_the_strength_is_0_8_and_only_of_a_clip():
    assert [SampleArgs(video=video).share_taken for video in (None, "a.mp4")] == [None, 0.8]
    assert SampleArgs(video="a.mp4", strength=0.3).share_taken == 0.3


def test_the_less_strength_the_more_of_the_clip_stays(config, clip, tmp_path):
    """A network that has learnt nothing changes a start that is hardly noised the least."""
    from sgm.config import load_run_config
    from sgm.inference.pipeline import Pipeline

    apart = []
    for strength in (0.1, 0.5, 1.0):
        flags = {"video": str(clip), "strength": strength, "num_steps": 10}
        video = Pipeline(load_run_config([config("2b")], SampleArgs, flags=flags), torch.device("cpu"))
        (prompt,) = video.encode(["a fox"])
        latents = video.sample(prompt, [SampleId(1, 0, 0)], video_steps)
        mean = video.engine.autoencoder.moments(video.visual.source.pixels(range(9), (16, 32))).chunk(2, dim=1)[0]
        mean = mean.transpose(1, 2) * video.engine.scale_factor
        apart.append(float((latents - mean).square().mean()))
    assert apart[0] < apart[1] < apart[2]


class video_steps:  # noqa: N801  # stands for a function that gives a context
    def __init__(self, total: int):
        self.total = total

    def __enter__(self):
        return lambda *_: None

    def __exit__(self, *_: object) -> None:
        pass


def test_what_does_not_fit_is_one_error(config, clip, tmp_path, capsys):
    (tmp_path / "text.mp4").write_text("no video")
    for kind, words, said in (
        ("2b", ["--video", clip, "--strength", "0.2"], "a strength of 0.2 is less than one of 4 steps: give at least 0.25"),
        ("2b", ["--video", clip, "--strength", "1.5"], "args.strength: must be above 0 and at most 1, got 1.5"),
        ("2b", ["--video", tmp_path / "none.mp4"], "none.mp4 does not exist"),
        ("2b", ["--video", tmp_path / "text.mp4"], "text.mp4"),
        ("2b", ["--video", clip, "--num-frames", "5"], "has 10 frames, and videos of 17 are asked for; --num-frames 3"),
        ("1.5_5b", ["--video", clip, "--num-frames", "6"], "videos of 17 are asked for; --num-frames 4 makes 9, 1 seconds"),
        ("5b_i2v", ["--video", clip], "makes videos from pictures; from a clip: configs/cogvideox_5b_infer.yaml"),
        ("2b", ["--video", clip, "--image", clip], "args.video and args.image are both given"),
        ("2b", ["--strength", "0.3"], "args.strength is of a clip to start from: name it, --video FILE"),
        ("2b", ["--video", clip, "--decode-latents", clip], "args.decode_latents and args.video are both given"),
        ("5b_i2v", ["--image", clip, "--decode-latents", clip], "args.decode_latents and args.image are both given"),
    ):  # fmt: skip
        path = config(kind)
        if "17" in said:
            text = path.read_text().replace("num_frames: 9", "num_frames: 17")
            path.write_text(text)
        assert main(path, "--prompt", "a fox", *words) == 2
        assert said in capsys.readouterr().err
