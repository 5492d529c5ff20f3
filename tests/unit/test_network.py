"""The network: names and shapes at full size, construction without side effects, precisions, sizes, errors."""

from __future__ import annotations

import copy
import hashlib
import random
import tracemalloc
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from sgm.models.network import DiffusionTransformer
from sgm.util import TargetError, instantiate_from_config
from tests.dit_tiny import TEXT_LENGTH, load_tiny, random_inputs, tiny_config, tiny_network

# Sizes of the published models, and digests of their lists of "name [shape]", one a line, sorted.
FULL = {"time_embed_dim": 512, "num_frames": 49, "latent_width": 90, "latent_height": 60}
WIDE = FULL | {"hidden_size": 3072, "num_attention_heads": 48, "num_layers": 42}
LONG = WIDE | {"num_frames": 81, "latent_width": 300, "latent_height": 300, "patch_size": [2, 2, 2]}
MODELS: dict[str, tuple[dict[str, Any], int, str]] = {
    "2b": (FULL | {"hidden_size": 1920, "num_attention_heads": 30, "num_layers": 30}, 557, "4cdcc67b36ba11e5"),
    "5b": (WIDE | {"rotary": True}, 775, "fd1ea1966496c864"),
    "5b-i2v": (WIDE | {"rotary": True, "learned": True, "in_channels": 32}, 776, "bf3ca01959f19e44"),
    "5b, linear patches": (WIDE | {"rotary": True, "patch_size": [1, 2, 2]}, 773, "b262c1ab80d72db8"),
    "5b-i2v, linear patches": (
        WIDE | {"rotary": True, "learned": True, "in_channels": 32, "patch_size": [1, 2, 2]},
        774,
        "c020d1917ec2fd82",
    ),
    "1.5": (LONG | {"rotary": True}, 773, "c66de2eaa012b97c"),
    "1.5-i2v": (LONG | {"rotary": True, "in_channels": 32, "ofs_embed_dim": 512}, 777, "d19ffeda0e4b85e4"),
}
MODELS["2b with LoRA"] = (MODELS["2b"][0] | {"lora": {"r": 128}}, 797, "1b0657ecd19344af")


def full_size(**options: Any) -> DiffusionTransformer:
    config = tiny_config(**options)
    modules = config["params"]["modules"]
    modules["pos_embed_config"]["params"]["text_length"] = 226
    modules["patch_embed_config"]["params"]["text_hidden_size"] = 4096
    with torch.device("meta"):
        return instantiate_from_config(config)


def digest(state: dict[str, Tensor]) -> str:
    lines = sorted(f"{name} {list(tensor.shape)}" for name, tensor in state.items())
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


@pytest.mark.parametrize("model", MODELS)
def test_names_and_shapes_of_the_published_models(model: str) -> None:
    options, count, expected = MODELS[model]
    state = full_size(**options).state_dict()
    assert len(state) == count
    assert digest(state).startswith(expected)
    assert all(tensor.is_meta for tensor in state.values())


def test_meta_construction_takes_no_memory() -> None:
    full_size(**MODELS["2b"][0])
    tracemalloc.start()
    network = full_size(**MODELS["2b"][0])
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 50e6
    assert sum(p.numel() for p in network.parameters()) == 1_727_913_792
    assert [n for n, p in network.named_parameters() if not p.requires_grad] == ["mixins.pos_embed.pos_embedding"]


def test_a_network_built_on_meta_and_filled_equals_one_built_in_memory() -> None:
    from sgm.weights import assign_state

    real = load_tiny(tiny_network())
    with torch.device("meta"):
        late = tiny_network()
    state = {name: tensor for name, tensor in real.state_dict().items() if name not in late.computed_state()}
    assign_state(late, state | late.computed_state(), source="test")
    inputs = random_inputs()
    with torch.no_grad():
        assert torch.equal(real(**inputs), late(**inputs))


@pytest.mark.parametrize("seed", [0, 1, 7])
def test_construction_leaves_random_state_and_switches_alone(seed: int) -> None:
    random.seed(seed), np.random.seed(seed), torch.manual_seed(seed)
    cudnn = torch.backends.cudnn
    switches = cudnn.enabled, cudnn.benchmark, cudnn.deterministic
    states = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()
    tiny_network(lora={"r": 2})
    assert random.getstate() == states[0] and np.random.get_state()[1].tolist() == states[1]
    assert torch.equal(torch.get_rng_state(), states[2])
    assert (cudnn.enabled, cudnn.benchmark, cudnn.deterministic) == switches


def test_initial_weights_follow_the_seed() -> None:
    def first_weight(seed: int) -> Tensor:
        torch.manual_seed(seed)
        return tiny_network().transformer.layers[0].attention.dense.weight

    assert torch.equal(first_weight(0), first_weight(0)) and not torch.equal(first_weight(0), first_weight(1))


def test_construction_is_silent(capfd: pytest.CaptureFixture[str]) -> None:
    tiny_network(lora={"r": 2})
    captured = capfd.readouterr()
    assert captured.out == "" and captured.err == ""


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
@pytest.mark.parametrize("rotary", [False, True])
def test_half_precision_on_the_cpu(dtype: str, rotary: bool) -> None:
    inputs = random_inputs()
    exact = load_tiny(tiny_network(rotary=rotary), rotary=rotary)
    rough = load_tiny(tiny_network(rotary=rotary, dtype=dtype), rotary=rotary)
    kind = {"bf16": torch.bfloat16, "fp16": torch.float16}[dtype]
    assert rough.dtype == kind and {p.dtype for p in rough.parameters()} == {kind}
    with torch.no_grad():
        expected, out = exact(**inputs), rough(**inputs)
    assert out.dtype == kind
    relative = (out.float() - expected).norm() / expected.norm()
    assert relative < (2e-2 if dtype == "bf16" else 3e-3)


def test_head_norms_keep_their_eps_in_half_precision_on_the_cpu() -> None:
    """Where the variance is about the eps, 1e-6 and 1e-5 give results a factor of two apart."""
    network = tiny_network(dtype="fp16")
    norm = network.mixins.adaln_layer.query_layernorm_list[0]
    x = (torch.randn(5, 64) * 1e-3).half()
    expected = nn.functional.layer_norm(x.float(), (64,), eps=1e-6)
    torch.testing.assert_close(norm(x).float(), expected, rtol=1e-2, atol=1e-2)


def test_whole_number_and_real_timesteps_agree() -> None:
    network, inputs = load_tiny(tiny_network()), random_inputs()
    with torch.no_grad():
        assert torch.equal(network(**inputs), network(**inputs | {"timesteps": inputs["timesteps"].long()}))


def test_results_do_not_depend_on_the_batch() -> None:
    network, inputs = load_tiny(tiny_network()), random_inputs(batch=3)
    with torch.no_grad():
        whole = network(**inputs)
        for i in range(3):
            alone = network(**{name: value[i : i + 1] for name, value in inputs.items()})
            torch.testing.assert_close(alone[0], whole[i], rtol=0, atol=1e-5)


@pytest.mark.parametrize("rotary", [False, True])
@pytest.mark.parametrize("size", [(3, 6, 10), (1, 6, 10), (2, 4, 4), (3, 8, 14), (1, 2, 2)])
def test_frames_and_sizes(rotary: bool, size: tuple[int, int, int]) -> None:
    network = load_tiny(tiny_network(rotary=rotary), rotary=rotary)
    frames, height, width = size
    inputs = random_inputs(frames=frames, height=height, width=width)
    with torch.no_grad():
        out = network(**inputs)
    assert out.shape == inputs["x"].shape and out.isfinite().all()


@pytest.mark.parametrize("rotary", [False, True])
def test_another_size_gives_what_a_network_configured_for_it_gives(rotary: bool) -> None:
    inputs = random_inputs(height=4, width=14)
    small = load_tiny(tiny_network(rotary=rotary), rotary=rotary)
    meant = load_tiny(tiny_network(rotary=rotary, latent_height=4, latent_width=14), rotary=rotary)
    with torch.no_grad():
        assert torch.equal(small(**inputs), meant(**inputs))


class OpCounter(TorchDispatchMode):
    """Counts the operations that are really carried out, by name."""

    def __init__(self) -> None:
        super().__init__()
        self.count: Counter[str] = Counter()

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count["attention" if "scaled_dot_product" in str(op) else str(op)] += "backward" not in str(op)
        return op(*args, **(kwargs or {}))


def test_activation_checkpointing_changes_no_gradient() -> None:
    def gradients(mode: bool | str) -> tuple[list[Tensor], Counter[str]]:
        network = load_tiny(tiny_network(transformer_args={"checkpoint_activations": mode})).train()
        with OpCounter() as operations:
            network(**random_inputs()).square().sum().backward()
        return [p.grad for p in network.parameters() if p.grad is not None], operations.count

    expected, kept = gradients(False)
    for mode in (True, "selective", "products"):
        found, again = gradients(mode)
        assert (again["aten.addmm.default"] > kept["aten.addmm.default"]) == (mode != "products")
        assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))
        assert again["attention"] == kept["attention"] * (2 if mode is True else 1)
        assert again["aten.native_layer_norm.default"] > kept["aten.native_layer_norm.default"]


def test_every_trainable_parameter_gets_a_gradient() -> None:
    network = load_tiny(tiny_network())
    network(**random_inputs()).square().sum().backward()
    assert [n for n, p in network.named_parameters() if p.requires_grad and p.grad is None] == []


def test_recording_a_graph_changes_no_number() -> None:
    network, inputs = load_tiny(tiny_network(rotary=True), rotary=True), random_inputs()
    recorded = network(**inputs).detach()
    with torch.inference_mode():
        assert torch.equal(network(**inputs), recorded)


@pytest.mark.parametrize("rotary", [False, True])
def test_training_at_a_size_that_was_sampled_before(rotary: bool) -> None:
    network, inputs = load_tiny(tiny_network(rotary=rotary), rotary=rotary), random_inputs(height=4)
    with torch.inference_mode():
        network(**inputs)
    network(**inputs).square().sum().backward()
    assert network.transformer.layers[0].attention.dense.weight.grad is not None


def test_a_copy_stands_on_its_own() -> None:
    network, inputs = load_tiny(tiny_network()), random_inputs()
    twin = copy.deepcopy(network)
    with torch.no_grad():
        before = network(**inputs)
        for parameter in twin.parameters():
            parameter.zero_()
        assert not twin(**inputs).any()
        assert torch.equal(network(**inputs), before)


def test_streamable_blocks_hold_all_that_a_layer_needs() -> None:
    """With every block moved away before it is reached and brought in by its hook, the result is the same."""
    network, inputs = load_tiny(tiny_network(lora={"r": 4}), lora=True), random_inputs()
    with torch.no_grad():
        expected = network(**inputs)
    blocks = network.streamable_blocks()
    assert [block[0] for block in blocks] == list(network.transformer.layers)
    store = {p: p.data for block in blocks for module in block for p in module.parameters()}
    for parameter in store:
        parameter.data = torch.full_like(parameter.data, torch.nan)

    def bring(block: list[nn.Module]) -> None:
        for parameter in (p for module in block for p in module.parameters()):
            parameter.data = store[parameter]

    for block in blocks:
        block[0].register_forward_pre_hook(lambda module, args, block=block: bring(block))
    with torch.no_grad():
        assert torch.equal(network(**inputs), expected)
    outside = sum(p.numel() for p in network.parameters()) - sum(p.numel() for p in store)
    assert outside < 0.2 * sum(p.numel() for p in network.parameters())


def test_sat_loads_a_checkpoint_into_it(tmp_path: Path) -> None:
    from argparse import Namespace

    from sat.training.model_io import load_checkpoint

    source = load_tiny(tiny_network())
    folder = tmp_path / "1"
    folder.mkdir()
    torch.save({"module": source.state_dict()}, folder / "mp_rank_00_model_states.pt")
    (tmp_path / "latest").write_text("1")
    network = tiny_network()
    load_checkpoint(network, Namespace(load=str(tmp_path), mode="inference", force_inference=False))
    inputs = random_inputs()
    with torch.no_grad():
        assert torch.equal(network(**inputs), source(**inputs))


def test_reinit_of_the_positions_restores_the_table() -> None:
    """SAT calls it for mixins whose entries a checkpoint lacks."""
    network = tiny_network()
    network.mixins.pos_embed.pos_embedding.zero_()
    network.reinit(["pos_embed"])
    (expected,) = network.computed_state().values()
    assert torch.equal(network.mixins.pos_embed.pos_embedding, expected)


def test_images_beside_the_latents() -> None:
    network = tiny_network(in_channels=32)
    inputs, images = random_inputs(batch=4), random_inputs(batch=2, seed=1)["x"]
    joined = inputs | {"x": torch.cat((inputs["x"], images.repeat(2, 1, 1, 1, 1)), dim=2)}
    with torch.no_grad():
        assert torch.equal(network(**inputs, concat_images=images), network(**joined))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"context": torch.zeros(2, TEXT_LENGTH - 1, 32)}, r"\(2, 11, 32\), .* takes \(2, 12, 32\).*text_length"),
        ({"context": torch.zeros(1, TEXT_LENGTH, 32)}, "batch of x"),
        ({"timesteps": torch.zeros(1)}, r"timesteps must be \(2,\)"),
        ({"x": torch.zeros(2, 3, 8, 6, 10)}, "8 channels.*takes 16"),
        ({"x": torch.zeros(2, 16, 6, 10)}, r"\(b, t, c, h, w\)"),
        ({"x": torch.zeros(2, 4, 16, 6, 10)}, "4 latent frames.*more than the 3"),
        ({"x": torch.zeros(2, 3, 16, 7, 10)}, "height 7.*patch size 2.*6 and 8"),
        ({"y": torch.zeros(2)}, "this network has none"),
        ({"ofs": torch.zeros(1)}, "takes no `ofs`"),
        ({"concat_images": torch.zeros(2, 3, 16, 4, 10)}, "concat_images is"),
    ],
)
def test_inputs_that_do_not_fit(change: dict[str, Tensor], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tiny_network()(**random_inputs() | change)


def test_ofs_is_the_published_model_s_unless_given() -> None:
    network = tiny_network(patch_size=[2, 2, 2], rotary=True, in_channels=32, ofs_embed_dim=24)
    inputs = random_inputs(frames=4, channels=32)
    with torch.no_grad():
        torch.nn.init.normal_(network.mixins.final_layer.linear.weight)
        torch.nn.init.normal_(network.mixins.final_layer.adaLN_modulation[1].weight)
        out = network(**inputs)
        assert torch.equal(out, network(**inputs, ofs=torch.tensor([2.0])))
        assert not torch.equal(out, network(**inputs, ofs=torch.tensor([0.0])))


def test_learned_positions_fix_the_resolution() -> None:
    with pytest.raises(ValueError, match="2 x 5.*learned position table of 3 x 5"):
        tiny_network(rotary=True, learned=True)(**random_inputs(height=4))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dtype": "fp8"}, "fp8.*fp32, fp16, bf16"),
        ({"num_attention_heads": 5}, "192 is no multiple of num_attention_heads 5"),
        ({"use_RMSNorm": True}, "use_RMSNorm"),
        ({"num_classes": 10}, "num_classes"),
        ({"ofs_embed_dim": 32}, "ofs_embed_dim 32 must equal time_embed_dim 24"),
        ({"transformer_args": {"layernorm_order": "post"}}, "layernorm_order.*'pre'"),
        ({"transformer_args": {"layers": 3}}, "transformer_args.layers"),
        ({"transformer_args": {"model_parallel_size": 2}}, "model_parallel_size 2"),
        ({"modules": {}}, "missing.*pos_embed_config"),
        ({"patch_size": [2, 2]}, r"\[t, h, w\]"),
    ],
)
def test_configurations_that_do_not_fit(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tiny_network(**change)


def test_unknown_parameters_are_errors() -> None:
    with pytest.raises(TargetError, match="hiden_size"):
        tiny_network(hiden_size=3)
    config = tiny_config()
    config["params"]["modules"]["adaln_layer_config"]["params"]["qk_lm"] = True
    with pytest.raises(TargetError, match="qk_lm.*qk_ln"):
        instantiate_from_config(config)


def test_names_the_original_carries_without_effect() -> None:
    assert isinstance(DiffusionTransformer(**tiny_config()["params"]), DiffusionTransformer)  # adm_in_channels
