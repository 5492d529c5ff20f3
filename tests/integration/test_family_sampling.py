"""The five kinds of models through sample_video.py: lengths, sizes, pictures, what does not fit."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import imageio.v3 as iio
import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from sgm.config import load_run_config
from sgm.data.images import Picture
from sgm.inference.options import SampleArgs
from sgm.inference.pipeline import Pipeline
from sgm.inference.writer import read_latents
from sgm.models.diffusion import SATVideoDiffusionEngine
from sgm.util import instantiate_from_config
from tests.family_tiny import FAMILY, write_kind
from tests.sampling_tiny import REPO, main

FRAMES = {"2b": 1, "5b": 1, "5b_i2v": 1, "1.5_5b": 2, "1.5_5b_i2v": 4}


@pytest.fixture(scope="module")
def sections(tmp_path_factory) -> dict[str, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("family")
    return {kind: write_kind(folder / kind, kind) for kind in FAMILY}


@pytest.fixture(scope="module")
def picture(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("pictures") / "a fox.png"
    pixels = np.random.default_rng(0).integers(0, 256, (30, 40, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return path


@pytest.fixture
def config(sections, tmp_path):
    """Writes a sampling configuration of two steps for a kind; `args` go into its `args:` section."""

    def write(kind: str, **args: Any) -> Path:
        model = sections[kind]
        release = Path(model["first_stage_config"]["params"]["ckpt_path"]).parents[1]
        given = {
            "load": str(release / "transformer"), "force_inference": True, "device": "cpu", "num_steps": 2,
            "sampling_num_frames": FRAMES[kind], "output_dir": str(tmp_path / "out"), **args,
        }  # fmt: skip
        (tmp_path / "c.yaml").write_text(yaml.safe_dump({"args": given, "model": model}))
        return tmp_path / "c.yaml"

    return write


def records(folder: Path) -> dict[str, dict[str, Any]]:
    return {file.parent.parent.name: json.loads(file.read_text()) for file in sorted(folder.rglob("*.json"))}


@pytest.mark.parametrize("kind", FAMILY)
def test_every_kind_samples(config, picture, tmp_path, kind):
    prompt = f"a fox@@{picture}" if kind.endswith("i2v") else "a fox"
    assert main(config(kind), "--prompt", prompt) == 0
    (record,) = records(tmp_path / "out").values()
    frames = iio.imread(tmp_path / "out" / "0_a_fox" / "0" / "000000.mp4")
    size = {"1.5_5b": (48, 64), "1.5_5b_i2v": (48, 64)}.get(kind, (16, 32))
    assert frames.shape[:3] == ({"1.5_5b_i2v": 9}.get(kind, 1), *size) and record["size"] == list(size)
    assert record["latent_frames"] == FRAMES[kind] and record["prompt"] == "a fox"
    if kind.endswith("i2v"):
        assert record["image"] == str(picture) and len(record["image_sha256"]) == 64


def test_a_comparison_s_pictures_lie_beside_its_prompts_and_are_read_first(config, picture, tmp_path, capsys):
    (tmp_path / "fox.png").write_bytes(picture.read_bytes())
    asked = config("1.5_5b_i2v", sampling_image_size=[16, 32]), "--grid", f"prompts={tmp_path / 'p.txt'}", "seeds=1,2"
    (tmp_path / "p.txt").write_text("a fox@@fox.png\na dog@@gone.png\n")
    assert main(*asked, "--dry-run") == main(*asked) == 2 and not (tmp_path / "out").exists()
    assert capsys.readouterr().err.count(f"{tmp_path / 'p.txt'}, line 2: gone.png does not exist") == 2
    (tmp_path / "p.txt").write_text(f"a fox@@fox.png\n\na dog@@{picture}\n")
    assert main(*asked) == 0
    assert capsys.readouterr().err.count("this model was trained at") == 1, "once of all clips"
    made = [(r["prompt"], r["image"], r["seed"]) for r in records_of_samples(tmp_path / "out")]
    pairs = ("a fox", str(tmp_path / "fox.png")), ("a dog", str(picture))
    assert made == [(*pair, seed) for pair in pairs for seed in (1, 2)]


def test_a_picture_s_ratio_and_the_guidance_both_count(config, tmp_path, monkeypatch):
    """1.5: an upright picture gives an upright video; the conditions of both branches hold it, in frame 0 alone."""
    from sgm.modules.diffusionmodules.wrappers import OpenAIWrapper

    Image.new("RGB", (30, 40), "red").save(tmp_path / "red.png")
    seen = []
    forward = OpenAIWrapper.forward
    monkeypatch.setattr(
        OpenAIWrapper, "forward", lambda self, x, t, c, **kw: seen.append(c) or forward(self, x, t, c, **kw)
    )
    file = config("1.5_5b_i2v", sampling_image_size=[32, 48], only_save_latents=True, batch_size=2, max_batch=2)
    assert main(file, "--prompt", "x", "--image", tmp_path / "red.png") == 0
    (record, _) = records_of_samples(tmp_path / "out")
    assert record["size"] == [48, 32] and all(c["concat"].shape == (4, 4, 16, 6, 4) for c in seen) and len(seen) == 2
    concat = seen[0]["concat"]
    assert concat[:, 0].any() and not concat[:, 1:].any() and concat[:2].equal(concat[2:])
    assert seen[0]["crossattn"][:2].any() == 0  # zeros for the text in the unconditional branch
    # the saved latents hold the first frame that decoding drops
    assert main(file, "--decode-latents", tmp_path / "out") == 0
    video = next((tmp_path / "out").rglob("*.mp4"))
    assert iio.imread(video).shape[:3] == (9, 48, 32)


def records_of_samples(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(file.read_text()) for file in sorted(folder.rglob("*.json"))]


def test_samples_of_another_picture_are_made_anew(config, picture, tmp_path, capsys):
    file = config("5b_i2v", only_save_latents=True, seed_mode="upstream", skip_done=True)
    copy = tmp_path / "copy.png"
    copy.write_bytes(picture.read_bytes())
    for image, said in ((picture, ""), (copy, "1 of 1 prompts are done already"), (None, "image_sha256")):
        if image is None:
            Image.new("RGB", (40, 30), "blue").save(copy)
        assert main(file, "--prompt", f"x@@{image or copy}") == 0
        assert said in capsys.readouterr().err
    (record,) = records_of_samples(tmp_path / "out")
    assert record["image"] == str(copy)


def test_how_a_picture_is_read_is_part_of_the_request(config, picture, tmp_path, capsys):
    file = config("5b_i2v", only_save_latents=True, skip_done=True)
    for key, value, said in (
        ("scale_image_latents", "true", "1 of 1 prompts are done already"),  # as without it
        ("scale_image_latents", "false", "scale_image_latents True, now False"),
        ("noised_image_all_concat", "true", "noised_image_all_concat False, now True"),
    ):
        assert main(file, "--prompt", f"x@@{picture}") == 0
        capsys.readouterr()
        assert main(file, "--prompt", f"x@@{picture}", "--set", f"model.{key}={value}") == 0
        assert said in capsys.readouterr().err


def test_the_single_stream_draws_a_picture_once_for_all_samples(config, picture, monkeypatch):
    """As the original, which encodes it before a prompt's samples; otherwise each sample draws its own."""
    seen: list[torch.Tensor] = []
    sample = SATVideoDiffusionEngine.sample
    monkeypatch.setattr(
        SATVideoDiffusionEngine, "sample", lambda *a, **kw: seen.extend(kw["image"]) or sample(*a, **kw)
    )
    for mode, same in (("upstream", True), ("sample", False)):
        file = config("5b_i2v", only_save_latents=True, seed_mode=mode, batch_size=2)
        assert main(file, "--prompt", f"x@@{picture}", "--prompt", f"y@@{picture}") == 0
        first, second, *others = seen
        assert first.equal(second) == others[0].equal(others[1]) == same and not first.equal(others[0])
        seen.clear()


def test_the_plan_names_pictures_and_sizes(config, picture, capsys):
    assert main(config("1.5_5b_i2v"), "--prompt", f"x@@{picture}", "--dry-run") == 0
    out = capsys.readouterr().out
    assert f"begins with {picture}, 40x30, scaled to 64x48" in out and "9 frames of 64x48 (4 latent frames)" in out
    assert main(config("5b_i2v"), "--prompt", "x", "--image", picture, "--dry-run") == 0
    assert "40x30, scaled and cropped to 32x16" in capsys.readouterr().out


def test_pictures_are_asked_for_too(config, picture, tmp_path, monkeypatch, capsys):
    import io
    import sys

    monkeypatch.setattr(sys, "stdin", io.StringIO(f"first\nsecond@@{picture}\n"))
    assert main(config("5b_i2v", only_save_latents=True, input_type="cli")) == 0
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["1_second"]
    assert "error: prompt 0: no picture is named" in capsys.readouterr().err


FAULTS = {
    "text model, picture": ("5b", ["--prompt", "x@@{picture}"], ["text alone", "configs/cogvideox_5b_i2v_infer.yaml"]),
    "text model, --image": ("1.5_5b", ["--image", "{picture}"], ["args.image", "configs/cogvideox1.5_5b_i2v_infer.yaml"]),
    "text model, image2video": ("2b", ["--set", "args.image2video=true"], ["configs/cogvideox_5b_i2v_infer.yaml"]),
    "no picture": ("1.5_5b_i2v", ["--prompt", "x"], ["prompt 0", "configs/cogvideox1.5_5b_infer.yaml"]),
    "image2video off": ("5b_i2v", ["--set", "args.image2video=false"], ["--set args.image2video=true;", "_5b_infer.yaml"]),
    "odd for 1.5": ("1.5_5b", ["--num-frames", "5"], ["must be even", "4t-7", "choose 4 or 6"]),
    "one for 1.5": ("1.5_5b", ["--num-frames", "1"], ["choose 2\n"]),
    "even for 1.0": ("5b", ["--num-frames", "4"], ["must be odd", "choose 3 or 5"]),
    "long for 1.5": ("1.5_5b", ["--num-frames", "6"], ["6 latent frames", "positions for 4: ", "--window-frames 4"]),
    "size of a learned table": ("5b_i2v", ["--image-size", "32", "32", "--image", "{picture}"], ["learned position table"]),
    "a strip": ("1.5_5b_i2v", ["--prompt", "x@@{strip}"], ["strip.png (200x10 pixels)", "--image-size"]),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_what_does_not_fit_is_one_error(config, picture, tmp_path, capsys, fault):
    kind, arguments, words = FAULTS[fault]
    Image.new("RGB", (200, 10)).save(tmp_path / "strip.png")
    given = [text.format(picture=picture, strip=tmp_path / "strip.png") for text in arguments]
    asked = [] if "--prompt" in given else ["--prompt", "x"]
    assert main(config(kind), *asked, *given) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("error:") == 1 and all(word in error for word in words), error


def test_float16_is_warned_of(config, capsys):
    for kind, warned in (("5b", True), ("2b", False)):
        run = load_run_config([config(kind)], SampleArgs, overrides=["args.fp16=true"])
        remarks = Pipeline(run, torch.device("cpu"), with_text_encoder=False).visual.remarks([])
        assert any("float16" in text for text in remarks) == warned


def test_files_of_both_versions_of_the_original(sections, config, tmp_path):
    """Convolution or linear patches, with tables of rotations or without: the same latents."""
    release = Path(sections["5b"]["first_stage_config"]["params"]["ckpt_path"]).parents[1]
    state = torch.load(release / "transformer" / "1000" / "mp_rank_00_model_states.pt", weights_only=True)["module"]
    prefix = "model.diffusion_model."
    patches = f"{prefix}mixins.patch_embed.proj.weight"
    network = instantiate_from_config(sections["5b"]["network_config"])
    tables = {f"{prefix}{name}": value for name, value in network.computed_state().items()}
    latents = {}
    for form, module in {"first": state | tables, "last": state | {patches: state[patches].flatten(1)}}.items():
        torch.save({"module": module}, tmp_path / f"{form}.pt")
        for patch in ("2", "[1,2,2]") if form == "first" else ("2",):
            where = tmp_path / form / patch
            file = config("5b", load=str(tmp_path / f"{form}.pt"), only_save_latents=True, output_dir=str(where))
            assert main(file, "--prompt", "x", "--set", f"model.network_config.params.patch_size={patch}") == 0
            latents[form, patch] = read_latents(next(where.rglob("latents.safetensors")))[0]
    first = latents["first", "2"]
    assert all((other - first).abs().max() < 1e-5 for other in latents.values()) and first.any()


@pytest.mark.parametrize(
    ("kind", "other", "words"),
    [("5b", "5b_i2v", ["32", "16"]), ("5b_i2v", "5b", ["pos_embedding"]), ("1.5_5b", "5b_i2v", ["final_layer.linear"])],
)
def test_weights_of_another_kind_are_one_error(sections, config, capsys, picture, kind, other, words):
    """Before anything is sampled; what the file holds is said."""
    release = Path(sections[other]["first_stage_config"]["params"]["ckpt_path"]).parents[1]
    image = ["--image", picture] if kind.endswith("i2v") else []
    assert main(config(kind, load=str(release / "transformer")), "--prompt", "x", *image) == 2
    error = capsys.readouterr().err
    assert error.count("error:") == 1 and "The file holds" in error and all(word in error for word in words), error


def test_the_python_of_the_docs_gives_what_the_command_gives(config, picture, tmp_path, monkeypatch):
    text = (REPO / "docs" / "family.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    file = config("5b_i2v", sampling_fps=8)
    for shown, here in {
        "configs/cogvideox_5b_i2v_infer.yaml": str(file),
        "fox.png": str(picture),
    }.items():
        assert code.count(shown) == 1
        code = code.replace(shown, here)
    monkeypatch.chdir(tmp_path)
    exec(code, {})
    assert main(file, "--prompt", f"It turns its head@@{picture}") == 0
    made = [iio.imread(file) for file in (tmp_path / "fox.mp4", next((tmp_path / "out").rglob("*.mp4")))]
    assert made[0].shape[1:] == (16, 32, 3) and (made[0] == made[1]).all()


def test_a_picture_is_encoded_whole_where_frames_are_decoded_in_tiles(config, picture):
    """Tiles are approximate; one frame needs none."""
    run = load_run_config([config("5b_i2v", vae_tiling=True)], SampleArgs)
    model = Pipeline(run, torch.device("cpu"), with_text_encoder=False)
    model.load("first_stage")
    found = []
    for tile in ((16, 16), None):
        model.engine.autoencoder.set_tiling(tile, overlap=8)
        found.append(model.visual.encode_picture(Picture.of(picture)))
    assert torch.equal(*found)
