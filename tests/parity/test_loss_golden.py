"""The loss, its options and its random draws against the original (full reference set)."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from torch import Tensor

from sgm.modules.diffusionmodules.loss import VideoDiffusionLoss, add_noise
from sgm.modules.diffusionmodules.sigma_sampling import DiscreteSampling, rank_range, uniform_groups
from sgm.modules.diffusionmodules.wrappers import OpenAIWrapper
from sgm.util import instantiate_from_config

RELATIVE = 1e-5


@pytest.fixture(scope="module")
def config(shared_golden: Path) -> dict:
    return yaml.safe_load((shared_golden / "tiny_engine.yaml").read_text())["model"]


@pytest.fixture(scope="module")
def facts(shared_golden: Path) -> dict:
    return json.loads((shared_golden / "engine_facts.json").read_text())


@pytest.fixture(scope="module")
def case(shared_golden: Path) -> dict[str, Tensor]:
    tensors = load_file(shared_golden / "engine_io.safetensors")
    return {name.removeprefix("loss."): value for name, value in tensors.items() if name.startswith("loss.")}


@pytest.fixture(scope="module")
def network(shared_golden: Path, config) -> OpenAIWrapper:
    net = instantiate_from_config(config["network_config"])
    state = load_file(shared_golden / "dit_state.safetensors")
    net.load_state_dict({name.removeprefix("model.diffusion_model."): value for name, value in state.items()})
    return OpenAIWrapper(net)


def losses(config, case, network, idx=None, noise=None, **options) -> Tensor:
    loss_fn = VideoDiffusionLoss(config["loss_fn_config"]["params"]["sigma_sampler_config"], **options)
    denoiser = instantiate_from_config(config["denoiser_config"])
    return loss_fn(network, denoiser, lambda batch: {"crossattn": case["context"]}, case["x"], {}, idx, noise)


def close(got: Tensor, wanted) -> None:
    torch.testing.assert_close(got, torch.as_tensor(wanted), rtol=RELATIVE, atol=0)


def test_noised_input(case):
    assert (add_noise(case["x"], case["noise"], case["alpha_sqrt"]) - case["noised"]).abs().max() <= 1e-6


def test_table_entries(config, case, facts):
    sampler = instantiate_from_config(config["loss_fn_config"]["params"]["sigma_sampler_config"])
    assert (sampler.idx_to_sigma(torch.tensor(facts["loss"]["idx"])) - case["alpha_sqrt"]).abs().max() <= 1e-6


@pytest.mark.parametrize("kind", ["l2", "l1"])
def test_loss_of_the_recorded_network_output(config, case, facts, kind):
    wanted = facts["loss"]["per_sample"] if kind == "l2" else facts["loss_options"]["l1"]
    idx = torch.tensor(facts["loss"]["idx"])
    got = losses(config, case, lambda x, t, c, **kw: case["network_out"], idx, case["noise"], type=kind)
    close(got, wanted)


def test_loss_and_gradients_of_the_transformer(config, case, facts, network):
    network.zero_grad()
    got = losses(config, case, network, torch.tensor(facts["loss"]["idx"]), case["noise"])
    close(got, facts["loss"]["per_sample"])
    close(got.mean(), facts["loss"]["mean"])
    got.mean().backward()
    for name, wanted in facts["loss"]["grad_norm"].items():
        gradient = network.get_parameter(name.removeprefix("model."))
        assert gradient.grad is not None, name
        assert gradient.grad.norm().item() == pytest.approx(wanted, rel=1e-4, abs=1e-8), name


@torch.no_grad()
@pytest.mark.parametrize("idx", [0, 1, 19, 100, 500, 900, 998, 999])
def test_loss_by_timestep(config, case, facts, network, idx):
    got = losses(config, case, network, torch.full((2,), idx), case["noise"])
    close(got, facts["loss_by_idx"][str(idx)])


@torch.no_grad()
def test_offset_noise(config, case, facts, network):
    torch.manual_seed(99)
    assert torch.randn(2).tolist() == pytest.approx(facts["loss_options"]["offset_noise_randn_seed99"])
    torch.manual_seed(99)
    idx = torch.tensor(facts["loss"]["idx"])
    got = losses(config, case, network, idx, case["noise"], offset_noise_level=0.1)
    close(got, facts["loss_options"]["offset_noise_0.1"])


def test_random_calls(config, case, facts, monkeypatch):
    """Which generators are called, in what order, with what arguments."""
    calls: list[list] = []
    randint, randn_like = torch.randint, torch.randn_like

    def spy_randint(low, high, size, **kwargs):
        calls.append(["randint", [low, high, list(size)]])
        return randint(low, high, size, **kwargs)

    def spy_randn_like(x):
        calls.append(["randn_like", list(x.shape)])
        return randn_like(x)

    monkeypatch.setattr(torch, "randint", spy_randint)
    monkeypatch.setattr(torch, "randn_like", spy_randn_like)
    losses(config, case, lambda x, t, c, **kw: torch.zeros_like(x))
    assert calls == [call[:2] for call in facts["loss_random_calls_in_order"]]


def test_rank_intervals(facts):
    for world, fact in facts["sigma_sampler_groups_by_world_size"].items():
        assert uniform_groups(int(world), 1000) == fact["group_num"]
        for rank, span in fact["randint_range_by_rank"].items():
            got = rank_range(int(rank), int(world), 1000)
            assert [got.start, got.stop] == span


def test_default_sampler_of_the_config(config):
    sampler = instantiate_from_config(config["loss_fn_config"]["params"]["sigma_sampler_config"])
    assert isinstance(sampler, DiscreteSampling) and sampler.uniform_sampling and sampler.num_idx == 1000
