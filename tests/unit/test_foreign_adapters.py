"""Adapters of other trainers: the same numbers as PEFT's own forward, whatever the file calls its entries."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from sgm.convert.lazy import ConvertError
from sgm.convert.to_sat import ToSat, convert, import_lora
from sgm.errors import SgmError
from sgm.inference.adapters import read_adapter
from sgm.models.loading import LoadedNetwork, load_network
from sgm.util import instantiate_from_config
from sgm.weights import WeightsError
from sgm.weights.release import Adapter, read_transformer
from tests.convert_tiny import network_of
from tests.dit_tiny import random_inputs, tiny_config

diffusers, peft = pytest.importorskip("diffusers"), pytest.importorskip("peft")

SIZES = dict(
    num_attention_heads=3, attention_head_dim=64, num_layers=2, time_embed_dim=24, text_embed_dim=32, sample_height=6,
    sample_width=10, sample_frames=9, max_text_seq_length=12,
)  # fmt: skip
ATTENTION = ["to_q", "to_k", "to_v", "to_out.0"]
ALL = [*ATTENTION, "ff.net.0.proj", "ff.net.2", "norm1.linear", "norm2.linear", "patch_embed.proj", "text_proj",
       "time_embedding.linear_1", "time_embedding.linear_2", "norm_out.linear", "proj_out"]  # fmt: skip


@pytest.fixture(scope="module")
def theirs(tmp_path_factory: pytest.TempPathFactory) -> tuple[nn.Module, Path]:
    """diffusers' transformer with random weights, and the folder that it and its SAT form are in."""
    folder = tmp_path_factory.mktemp("foreign")
    torch.manual_seed(0)
    model = diffusers.CogVideoXTransformer3DModel(**SIZES).eval().requires_grad_(False)
    for name, value in model.named_parameters():
        value.copy_(("norm" in name and name.endswith("weight") and value.ndim == 1) + 0.08 * torch.randn(value.shape))
    model.norm_out.norm.eps = 1e-6
    model.save_pretrained(folder / "hf")
    convert(ToSat(folder / "hf", folder / "sat", partial=True))
    return model, folder


def trained(model: nn.Module, seed: int = 1, **settings: Any) -> Any:
    """A PEFT model over a copy of the transformer, all of its adapter's tensors random."""
    copy = diffusers.CogVideoXTransformer3DModel(**SIZES).eval()
    copy.load_state_dict(model.state_dict())
    copy.norm_out.norm.eps = 1e-6
    wrapped = peft.get_peft_model(copy, peft.LoraConfig(**{"r": 4, "lora_alpha": 8, **settings})).eval()
    draw = torch.Generator().manual_seed(seed)
    for name, value in wrapped.named_parameters():
        if "lora_magnitude" in name:
            value.data *= 1 + 0.2 * torch.rand(value.shape, generator=draw)
        elif "lora_" in name:
            value.data = 0.1 * torch.randn(value.shape, generator=draw)
    return wrapped


@torch.no_grad()
def their_output(model: nn.Module) -> Tensor:
    x = random_inputs()
    return model(x["x"], x["context"], x["timesteps"], return_dict=False)[0]


@torch.no_grad()
def our_output(folder: Path, adapter: Path | str, *more: Adapter, scale: float = 1, merge: bool = False) -> Tensor:
    return network_with(folder, [Adapter(str(adapter), scale), *more], merge)[0](**random_inputs())


def network_with(folder: Path, adapters: list[Adapter], merge: bool = False) -> tuple[nn.Module, LoadedNetwork]:
    node = tiny_config()
    node["params"]["defer_lora"] = True
    with torch.device("meta"):
        network = instantiate_from_config(node)
    loaded = load_network(
        network, folder / "sat" / "transformer", device=torch.device("cpu"), dtype=torch.float32, allow_absent=True,
        adapters=adapters, read=read_adapter, merge=merge,
    )  # fmt: skip
    return network.eval(), loaded


def same(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "settings",
    [
        {"target_modules": ATTENTION},
        {"target_modules": ["to_q", "to_v"], "use_rslora": True},
        {"target_modules": [*ATTENTION, "ff.net.0.proj"], "rank_pattern": {"to_q": 2, "ff.net.0.proj": 7},
         "alpha_pattern": {r"transformer_blocks\.1\.attn1\.to_k": 3}, "use_rslora": True},
        {"target_modules": ["norm1.linear", "to_k"]},
        {"target_modules": ALL},
        {"target_modules": [*ATTENTION, "norm2.linear", "norm1.linear"], "use_dora": True},
        {"target_modules": [*ALL, "ff.net.2"], "use_dora": True, "rank_pattern": {"to_v": 9}},
    ],
    ids=["attention", "some of it, stabilised", "ranks and alphas", "one branch", "all", "dora", "dora of all"],
)  # fmt: skip
def test_a_folder_of_peft(theirs: Any, tmp_path: Path, settings: dict[str, Any]) -> None:
    model, folder = theirs
    wrapped = trained(model, **settings)
    wrapped.save_pretrained(tmp_path, safe_serialization="alpha_pattern" not in settings)  # else a .bin
    expected = their_output(wrapped)
    assert (expected - their_output(model)).abs().max() > 0.05
    same(our_output(folder, tmp_path), expected)
    same(our_output(folder, tmp_path, merge=True), expected)
    for layer in wrapped.modules():
        if hasattr(layer, "set_scale"):
            layer.set_scale("default", 0.5)
    same(our_output(folder, tmp_path, scale=0.5), their_output(wrapped))
    same(our_output(folder, tmp_path, scale=0), their_output(model))


def written(state: dict[str, Tensor], style: str, alpha: float) -> tuple[dict[str, Tensor], dict[str, str]]:
    """PEFT's entries under the names of another program, and its header."""
    plain = {name.removeprefix("base_model.model."): value.contiguous() for name, value in state.items()}
    if style in ("diffusers", "finetrainers", "diffusion_model."):
        prefix = style if style.endswith(".") else "transformer."
        header = {
            "diffusers": {"lora_adapter_metadata": json.dumps({"transformer.r": 4, "transformer.lora_alpha": alpha})},
            "finetrainers": {"lora_config": json.dumps({"r": 4, "lora_alpha": alpha, "target_modules": ALL})},
        }.get(style, {"ss_network_alpha": str(alpha)})
        return {prefix + name: value for name, value in plain.items()}, header
    found = {}
    for name, value in plain.items():
        module, end = name.split(".lora_")
        flat = {
            "videox_fun": "lora_unet__" + module.replace(".", "_"),
            "kohya": "lora_unet_" + module.replace(".", "_"),
            "comfyui": "diffusion_model." + comfyui(module),
            "comfyui, flat": "lora_unet_" + comfyui(module).replace(".", "_"),
            "diffusers, old": "transformer." + module,
        }[style]
        middle = "lora." if "old" in style else "lora_"
        found[f"{flat}.{middle}{'down' if end.startswith('A') else 'up'}.weight"] = value
        found[f"{flat}.alpha"] = torch.tensor(alpha)
    return found, {}


def comfyui(module: str) -> str:
    names = {"attn1.to_q": "q", "attn1.to_k": "k", "attn1.to_v": "v", "attn1.to_out.0": "attn_out",
             "ff.net.0.proj": "ff_proj", "ff.net.2": "ff_out"}  # fmt: skip
    for old, new in names.items():
        module = module.replace(old, new)
    return re.sub(r"(time_embedding)\.", r"\1_", module.replace("transformer_blocks", "blocks"))


@pytest.mark.parametrize("style", ["diffusers", "finetrainers", "diffusion_model.", "videox_fun", "kohya", "comfyui",
                                   "comfyui, flat", "diffusers, old"])  # fmt: skip
def test_files_of_other_programs(theirs: Any, tmp_path: Path, style: str) -> None:
    model, folder = theirs
    linears = [name for name in ALL if name != "patch_embed.proj"]
    wrapped = trained(model, target_modules=ATTENTION if style in ("diffusers", "finetrainers", "kohya") else linears)
    state, header = written(peft.get_peft_model_state_dict(wrapped), style, 8.0)
    save_file(state, tmp_path / "odd_name.safetensors", header)
    same(our_output(folder, tmp_path), their_output(wrapped))
    lines = import_lora(ToSat(tmp_path, tmp_path / "sat"))
    assert "rank 4, alpha 8 (stated in the file)" in lines[0] or "each linear's alpha" in lines[0]
    same(our_output(folder, tmp_path / "sat"), their_output(wrapped))


def test_alpha_is_said_to_be_stated_only_where_it_is(theirs: Any, tmp_path: Path) -> None:
    model, folder = theirs
    wrapped = trained(model, target_modules=ATTENTION)
    state, _ = written(peft.get_peft_model_state_dict(wrapped), "diffusers", 8.0)
    file = tmp_path / "pytorch_lora_weights.safetensors"
    save_file(state, file)
    lines = import_lora(ToSat(file, tmp_path / "a"))
    assert "rank 4, alpha 4 (assumed, the file does not say)" in lines[0]
    lines = import_lora(ToSat(file, tmp_path / "b", lora_alpha=8))
    assert "rank 4, alpha 8 (given)" in lines[0] and read_transformer(tmp_path / "b").lora["alpha"] == 8
    same(our_output(folder, tmp_path / "b"), their_output(wrapped))
    network, loaded = network_with(folder, [Adapter(str(file), 2.0)])
    assert any("does not say the alpha" in note for note in loaded.notes)
    with torch.no_grad():
        same(network(**random_inputs()), their_output(wrapped))


def test_dora_counts_for_the_base_alone(theirs: Any, tmp_path: Path) -> None:
    """Beside another adapter, as in PEFT, where each sees the base's weights; two of them would not."""
    model, folder = theirs
    dora = trained(model, target_modules=ATTENTION, use_dora=True)
    plain = trained(model, seed=2, target_modules=ATTENTION)
    for name, wrapped in (("dora", dora), ("plain", plain)):
        wrapped.save_pretrained(tmp_path / name)
    dora.load_adapter(tmp_path / "plain", adapter_name="plain")
    dora.base_model.set_adapter(["default", "plain"])
    for first, second in (("dora", "plain"), ("plain", "dora")):
        same(our_output(folder, tmp_path / first, Adapter(str(tmp_path / second))), their_output(dora))
    copy = Adapter(str(tmp_path / "dora" / "adapter_model.safetensors"))
    with pytest.raises(WeightsError, match="both DoRA"):
        network_with(folder, [Adapter(str(tmp_path / "dora")), copy])
    with pytest.raises(ConvertError, match="DoRA.*--lora"):
        import_lora(ToSat(tmp_path / "dora", tmp_path / "sat"))
    convert(ToSat(folder / "hf", tmp_path / "merged", partial=True, adapters=[copy]))
    same(sampled_network(tmp_path / "merged"), our_output(folder, tmp_path / "dora"))


@torch.no_grad()
def sampled_network(release: Path) -> Tensor:
    return network_of(release / "transformer")(**random_inputs())


BLOCK = "transformer.transformer_blocks.0.attn1.to_q"
PAIR = {f"{BLOCK}.lora_A.weight": torch.ones(4, 192), f"{BLOCK}.lora_B.weight": torch.ones(192, 4)}


@pytest.mark.parametrize(
    ("entries", "header", "said"),
    [
        ({"lora_unet_transformer_blocks_0_attn1_to_q.lokr_w1": torch.ones(4, 4)}, {}, "another kind of adapter"),
        (PAIR | {"lora_te_encoder_block_0_layer_0_SelfAttention_q.alpha": torch.ones(())}, {}, "of the text encoder"),
        (PAIR | {"transformer.proj_out.weight": torch.ones(64, 192)}, {}, "whole weights.*modules_to_save.*proj_out"),
        (PAIR | {f"{BLOCK}.lora_B.bias": torch.ones(192)}, {}, "lora_bias"),
        (PAIR | {f"{BLOCK}.diff_b": torch.ones(192)}, {}, "whole differences"),
        (PAIR | {f"{BLOCK}.dora_scale": torch.ones(1, 192)}, {}, "norms of columns"),
        ({"diffusion_model.double_blocks.0.img_attn.qkv.lora_A.weight": torch.ones(4, 4)}, {}, "not those of a LoRA"),
        ({name: t for name, t in PAIR.items() if "_A" in name}, {}, "each A needs its B"),
        (PAIR, {"r": 8, "lora_alpha": 8}, "states LoRA rank 8.*have rank 4"),
        (PAIR, {"r": 4, "lora_alpha": "eight"}, "lora_alpha 'eight', which is no number"),
        (PAIR, {"r": 4, "lora_alpha": 4, "init_lora_weights": "pissa_niter_4"}, "init_lora_weights pissa"),
        (PAIR, {"peft_type": "LOHA"}, "peft_type LOHA"),
    ],
)  # fmt: skip
def test_what_is_more_than_lora_is_refused_by_name(
    theirs: Any, tmp_path: Path, entries: dict[str, Tensor], header: dict[str, Any], said: str
) -> None:
    metadata = {"lora_adapter_metadata": json.dumps({f"transformer.{k}": v for k, v in header.items()})}
    save_file(entries, tmp_path / "a.safetensors", metadata if header else {})
    with pytest.raises(SgmError, match=f"(?s){tmp_path}/a.safetensors.*{said}"):
        read_adapter(str(tmp_path / "a.safetensors"))


def test_one_of_several_has_to_be_named(tmp_path: Path) -> None:
    for name in ("a", "b"):
        save_file(PAIR, tmp_path / f"{name}.safetensors")
    with pytest.raises(WeightsError, match=r"2 adapters; name one: \S+/a.safetensors, \S+/b.safetensors"):
        read_adapter(str(tmp_path))
