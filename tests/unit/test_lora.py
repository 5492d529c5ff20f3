"""Adapters: arithmetic, SAT's tensor names, merging, scales, files, and what does not fit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sgm.models.adapters import apply_adapter
from sgm.modules.transformer.lora import LoraLinear, lora_layers, merge_lora, set_lora_scale
from sgm.modules.transformer.lora_state import LoraError, lora_delta, lora_spec_of, split_lora
from sgm.util import TargetError, instantiate_from_config
from tests.dit_tiny import load_tiny, merged_state, random_inputs, tiny_network, tiny_state

ALL = ["attention", "mlp", "adaln"]


def adapted(**lora: Any) -> nn.Module:
    """The tiny network with an adapter whose B is not zero."""
    network = load_tiny(tiny_network(lora={"r": 4} | lora))
    draw = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for layer in lora_layers(network).values():
            for matrix in layer.matrix_B:
                matrix.copy_(torch.randn(matrix.shape, generator=draw) * 0.1)
    return network


def output(network: nn.Module) -> Tensor:
    with torch.no_grad():
        return network(**random_inputs())


@pytest.fixture(scope="module")
def base_output() -> Tensor:
    return output(load_tiny(tiny_network()))


def test_one_linear_by_hand() -> None:
    linear = nn.Linear(6, 9)
    wrapped = LoraLinear(linear, parts=3, rank=2, scaling=0.5)
    with torch.no_grad():
        for matrix in wrapped.matrix_B:
            matrix.normal_()
    x = torch.randn(4, 6)
    added = torch.cat([x @ a.T @ b.T for a, b in zip(wrapped.matrix_A, wrapped.matrix_B, strict=True)], dim=-1)
    torch.testing.assert_close(wrapped(x), linear(x) + 0.5 * added)
    delta = lora_delta(list(wrapped.matrix_A), list(wrapped.matrix_B), 0.5)
    torch.testing.assert_close(x @ (linear.weight + delta).T + linear.bias, wrapped(x))


def test_starts_as_the_base(base_output: Tensor) -> None:
    assert torch.equal(output(load_tiny(tiny_network(lora={"r": 4, "targets": ALL}))), base_output)


def test_names_are_sats() -> None:
    from sat.model.finetune.lora2 import LoraMixin as SatMixin

    ours, theirs = tiny_network(lora={"r": 3}), tiny_network()
    theirs.add_mixin("lora", SatMixin(2, r=3), reinit=True)
    assert {n: t.shape for n, t in ours.state_dict().items()} == {n: t.shape for n, t in theirs.state_dict().items()}
    theirs.load_state_dict(ours.state_dict())
    ours.load_state_dict(theirs.state_dict())
    assert isinstance(ours.mixins.lora, SatMixin)


def test_extra_targets_and_layers() -> None:
    network = adapted(targets=["mlp", "adaln"], layer_range=[1])
    assert set(lora_layers(network)) == {
        "transformer.layers.1.mlp.dense_h_to_4h",
        "transformer.layers.1.mlp.dense_4h_to_h",
        "mixins.adaln_layer.adaLN_modulations.1.1",
    }


@pytest.mark.parametrize(
    ("options", "scaling"),
    [
        ({}, 1 / 4),
        ({"lora_alpha": 8}, 2.0),
        ({"lora_alpha": 8, "rank_stabilised": True}, 4.0),
    ],
)
def test_scaling(options: dict[str, Any], scaling: float) -> None:
    for layer in lora_layers(adapted(**options)).values():
        assert layer.scaling == scaling


@pytest.mark.parametrize("targets", [["attention"], ALL])
def test_merging_gives_a_network_without_adapters(targets: list[str]) -> None:
    network = adapted(targets=targets, lora_alpha=3)
    by_state = merged_state(network.state_dict(), alpha=3)
    expected = output(network)
    merge_lora(network)
    assert network.state_dict().keys() == tiny_network().state_dict().keys() and not lora_layers(network)
    torch.testing.assert_close(output(network), expected, rtol=0, atol=5e-6)
    assert by_state.keys() == network.state_dict().keys()
    for name, value in network.state_dict().items():
        torch.testing.assert_close(by_state[name], value, rtol=0, atol=1e-6)


def test_sats_own_wrappers_merge_too(base_output: Tensor) -> None:
    from sat.model.finetune.lora2 import LoraMixin as SatMixin

    network = load_tiny(tiny_network())
    network.add_mixin("lora", SatMixin(2, r=4), reinit=True)
    set_lora_scale(network, 2.0)
    with torch.no_grad():
        network.transformer.layers[0].attention.dense.matrix_B[0].fill_(0.1)
    expected = output(network)
    assert not torch.allclose(expected, base_output, atol=1e-4)
    merge_lora(network)
    torch.testing.assert_close(output(network), expected, rtol=0, atol=5e-6)


def test_scale_at_run_time(base_output: Tensor) -> None:
    network = adapted(targets=ALL)
    full = output(network)
    assert not torch.allclose(full, base_output, atol=1e-3)
    set_lora_scale(network, 0)
    assert torch.equal(output(network), base_output)
    set_lora_scale(network, 1)
    assert torch.equal(output(network), full)
    set_lora_scale(network, 0.5)
    halved = output(network)
    merge_lora(network)
    torch.testing.assert_close(output(network), halved, rtol=0, atol=5e-6)
    with pytest.raises(LoraError, match="no LoRA adapter"):
        set_lora_scale(network, 1)


def test_a_base_checkpoint_loads_into_an_adapted_network() -> None:
    network = adapted(targets=ALL)
    matrices = split_lora({name: value.clone() for name, value in network.state_dict().items()})[1]
    result = network.load_state_dict(network.computed_state() | tiny_state())
    assert not result.missing_keys and not result.unexpected_keys
    assert all(torch.equal(network.state_dict()[name], value) for name, value in matrices.items())


def test_what_is_missing_is_reported() -> None:
    network, state = adapted(), adapted().state_dict()
    del state["transformer.layers.0.attention.dense.matrix_B.0"]
    del state["transformer.layers.1.attention.dense.original.weight"]
    assert sorted(network.load_state_dict(state, strict=False).missing_keys) == [
        "transformer.layers.0.attention.dense.matrix_B.0",
        "transformer.layers.1.attention.dense.original.weight",
    ]


def test_deferred_until_the_base_is_there() -> None:
    with torch.device("meta"):
        network = tiny_network(lora={"r": 4}, defer_lora=True)
    assert network.has_lora_config and not lora_layers(network)
    load_tiny(network)
    network.attach_lora()
    assert len(lora_layers(network)) == 4 and not any(p.is_meta for p in network.parameters())
    with pytest.raises(ValueError, match="already has a LoRA"):
        network.attach_lora()
    with pytest.raises(ValueError, match="no lora_config"):
        tiny_network().attach_lora()


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_half_precision_follows_the_base(dtype: str) -> None:
    network = tiny_network(lora={"r": 4}, dtype=dtype)
    assert {p.dtype for p in network.parameters()} == {network.dtype}
    assert output(network).dtype == network.dtype


def test_dropout_acts_in_training_only() -> None:
    network = adapted(lora_dropout=0.5)
    assert torch.equal(output(network), output(network))
    network.train()
    assert not torch.equal(output(network), output(network))


def test_only_the_adapter_learns_when_the_base_is_frozen() -> None:
    network = adapted()
    for name, parameter in network.named_parameters():
        parameter.requires_grad_("matrix_" in name)
    network(**random_inputs()).square().sum().backward()
    trained = [name for name, p in network.named_parameters() if p.grad is not None and p.grad.any()]
    assert len(trained) == 16 and all("matrix_" in name for name in trained)


# --- adapters from files ----------------------------------------------------------------------------------------------


def test_spec_and_split() -> None:
    network = adapted(r=3, targets=["attention", "adaln"], layer_range=[1])
    state = {f"model.diffusion_model.{name}": value for name, value in network.state_dict().items()}
    spec = lora_spec_of(state, {"alpha": "6", "format": "pt"})
    assert (spec.rank, spec.targets, spec.layers, spec.scaling) == (3, ("attention", "adaln"), (1,), 2.0)
    base, lora = split_lora(network.state_dict())
    assert base.keys() == tiny_network().state_dict().keys()
    assert len(lora) == 10 and lora_spec_of(base) is None
    assert lora_spec_of(lora).alpha == 1.0


@pytest.mark.parametrize("merge", [False, True])
def test_applying_an_adapter(merge: bool) -> None:
    source = adapted(r=3, lora_alpha=6, rank_stabilised=True, targets=["attention", "mlp"])
    lora = split_lora(source.state_dict())[1]
    network = load_tiny(tiny_network())
    spec = apply_adapter(network, lora, facts={"alpha": 6.0, "rank_stabilised": "True"}, scale=0.5, merge=merge)
    assert spec.rank == 3 and bool(lora_layers(network)) != merge
    set_lora_scale(source, 0.5)
    torch.testing.assert_close(output(network), output(source), rtol=0, atol=5e-6)


def test_alpha_comes_from_the_configuration_where_the_file_is_silent() -> None:
    lora = split_lora(adapted(lora_alpha=8).state_dict())[1]
    network = load_tiny(tiny_network(lora={"r": 4, "lora_alpha": 8}, defer_lora=True))
    assert apply_adapter(network, lora).alpha == 8
    assert apply_adapter(load_tiny(tiny_network()), lora).alpha == 1


def test_two_adapters_add_up_when_merged() -> None:
    lora = split_lora(adapted().state_dict())[1]
    twice, once = load_tiny(tiny_network()), load_tiny(tiny_network())
    for _ in range(2):
        apply_adapter(twice, lora, scale=0.5, merge=True)
    apply_adapter(once, lora, merge=True)
    torch.testing.assert_close(output(twice), output(once), rtol=0, atol=5e-6)


def test_adapters_that_do_not_fit() -> None:
    lora = split_lora(adapted().state_dict())[1]
    network = tiny_network()
    name = "transformer.layers.0.attention.dense.matrix_A.0"
    with pytest.raises(LoraError, match="no adapter"):
        apply_adapter(network, {})
    with pytest.raises(LoraError, match="attention.dense has matrix_A .* incomplete"):
        apply_adapter(network, {n: t for n, t in lora.items() if n != name})
    with pytest.raises(LoraError, match=r"dense is for a weight \(192, 100\)"):
        apply_adapter(network, lora | {name: torch.zeros(4, 100)})
    with pytest.raises(LoraError, match="mixes ranks"):
        apply_adapter(network, lora | {name: torch.zeros(5, 192)})
    with pytest.raises(LoraError, match="reaches layer 7"):
        apply_adapter(network, {n.replace("layers.1", "layers.7"): t for n, t in lora.items()})
    with pytest.raises(LoraError, match="'time_embed.1' is not supported"):
        lora_spec_of({"time_embed.1.matrix_A.0": torch.zeros(2, 4), "time_embed.1.matrix_B.0": torch.zeros(4, 2)})
    beside = {"ofs_embed.0.matrix_A.0": torch.zeros(4, 24), "ofs_embed.0.matrix_B.0": torch.zeros(24, 4)}
    assert lora_spec_of(lora | beside).only_folded == "it adapts ofs_embed.0, too"
    with pytest.raises(LoraError, match="for ofs_embed.0, which this network lacks"):
        apply_adapter(network, lora | beside)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"r": 0}, "r: must be at least 1"),
        ({"qlora": True}, "qlora"),
        ({"targets": ["attention", "norms"]}, "norms are unknown; choose from attention, mlp, adaln"),
        ({"layer_range": [0, 2]}, r"layers \[2\]; the network has 0 to 1"),
    ],
)
def test_options_that_cannot_be(options: dict[str, Any], message: str) -> None:
    with pytest.raises((LoraError, TargetError), match=message):
        instantiate_from_config({"target": "sat.model.finetune.lora2.LoraMixin", "params": options}, layer_num=2)
