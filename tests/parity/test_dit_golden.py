"""The network against recorded results of the original: float32, 1e-5."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from sgm.modules.diffusionmodules.util import timestep_embedding
from sgm.modules.transformer.block import TokenGrid
from sgm.modules.transformer.positions import sincos_table
from sgm.weights import assign_state
from tests.dit_tiny import load_tiny, tiny_network, tiny_state

TOLERANCE = 1e-5
PREFIX = "model.diffusion_model."
# Where the eps of each norm decides the result, since these inputs of norms are scaled down.
EPS_PROBE = {
    "patch_embed.": 0.004,
    "pos_embedding": 0.0,
    "query_key_value.": 0.004,
    "transformer.final_layernorm.": 0.002,
}


@pytest.fixture(scope="module")
def cases(golden: Path) -> dict[str, Tensor]:
    return load_file(golden / "dit_io.safetensors")


@pytest.fixture(scope="module")
def all_cases(shared_golden: Path) -> dict[str, Tensor]:
    return load_file(shared_golden / "dit_io.safetensors")


def assert_case(network: torch.nn.Module, cases: dict[str, Tensor], name: str, **extra: Tensor) -> None:
    source = name if f"{name}.x" in cases else "video"
    with torch.no_grad():
        out = network(*(cases[f"{source}.{part}"] for part in ("x", "timesteps", "context")), **extra)
    assert out.dtype == torch.float32
    torch.testing.assert_close(out, cases[f"{name}.out"], rtol=0, atol=TOLERANCE)


def without_prefix(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(PREFIX): value for name, value in state.items()}


def probe(state: dict[str, Tensor]) -> dict[str, Tensor]:
    scaled = dict(state)
    for mark, factor in EPS_PROBE.items():
        scaled |= {name: value * factor for name, value in scaled.items() if mark in name}
    return scaled


# --- committed cases --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["video", "image", "two"])
def test_base(cases: dict[str, Tensor], name: str) -> None:
    assert_case(load_tiny(tiny_network()), cases, name)


def test_each_norm_has_the_original_eps(cases: dict[str, Tensor]) -> None:
    network = tiny_network()
    state = probe(network.computed_state() | tiny_state())
    assign_state(network, state, source="probe")
    assert_case(network, cases, "eps_probe")


def test_lora(cases: dict[str, Tensor]) -> None:
    assert_case(load_tiny(tiny_network(lora={"r": 4}), lora=True), cases, "lora")


def test_lora_with_the_mixin_of_sat_itself(cases: dict[str, Tensor]) -> None:
    from sat.model.finetune.lora2 import LoraMixin

    network = tiny_network()
    network.add_mixin("lora", LoraMixin(2, r=4), reinit=True)
    assert_case(load_tiny(network, lora=True), cases, "lora")


def test_rotary(cases: dict[str, Tensor]) -> None:
    assert_case(load_tiny(tiny_network(rotary=True), rotary=True), cases, "rotary")


def test_timestep_embedding(cases: dict[str, Tensor]) -> None:
    steps = cases["timestep_embedding.t"]
    torch.testing.assert_close(timestep_embedding(steps, 192), cases["timestep_embedding.out"], rtol=0, atol=1e-6)
    assert torch.equal(timestep_embedding(steps.long(), 192), timestep_embedding(steps, 192))


def test_position_rows_of_the_2b_model(cases: dict[str, Tensor]) -> None:
    grid = TokenGrid(13, 30, 45)
    table = sincos_table(grid, 1920, (1.0, 1.875, 1.875)).unflatten(0, (13, 30 * 45))
    rows = torch.stack([table[t, i] for t, i in ((0, 0), (0, 1), (0, 45), (5, 700), (12, 1349))])
    torch.testing.assert_close(rows.float(), cases["2b_rows"], rtol=0, atol=1e-7)
    assert table.abs().sum().item() == pytest.approx(18987505.17183582, rel=1e-12)


# --- the full set -----------------------------------------------------------------------------------------------------


def test_a_stored_position_table_wins(all_cases: dict[str, Tensor]) -> None:
    network = load_tiny(tiny_network())
    with torch.no_grad():
        network.mixins.pos_embed.pos_embedding.copy_(all_cases["posrand.pos_embedding"])
    assert_case(network, all_cases, "posrand")


@pytest.mark.parametrize("name", ["lora", "lora_image"])
def test_lora_cases_merged_and_attached(all_cases: dict[str, Tensor], name: str) -> None:
    from sgm.modules.transformer.lora import merge_lora

    network = load_tiny(tiny_network(lora={"r": 4}), lora=True)
    assert_case(network, all_cases, name)
    merge_lora(network)
    assert_case(network, all_cases, name)
    merged = network.transformer.layers[0].attention.query_key_value.weight
    torch.testing.assert_close(merged, all_cases["lora.merged.qkv0"], rtol=0, atol=1e-6)


@pytest.mark.parametrize("learned", [False, True])
def test_rotary_cases(all_cases: dict[str, Tensor], shared_golden: Path, learned: bool) -> None:
    stored = load_file(shared_golden / "dit_rotary_state.safetensors")
    network = load_tiny(tiny_network(rotary=True, learned=learned), rotary=True)
    for name, table in network.computed_state().items():
        torch.testing.assert_close(table, stored[PREFIX + name], rtol=0, atol=1e-6)
    kind = "rotary_learnable" if learned else "rotary"
    if learned:
        with torch.no_grad():
            network.mixins.pos_embed.pos_embedding.copy_(stored[f"learnable:{PREFIX}mixins.pos_embed.pos_embedding"])
    assert_case(network, all_cases, kind)
    assert_case(network, all_cases, f"{kind}_image")


def test_hidden_states(all_cases: dict[str, Tensor]) -> None:
    network = load_tiny(tiny_network())
    seen: dict[str, Tensor] = {}
    first, second = network.transformer.layers
    first.register_forward_pre_hook(lambda module, args: seen.update(embed=args[0]))
    first.register_forward_hook(lambda module, args, out: seen.update(layer0=out))
    second.register_forward_hook(lambda module, args, out: seen.update(layer1=out))
    assert_case(network, all_cases, "video")
    for name, hidden in seen.items():
        torch.testing.assert_close(hidden, all_cases[f"video.hidden.{name}"], rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("divisor", [1, 1.875])
def test_tiny_position_table(shared_golden: Path, divisor: float) -> None:
    stored = load_file(shared_golden / "dit_pos.safetensors")[f"tiny_interp_{divisor}"]
    table = sincos_table(TokenGrid(3, 3, 5), 192, (1.0, divisor, divisor)).float()
    assert torch.equal(table, stored[0, 12:]) and not stored[0, :12].any()


@pytest.mark.parametrize("name", ["p122", "p122_image", "p222", "i2v"])
def test_later_releases(shared_golden: Path, name: str) -> None:
    """Three-number patches, embedding of ofs, and image-to-video by channel concatenation."""
    cases = load_file(shared_golden / "dit_head_io.safetensors")
    own = load_file(shared_golden / "dit_head_state.safetensors")
    kind = name.removesuffix("_image")
    state = tiny_state(rotary=True)
    state |= without_prefix({k.removeprefix(f"{kind}:"): v for k, v in own.items() if k.startswith(f"{kind}:")})
    options = {"patch_size": [1, 2, 2] if kind == "p122" else [2, 2, 2]}
    extra = {}
    if kind == "p122":
        state["mixins.patch_embed.proj.weight"] = state["mixins.patch_embed.proj.weight"].flatten(1)
    if kind == "i2v":
        options |= {"in_channels": 32, "ofs_embed_dim": 24}
        extra = {"concat_images": cases["i2v.concat_images"], "ofs": cases["i2v.ofs"]}
    network = tiny_network(rotary=True, **options)
    assert not network.computed_state()
    assign_state(network, state, source="reference")
    assert_case(network, cases, name, **extra)


def test_key_list_of_the_tiny_network(shared_golden: Path) -> None:
    facts = json.loads((shared_golden / "dit_facts.json").read_text())
    for expected, network in ((facts["keys"], tiny_network()), (facts["lora_keys"], tiny_network(lora={"r": 4}))):
        assert {PREFIX + n: list(t.shape) for n, t in network.state_dict().items()} == expected
        frozen = [PREFIX + n for n, p in network.named_parameters() if not p.requires_grad]
        assert frozen == facts["requires_grad_false"]
    norms = {PREFIX + n: m.eps for n, m in tiny_network().named_modules() if isinstance(m, torch.nn.LayerNorm)}
    assert norms == facts["layernorm_eps"]
    rotary = tiny_network(rotary=True)
    assert {PREFIX + n for n, _ in rotary.named_buffers()} == set(facts["rotary_buffers"])
    assert {n: list(rotary.state_dict()[n.removeprefix(PREFIX)].shape) for n in facts["rotary_keys_extra"]} == facts[
        "rotary_keys_extra"
    ]
