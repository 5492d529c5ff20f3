"""5B, 5B-I2V, 1.5 and 1.5-I2V at tiny sizes: trained, validated, resumed, from videos and from a cache."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import imageio.v3 as iio
import numpy as np
import pytest
import torch
from PIL import Image

from sgm import TextToVideo
from sgm.config import ConfigError, load_run_config
from sgm.training.options import TrainArgs
from sgm.training.run import train
from sgm.training.setup.data import check_clips
from sgm.weights.release import read_transformer
from tests.family_tiny import kind_section
from tests.training_tiny import configuration, write_clips, write_release, write_yaml

FRAMES = 9
KINDS = ("5b", "5b_i2v", "1.5_5b", "1.5_5b_i2v")


@pytest.fixture(scope="module")
def sections(tmp_path_factory) -> dict[str, dict[str, Any]]:
    """Of each kind the `model:` section, whose weights are written; posteriors wide enough for draws to matter."""
    folder, found = tmp_path_factory.mktemp("family"), {}
    for kind in KINDS:
        found[kind] = kind_section(folder / kind, kind)
        found[kind]["network_config"]["params"]["num_frames"] = FRAMES
        write_release(folder / kind, found[kind]["network_config"])
        file = folder / kind / "vae" / "3d-vae.pt"
        state = torch.load(file, weights_only=True)
        state["state_dict"]["encoder.conv_out.conv.bias"][16:] = -1
        torch.save(state, file)
    return found


@pytest.fixture(scope="module")
def clips(tmp_path_factory) -> Path:
    return write_clips(tmp_path_factory.mktemp("clips"), 3, FRAMES)


@pytest.fixture
def content(sections, clips, tmp_path):
    """A training configuration for a kind; `args` go into its `args:` section."""

    def make(kind: str, folder: str = "save", lora: int | None = None, **args: Any) -> dict[str, Any]:
        model = json.loads(json.dumps(sections[kind]))
        if model.get("noised_image_input"):
            model["noised_image_dropout"] = 0.3
        if lora:
            model["not_trainable_prefixes"] = ["all"]
            model["network_config"]["params"]["modules"]["lora_config"] = {
                "target": "sat.model.finetune.lora2.LoraMixin", "params": {"r": lora},
            }  # fmt: skip
        model["sampler_config"]["params"]["num_steps"] = 2
        release = Path(model["first_stage_config"]["params"]["ckpt_path"]).parents[1]
        made = configuration(release, clips, tmp_path / folder, **args)
        made["data"]["params"]["max_num_frames"] = FRAMES
        return made | {"model": model}

    return make


def run(content: dict[str, Any], folder: Path, *overrides: str) -> Path:
    """Train in this process; the run's folder."""
    path = write_yaml(folder / "config.yaml", content)
    assert train(load_run_config([path], TrainArgs, overrides=overrides)) == 0
    (found,) = Path(content["args"]["save"]).iterdir()
    return found


def losses(folder: Path) -> list[float]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if line["kind"] in ("train", "valid")]


# Each kind in a way of its own: whole or an adapter, ZeRO stage, checkpointing.
WAYS = {"5b": (None, 0, True), "5b_i2v": (None, 2, False), "1.5_5b": (2, 1, "selective"),
        "1.5_5b_i2v": (2, 2, True)}  # fmt: skip


@pytest.mark.parametrize("kind", WAYS)
def test_every_kind_trains_and_shows_whole_clips(content, clips, tmp_path, capsys, kind):
    """Clips of three latents, of which patches of two frames see four; what is shown has the clip's length."""
    lora, stage, checkpointing = WAYS[kind]
    args = {"train_iters": 2, "eval_interval": 2, "eval_iters": 1, "valid_data": [str(clips)], "log_image": True}
    picture = tmp_path / "square.png"
    Image.new("RGB", (40, 40), "red").save(picture)
    start = {"image": picture} if kind.endswith("i2v") else {}
    prompts = [f"a square@@{picture}" if start else "a square"]
    made = content(kind, lora=lora, **args, checkpoint_activations=checkpointing, eval_prompts=prompts, seed=6)
    folder = run(made, tmp_path, f"deepspeed.zero_optimization.stage={stage}")
    assert len(losses(folder)) == 3
    for shown in ("inputs", "reconstructions", "samples"):
        assert len(iio.imread(folder / "video" / f"{shown}_gs-000002" / "000000.mp4")) == FRAMES
    said = capsys.readouterr().out
    assert f"{folder / 'infer.yaml'} --prompt" in said and ("@@picture.png" in said) == bool(start)
    # what was shown is what the checkpoint gives to who asks for the same
    model = TextToVideo.from_config(folder / "infer.yaml", overrides={"args.seed_mode": "upstream"})
    video = model("a square", seed=7, **start)
    video.save(tmp_path / "again.mp4")
    first, again = (
        iio.imread(file) for file in (folder / "video/samples_gs-000002/000001.mp4", tmp_path / "again.mp4")
    )
    assert np.array_equal(first, again)
    # 1.5 takes the picture's ratio
    assert first.shape[:3] == ((FRAMES, 16, 16) if kind == "1.5_5b_i2v" else (FRAMES, 16, 32))
    assert bool(video.record["weights"]["adapters"]) == bool(lora)
    before = read_transformer(made["args"]["load"]).network
    after = read_transformer(folder).network
    still = {name for name, value in after.items() if name in before and torch.equal(before[name], value)}
    assert still <= ({"transformer.position_embeddings.weight"} if lora is None else before.keys())
    assert lora is None or all(value.any() for name, value in after.items() if "matrix_B" in name)


def test_a_cached_run_is_the_one_without_and_goes_on_bit_for_bit(content, clips, tmp_path):
    """Pictures are noised and encoded anew in each step; what is left of a resumed run draws what the whole one drew."""
    args = {"train_iters": 4, "eval_interval": 2, "eval_iters": 1, "valid_data": [str(clips)], "save_interval": 2}
    plain = run(content("1.5_5b_i2v", "plain", **args), tmp_path)
    cached = {"cache_dir": str(tmp_path / "cache"), "cache_dtype": "fp32", "log_image": True}
    made = content("1.5_5b_i2v", "cached", **args, **cached)
    folder = run(made, tmp_path, "args.exit_interval=2")
    assert run(made, tmp_path, "args.resume=auto", "args.cache_fill=false") == folder
    assert len(losses(plain)) == 6 and losses(folder) == losses(plain)
    latents = torch.load(folder / "video/latents/latents_gs-000004/latent.pt", weights_only=True)
    assert latents.shape[1] == 4
    for part in ("4", "4-ema"):
        first, second = (read_transformer(run_folder / part).network for run_folder in (plain, folder))
        assert all(torch.equal(first[name], second[name]) for name in first), part


def refused(content: dict[str, Any], folder: Path, *overrides: str) -> str:
    path = write_yaml(folder / "config.yaml", content)
    with pytest.raises(ConfigError) as error:
        train(load_run_config([path], TrainArgs, overrides=overrides))
    return str(error.value)


def test_what_does_not_fit_is_said_before_anything_is_loaded(content, tmp_path):
    (tmp_path / "cut.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    for kind, prompt, word in (
        ("5b_i2v", "a fox", "no picture is named"),
        ("5b_i2v", "a fox@@a@@b.png", "@@ stands 2 times"),
        ("5b_i2v", f"a fox@@{tmp_path}/none.png", "none.png does not exist"),
        ("5b_i2v", f"a fox@@{tmp_path}/cut.png", "no readable picture"),
        ("5b", "a fox@@fox.png", "makes videos from text alone"),
    ):
        assert word in refused(content(kind, eval_prompts=[prompt]), tmp_path)


def test_what_the_models_were_not_made_for_is_warned_of(content, tmp_path):
    made = content("1.5_5b_i2v")
    config = load_run_config([write_yaml(tmp_path / "config.yaml", made)], TrainArgs)
    assert check_clips(config, "bf16") == []
    made["data"]["params"]["max_num_frames"] = 5
    config = load_run_config([write_yaml(tmp_path / "config.yaml", made)], TrainArgs)
    (half, even) = check_clips(config, "fp16")
    assert "published in bf16" in half and "5x16x32 have an even number of latents" in even
