"""Converters on tiny releases: bit-exact round trips, all variants, every kind of checkpoint, memory-lean output."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from sgm.config import check_model_section, load_run_config, merge_yaml
from sgm.convert import vae_keys
from sgm.convert.dit_sizes import sizes_of_hf, sizes_of_params, sizes_of_sat
from sgm.convert.lazy import ConvertError, all_deferred
from sgm.convert.output import parse_size, write_shards
from sgm.convert.to_hf import ToHf, convert
from sgm.convert.to_sat import ToSat, run_file
from sgm.convert.to_sat import convert as convert_back
from sgm.inference.options import SampleArgs
from sgm.models.diffusion import SATVideoDiffusionEngine
from sgm.models.loading import load_network
from sgm.weights import read_checkpoint
from sgm.weights.files import tensors_of
from sgm.weights.release import NETWORK_PREFIX, read_transformer
from sgm.weights.save import save_pt
from sgm.weights.tensor_parallel import partition_state
from tests.convert_tiny import VAE_PARAMS, adapter_matrices, model_section, rewrite
from tests.dit_tiny import tiny_config, tiny_network
from tools.describe_weights import inspect

REPO = Path(__file__).resolve().parents[2]
VARIANTS: dict[str, dict[str, Any]] = {
    "2b": {},
    "5b": {"rotary": True},
    "5b-head": {"rotary": True, "patch_size": [1, 2, 2]},
    "5b-i2v": {"rotary": True, "learned": True, "in_channels": 32},
    "1.5": {"rotary": True, "patch_size": [2, 2, 2]},
    "1.5-i2v": {"rotary": True, "patch_size": [2, 2, 2], "in_channels": 32, "ofs_embed_dim": 24},
}


@pytest.fixture(scope="module")
def hf(sat_release: Path, sat_yaml: Path) -> Path:
    convert(whole(sat_release, sat_release.parent / "hf", config=sat_yaml, shard_bytes=500_000))
    return sat_release.parent / "hf"


def yaml_of(file: Path, model: dict[str, Any]) -> Path:
    from omegaconf import OmegaConf

    file.parent.mkdir(exist_ok=True)
    OmegaConf.save(OmegaConf.create({"model": model}), file)
    return file


def whole(sat_release: Path, out: Path, **options: Any) -> ToHf:
    options = {"dtype": torch.float32} | options
    return ToHf(out, sat_release / "transformer", sat_release / "vae" / "3d-vae.pt", str(sat_release / "t5"), **options)


def component(folder: Path) -> dict[str, Tensor]:
    return {name: t for file in sorted(folder.glob("*.safetensors")) for name, t in load_file(file).items()}


def same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name].dtype == value.dtype and torch.equal(found[name], value), name


# --- there and back --------------------------------------------------------------------------------------------------


def test_round_trip_of_a_whole_release_is_bit_exact_and_runs(sat_release: Path, hf: Path, tmp_path: Path) -> None:
    lines = convert_back(ToSat(hf, tmp_path / "back"))
    back = tmp_path / "back"
    same(read_transformer(back / "transformer").network, read_transformer(sat_release / "transformer").network)
    vae = Path("vae", "3d-vae.pt")
    same(read_checkpoint(back / vae)["state_dict"], read_checkpoint(sat_release / vae)["state_dict"])
    same(component(back / "t5-v1_1-xxl"), component(sat_release / "t5"))
    for name in ("spiece.model", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"):
        assert (back / "t5-v1_1-xxl" / name).read_bytes() == (sat_release / "t5" / name).read_bytes()
    assert any("infer.yaml" in line for line in lines)
    import sample_video

    arguments = ["--prompt", "x", "--device", "cpu", "--steps", "2", "--num-frames", "1"]
    assert sample_video.main([str(back / "infer.yaml"), *arguments, "--output-dir", str(tmp_path / "out")]) == 0
    assert list((tmp_path / "out").rglob("*.mp4"))


def test_files_of_a_pipeline(hf: Path) -> None:
    index = json.loads((hf / "model_index.json").read_text())
    assert index["_class_name"] == "CogVideoXPipeline" and index["vae"] == ["diffusers", "AutoencoderKLCogVideoX"]
    assert json.loads((hf / "scheduler" / "scheduler_config.json").read_text())["snr_shift_scale"] == 3.0
    shards = sorted((hf / "transformer").glob("diffusion_pytorch_model-*.safetensors"))
    assert len(shards) > 3 and shards[0].name == f"diffusion_pytorch_model-00001-of-{len(shards):05d}.safetensors"
    placed = json.loads((hf / "transformer" / "diffusion_pytorch_model.safetensors.index.json").read_text())
    assert placed["weight_map"].keys() == component(hf / "transformer").keys()
    assert not [p for p in hf.parent.iterdir() if p.name.startswith(".partial-")]


def test_scales_of_a_configuration_go_along_both_ways(sat_release: Path, tmp_path: Path) -> None:
    schedule = {"params": {"discretization_config": {"params": {"shift_scale": 2.5}}}}
    model = model_section(sat_release) | {"scale_factor": 0.5, "sampler_config": schedule}
    convert(whole(sat_release, tmp_path / "hf", config=yaml_of(tmp_path / "c.yaml", model), scheduler="ddim"))
    scheduler = json.loads((tmp_path / "hf" / "scheduler" / "scheduler_config.json").read_text())
    assert scheduler["snr_shift_scale"] == 2.5 and scheduler["_class_name"] == "CogVideoXDDIMScheduler"
    assert json.loads((tmp_path / "hf" / "vae" / "config.json").read_text())["scaling_factor"] == 0.5
    assert not [line for line in convert_back(ToSat(tmp_path / "hf", tmp_path / "sat")) if "assumed" in line]
    written = merge_yaml([tmp_path / "sat" / "infer.yaml"])["model"]
    assert written["scale_factor"] == 0.5
    shifts = [
        written["denoiser_config"],
        written["sampler_config"],
        written["loss_fn_config"]["params"]["sigma_sampler_config"],
    ]
    assert [node["params"]["discretization_config"]["params"]["shift_scale"] for node in shifts] == [2.5] * 3
    shutil.rmtree(tmp_path / "hf" / "scheduler")
    lines = convert_back(ToSat(tmp_path / "hf", tmp_path / "sat", overwrite=True))
    assert any(line.startswith("assumed: shift_scale 3, as the published model's") for line in lines)


@pytest.mark.parametrize("variant", VARIANTS)
def test_variants_are_read_from_the_tensors(variant: str, tmp_path: Path) -> None:
    """Structure from names and shapes, the rest from the YAML file beside the weights; there and back gives the same."""
    options = VARIANTS[variant]
    network = tiny_network(**options)
    with torch.no_grad():
        for k, parameter in enumerate(p for p in network.parameters() if p.requires_grad):
            parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(k)))
    state = {NETWORK_PREFIX + name: t for name, t in network.state_dict().items()}
    save_pt(tmp_path / "w.pt", {"module": state})
    request = ToHf(tmp_path / "hf", tmp_path / "w.pt", dtype=torch.float32, partial=True)
    yaml_of(tmp_path / "another.yaml", {"network_config": tiny_config(hidden_size=128, **options)})
    if variant != "2b":  # whose table says it all
        with pytest.raises(ConvertError):
            convert(request)
        yaml_of(tmp_path / "c.yaml", {"network_config": tiny_config(**options)})
    convert(request)
    if variant == "5b-head":  # the YAML file may have the form of the original's other version
        other = yaml_of(tmp_path / "other" / "c.yaml", {"network_config": tiny_config(rotary=True)})
        convert(replace(request, output=tmp_path / "hf2", config=other))
        same(component(tmp_path / "hf2" / "transformer"), component(tmp_path / "hf" / "transformer"))
    written = json.loads((tmp_path / "hf" / "transformer" / "config.json").read_text())
    expected = sizes_of_params(tiny_config(**options)["params"]).hf_config()
    assert {name: written[name] for name in expected} == expected
    convert_back(ToSat(tmp_path / "hf", tmp_path / "sat", partial=True, linear_patches=variant == "5b-head"))
    kept = {n: t for n, t in network.state_dict().items()
            if n not in network.dead_keys() and n not in network.computed_state()}  # fmt: skip
    same(read_transformer(tmp_path / "sat" / "transformer").network, {n: t.detach() for n, t in kept.items()})
    with torch.device("meta"):
        empty = tiny_network(**options)
    where = {"device": torch.device("cpu"), "dtype": torch.float32}
    load_network(empty, tmp_path / "sat" / "transformer", allow_absent=True, **where)
    assert not any(t.is_meta for t in empty.state_dict().values())


@pytest.mark.parametrize("variant", VARIANTS)
def test_sizes_agree_in_all_their_forms(variant: str) -> None:
    params = tiny_config(**VARIANTS[variant])["params"]
    sizes = sizes_of_params(params)
    again = sizes_of_hf(sizes.hf_config())
    assert again.hf_config() == sizes.hf_config() == sizes_of_params(sizes.sat_params()).hf_config()
    network = tiny_network(**VARIANTS[variant])
    named = {name: tuple(t.shape) for name, t in network.state_dict().items()}
    computed = {*network.dead_keys(), *network.computed_state()}
    assert sizes.sat_shapes() == {name: shape for name, shape in named.items() if name not in computed}


PUBLISHED_HF: dict[str, dict[str, Any]] = {  # what the published config.json say beside diffusers' defaults
    "CogVideoX-5B": {},
    "CogVideoX-5B-I2V": {"in_channels": 32, "use_learned_positional_embeddings": True},
    "CogVideoX1.5-5B": {"patch_size_t": 2, "patch_bias": False, "sample_frames": 81, "sample_height": 300,
                        "sample_width": 300},
    "CogVideoX1.5-5B-I2V": {"patch_size_t": 2, "patch_bias": False, "sample_frames": 81, "sample_height": 96,
                            "sample_width": 170, "in_channels": 32, "ofs_embed_dim": 512},
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED_HF)
def test_published_configurations_become_those_of_the_original(name: str, tmp_path: Path) -> None:
    heads = {"num_attention_heads": 48, "num_layers": 42, "use_rotary_positional_embeddings": True}
    sizes = sizes_of_hf(heads | PUBLISHED_HF[name])
    later, image = "1.5" in name, "I2V" in name
    assert sizes.name == name and sizes.is_published and bool(sizes.assumed) == later
    params = sizes.sat_params()
    expected = {"hidden_size": 3072, "num_frames": 81 if later else 49, "in_channels": 32 if image else 16,
                "patch_size": [2, 2, 2] if later else 2, "latent_height": 300 if later else 60,
                "latent_width": 300 if later else 90, "ofs_embed_dim": 512 if later and image else None}  # fmt: skip
    assert {key: params.get(key) for key in expected} == expected
    positions = params["modules"]["pos_embed_config"]["params"]
    table = {"learnable_pos_embed": True} if image and not later else {}
    assert positions == {"hidden_size_head": 64, "text_length": 224 if later else 226} | table
    state = {n: torch.empty(shape, device="meta") for n, shape in sizes.sat_shapes().items()}
    assert len(state) == {"CogVideoX-5B-I2V": 773, "CogVideoX1.5-5B-I2V": 776}.get(name, 772)  # + SAT's unused one
    assert sum(t.numel() for t in state.values()) + 64 * 3072 == VALUES[name]
    schedule = (VAE_PARAMS, sizes.nearest.scale_factor, sizes.nearest.shift_scale, torch.bfloat16)
    (tmp_path / "run.yaml").write_text(run_file(tmp_path, sizes, *schedule))
    run = load_run_config([tmp_path / "run.yaml"], SampleArgs)
    check_model_section(run.model, SATVideoDiffusionEngine)
    args, model = run.args, run.model
    assert (args.dtype, args.sampling_fps, args.sampling_num_frames) == ("bf16", *((16, 22) if later else (8, 13)))
    assert args.image2video == (True if image else None)
    assert args.sampling_image_size == ([768, 1360] if later and not image else None)
    assert [model.get(f"noised_image_{key}") for key in ("input", "dropout")] == ([True, 0.05] if image else [None] * 2)
    assert model["conditioner_config"]["params"]["emb_models"][0]["params"]["max_length"] == positions["text_length"]
    shift = model["loss_fn_config"]["params"]["sigma_sampler_config"]["params"]["discretization_config"]["params"]
    assert (model["scale_factor"], shift["shift_scale"]) == (0.7, 1.0)
    if table:  # which cannot be computed
        state = {n: t for n, t in state.items() if "pos_embedding" not in n}
        with pytest.raises(ConvertError, match="CogVideoX-5B-I2V: missing .1.: mixins.pos_embed.pos_embedding"):
            sizes_of_sat(all_deferred(state)).check(state, "the file")
    else:
        assert replace(sizes_of_sat(all_deferred(state)), assumed="") == replace(sizes, assumed="")


VALUES = {"CogVideoX-5B": 5_570_479_680, "CogVideoX-5B-I2V": 5_625_284_160, "CogVideoX1.5-5B": 5_570_872_960,
          "CogVideoX1.5-5B-I2V": 5_571_791_488}  # fmt: skip  # of the original's networks


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_stored_sine_table_tells_text_length_grid_and_spacing(dtype: torch.dtype) -> None:
    params = tiny_config()["params"]
    state = {name: t.to(dtype) for name, t in tiny_network().state_dict().items()}
    assert sizes_of_sat(all_deferred(state)) == sizes_of_params(params)
    del state["mixins.pos_embed.pos_embedding"]
    assumed = sizes_of_sat(all_deferred(state))
    assert assumed.text_length == 226 and not assumed.rotary and "226 text tokens" in assumed.assumed


def test_vae_sizes_and_names() -> None:
    from sgm.util import instantiate_from_config

    section = model_section(Path("x"))["first_stage_config"]
    with torch.device("meta"):
        state = instantiate_from_config(section).state_dict()
    assert vae_keys.params_of(state, "vae") == VAE_PARAMS
    assert vae_keys.sat_shapes(VAE_PARAMS) == {name: tuple(t.shape) for name, t in state.items()}


def test_a_decoder_of_other_width_is_told_from_a_fault_of_the_file() -> None:
    state = {
        name: torch.empty(shape, device="meta") for name, shape in vae_keys.sat_shapes(VAE_PARAMS, [64] * 4).items()
    }
    params = vae_keys.params_of(state, "vae")
    assert params == VAE_PARAMS and vae_keys.decoder_widths(state, params) == [64] * 4
    with pytest.raises(
        vae_keys.UnequalWidthsError, match=r"encoder are \[32, 64, 64, 128\].*decoder \[64, 64, 64, 64\]"
    ):
        vae_keys.check(state, params, "vae")
    same_width = {name: torch.empty(shape, device="meta") for name, shape in vae_keys.sat_shapes(VAE_PARAMS).items()}
    for side in ("decoder.up.0", "encoder.down.1"):
        name = f"{side}.block.0.conv2.conv.weight"
        with pytest.raises(ValueError, match=f"not a whole CogVideoX autoencoder: {name} is") as found:
            vae_keys.check(same_width | {name: torch.empty(40, 40, 3, 3, 3, device="meta")}, params, "vae")
        assert not isinstance(found.value, vae_keys.UnequalWidthsError)


# --- kinds of checkpoints --------------------------------------------------------------------------------------------


def transformer_of(checkpoint: Path, out: Path, **options: Any) -> dict[str, Tensor]:
    convert(ToHf(out, checkpoint, dtype=torch.float32, partial=True, **options))
    return component(out / "transformer")


def test_tensor_parallel_parts_and_averaged_weights(sat_release: Path, hf: Path, tmp_path: Path) -> None:
    whole_state = {NETWORK_PREFIX + n: t for n, t in read_transformer(sat_release / "transformer").network.items()}
    folder = tmp_path / "run" / "5-ema"
    folder.mkdir(parents=True)
    (folder.parent / "training_config.yaml").write_bytes((sat_release / "infer.yaml").read_bytes())
    for rank in range(2):
        part = partition_state(whole_state, rank, 2)
        if rank == 1:
            drifted = NETWORK_PREFIX + "mixins.adaln_layer.query_layernorm_list.0.weight"
            part_drifted = part | {drifted: part[drifted] + 1}
        save_pt(folder / f"mp_rank_0{rank}_model_states.pt", {"module": part})
    expected = component(hf / "transformer")
    same(transformer_of(folder, tmp_path / "a"), expected)
    (report,) = inspect(folder)
    assert len(report.files) == 2 and report.iteration == 5 and not report.found[0].missing
    (alone,) = inspect(folder / "mp_rank_00_model_states.pt")
    assert "wrong shape" in "\n".join(alone.lines())
    with pytest.raises(ValueError, match="wrong shape.*name the folder, not one mp_rank file"):
        transformer_of(folder / "mp_rank_00_model_states.pt", tmp_path / "b")
    save_pt(folder / "mp_rank_01_model_states.pt", {"module": part_drifted})
    with pytest.raises(ValueError, match="query_layernorm_list.0.weight.*--allow_drift"):
        transformer_of(folder, tmp_path / "b")
    assert not (tmp_path / "b").exists() and not list(tmp_path.glob(".partial*"))
    same(transformer_of(folder, tmp_path / "b", allow_drift=True), expected)


def test_a_run_is_described_without_its_date(sat_release: Path, tmp_path: Path) -> None:
    shutil.copytree(sat_release / "transformer", tmp_path / "fox-01-31-12-00")
    (report,) = inspect(tmp_path / "fox", with_hash=False)
    assert "fox-01-31-12-00" in report.lines()[0]
    with pytest.raises(ValueError, match="nor a training run of that name"):
        inspect(tmp_path / "hen")


def test_whole_engine_save_gives_all_parts(sat_release: Path, hf: Path, sat_yaml: Path, tmp_path: Path) -> None:
    """A fine-tuning save with text encoder, VAE and position table in it; only T5's small files come from elsewhere."""
    vae = read_checkpoint(sat_release / "vae" / "3d-vae.pt")["state_dict"]
    text = component(sat_release / "t5")
    text["encoder.embed_tokens.weight"] = text["shared.weight"]

    def add(module: dict[str, Tensor]) -> None:
        module[NETWORK_PREFIX + "mixins.pos_embed.pos_embedding"] = tiny_network().state_dict()[
            "mixins.pos_embed.pos_embedding"
        ]
        module.update({f"first_stage_model.{n}": t for n, t in vae.items()})
        module.update({f"conditioner.embedders.0.transformer.{n}": t for n, t in text.items()})

    checkpoint = rewrite(sat_release / "transformer", tmp_path / "7" / "mp_rank_00_model_states.pt", add)
    small = tmp_path / "t5"
    small.mkdir()
    for name in ("config.json", "spiece.model"):
        (small / name).write_bytes((sat_release / "t5" / name).read_bytes())
    lines = convert(ToHf(tmp_path / "hf", checkpoint, text_encoder=str(small), dtype=torch.float32))
    for name in ("transformer", "vae", "text_encoder"):
        same(component(tmp_path / "hf" / name), component(hf / name))
        assert json.loads((tmp_path / "hf" / name / "config.json").read_text()) == json.loads(
            (hf / name / "config.json").read_text()
        )
    assert any("left out" in line and "pos_embedding" in line for line in lines)
    assert (tmp_path / "hf" / "model_index.json").is_file()


def test_single_components_and_pickled_files(sat_release: Path, hf: Path, tmp_path: Path) -> None:
    """A transformer's or VAE's own folder, also with a `.bin` file, as older repositories have."""
    for name in ("transformer", "vae"):
        old = tmp_path / f"old-{name}"
        old.mkdir()
        torch.save(component(hf / name), old / "diffusion_pytorch_model.bin")
        (old / "config.json").write_bytes((hf / name / "config.json").read_bytes())
        with pytest.raises(ValueError, match=f"{name} alone; convert it with --partial"):
            convert_back(ToSat(old, tmp_path / name))
        convert_back(ToSat(old, tmp_path / name, partial=True))
    same(
        read_transformer(tmp_path / "transformer" / "transformer").network,
        read_transformer(sat_release / "transformer").network,
    )
    vae = Path("vae", "3d-vae.pt")
    same(read_checkpoint(tmp_path / "vae" / vae)["state_dict"], read_checkpoint(sat_release / vae)["state_dict"])


def test_default_type_is_half_and_bfloat16_stays(sat_release: Path, tmp_path: Path) -> None:
    convert(whole(sat_release, tmp_path / "half", dtype=None))
    kinds = {
        t.dtype for part in ("transformer", "vae", "text_encoder") for t in component(tmp_path / "half" / part).values()
    }
    assert kinds == {torch.float16}
    bf16 = rewrite(sat_release / "transformer", tmp_path / "b.pt", lambda m: {n: t.bfloat16() for n, t in m.items()})
    convert(ToHf(tmp_path / "bf", bf16, partial=True))
    assert {t.dtype for t in component(tmp_path / "bf" / "transformer").values()} == {torch.bfloat16}
    for dtype, expected in (
        (torch.float32, torch.bfloat16),
        (torch.float16, torch.float16),
    ):  # 5B's, by its file's type
        state = {NETWORK_PREFIX + n: t.detach().to(dtype) for n, t in tiny_network(rotary=True).state_dict().items()}
        save_pt(tmp_path / "r.pt", {"module": state})
        config = yaml_of(tmp_path / "c" / "r.yaml", {"network_config": tiny_config(rotary=True)})
        convert(ToHf(tmp_path / "r", tmp_path / "r.pt", partial=True, config=config, overwrite=True))
        assert {t.dtype for t in component(tmp_path / "r" / "transformer").values()} == {expected}


def test_shards_hold_at_most_their_size(tmp_path: Path) -> None:
    plan = all_deferred({f"t{k}": torch.full((k + 1,), float(k)) for k in range(10)})
    files = write_shards(tmp_path, "w", plan, limit=40)
    sizes = [sum(t.nbytes for t in load_file(f).values()) for f in files if f.suffix == ".safetensors"]
    assert sum(sizes) == 220 and all(size <= 40 for size in sizes) and len(sizes) == 7
    assert [parse_size(t) for t in ("5GB", "1.5 MiB", "1000", "2kb")] == [5 * 10**9, 3 << 19, 1000, 2000]


def test_commands_of_the_page(hf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    """Every command of docs/conversion.md, in order, in a folder that holds what they name."""
    pytest.importorskip("diffusers")
    from tools import compare_diffusers, convert_weight_hf2sat, convert_weight_sat2hf, inspect_weights

    named = (compare_diffusers, convert_weight_hf2sat, convert_weight_sat2hf, inspect_weights)
    tools = {f"tools/{tool.__name__.rpartition('.')[2]}.py": tool for tool in named}
    page = (REPO / "docs" / "conversion.md").read_text()
    block = page.split("```shell")[1].split("```")[0].replace("\\\n", " ")
    commands = [shlex.split(line, comments=True) for line in block.splitlines() if line.startswith("python ")]
    monkeypatch.chdir(tmp_path)
    (tmp_path / "CogVideoX-2b").symlink_to(hf)
    run = tmp_path / "ckpts" / "lora-disney-11-24-16-30"  # named without its date in the command
    (run / "7").mkdir(parents=True)
    save_pt(run / "7" / "mp_rank_00_model_states.pt", {"module": adapter_matrices()})
    (run / "latest").write_text("7")
    assert len(commands) == 7
    for _, tool, *arguments in commands:
        assert tools[tool].main(arguments) == 0, (tool, arguments, capsys.readouterr().err)
    printed = capsys.readouterr().out
    assert "to sample: python sample_video.py CogVideoX-2b-sat/infer.yaml" in printed and "rank 4" in printed
    same(component(tmp_path / "hf" / "transformer"), {n: t.half() for n, t in component(hf / "transformer").items()})


def test_tensors_of_a_checkpoint_are_all_accounted_for(sat_release: Path, tmp_path: Path) -> None:
    """An unknown name is refused, it never vanishes."""
    odd = rewrite(
        sat_release / "transformer",
        tmp_path / "o.pt",
        lambda m: m.update({NETWORK_PREFIX + "extra.weight": torch.zeros(1)}),
    )
    with pytest.raises(ValueError, match="extra.weight"):
        transformer_of(odd, tmp_path / "x")
    vae = tensors_of(read_checkpoint(sat_release / "vae" / "3d-vae.pt")["state_dict"])
    save_pt(tmp_path / "v.pt", {"state_dict": vae | {"loss.logvar": torch.zeros(1)}})
    (tmp_path / "infer.yaml").unlink()
    with pytest.raises(ConvertError, match="no tensor says the model's scale_factor"):
        convert(ToHf(tmp_path / "v", vae=tmp_path / "v.pt", partial=True))
    (tmp_path / "run.yaml").write_bytes((sat_release / "infer.yaml").read_bytes())
    lines = convert(ToHf(tmp_path / "v", vae=tmp_path / "v.pt", partial=True))
    assert any("left out: 1 entries of the training loss" in line for line in lines)
    save_pt(tmp_path / "v.pt", {"state_dict": vae | {"decoder.odd.weight": torch.zeros(1)}})
    with pytest.raises(ValueError, match="unknown decoder.odd.weight"):
        convert(ToHf(tmp_path / "w", vae=tmp_path / "v.pt", partial=True))


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from /proc")
def test_memory_holds_one_tensor_not_the_file(tmp_path: Path) -> None:
    """Both ways through a 100 MB transformer: anonymous memory grows by far less than the file."""
    sizes = sizes_of_params(tiny_config(hidden_size=768, num_attention_heads=12, num_layers=3)["params"])
    state = {NETWORK_PREFIX + n: torch.full(shape, 0.5) for n, shape in sizes.sat_shapes().items()}
    total, largest = sum(t.nbytes for t in state.values()), max(t.nbytes for t in state.values())
    save_pt(tmp_path / "w.pt", {"module": state})
    yaml_of(tmp_path / "w.yaml", {"network_config": tiny_config(hidden_size=768, num_attention_heads=12, num_layers=3)})
    del state
    with anonymous_growth() as growth:
        convert(ToHf(tmp_path / "hf", tmp_path / "w.pt", dtype=torch.float32, partial=True))
        convert_back(ToSat(tmp_path / "hf", tmp_path / "sat", partial=True))
    assert total > 80 << 20 and growth[0] < 2 * largest + (16 << 20) < total / 2, (growth, largest, total)


@contextmanager
def anonymous_growth() -> Iterator[list[int]]:
    """[bytes by which this process's anonymous memory grew at most], sampled while the block runs."""

    def used() -> int:
        return int(re.search(r"RssAnon:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) << 10  # type: ignore[index]

    begin, peak, done = used(), [0], threading.Event()

    def watch() -> None:
        while not done.wait(0.002):
            peak[0] = max(peak[0], used() - begin)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield peak
    finally:
        done.set()
        thread.join()
