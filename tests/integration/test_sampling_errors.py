"""What is wrong with a sampling command's input is said once, and what was made is kept. A tiny model, real files."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from sgm.weights import checksums
from tests.sampling_tiny import (
    REPO,
    changed,
    main,
    network_file,
    records,
)

MODEL_DIR = "model.conditioner_config.params.emb_models.0.params.model_dir"
VAE = "model.first_stage_config.params.ckpt_path"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--load", "/nowhere/transformer"], ["args.load: /nowhere/transformer does not exist", "make_weights"]),
        (["--load", "nowhere/transformer"], ["args.load: nowhere/transformer does not exist"]),
        (["--set", f"{VAE}=/nowhere/vae.pt"], ["/nowhere/vae.pt does not exist"]),
        (["--set", f"{MODEL_DIR}=/nowhere/t5"], ["/nowhere/t5 does not exist", "spiece.model"]),
        (["--set", "args.load={your_ckpt}"], ["args.load is still the placeholder '{your_ckpt}'", "transformer.zip"]),
        (["--guidance-scale", "nan"], ["args.guidance_scale: expected a finite number, got nan"]),
        (["--set", "model.sampler_config.params.num_steps=x"],
         ["model.sampler_config.params.num_steps: expected a whole number, got 'x'"]),
        (["--dry-run", "--set", "model.sampler_config.params.num_steps=x"], ["num_steps: expected a whole number"]),
        (["--set", "model.scale_factor=abc"], ["model.scale_factor: expected a number, got 'abc'"]),
        (["--set", "model.network_config.params.num_layers=six"], ["num_layers: expected a whole number, got 'six'"]),
        (["--set", "model.network_config.params.transformer_args.max_sequence_length=x"],
         ["transformer_args.max_sequence_length: expected a whole number, got 'x'"]),
        (["--lora", "/nowhere/lora.pt:0.5"], ["args.lora: /nowhere/lora.pt does not exist"]),
        (["--num-frames", "4"], ["odd", "3 or 5"]),
        (["--prompt", "a fox@@fox.png"], ["prompt 0 asks", "image 'fox.png'", "text alone"]),
        (["--set", "args.image2video=true"], ["args.image2video", "text alone", "_i2v_infer.yaml"]),
        (["--prompt", "x", "--set", "model.network_config.params.in_channels=32"], ["prompt 0", "makes videos from one"]),
        (["--set", "model.noised_image_input=true"], ["noised_image_input is true", "in_channels 16"]),
        (["--set", "model.sampler_config.params.fixed_frames=1"], ["fixed_frames is 1", "set it to 0"]),
        (["configs/demo_infer"], ["no configuration file at configs/demo_infer;", "configs/demo_infer.yaml"]),
        (["A", "fox's tail"], ["is no configuration file", "--prompt 'A fox'\"'\"'s tail'"]),
        (["--num-frames", "6", "--set", "model.network_config.params.patch_size=[2,2,2]"], ["6 latent frames", "--window-frames"]),
        (["--num-frames", "5"], ["5 latent frames", "positions for 2", "--window-frames"]),
        (["--image-size", "100", "192"], ["multiples of 16"]),
        (["--set", "args.sampling_fsp=3"], ["sampling_fsp", "did you mean `sampling_fps`"]),
        (["--set", "modle.scale_factor=3"], ["modle", "did you mean `model`"]),
        (["--set", "args.batch_size=many"], ["batch_size", "whole number", "many"]),
        (["--set", "args.fp16=yes please"], ["args.fp16", "true or false"]),
        (["--set", "args.load"], ["KEY=VALUE"]),
        (["--set", "model.sampler_config.target=sat.helpers.os.system"], ["sampler_config", "'sat.helpers.os.system'"]),
        (["--set", "model.sampler_config.target=os.system"], ["os.system", "--allow-target"]),
        (["--set", "model.sampler_config.target=sgm.modules.diffusionmodules.sampling.VPSDEDPMP2MSampler"],
         ["unknown target", "did you mean", "VPSDEDPMPP2MSampler"]),
        (["--set", "model.sampler_config.params.num_stepz=3"], ["num_stepz", "num_steps"]),
        (["--set", "model.network_config.params.modules.pos_embed_config.params.text_length=13"], ["max_length", "13"]),
        (["--set", "args.latent_channels=8"], ["latent_channels is 8", "16"]),
        (["--input-file", "no-such-file.txt"], ["no-such-file.txt"]),
        (["--prompt", "  "], ["blank"]),
        (["--set", "args.fp16=true", "--set", "args.bf16=true"], ["choose one"]),
        (["--steps", "1001"], ["num_steps must be 1 to 1000"]),
        (["--device", "tpu"], ["tpu", "cpu, cuda or cuda:N"]),
        (["--decode-latents", "/nowhere"], ["latents.safetensors", "/nowhere"]),
    ],
    ids=lambda value: " ".join(value)[-40:] if isinstance(value, list) else None,
)  # fmt: skip
def test_bad_input_is_one_clear_error(config, tmp_path, capsys, arguments, words):
    assert main(config, *arguments) == 2
    err = capsys.readouterr().err
    assert all(word in err for word in words), err
    assert err.count("error: ") == 1 and not list((tmp_path / "out").rglob("*.mp4"))


def test_a_size_far_from_training_s_is_warned_of(config, capsys):
    for width, far in ((32, False), (48, True), (16, True)):
        assert main(config, "--prompt", "x", "--dry-run", "--image-size", 16, width) == 0
        warning = f"warning: this model was trained at 16x32 (height x width); at 16x{width} expect"
        assert (warning in capsys.readouterr().err) == far


def test_an_adapter_in_diffusers_form_that_does_not_fit(config, tmp_path, capsys):
    file = tmp_path / "hf" / "pytorch_lora_weights.safetensors"
    file.parent.mkdir()
    file.touch()
    assert main(config, "--prompt", "x", "--lora", file.parent) == 2
    assert f"{file} cannot be read as weights" in capsys.readouterr().err
    module = "transformer.transformer_blocks.0.attn1.to_out.0"
    save_file({f"{module}.lora_A.weight": torch.ones(1, 7), f"{module}.lora_B.weight": torch.ones(7, 1)}, file)
    assert main(config, "--prompt", "x", "--lora", file.parent) == 2
    assert (
        f"{file}: the adapter of transformer.layers.0.attention.dense is for a weight (7, 7)" in capsys.readouterr().err
    )


def test_bad_prompt_files(config, tmp_path, capsys):
    file = tmp_path / "prompts.txt"
    for content, words in [
        (b"", "holds no prompt"),
        (b"\n \n", "2 blank lines"),
        (b"good\nbad \xff\n", "line 2: byte 5"),
    ]:
        file.write_bytes(content)
        assert main(config) == 2
        assert words in capsys.readouterr().err


def test_output_folder_that_cannot_be_written(config, tmp_path, capsys):
    (tmp_path / "file").write_text("x")
    assert main(config, "--prompt", "x", "--output-dir", tmp_path / "file" / "below") == 2
    assert "--output-dir" in capsys.readouterr().err


def test_text_encoder_folders_that_are_not_whole(config, golden, tmp_path, capsys):
    folder = tmp_path / "t5"
    for name, words in (
        ("spiece.model", "spiece.model"),
        ("model.safetensors", "weights"),
        ("config.json", "config.json"),
    ):
        shutil.copytree(golden / "t5_tiny", folder)
        (folder / name).unlink()
        assert main(config, "--prompt", "x", "--set", f"{MODEL_DIR}={folder}") == 2
        err = capsys.readouterr().err
        assert "incomplete; missing" in err and words in err and "text_encoder/" in err
        shutil.rmtree(folder)


class RunsCode:
    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self):
        return Path.touch, (self.mark,)


def test_bad_transformer_files(config, release, tmp_path, capsys):
    """Hostile, truncated, of another size, with a key too few, of another kind: said before anything is written."""
    mark = tmp_path / "ran"
    hostile = changed(release, tmp_path / "hostile.pt", lambda c: c | {"extra": RunsCode(mark)})
    cut = tmp_path / "cut.pt"
    cut.write_bytes(network_file(release).read_bytes()[:-3000])
    lacking = changed(
        release,
        tmp_path / "lacking.pt",
        lambda c: {"module": {k: v for k, v in c["module"].items() if "time_embed.0.bias" not in k}},
    )
    wide = changed(
        release, tmp_path / "wide.pt", lambda c: {"module": {k: torch.cat([v, v]) for k, v in c["module"].items()}}
    )
    for file, words in [
        (hostile, ["hostile.pt was not loaded", "run code"]),
        (cut, ["cut.pt", "cut short"]),
        (lacking, ["missing", "time_embed.0.bias"]),
        (wide, ["wrong shape", "width 128"]),
        (release / "vae" / "3d-vae.pt", ["3D VAE"]),
    ]:
        assert main(config, "--prompt", "x", "--load", file) == 2
        err = capsys.readouterr().err
        assert all(word in err for word in words) and "Traceback" not in err, err
    assert not mark.exists() and not list((tmp_path / "out").rglob("*.mp4"))


def test_whole_engine_file_with_random_state_loads_as_the_published_one_does(config, release, tmp_path):
    """What the original's fine-tuning saves: text encoder, VAE and NumPy's random state beside the transformer."""

    def whole(content):
        stage = torch.load(release / "vae" / "3d-vae.pt", weights_only=True)["state_dict"]
        content["module"] |= {f"first_stage_model.{k}": v for k, v in stage.items()}
        content["module"]["conditioner.embedders.0.transformer.shared.weight"] = torch.zeros(3, 3)
        return content | {"np_rng_state": np.random.get_state(), "random_rng_state": (3, (1, 2), None), "iteration": 7}

    file = changed(release, tmp_path / "whole.pt", whole)
    assert main(config, "--prompt", "x", "--only-save-latents") == 0
    assert main(config, "--prompt", "x", "--only-save-latents", "--load", file, "--output-dir", tmp_path / "b") == 0
    (one,), (other,) = records(tmp_path / "out").values(), records(tmp_path / "b").values()
    assert one["latents_sha256"] == other["latents_sha256"]


def test_nan_gives_an_error_and_no_video(config, release, tmp_path, capsys):
    def poison(content):
        content["module"]["model.diffusion_model.time_embed.2.bias"].fill_(3e38)  # finite, what it leads to is not

    file = changed(release, tmp_path / "nan.pt", poison)
    for precision, advice in (("bf16", "use float32"), ("fp16", "the weights are damaged")):  # the latter in float32
        assert main(config, "--prompt", "x", "--load", file, "--set", f"args.{precision}=true") == 2
        err = capsys.readouterr().err
        assert "NaN" in err and "no video was written" in err and advice in err
    assert not [p for p in (tmp_path / "out").rglob("*") if p.is_file()]


@pytest.mark.parametrize("part", ["transformer", "vae"])
def test_damage_that_is_found_while_sampling_ends_it(config, release, tmp_path, capsys, monkeypatch, part):
    """Large parts of files are compared meanwhile; nothing that came of them is kept."""
    monkeypatch.setattr(checksums, "_AT_ONCE", 100)
    shutil.copytree(release / part, tmp_path / part)
    (file,) = (tmp_path / part).rglob("*.pt")
    name, begin, size, _ = max(checksums.stretches_of(file), key=lambda stretch: stretch[2])
    content = bytearray(file.read_bytes())
    content[begin + size // 2 & ~3] ^= 1  # the least bit of a value
    file.write_bytes(content)
    key = VAE if part == "vae" else "args.load"
    place = ("--set", f"{key}={file if part == 'vae' else tmp_path / part}")
    assert main(config, "--prompt", "x", *place, "--dry-run") == 0  # which does not read gigabytes
    assert main(config, "--prompt", "x", "--prompt", "y", *place) == 2
    assert f"{file} cannot be read as weights: {name} has another checksum" in capsys.readouterr().err
    assert {p.name for p in (tmp_path / "out").rglob("*") if p.is_file()} <= {"latents.safetensors"}
    assert part == "vae" or not list((tmp_path / "out").rglob("*.safetensors"))


def test_a_decoder_that_fails_loses_no_latents(config, release, tmp_path, capsys):
    content = torch.load(release / "vae" / "3d-vae.pt", weights_only=True)
    content["state_dict"]["decoder.conv_out.conv.weight"].fill_(3e38)  # finite, the pixels are not
    torch.save(content, tmp_path / "vae.pt")
    assert main(config, "--prompt", "x", "--set", f"{VAE}={tmp_path / 'vae.pt'}") == 2
    assert "the pixels contain NaN or infinity" in capsys.readouterr().err
    assert {p.name for p in (tmp_path / "out").rglob("*") if p.is_file()} == {"latents.safetensors"}
    assert main(config, "--decode-latents", tmp_path / "out") == 0
    (facts,) = records(tmp_path / "out").values()
    assert facts["prompt"] == "x" and facts["decoded_from"] == "latents.safetensors"
    assert main(config, "--prompt", "x") == 0
    assert len(list((tmp_path / "out").rglob("*.mp4"))) == 1 and not list((tmp_path / "out").rglob("*.safetensors"))


def test_what_the_originals_files_carry_without_use_is_accepted_and_named_once(config, tmp_path, capsys):
    extra = tmp_path / "extra.yaml"
    extra.write_text("args: {block_size: 10000, checkpoint_activations: False}\ndeepspeed: {fp16: {enabled: True}}\n")
    assert main(config, extra, "--prompt", "x", "--only-save-latents", "--local_rank", 0) == 0
    err = capsys.readouterr().err
    assert err.count("block_size has no effect") == 1 and err.count("checkpoint_activations has no effect") == 1


def test_the_guides_slip_under_log_keys_is_a_warning(config, tmp_path, capsys):
    slip = tmp_path / "slip.yaml"
    slip.write_text("model:\n  log_keys:\n    - txt'\n")
    assert main(config, slip, "--prompt", "x", "--only-save-latents") == 0
    assert "stray quote" in capsys.readouterr().err


def test_out_of_memory_names_ways_out(config, tmp_path, monkeypatch, capsys):
    from sgm.inference.pipeline import Pipeline

    sizes = []

    def greedy(self, prompt, samples, steps):
        sizes.append(len(samples))
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(Pipeline, "sample", greedy)
    assert main(config, "--prompt", "x", "--batch-size", 4, "--placement", "stages") == 2
    err = capsys.readouterr().err
    assert sizes == [4, 2, 1] and "--placement lean" in err and "--vae-tiling" in err and "--max-batch 1" in err


def test_shipped_file_with_some_paths_edited_names_the_rest(tmp_path, capsys):
    (tmp_path / "t").mkdir()
    assert main(REPO / "configs" / "cogvideox_2b_infer.yaml", "--load", tmp_path / "t") == 2
    err = capsys.readouterr().err
    assert "ckpt_path" in err and "model_dir" in err and "args.load" not in err
