"""Longer than a model's positions: clips that go on (--video FILE --extend N), and windows (--window-frames T)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import imageio.v3 as iio
import numpy as np
import pytest
import torch

from sgm.config import load_run_config
from sgm.inference.fit import SamplingError
from sgm.inference.noise import SampleId
from sgm.inference.options import SampleArgs
from sgm.inference.pipeline import Pipeline
from tests.family_tiny import kind_section, write_kind, write_short
from tests.sampling_tiny import main
from tests.training_tiny import write_clips

KINDS = ("2b", "1.5_5b")
LATENTS = {"1.5_5b": 4, "1.5_5b_i2v": 4}  # of 9 frames, as 3 of the others


@pytest.fixture(scope="module")
def sections(tmp_path_factory) -> dict[str, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("family")
    made = {kind: write_kind(folder / kind, kind) for kind in (*KINDS, "1.5_5b_i2v")}
    return made | {"5b_i2v": kind_section(folder / "2b", "5b_i2v")}


@pytest.fixture(scope="module")
def clip(tmp_path_factory) -> Path:
    """Seven frames of 16x32, 8 a second."""
    return write_clips(tmp_path_factory.mktemp("clip"), 1, 6) / "videos" / "0.mp4"


@pytest.fixture
def config(sections, tmp_path):
    """Writes a sampling configuration of two steps for a kind, whose network has positions for 9 frames."""

    def write(kind: str, **args: Any) -> Path:
        asked = {"num_steps": 2, "sampling_num_frames": LATENTS.get(kind, 3), **args}
        return write_short(sections[kind], tmp_path, **asked)

    return write


def pipeline(path: Path, **flags: Any) -> Pipeline:
    return Pipeline(load_run_config([path], SampleArgs, flags=flags), torch.device("cpu"))


def sample(made: Pipeline, seed: int = 1) -> torch.Tensor:
    (prompt,) = made.encode(["a fox"])
    return made.sample(prompt, [SampleId(seed, 0, 0)])


@pytest.mark.parametrize(("kind", "new"), [("2b", 6), ("1.5_5b", 22), ("1.5_5b_i2v", 8)])
def test_a_clip_gets_new_frames_behind_its_own(config, clip, tmp_path, kind, new, capsys):
    words = [config(kind), "--prompt", "a fox", "--video", clip, "--extend", new, "--seed", "3"]
    assert main(*words) == 0
    (file,) = (tmp_path / "out").rglob("*.json")
    record = json.loads(file.read_text())
    frames, source = iio.imread(file.with_suffix(".mp4")), iio.imread(clip)
    assert len(frames) == len(source) + new
    assert (record["extend"], record["first_new_frame"], record["strength"]) == (new, len(source), None)
    assert np.abs(frames[0].astype(float) - source[0]).mean() < 3  # but for the coding
    if kind == "2b":
        assert main(*words, "--skip-done") == 0 and "1 of 1 prompts are done already" in capsys.readouterr().err
        assert main(*words, "--skip-done", "--extend", "7") == 0
        assert "extend 6, now 7" in capsys.readouterr().err


def test_latents_kept_of_an_extended_clip_are_not_taken_for_its_video(config, clip, tmp_path, monkeypatch, capsys):
    """Where decoding fails they are kept; decoded alone, they are no clip with new frames behind it."""
    words = [config("2b"), "--prompt", "a fox", "--video", clip, "--extend", "6"]
    with monkeypatch.context() as broken:
        broken.setattr(Pipeline, "decode", lambda *_: raise_it(SamplingError("no")))
        assert main(*words) == 2 and "reads them, without the clip" in capsys.readouterr().err
    (saved,) = (tmp_path / "out").rglob("*.safetensors")
    assert main(config("2b"), "--decode-latents", saved) == 0
    record = json.loads(saved.with_name("000000.json").read_text())
    assert (record["extend"], record["first_new_frame"]) == (None, None)
    assert main(*words, "--skip-done") == 0 and "made otherwise: extend None, now 6" in capsys.readouterr().err
    assert len(iio.imread(saved.with_name("000000.mp4"))) == 7 + 6


def raise_it(error: Exception) -> None:
    raise error


def test_new_frames_are_as_many_as_asked_for_and_the_clip_is_as_it_was(config, clip):
    """Whatever the clip's length and theirs are to the grid of latents; only frames that both have are blended."""
    for new in (1, 3, 4, 9, 17):
        made = pipeline(config("2b"), video=str(clip), extend=new)
        length = made.visual.length
        given = np.full((made.engine.strides.pixel_frames(length.decoded), 16, 32, 3), 255, np.uint8)
        frames, source = made.visual.behind_source(given), made.visual.source.images((16, 32))
        assert length.decoded % 2 == 1 and len(frames) == 7 + new and (frames[7:] == 255).all()
        assert np.array_equal(frames[: 7 - length.kept], source[: 7 - length.kept])
        assert np.array_equal(source, iio.imread(clip))


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_kept_of_a_clip_is_its_end_to_the_last_bit(config, clip, kind):
    made = pipeline(config(kind), video=str(clip), extend=20, window_overlap=2)
    latents, known = sample(made), made.visual.kept_latents(1)
    end = made.engine.autoencoder.moments(made.visual.source.pixels(range(2, 7), (16, 32))).chunk(2, dim=1)[0]
    clip_latents = known[:, 1:] if kind == "1.5_5b" else known  # the first of 1.5 is dropped
    torch.testing.assert_close(clip_latents, end.transpose(1, 2) * made.engine.scale_factor)
    torch.testing.assert_close(latents[:, : known.shape[1]], known)
    assert latents.shape[1] == made.visual.length.total


@pytest.mark.parametrize(("kind", "frames"), [("2b", 9), ("1.5_5b", 10)])
def test_a_window_is_a_run_from_the_end_of_the_one_before(config, kind, frames):
    """The whole is windows one by one, with the noise of one stream, and as long as asked for."""
    most = LATENTS.get(kind, 3)
    made = pipeline(config(kind), sampling_num_frames=frames, window_frames=most, window_overlap=most - 2)
    latents = sample(made)
    assert latents.shape[1] == frames
    alone = pipeline(config(kind), sampling_num_frames=most)
    torch.testing.assert_close(latents[:, :most], sample(alone), rtol=0, atol=0)
    assert made.decode(latents[0]).shape[0] == made.engine.strides.pixel_frames(made.visual.length.decoded)
    shown: list[int] = []
    handed = made.engine.sample
    made.engine.sample = lambda *a, **k: (
        shown.append(k["prefix"] is not None and k["prefix"].shape[1]) or handed(*a, **k)
    )
    sample(made)
    assert shown == [False, *[most - 2] * 3]


def test_kept_frames_are_clean_first_and_noised_later(config):
    made = pipeline(config("2b"), num_steps=6, sampling_num_frames=5, window_frames=3, window_overlap=1)
    seen: list[tuple[float, torch.Tensor]] = []
    denoise = made.engine.denoiser.forward

    def watched(network, x, sigma, cond, **kw):
        seen.append((float(sigma[0]), x[0, 0].clone()))
        return denoise(network, x, sigma, cond, **kw)

    made.engine.denoiser.forward = watched
    kept = sample(made)[0, 2]
    clean = [torch.equal(first, kept) for _, first in seen[6:]]
    assert clean == [signal < 0.3 for signal, _ in seen[6:]] and 0 < sum(clean) < 6


def test_several_samples_windows_and_shortcuts_go_together(config, clip, tmp_path):
    fast = ["--set", "accelerate.guidance_interval=[0,0.5]"]
    words = ["--num-frames", "7", "--window-frames", "3", "--window-overlap", "1", "--steps", "4", "--batch-size", "2"]
    assert main(config("2b"), "--prompt", "a fox", *words, *fast, "--only-save-latents") == 0
    records = [json.loads(file.read_text()) for file in (tmp_path / "out").rglob("*.json")]
    assert [record["windows"] for record in records] == [[[0, 3], [2, 5], [4, 7]]] * 2
    assert all(record["network_passes"] == {"usual": 24, "whole": 18} for record in records)
    assert records[0]["latents_sha256"] != records[1]["latents_sha256"]


def test_a_video_from_a_long_clip_in_windows(config, tmp_path):
    long = write_clips(tmp_path, 1, 20) / "videos" / "0.mp4"
    made = pipeline(config("2b"), video=str(long), strength=0.5, sampling_num_frames=5, window_frames=3)
    assert sample(made).shape[1] == 5


def test_the_plan_says_windows_and_what_is_extended(config, clip, capsys):
    assert main(config("2b"), "--prompt", "a fox", "--video", clip, "--extend", "22", "--dry-run") == 0
    said = capsys.readouterr().out
    assert "22 new frames behind the 7 of" in said and "windows of up to 3 latent frames" in said


def test_what_does_not_fit_is_one_error(config, clip, tmp_path, capsys):
    for kind, words, said in (
        ("2b", ["--num-frames", "5"], "positions for 3: make a longer video in windows that follow one another, --window-frames 3"),
        ("2b", ["--num-frames", "9", "--window-frames", "5"], "args.window_frames is 5 latent frames, and this model has positions for 3"),
        ("2b", ["--window-overlap", "1"], "args.window_overlap is of windows: say how long they are, --window-frames T"),
        ("2b", ["--num-frames", "5", "--window-frames", "3", "--window-overlap", "3"], "with 3 in common"),
        ("1.5_5b", ["--num-frames", "8", "--window-frames", "4", "--window-overlap", "1"], "each a multiple of 2"),
        ("2b", ["--video", clip, "--extend", "4", "--num-frames", "1"], "args.sampling_num_frames is 1 latent frames, the first of them from the end of what is there; it must be 3 at least"),
        ("5b_i2v", ["--video", clip, "--extend", "4", "--num-frames", "1"], "it must be 3 at least"),
        ("1.5_5b", ["--num-frames", "8", "--window-frames", "2"], "args.window_frames is 2 latent frames, the first of them from the end of what is there; it must be a multiple of 2, 4 at least"),
        ("2b", ["--video", clip, "--extend", "4", "--num-frames", "3", "--window-overlap", "3"], "windows of 3 latent frames (args.sampling_num_frames) with 3 in common"),
        ("5b_i2v", ["--image", clip, "--window-frames", "3"], "go on with such a video, --video FILE --extend N"),
        ("5b_i2v", ["--video", clip, "--extend", "9"], "up to 8 frames behind a picture: ask for those, and extend"),
        ("2b", ["--extend", "4"], "args.extend goes on with a clip: name it, --video FILE"),
        ("2b", ["--video", clip, "--extend", "4", "--strength", "0.5"], "args.extend goes on with it; choose one"),
        ("2b", ["--video", clip, "--extend", "4", "--only-save-latents"], "args.only_save_latents keeps no frames"),
        ("2b", ["--video", clip, "--extend", "0"], "at least 1"),
        ("5b_i2v", ["--video", clip, "--extend", "4", "--prompt", "x@@a.png"], "and args.extend goes on with a clip: remove the @@"),
        ("2b", ["--video", tmp_path / "none.mp4", "--extend", "4"], "none.mp4 does not exist"),
    ):  # fmt: skip
        assert main(config(kind), "--prompt", "a fox", *words) == 2
        assert said in capsys.readouterr().err
