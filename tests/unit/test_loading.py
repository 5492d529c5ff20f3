"""Weights into an engine built on the meta device: what a file may lack, which configuration fits, nothing left empty."""

from __future__ import annotations

import gc
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from sgm.config import merge_yaml
from sgm.convert.dit_sizes import sizes_of_params
from sgm.models.loading import Adapter, load_network
from sgm.places import CONFIGS, shown
from sgm.util import instantiate_from_config
from sgm.weights import WeightsError
from tests.dit_tiny import tiny_config, tiny_network

KINDS = {
    "2b": {},
    "5b": {"rotary": True},
    "5b-i2v": {"rotary": True, "learned": True},
    "1.5": {"rotary": True, "patch_size": [2, 2, 2]},
}


def empty(**options) -> nn.Module:
    config = tiny_config(**options)
    config["params"]["defer_lora"] = True
    with torch.device("meta"):
        return instantiate_from_config(config)


def load(network: nn.Module, file: Path, force: bool, dtype: torch.dtype = torch.float32):
    return load_network(network, file, device=torch.device("cpu"), dtype=dtype, allow_absent=force)


def save(network: nn.Module, file: Path, without=()) -> dict[str, torch.Tensor]:
    state = {name: value for name, value in network.state_dict().items() if name not in set(without)}
    torch.save({"module": {f"model.diffusion_model.{name}": value for name, value in state.items()}}, file)
    return state


@pytest.mark.parametrize("kind", KINDS)
def test_files_as_published_load_and_nothing_stays_empty(kind, tmp_path):
    """Without the tables that the configuration determines, and without the rotary models' unused embedding."""
    source = tiny_network(**KINDS[kind])
    save(source, tmp_path / "w.pt", without=[*source.computed_state(), *source.dead_keys()])
    network = empty(**KINDS[kind])
    loaded = load(network, tmp_path / "w.pt", force=True)
    assert not [n for n, t in [*network.named_parameters(), *network.named_buffers()] if t.is_meta]
    found, expected = network.state_dict(), source.state_dict()
    assert all(torch.equal(found[n], expected[n]) for n in expected if n not in source.dead_keys())
    assert bool(loaded.notes) == bool(source.computed_state())


@pytest.mark.parametrize("kind", ["2b", "5b"])
def test_force_permits_only_what_the_configuration_determines(kind, tmp_path):
    source = tiny_network(**KINDS[kind])
    save(source, tmp_path / "w.pt", without=source.computed_state())
    with pytest.raises(WeightsError, match="lacks mixins.pos_embed.*args.force_inference: True"):
        load(empty(**KINDS[kind]), tmp_path / "w.pt", force=False)
    save(source, tmp_path / "w.pt", without=["transformer.layers.1.mlp.dense_h_to_4h.bias"])
    with pytest.raises(WeightsError, match=r"missing from the file \(1\): transformer.layers.1.mlp.dense_h_to_4h.bias"):
        load(empty(**KINDS[kind]), tmp_path / "w.pt", force=True)


def test_a_table_in_the_file_wins(tmp_path):
    source = tiny_network()
    with torch.no_grad():
        source.mixins.pos_embed.pos_embedding.fill_(0.25)
    save(source, tmp_path / "w.pt")
    network = empty()
    load(network, tmp_path / "w.pt", force=True)
    assert bool((network.mixins.pos_embed.pos_embedding == 0.25).all())


def test_another_model_is_named_with_the_configuration_that_fits(tmp_path):
    from sgm.config import merge_yaml

    params = merge_yaml(["configs/demo_infer.yaml"])["model"]["network_config"]["params"]
    width, text = params["hidden_size"], params["modules"]["patch_embed_config"]["params"]["text_hidden_size"]
    state = {
        "mixins.patch_embed.proj.weight": torch.zeros(width, 16, 2, 2),
        "mixins.patch_embed.text_proj.weight": torch.zeros(width, text),
        "mixins.pos_embed.pos_embedding": torch.zeros(1, 2, width),
        **{f"transformer.layers.{k}.attention.dense.bias": torch.zeros(width) for k in range(params["num_layers"])},
    }
    torch.save(state, tmp_path / "w.pt")
    with pytest.raises(WeightsError, match=rf"(?s)wrong shape.*width {width}.*configuration fits: .*demo_infer\.yaml"):
        load(empty(), tmp_path / "w.pt", force=True)


@pytest.mark.parametrize(
    ("held", "taken", "says"),
    [
        ("cogvideox_5b", "cogvideox_5b_i2v", "holds CogVideoX-5B (width 3072, 42 layers). This configuration fits: {}"),
        ("cogvideox_5b_i2v", "cogvideox_5b", "holds CogVideoX-5B-I2V (width 3072"),
        ("cogvideox1.5_5b", "cogvideox1.5_5b_i2v", "holds CogVideoX1.5-5B (width 3072"),
        (
            "cogvideox_5b_i2v linear",
            "cogvideox1.5_5b",
            "holds CogVideoX-5B-I2V (width 3072",
        ),  # 128 values a patch in both
    ],
)
def test_a_published_model_under_anothers_configuration_is_named(held, taken, says, tmp_path):
    """Of the full size: a file of tensors that repeat one number is small."""
    held, _, linear = held.partition(" ")
    sizes = sizes_of_params(merge_yaml([CONFIGS / f"{held}_infer.yaml"])["model"]["network_config"]["params"])
    shapes = replace(sizes, linear_patches=bool(linear) or sizes.linear_patches).sat_shapes()
    (tmp_path / "1").mkdir()  # as some releases have it
    (tmp_path / "latest").write_text("1")
    state = {f"model.diffusion_model.{name}": torch.zeros(1).expand(shape) for name, shape in shapes.items()}
    torch.save({"module": state}, tmp_path / "1" / "mp_rank_00_model_states.pt")
    node = merge_yaml([CONFIGS / f"{taken}_infer.yaml"])["model"]["network_config"]
    with torch.device("meta"):
        network = instantiate_from_config(node, dtype="bf16", defer_lora=True)
    with pytest.raises(WeightsError) as error:
        load_network(network, tmp_path, device=torch.device("cpu"), dtype=torch.bfloat16, allow_absent=True)
    assert says.format(shown(CONFIGS / f"{held}_infer.yaml")) in str(error.value)
    assert f"{held}_sft.yaml" in str(error.value)


def test_weights_that_fit_are_the_files_own_pages(tmp_path):
    """No second copy in memory: the tensors are views of the mapped file, and half precision is made once."""
    source = tiny_network()
    save(source, tmp_path / "w.pt")
    network = empty()
    load(network, tmp_path / "w.pt", force=True)
    ((low, high),) = _mapped(tmp_path / "w.pt")
    parameters = [p for n, p in network.named_parameters() if "pos_embedding" not in n]
    assert all(low <= p.data_ptr() < high for p in parameters)
    half = empty()
    load(half, tmp_path / "w.pt", force=True, dtype=torch.float16)
    assert {p.dtype for p in half.parameters()} == {torch.float16}
    del network, parameters
    gc.collect()  # SAT's mixins and their model refer to each other
    assert not _mapped(tmp_path / "w.pt")  # and nothing holds the file any more


def _mapped(file: Path) -> list[tuple[int, int]]:
    spans = [
        line.split()[0].split("-") for line in Path("/proc/self/maps").read_text().splitlines() if str(file) in line
    ]
    return [(int(a, 16), int(b, 16)) for a, b in spans]


@pytest.mark.parametrize(("text", "scale"), [("a.pt", 1.0), ("a.pt:0.5", 0.5), ("C:x:2", 2.0)])
def test_adapters_by_path_and_scale(text, scale):
    assert Adapter.parse(text).scale == scale


def test_an_adapter_that_is_not_finite_is_named(tmp_path):
    source = tiny_network()
    save(source, tmp_path / "w.pt")
    place = "transformer.layers.0.attention.dense"
    out, wide = source.get_submodule(place).weight.shape
    matrices = {f"{place}.matrix_A.0": torch.zeros(2, wide), f"{place}.matrix_B.0": torch.full((out, 2), math.inf)}
    torch.save({"module": {f"model.diffusion_model.{n}": m for n, m in matrices.items()}}, tmp_path / "lora.pt")
    with pytest.raises(WeightsError, match=rf"lora.pt: {place}.matrix_B.0 is not finite, {2 * out} of {2 * out}"):
        load_network(
            empty(), tmp_path / "w.pt", device=torch.device("cpu"), dtype=torch.float32, allow_absent=True,
            adapters=[Adapter(str(tmp_path / "lora.pt"))],
        )  # fmt: skip


def test_adapter_scale_that_is_no_number(tmp_path):
    with pytest.raises(WeightsError, match="'strong' is not a number"):
        Adapter.parse("a.pt:strong")
    (tmp_path / "a:b.pt").touch()
    assert Adapter.parse(str(tmp_path / "a:b.pt")) == Adapter(str(tmp_path / "a:b.pt"))
