"""Training noise levels and the loss: weights, options, order of random draws."""

from __future__ import annotations

import pytest
import torch

from sgm.modules.diffusionmodules.denoiser import DiscreteDenoiser
from sgm.modules.diffusionmodules.loss import VideoDiffusionLoss, add_noise, snr_weight, weighted_error
from sgm.modules.diffusionmodules.sigma_sampling import DiscreteSampling, EDMSampling, rank_range, uniform_groups
from sgm.modules.diffusionmodules.wrappers import OpenAIWrapper
from sgm.util import instantiate_from_config

ROOT = "sgm.modules.diffusionmodules"
ZERO_SNR = {"target": f"{ROOT}.discretizer.ZeroSNRDDPMDiscretization", "params": {"shift_scale": 3.0}}
SAMPLER = {
    "target": f"{ROOT}.sigma_sampling.DiscreteSampling",
    "params": {"uniform_sampling": True, "num_idx": 1000, "discretization_config": ZERO_SNR},
}
DENOISER = DiscreteDenoiser(
    {"target": f"{ROOT}.denoiser_weighting.EpsWeighting"},
    {"target": f"{ROOT}.denoiser_scaling.VideoScaling"},
    1000,
    ZERO_SNR,
    quantize_c_noise=False,
)


def build(**params) -> VideoDiffusionLoss:
    target = f"{ROOT}.loss.VideoDiffusionLoss"
    return instantiate_from_config({"target": target, "params": {"sigma_sampler_config": SAMPLER, **params}})


def no_condition(batch):
    return {"crossattn": torch.zeros(1)}


def zero_network(x, t, cond, **kwargs):
    return torch.zeros_like(x)


def loss_of(loss_fn, z, network=zero_network, conditioner=no_condition, batch=None, **kwargs):
    return loss_fn(network, DENOISER, conditioner, z, batch or {}, **kwargs)


# --- loss -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("idx", [0, 19, 500, 999])
def test_weight_makes_it_the_error_of_v(idx):
    """1 / (1 - a^2) on the clean sample's error is the plain squared error of the network's v."""
    generator = torch.Generator().manual_seed(0)
    z, noise, output = (torch.randn(2, 3, 4, 5, 5, generator=generator) for _ in range(3))
    indices = torch.tensor([idx, idx])
    a = DENOISER.idx_to_sigma(indices).view(-1, 1, 1, 1, 1)
    velocity = a * noise - (1 - a**2).sqrt() * z
    got = loss_of(build(), z, lambda x, t, c, **kw: output, idx=indices, noise=noise)
    torch.testing.assert_close(got, ((output - velocity) ** 2).flatten(1).mean(1), rtol=1e-3, atol=1e-5)


def test_l1():
    z, noise, idx = torch.randn(2, 1, 1, 2, 2), torch.randn(2, 1, 1, 2, 2), torch.tensor([999, 999])
    got = loss_of(build(type="l1"), z, idx=idx, noise=noise)
    torch.testing.assert_close(got, z.abs().flatten(1).mean(1))  # a = 0 and v = 0: the estimate is 0, the weight 1


def test_min_snr_caps_each_sample_of_a_batch():
    a = torch.tensor([0.0, 0.9, 0.999])
    assert snr_weight(a, 5.0).tolist() == pytest.approx([1.0, 5.0, 5.0])
    assert snr_weight(a)[1].item() == pytest.approx(1 / 0.19, rel=1e-5)
    z, noise, idx = torch.randn(3, 1, 2, 2, 2), torch.randn(3, 1, 2, 2, 2), torch.tensor([999, 300, 10])
    plain = loss_of(build(), z, idx=idx, noise=noise)
    capped = loss_of(build(min_snr_value=5.0), z, idx=idx, noise=noise)
    cap = (5.0 / snr_weight(DENOISER.idx_to_sigma(idx))).clamp(max=1)
    torch.testing.assert_close(capped, plain * cap)


def test_offset_noise_is_one_value_a_sample_drawn_last():
    z, noise, idx = torch.zeros(2, 2, 3, 4, 4), torch.randn(2, 2, 3, 4, 4), torch.tensor([999, 999])
    seen = []
    torch.manual_seed(99)
    loss_of(build(offset_noise_level=0.1), z, lambda x, t, c, **kw: seen.append(x) or x, idx=idx, noise=noise)
    torch.manual_seed(99)
    torch.testing.assert_close(seen[0], noise + 0.1 * torch.randn(2).view(2, 1, 1, 1, 1))


def test_order_of_random_draws():
    """Conditioner, timesteps, noise, offset: replayed one by one from the same seed."""
    dropped, seen = [], []

    def conditioner(batch):
        dropped.append(torch.bernoulli(torch.full((2,), 0.9)))
        return {}

    def network(x, t, cond, **kwargs):
        seen.extend([x, t])
        return torch.zeros_like(x)

    z = torch.randn(2, 3, 4, 2, 2)
    torch.manual_seed(7)
    loss_of(build(offset_noise_level=0.5), z, network, conditioner)
    torch.manual_seed(7)
    keep = torch.bernoulli(torch.full((2,), 0.9))
    idx = torch.randint(0, 1000, (2,))
    noise = torch.randn_like(z) + 0.5 * torch.randn(2).view(2, 1, 1, 1, 1)
    assert torch.equal(dropped[0], keep) and torch.equal(seen[1], idx) and seen[1].dtype == torch.int64
    torch.testing.assert_close(seen[0], add_noise(z, noise, DENOISER.idx_to_sigma(idx)))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_latents_give_half_noise_and_a_float32_loss(dtype):
    z = torch.randn(2, 2, 2, 2, 2).to(dtype)
    seen = []
    torch.manual_seed(1)
    got = loss_of(build(), z, lambda x, t, c, **kw: seen.append(x) or x.to(dtype))
    assert seen[0].dtype == torch.float32 and got.dtype == torch.float32
    torch.manual_seed(1)
    idx = torch.randint(0, 1000, (2,))
    torch.testing.assert_close(seen[0], add_noise(z, torch.randn_like(z), DENOISER.idx_to_sigma(idx)))


def test_gradients_reach_the_network():
    gain = torch.tensor(0.3, requires_grad=True)
    loss_of(build(), torch.randn(2, 1, 2, 2, 2), lambda x, t, c, **kw: gain * x).mean().backward()
    assert gain.grad is not None and gain.grad != 0


def test_batch_entries_for_the_network():
    seen = []
    batch = {"concat_images": 1, "ofs": 2, "txt": ["a"]}
    loss_of(
        build(batch2model_keys="ofs"),
        torch.randn(1, 1, 1, 2, 2),
        lambda x, t, c, **kw: seen.append(kw) or x,
        batch=batch,
    )
    assert seen == [{"ofs": 2}]


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"type": "lpips"}, "type: 'lpips' is not one of 'l2', 'l1'"),
        ({"fixed_frames": 1}, "fixed_frames=1 would have no effect"),
        ({"block_scale": 0.1, "block_size": 2}, "block_scale=0.1, block_size=2 would"),
    ],
)
def test_loss_parameters_are_checked(params, message):
    with pytest.raises(ValueError, match=message):
        build(**params)


def test_weighted_error_means_over_all_but_the_batch():
    estimate, target = torch.ones(2, 3, 4), torch.zeros(2, 3, 4)
    assert weighted_error(estimate, target, torch.tensor([1.0, 2.0]), "l2").tolist() == [1.0, 2.0]


# --- timesteps --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("world", "rank", "span"),
    [
        (1, 0, (0, 1000)),
        (2, 1, (500, 1000)),
        (3, 2, (0, 1000)),
        (4, 1, (250, 500)),
        (4, 3, (750, 1000)),
        (6, 1, (0, 500)),
        (6, 5, (500, 1000)),
        (8, 7, (875, 1000)),
        (16, 1, (0, 125)),
        (16, 15, (875, 1000)),
        (40, 39, (975, 1000)),
        (64, 63, (875, 1000)),
    ],
)
def test_ranks_share_the_timesteps(world, rank, span):
    got = rank_range(rank, world, 1000)
    assert (got.start, got.stop) == span


@pytest.mark.parametrize("world", [1, 2, 3, 5, 6, 7, 8, 12, 48])
def test_all_ranks_together_cover_all_timesteps_evenly(world):
    hits = torch.zeros(1000)
    for rank in range(world):
        span = rank_range(rank, world, 1000)
        hits[span.start : span.stop] += 1 / (span.stop - span.start)
    torch.testing.assert_close(hits, torch.full((1000,), world / 1000))
    assert world % uniform_groups(world, 1000) == 0


def test_group_num_that_does_not_fit_is_left_aside_with_a_word(caplog):
    """The original's files for 1.5 say 40, whatever the number of processes."""
    sampler = build().sigma_sampler
    sampler.uniform_sampling, sampler.group_num = True, 40
    assert [sampler.index_range(rank, 8).start for rank in (0, 7)] == [0, 875]
    assert caplog.text.count("group_num 40 does not divide 8 ranks") == 1
    sampler.group_num = 40
    assert sampler.index_range(79, 80).start == 975 and caplog.text.count("group_num") == 1


def test_group_num_is_checked():
    assert rank_range(7, 8, 1000, group_num=2).start == 500
    with pytest.raises(ValueError, match="group_num=3 must divide the 8"):
        rank_range(0, 8, 1000, group_num=3)
    with pytest.raises(ValueError, match="rank 8 is outside"):
        rank_range(8, 8, 1000)


def test_draws_stay_in_the_ranks_interval_on_the_cpu():
    sampler = DiscreteSampling(ZERO_SNR, 1000, uniform_sampling=True)
    sampler.index_range = lambda: rank_range(3, 4, 1000)
    sigma, idx = sampler(500, return_idx=True)
    assert int(idx.min()) >= 750 and int(idx.max()) < 1000 and idx.device.type == "cpu"
    assert torch.equal(sigma, sampler.sigmas[idx])
    assert DiscreteSampling(ZERO_SNR, 1000).index_range(rank=3, world_size=4).stop == 1000


def test_one_process_draws_from_everything():
    span = DiscreteSampling(ZERO_SNR, 1000, uniform_sampling=True).index_range()
    assert (span.start, span.stop) == (0, 1000)


def test_given_timesteps():
    assert DiscreteSampling(ZERO_SNR, 1000)(2, rand=torch.tensor([999, 0]))[0] == 0


def test_edm_sampling_is_log_normal():
    torch.manual_seed(0)
    draws = EDMSampling()(100_000).log()
    assert draws.mean().item() == pytest.approx(-1.2, abs=0.02) and draws.std().item() == pytest.approx(1.2, abs=0.02)
    assert EDMSampling(1.0, 2.0)(1, rand=torch.zeros(1)).log().item() == pytest.approx(1.0)


# --- wrapper ----------------------------------------------------------------------------------------------------------


class Spy(torch.nn.Module):
    def forward(self, x, timesteps, context, **kwargs):
        self.seen = {"x": x, "timesteps": timesteps, "context": context, **kwargs}
        return x


def test_wrapper_unpacks_and_casts_conditions_without_touching_the_callers():
    wrapper = OpenAIWrapper(Spy(), dtype=torch.bfloat16)
    cond = {"crossattn": torch.ones(2, 3, 4), "concat": torch.full((2, 5, 1, 2, 2), 7.0), "vector": torch.ones(2, 6)}
    x, t = torch.zeros(2, 5, 3, 2, 2), torch.tensor([1.0, 2.0])
    wrapper(x, t, cond, ofs=3)
    seen = wrapper.diffusion_model.seen
    assert seen["x"].shape == (2, 5, 4, 2, 2) and seen["x"].dtype == torch.float32
    assert bool((seen["x"][:, :, 3] == 7).all())
    assert seen["context"].dtype == seen["y"].dtype == torch.bfloat16 and seen["ofs"] == 3
    assert torch.equal(seen["timesteps"], t) and cond["crossattn"].dtype == torch.float32


def test_wrapper_passes_no_vector_where_there_is_none():
    wrapper = OpenAIWrapper(Spy())
    wrapper(torch.zeros(1, 1, 1, 2, 2), torch.zeros(1), {"crossattn": torch.ones(1, 2, 2)})
    assert set(wrapper.diffusion_model.seen) == {"x", "timesteps", "context"}
