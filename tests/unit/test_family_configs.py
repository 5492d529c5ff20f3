"""Configurations of the family: ours beside the original's, and one laid over another."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from sgm.config import ConfigError, check_model_section, load_run_config, merge_yaml
from sgm.inference.options import SampleArgs
from sgm.inference.pipeline import Pipeline
from sgm.models.diffusion import SATVideoDiffusionEngine
from sgm.training.options import TrainArgs
from sgm.training.setup.data import check_clips
from sgm.training.setup.deepspeed import plan_deepspeed
from tests.training_tiny import REPO
from tests.upstream_family import MODELS, upstream_inference, upstream_model, upstream_sft

CONFIGS = REPO / "configs"
OURS = ("cogvideox_5b", "cogvideox_5b_i2v", "cogvideox1.5_5b", "cogvideox1.5_5b_i2v")


def neutral(model: dict[str, Any]) -> dict[str, Any]:
    """A model section without what changes no number: paths, keys without effect, values that are defaults."""
    model = copy.deepcopy(model)
    for name in ("latent_input", "noised_image_all_concat", "augmentation_dropout"):
        model.pop(name, None)
    model["first_stage_config"]["params"].pop("ckpt_path")
    for coder in ("encoder_config", "decoder_config"):
        model["first_stage_config"]["params"][coder]["params"].pop("gather_norm")
    model["conditioner_config"]["params"]["emb_models"][0]["params"].pop("model_dir")
    sigma = model["loss_fn_config"]["params"]["sigma_sampler_config"]["params"]
    sigma.pop("group_num", None)
    for params in (model["denoiser_config"]["params"], sigma, model["sampler_config"]["params"]):
        params["discretization_config"].setdefault("params", {"shift_scale": 1.0})
    for part in ("loss_fn_config", "sampler_config"):
        model[part]["params"].pop("fixed_frames", None)
    return model


@pytest.mark.parametrize("name", OURS)
@pytest.mark.parametrize(("kind", "record"), [("infer", SampleArgs), ("sft", TrainArgs)])
def test_ours_say_what_the_original_s_say(name, kind, record):
    config = load_run_config([CONFIGS / f"{name}_{kind}.yaml"], record)
    assert neutral(config.model) == neutral(upstream_model(name)) and not config.notes
    check_model_section(config.model, SATVideoDiffusionEngine)
    if kind == "infer":
        length = {"cogvideox_5b": (13, 8), "cogvideox1.5_5b": (22, 16)}[name.removesuffix("_i2v")]
        assert (config.args.sampling_num_frames, config.args.sampling_fps, config.args.dtype) == (*length, "bf16")
    else:
        clip = {"cogvideox_5b": ([480, 720], 8, 49), "cogvideox1.5_5b": ([768, 1360], 16, 81)}[
            name.removesuffix("_i2v")
        ]
        params = config.data["params"]
        assert (params["video_size"], params["fps"], params["max_num_frames"]) == clip
        assert config.deepspeed["bf16"]["enabled"] and not config.deepspeed["fp16"]["enabled"]


@pytest.mark.parametrize("name", [name for name in MODELS if name not in ("cogvideox_5b", "cogvideox_5b_i2v")])
def test_the_original_s_files_are_taken_unchanged(tmp_path, name):
    """With its last inference.yaml for 1.5, with the earlier one for the others; each key acts or is named."""
    (tmp_path / "model.yaml").write_text(json.dumps({"model": upstream_model(name)}))
    asked = {"image2video": True} if "i2v" in name else {}
    version = "head" if name.startswith("cogvideox1.5") else "1.0"
    (tmp_path / "inference.yaml").write_text(json.dumps({"args": upstream_inference(version, **asked)}))
    config = load_run_config([tmp_path / "model.yaml", tmp_path / "inference.yaml"], SampleArgs)
    named = [note for note in config.notes if "has no effect" in note]
    assert ["augmentation_dropout" in note for note in named] == ([True] if name == "cogvideox1.5_5b_i2v" else [])
    assert list(config.notes) == named
    pipeline = Pipeline(config, torch.device("cpu"), with_text_encoder=False)
    trained = {"cogvideox1.5_5b": (768, 1360), "cogvideox1.5_5b_i2v": (768, 1360)}.get(name, (480, 720))
    assert pipeline.visual.size() == trained and pipeline.visual.pictures.wanted == ("i2v" in name)
    frames = pipeline.engine.strides.pixel_frames(pipeline.visual.length.decoded)
    assert frames == (81 if version == "head" else 49) and pipeline.visual.remarks([]) == []
    assert pipeline.engine.image_scale == (1.0 if version == "head" else pipeline.engine.scale_factor)


# --- one file laid over others -------------------------------------------------------------------------------------------


def write(folder: Path, **files: str) -> Path:
    for name, text in files.items():
        (folder / f"{name}.yaml").write_text(text)
    return folder


def test_a_file_is_laid_over_those_that_it_extends(tmp_path):
    write(
        tmp_path,
        base="args: {seed: 1, batch_size: 2}\nmodel: {a: {b: 1, c: [1, 2]}}",
        other="args: {seed: 2}",
        top="extends: [base.yaml, other.yaml]\nmodel: {a: {c: [3]}}",
        over="args: {batch_size: 5}",
    )
    merged = merge_yaml([tmp_path / "top.yaml", tmp_path / "over.yaml"])
    assert merged == {"args": {"seed": 2, "batch_size": 5}, "model": {"a": {"b": 1, "c": [3]}}}


def test_a_copy_elsewhere_still_finds_the_shipped_parts(tmp_path):
    shipped = CONFIGS / "cogvideox1.5_5b_infer.yaml"
    (tmp_path / "mine.yaml").write_bytes(shipped.read_bytes())
    assert merge_yaml([tmp_path / "mine.yaml"]) == merge_yaml([shipped])


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("extends: nowhere.yaml", "no configuration file at .*nowhere.yaml"),
        ("extends: top.yaml", "top.yaml extends top.yaml, which extends it in turn"),
        ("extends: back.yaml", "back.yaml extends top.yaml, which extends it in turn"),
        ("extends: {a: 1}", "extends must be a file, or a list of files"),
        ("extends: [1]", "extends must be a file, or a list of files"),
    ],
)
def test_what_cannot_be_extended(tmp_path, text, words):
    write(tmp_path, top=text, back="extends: top.yaml")
    with pytest.raises(ConfigError, match=words):
        merge_yaml([tmp_path / "top.yaml"])


@pytest.mark.parametrize("name", ["cogvideox_5b_i2v_lora", "cogvideox1.5_5b", "cogvideox1.5_5b_i2v"])
def test_the_original_s_files_are_trained_with_unchanged(tmp_path, name):
    """With its last sft.yaml, in which options of float16 have slipped out of their place."""
    sft = upstream_sft()
    if name.startswith("cogvideox1.5"):  # its file leaves these to the user
        sft["data"]["params"] |= {"video_size": [768, 1360], "fps": 16, "max_num_frames": 81}
    (tmp_path / "model.yaml").write_text(json.dumps({"model": upstream_model(name)}))
    (tmp_path / "sft.yaml").write_text(json.dumps(sft))
    config = load_run_config([tmp_path / "model.yaml", tmp_path / "sft.yaml"], TrainArgs)
    words = {"cogvideox1.5_5b": ["latent_input is taken for false"], "cogvideox1.5_5b_i2v": ["augmentation_dropout"]}
    for note, word in zip(config.notes, words.get(name, []), strict=True):
        assert word in note
    plan = plan_deepspeed(config.deepspeed, device_type="cuda", data_parallel_size=1)
    moved = [note for note in plan.notes if "belongs under deepspeed.fp16" in note]
    assert len(moved) == 4 and plan.dtype == "bf16" and check_clips(config, plan.dtype) == []
