"""FlashAttention-4's place in the project: what is asked of the package, gradients, checkpointing, and refusals.

The package needs a GPU. Here a module with its two functions stands in, in plain arithmetic; tools/bench/gpu.py compares
the real ones with PyTorch's on a GPU.
"""

import math
from types import SimpleNamespace

import pytest
import torch

from sgm.modules.ops import block_ops as plain
from sgm.modules.ops import flash4
from sgm.modules.ops.choice import choose_kernels
from sgm.modules.ops.recompute import run_layer
from sgm.typed import ConfigError


class Package:
    """(b, n, h, hd) in and out, and the logarithm of the sums (b, h, n), as in flash_attn.cute.interface."""

    def __init__(self):
        self.calls = []

    def flash_attn_func(self, q, k, v, *, return_lse):
        assert (return_lse and not torch.is_grad_enabled()) or not q.requires_grad
        self.calls.append("forward")
        scores = torch.einsum("bnhd,bmhd->bhnm", q.float(), k.float()) / math.sqrt(q.shape[-1])
        out = torch.einsum("bhnm,bmhd->bnhd", scores.softmax(-1), v.float())
        return out.to(q.dtype), scores.logsumexp(-1)

    def _flash_attn_bwd(self, q, k, v, out, dout, lse):
        self.calls.append("backward")
        assert dout.is_contiguous()
        q, k, v, out, dout = (x.float() for x in (q, k, v, out, dout))
        scale = 1 / math.sqrt(q.shape[-1])
        weights = (torch.einsum("bnhd,bmhd->bhnm", q, k) * scale - lse[..., None]).exp()
        dv = torch.einsum("bhnm,bnhd->bmhd", weights, dout)
        along = (dout * out).sum(-1).transpose(1, 2)[..., None]
        ds = weights * (torch.einsum("bnhd,bmhd->bhnm", dout, v) - along) * scale
        dq, dk = torch.einsum("bhnm,bmhd->bnhd", ds, k), torch.einsum("bhnm,bnhd->bmhd", ds, q)
        return dq.bfloat16(), dk.bfloat16(), dv.bfloat16(), None  # later releases give more than three


@pytest.fixture
def package(monkeypatch):
    package = Package()
    monkeypatch.setattr(flash4, "_library", lambda: package)
    return package


def heads(dtype=torch.bfloat16, grad=False):
    torch.manual_seed(0)
    qkv = torch.randn(2, 9, 3, 4, 8).to(dtype).requires_grad_(grad)
    return qkv, [part.transpose(1, 2) for part in qkv.unbind(2)]


def test_result_and_gradients_are_those_of_the_plain_attention(package):
    qkv, parts = heads(grad=True)
    slope = torch.randn(2, 4, 9, 8).bfloat16()
    expected = plain.attention(*parts)
    (expected_slope,) = torch.autograd.grad(expected, qkv, slope)
    got = flash4.flash4_attention(*parts)
    (got_slope,) = torch.autograd.grad(got, qkv, slope)
    assert got.shape == expected.shape
    torch.testing.assert_close(got, expected, atol=2e-2, rtol=2e-2)
    torch.testing.assert_close(got_slope, expected_slope, atol=3e-2, rtol=3e-2)
    assert package.calls == ["forward", "backward"]


def test_float32_is_left_to_pytorch(package):
    _, parts = heads(torch.float32)
    assert torch.equal(flash4.flash4_attention(*parts), plain.attention(*parts))
    assert package.calls == []


@pytest.mark.parametrize(("mode", "runs"), [(True, 2), ("selective", 1), ("products", 1), (False, 1)])
def test_checkpointing_keeps_its_result_where_it_keeps_attention(package, mode, runs):
    qkv, _ = heads(grad=True)

    def layer(x):
        return flash4.flash4_attention(*(part.transpose(1, 2) for part in (2 * x).unbind(2))).float().exp()

    run_layer(mode, layer, qkv).sum().backward()
    assert package.calls.count("forward") == runs
    assert qkv.grad.isfinite().all()


def test_a_device_that_it_is_not_for_is_refused():
    with pytest.raises(ConfigError, match="accelerate.attention is 'flash4'.*cpu.*NVIDIA GPU.*choose another"):
        choose_kernels("plain", "flash4", torch.device("cpu"))


@pytest.mark.parametrize(
    ("capability", "cuda", "said"),
    [
        ((8, 9), "13.0", "9.x and 10.x.*Some GPU has 8.9"),
        ((9, 0), "13.0", r"pip install \"flash-attn-4\[cu13\]==\S+\" \"nvidia-cutlass-dsl\[cu13\]=="),
        ((9, 0), "12.8", r"pip install \"flash-attn-4==\S+\" \"nvidia-cutlass-dsl=="),
    ],
)
def test_an_old_gpu_and_a_missing_package_are_named(monkeypatch, capability, cuda, said):
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Some GPU")
    flash4._library.cache_clear()
    with pytest.raises(plain.AttentionError, match=said):
        flash4.demand_flash4(SimpleNamespace(type="cuda"))
