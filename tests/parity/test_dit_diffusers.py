"""The network against diffusers' CogVideoXTransformer3DModel, with weights taken through the key map."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sgm.convert import dit_keys, dit_sizes, lora_keys
from sgm.convert.lazy import ConvertError
from sgm.convert.lora_files import scaled_matrices
from sgm.convert.lora_keys import factors_of
from tests.dit_tiny import random_inputs, tiny_config, tiny_network

diffusers = pytest.importorskip("diffusers")

LAYOUTS: dict[str, dict[str, Any]] = {
    "2b": {},
    "5b": {"rotary": True},
    "5b-i2v": {"rotary": True, "learned": True},
    "1.5": {"rotary": True, "patch_size": [2, 2, 2]},
    "1.5-i2v": {"rotary": True, "patch_size": [2, 2, 2], "in_channels": 32, "ofs_embed_dim": 24},
}


def randomised(**options: Any) -> nn.Module:
    """The tiny network with every trainable tensor drawn at random, norms around 1."""
    network = tiny_network(**options)
    draw = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if parameter.requires_grad:
                centre = 1.0 if "norm" in name and name.endswith("weight") else 0.0
                parameter.copy_(centre + 0.08 * torch.randn(parameter.shape, generator=draw))
    return network


def counterpart(config: dict[str, Any], state: dict[str, Tensor], eps_as_sat: bool = True) -> nn.Module:
    """diffusers' model with these weights; its `norm_out` eps, 1e-5 as published, is 1e-6 in SAT."""
    from diffusers import CogVideoXTransformer3DModel

    model = CogVideoXTransformer3DModel(**dit_sizes.sizes_of_params(config["params"]).hf_config()).eval()
    result = model.load_state_dict(state, strict=True)
    assert not result.missing_keys and not result.unexpected_keys
    if eps_as_sat:
        model.norm_out.norm.eps = 1e-6
    return model


def both(network: nn.Module, other: nn.Module, inputs: dict[str, Tensor], **extra: Tensor) -> tuple[Tensor, Tensor]:
    rotary = network.mixins.pos_embed.rotary(network.patch.grid(inputs["x"].shape[1], 6, 10), inputs["x"])
    with torch.no_grad():
        theirs = other(
            inputs["x"],
            inputs["context"],
            inputs["timesteps"],
            image_rotary_emb=tuple(rotary) if rotary else None,
            return_dict=False,
            **extra,
        )[0]
        return network(**inputs, **extra), theirs


@pytest.mark.parametrize("layout", LAYOUTS)
def test_same_results(layout: str) -> None:
    options = LAYOUTS[layout]
    network = randomised(**options)
    other = counterpart(tiny_config(**options), dit_keys.sat_to_hf(network.state_dict()))
    inputs = random_inputs(frames=4 if "patch_size" in options else 3, channels=options.get("in_channels", 16))
    extra = {"ofs": torch.tensor([2.0])} if "ofs_embed_dim" in options else {}
    ours, theirs = both(network, other, inputs, **extra)
    assert ours.std() > 0.1
    torch.testing.assert_close(ours, theirs, rtol=0, atol=5e-6)


def test_as_published_only_the_last_eps_differs() -> None:
    network = randomised()
    other = counterpart(tiny_config(), dit_keys.sat_to_hf(network.state_dict()), eps_as_sat=False)
    ours, theirs = both(network, other, random_inputs())
    assert (ours - theirs).abs().max() < 1e-4


def test_rotary_table_is_diffusers() -> None:
    from diffusers.models.embeddings import get_3d_rotary_pos_embed

    from sgm.modules.transformer.block import TokenGrid
    from sgm.modules.transformer.positions import rotary_table

    theirs = get_3d_rotary_pos_embed(64, ((0, 0), (30, 45)), (30, 45), 13)
    for mine, other in zip(rotary_table(TokenGrid(13, 30, 45), 64), theirs, strict=True):
        torch.testing.assert_close(mine, other, rtol=0, atol=1e-5)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_there_and_back(layout: str) -> None:
    network = randomised(**LAYOUTS[layout])
    back = dit_keys.hf_to_sat(dit_keys.sat_to_hf(network.state_dict()))
    left_out = {*network.dead_keys(), *network.computed_state()}
    expected = {name: value for name, value in network.state_dict().items() if name not in left_out}
    assert back.keys() == expected.keys()
    assert all(torch.equal(back[name], value) for name, value in expected.items())


def test_whole_engine_saves_convert_too() -> None:
    """Text encoder and VAE entries beside the network's are left out."""
    network = tiny_network()
    saved = {f"model.diffusion_model.{n}": t for n, t in network.state_dict().items()}
    saved |= {"conditioner.embedders.0.x": torch.zeros(1), "first_stage_model.y": torch.zeros(1)}
    assert dit_keys.sat_to_hf(saved).keys() == dit_keys.sat_to_hf(network.state_dict()).keys()


def test_names_of_the_reference_map(shared_golden: Path) -> None:
    facts = json.loads((shared_golden / "hf_facts.json").read_text())
    for name, expected in facts["dit_key_map"].items():
        if expected != "dropped":
            table = torch.ones(1, 12, 4) if name.endswith(dit_keys.POSITIONS[0]) else torch.ones(12, 4)
            assert list(dit_keys.sat_to_hf({name: table})) == expected
    matrices = {name: torch.zeros(3, 3) for name in facts["lora_key_map_layer0"]}
    exported = lora_keys.lora_sat_to_hf(matrices, prefix="")
    assert set(exported) == set(facts["lora_key_map_layer0"].values())


def test_unknown_names_are_listed() -> None:
    with pytest.raises(ConvertError, match="bogus.weight.*direction"):
        dit_keys.sat_to_hf({"bogus.weight": torch.zeros(1)})
    state = dit_keys.sat_to_hf(tiny_network().state_dict())
    del state["transformer_blocks.1.attn1.to_k.weight"]
    with pytest.raises(ConvertError, match="layers.1.attention.query_key_value.weight.*missing"):
        dit_keys.hf_to_sat(state)
    with pytest.raises(ConvertError, match="merge"):
        dit_keys.sat_to_hf(tiny_network(lora={"r": 2}).state_dict())


@pytest.mark.parametrize("targets", [("attention",), ("attention", "mlp", "adaln")])
def test_exported_lora(targets: tuple[str, ...]) -> None:
    """The exported matrices, applied as PEFT does (W + B A), give SAT's adapted network."""
    from sgm.modules.transformer.lora import merge_lora
    from sgm.modules.transformer.lora_state import split_lora

    network = randomised(lora={"r": 4, "lora_alpha": 2, "targets": list(targets)})
    base, lora = split_lora(network.state_dict())
    exported = lora_keys.lora_sat_to_hf(scaled_matrices(lora, 2 / 4), prefix="")
    state = dit_keys.sat_to_hf(base)
    for name in [n for n in exported if ".lora_A." in n]:
        module = name.removesuffix(".lora_A.weight")
        state[f"{module}.weight"] = state[f"{module}.weight"] + exported[f"{module}.lora_B.weight"] @ exported[name]
    ours, theirs = both(network, counterpart(tiny_config(), state), random_inputs())
    torch.testing.assert_close(ours, theirs, rtol=0, atol=5e-6)
    back = lora_keys.lora_hf_to_sat(factors_of(lora_keys.lora_sat_to_hf(lora), "it"))
    assert back.keys() == lora.keys()
    assert all(torch.equal(back[name], value) for name, value in lora.items())
    merge_lora(network)
    assert network.state_dict().keys() == base.keys()
