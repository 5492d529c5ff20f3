"""8-bit linear layers: what rounding may cost, what is exchanged, and what is refused."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F

from sgm.modules.ops import fp8
from sgm.modules.ops.fp8 import Fp8Linear, check_fp8, quantize_rows
from sgm.modules.transformer.quantize import quantize_network
from sgm.typed import ConfigError
from tests.dit_tiny import load_tiny, random_inputs, tiny_network

STEP = 2.0**-4  # half a step of three bits of mantissa, relative
CPU = torch.device("cpu")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", [(5, 32), (1, 1920), (3, 16)])
def test_rows_keep_their_largest_value_and_round_the_rest(size, dtype):
    x = (torch.randn(size) * 10 ** torch.linspace(-3, 3, size[0])[:, None]).to(dtype)
    codes, scale = quantize_rows(x)
    assert codes.dtype == torch.float8_e4m3fn and scale.shape == size[:1]
    back, wide = codes.float() * scale[:, None], x.float()
    largest = wide.abs().amax(dim=1, keepdim=True)
    assert bool(((back - wide).abs() <= STEP * wide.abs() + 2.0**-10 * scale[:, None] + 1e-6 * largest).all())
    at = wide.abs().argmax(dim=1, keepdim=True)
    torch.testing.assert_close(back.gather(1, at), wide.gather(1, at), rtol=1e-6, atol=0)
    codes, scale = quantize_rows(torch.zeros(2, 16))
    assert not codes.float().any() and bool((scale == 1).all())


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("sizes", [(1, 32, 48), (37, 192, 576), (20, 1920, 16)])
def test_a_layer_stays_within_the_rounding_of_its_numbers(sizes, bias):
    """|error| <= (2 u + u^2) |x| |w|^T with u = 2^-4, and typically a tenth of that."""
    m, k, n = sizes
    torch.manual_seed(0)
    x, weight = torch.randn(2, m, k), torch.randn(n, k) * torch.rand(n, 1)
    offset = torch.randn(n) if bias else None
    got, exact = Fp8Linear(weight, offset)(x), F.linear(x, weight, offset)
    bound = (2 * STEP + STEP**2) * F.linear(x.abs(), weight.abs()) + 1e-5
    assert got.shape == exact.shape and bool(((got - exact).abs() <= bound).all())
    assert (got - exact).norm() / F.linear(x, weight).norm() < 0.05
    half = Fp8Linear(weight.bfloat16(), None if offset is None else offset.bfloat16())(x.bfloat16())
    assert half.dtype == torch.bfloat16 and (half.float() - exact).norm() / exact.norm() < 0.06


def test_the_network_answers_nearly_the_same_from_half_the_bytes():
    network = load_tiny(tiny_network())
    inputs = random_inputs()
    with torch.no_grad():
        exact = network(**inputs)
        small = copy.deepcopy(network)
        quantize_network(small)
        got = small(**inputs)
    assert 0 < (got - exact).norm() / exact.norm() < 0.1
    layers = [m for m in small.modules() if isinstance(m, Fp8Linear)]
    assert len(layers) == 4 * network.num_layers and all(layer.weight.element_size() == 1 for layer in layers)


def test_adapters_are_to_be_merged_first():
    network = load_tiny(tiny_network(lora={"r": 4}), lora=True)
    with pytest.raises(ConfigError, match="--merge-lora"):
        quantize_network(network)
    network.mixins.lora.merge_lora()
    quantize_network(network)


def test_widths_and_gpus_that_cannot(monkeypatch):
    odd = tiny_network(num_layers=1)
    odd.transformer.layers[0].mlp.dense_h_to_4h = torch.nn.Linear(192, 24)
    with pytest.raises(ConfigError, match=r"dense_h_to_4h is \(24, 192\); both must be multiples of 16"):
        quantize_network(odd)
    check_fp8(CPU)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "Some GPU")
    for capability, fits in (((8, 0), False), ((8, 9), True), ((9, 0), True)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _, c=capability: c)
        if fits:
            check_fp8(torch.device("cuda"))
        else:
            with pytest.raises(ConfigError, match=r"Some GPU has 8\.0"):
                check_fp8(torch.device("cuda"))


def test_the_gpu_product_is_asked_for_what_the_twin_defines(monkeypatch):
    """The arguments of the 8-bit product: row-major codes, a column-major weight, a scale for each row and channel."""
    seen = {}

    def scaled_mm(a, b, *, scale_a, scale_b, bias=None, out_dtype, use_fast_accum=False):
        seen.update(strides=(a.stride(), b.stride()), scales=(scale_a.shape, scale_b.shape), bias=bias.dtype)
        return ((a.float() @ b.float()) * scale_a * scale_b + bias.float()).to(out_dtype)

    monkeypatch.setattr(torch, "_scaled_mm", scaled_mm)
    x, weight, bias = torch.randn(5, 32).bfloat16(), torch.randn(48, 32), torch.randn(48).bfloat16()
    layer = Fp8Linear(weight, bias)
    got = fp8.gpu_product(*quantize_rows(x), layer.weight, layer.weight_scale, layer.bias, torch.bfloat16)
    torch.testing.assert_close(got, layer(x), rtol=1e-2, atol=1e-2)
    assert seen == {
        "strides": ((32, 1), (1, 32)), "scales": ((5, 1), (1, 48)), "bias": torch.bfloat16
    }  # fmt: skip
