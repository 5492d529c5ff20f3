"""Products in bfloat16 on a CPU: close to float32 in result and gradient, chosen where asked for, and only there."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from sgm.config import AccelerateArgs
from sgm.modules.autoencoding.causal_conv import CausalConv3d
from sgm.modules.ops import block_ops, cpu_bf16, vae
from sgm.modules.ops.choice import choose_kernels
from sgm.modules.transformer.adaln import HeadNorm
from sgm.typed import build_args
from sgm.util import instantiate_from_config
from tests.dit_tiny import TEXT_LENGTH, TEXT_WIDTH, tiny_config

CPU = torch.device("cpu")


def relative(got, expected):
    return ((got.float() - expected).norm() / expected.norm()).item()


def tiny_network(**changes):
    torch.manual_seed(0)
    network = instantiate_from_config(tiny_config(**changes))
    for p in network.parameters():
        nn.init.normal_(p, std=0.08)
    return network


def inputs(network):
    torch.manual_seed(1)
    x = torch.randn(2, 3, network.in_channels, network.latent_height, network.latent_width)
    return x, torch.tensor([900, 40]), torch.randn(2, TEXT_LENGTH, TEXT_WIDTH)


def test_network_and_its_gradients_stay_close():
    network = tiny_network()
    results = []
    for products in (False, True):
        network.use_ops(choose_kernels("plain", "default", CPU, products).block)
        network.zero_grad()
        out = network(*inputs(network))
        out.square().mean().backward()
        results.append((out, {name: p.grad.clone() for name, p in network.named_parameters() if p.grad is not None}))
    (expected, slopes), (got, got_slopes) = results
    assert got.dtype == torch.float32
    assert 0 < relative(got, expected) < 1e-2
    assert slopes.keys() == got_slopes.keys()
    for name, slope in slopes.items():
        assert got_slopes[name].dtype == torch.float32
        assert slope.norm() < 1e-7 or relative(got_slopes[name], slope) < 5e-2, name


def test_gradients_of_head_norms_count_every_token():
    torch.manual_seed(0)
    layer, norms, x = nn.Linear(16, 48), [HeadNorm(8), HeadNorm(8)], torch.randn(1, 4000, 16)
    slopes = []
    for linear in (block_ops.PLAIN.linear, cpu_bf16.linear):
        query, key, _ = block_ops.split_heads(linear(layer, x), 8, *norms, None, 10)
        loss = query.float().sum() + key.float().square().sum()
        slopes.append(torch.autograd.grad(loss, [norms[0].bias, norms[1].weight]))
    for expected, got in zip(*slopes):
        assert got.dtype == torch.float32 and relative(got, expected) < 1e-2


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("largest", [2**26, 1])
def test_attention_is_close_with_either_product(monkeypatch, largest, grad):
    monkeypatch.setattr(cpu_bf16, "LARGEST_SCORES", largest)
    torch.manual_seed(0)
    qkv = torch.randn(2, 33, 3, 4, 16) + torch.tensor([0.0, 3.0, 0.0]).view(3, 1, 1)  # keys far from zero, all alike
    query, key, value = (x.transpose(1, 2).requires_grad_(grad) for x in qkv.unbind(2))
    expected, got = F.scaled_dot_product_attention(query, key, value), cpu_bf16.attention(query, key, value)
    assert got.dtype == torch.bfloat16 and relative(got, expected) < 1e-2
    if grad:
        slope = torch.randn_like(expected)
        for a, b in zip(
            torch.autograd.grad(got, (query, key, value), slope.bfloat16()),
            torch.autograd.grad(expected, (query, key, value), slope),
        ):
            assert relative(a, b) < 2e-2


def test_an_adapter_takes_part():
    from sgm.modules.transformer.lora import LoraLinear

    torch.manual_seed(0)
    layer = LoraLinear(nn.Linear(32, 48), parts=3, rank=4, scaling=0.25)
    for up in layer.matrix_B:
        nn.init.normal_(up)
    x = torch.randn(2, 7, 32)
    expected, got = layer(x), cpu_bf16.linear(layer, x)
    assert got.dtype == torch.bfloat16 and relative(got, expected) < 1e-2
    got.float().square().sum().backward()
    assert all(up.grad.dtype == torch.float32 and up.grad.norm() > 0 for up in layer.matrix_B)


@pytest.mark.parametrize("bare", [False, True])
@pytest.mark.parametrize("spare", [False, True])
def test_convolution_is_close_and_float32(bare, spare):
    torch.manual_seed(0)
    conv, x = CausalConv3d(8, 16).conv, torch.randn(1, 8, 5, 6, 7)
    with torch.no_grad():
        expected = vae.convolve(conv, x, bare)
        place = torch.empty_like(expected) if spare else None
        got = cpu_bf16.convolve(conv, x, bare, place)
    assert got.dtype == torch.float32 and 0 < relative(got, expected) < 1e-2
    assert place is None or got is place


def test_a_first_stage_in_training_is_left_alone():
    conv, x = CausalConv3d(4, 4).conv, torch.randn(1, 4, 3, 6, 6)
    assert torch.equal(cpu_bf16.convolve(conv, x), vae.convolve(conv, x))


@pytest.mark.parametrize("able", [False, True])
def test_auto_asks_the_cpu(monkeypatch, able):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": able, "amx_bf16": False})
    chosen = choose_kernels("auto", "default", CPU, "auto")
    assert chosen.cpu_bf16 is able
    assert (chosen.block == block_ops.PLAIN) is not able
    assert choose_kernels("auto", "default", CPU, True).cpu_bf16
    assert choose_kernels("plain", "default", torch.device("meta"), True).block == block_ops.PLAIN


def test_the_switch_is_exact_and_checked():
    assert AccelerateArgs(cpu_bf16="auto").approximate() == {}
    assert "cpu_bf16" in {field.name for field in dataclasses.fields(AccelerateArgs)}
    problems: list[str] = []
    assert build_args(AccelerateArgs, {"cpu_bf16": "yes"}, problems, [], "accelerate") is None
    assert "accelerate.cpu_bf16: 'yes' is not one of False, True, 'auto'" in problems[0]
