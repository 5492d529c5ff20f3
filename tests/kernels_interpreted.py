"""Fused kernels against the plain PyTorch that defines them, on random shapes, under Triton's interpreter.

Run by `tests/unit/test_kernels.py` in a process of its own: Triton reads TRITON_INTERPRET when a kernel is defined.
"""

from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from sgm.inference import rehearsal
from sgm.models.autoencoder import VideoAutoencoderInferenceWrapper
from sgm.modules.ops import block_ops, fp8, fused_block, fused_vae, triton_block, triton_vae, vae
from sgm.modules.ops.block_ops import RotaryTable, split_modulation
from sgm.modules.ops.choice import choose_kernels
from sgm.modules.ops.vae import AffineField, FrameMap, Modulation
from tests.dit_tiny import random_inputs, tiny_network
from tests.unit.test_autoencoder import TINY, configs

TYPES = [torch.float32, torch.bfloat16]
# (b, l, n, heads, hd): programs that are partly filled; no text at all
SEQUENCES = [(2, 5, 23, 3, 64), (1, 0, 9, 2, 16)]
HEADS = [*SEQUENCES, (1, 2, 5, 3, 24)]  # of a width that is no power of two
# (b, c, t, h, w), field's (t, h, w), groups
CLIPS = [((2, 96, 2, 6, 20), (2, 3, 5), 32), ((1, 32, 5, 6, 40), (1, 1, 1), 8)]
LAST = torch.channels_last_3d


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def close(got: Tensor, expected: Tensor) -> None:
    """Within the rounding of the type; the interpreter truncates to bfloat16, which doubles its error."""
    limit = {torch.float32: 1e-6, torch.bfloat16: 1e-2}[expected.dtype]
    error = (got.double() - expected.double()).norm() / expected.double().norm()
    assert got.dtype == expected.dtype and got.shape == expected.shape and error < limit


def random_norm(width: int, eps: float, dtype: torch.dtype) -> nn.LayerNorm:
    norm = nn.LayerNorm(width, eps=eps, dtype=dtype).requires_grad_(False)
    norm.weight.normal_()
    norm.bias.normal_()
    return norm


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("size", SEQUENCES)
def test_residual_and_norm(size, dtype):
    b, length, n, heads, width = size
    d = heads * width
    hidden, update = torch.randn(2, b, n, d).to(dtype)
    modulation = split_modulation(torch.randn(b, 12 * d).to(dtype))
    text, video = modulation.text_mlp, modulation.video_mlp
    for norm in (random_norm(d, 1e-5, dtype), nn.LayerNorm(d, elementwise_affine=False)):
        gates = (modulation.text_attention.gate, modulation.video_attention.gate)
        args = (hidden, update, *gates, norm, text, video, length)
        for got, expected in zip(fused_block.residual_norm(*args), block_ops.residual_norm(*args)):
            close(got, expected)
        args = (hidden, norm, text, video, length)
        close(fused_block.norm_modulate(*args), block_ops.norm_modulate(*args))
        args = (hidden, update, *gates, length)
        close(fused_block.gated_residual(*args), block_ops.gated_residual(*args))


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("size", HEADS)
def test_split_heads(size, dtype, monkeypatch):
    monkeypatch.setattr(triton_block, "_HEAD_TILE", 256)  # a token's heads in two programs, or in one
    b, length, n, heads, width = size
    qkv = torch.randn(b, n, 3 * heads * width).to(dtype)
    norms = random_norm(width, 1e-6, dtype), random_norm(width, 1e-2, dtype)
    table = RotaryTable(torch.randn(n - length, width), torch.randn(n - length, width))
    for pair, rotary in ((norms, table), (norms, None), ((None, None), table)):
        buffer = qkv.clone()
        got = fused_block.split_heads(buffer, width, *pair, rotary, length)
        assert got[0].data_ptr() == buffer.data_ptr()  # no copy
        for a, b in zip(got, block_ops.split_heads(qkv, width, *pair, rotary, length)):
            close(a, b)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("shape, grid, groups", CLIPS)
def test_group_moments(shape, grid, groups, dtype):
    offsets = 5 * torch.randn(shape[1])[:, None, None, None]
    x = (torch.randn(shape) + offsets).to(dtype).contiguous(memory_format=LAST)
    expected = vae.group_moments(x.double(), groups, 1 << 30)
    for got, want in zip(fused_vae.group_moments(x, groups, 1), expected):
        close(got, want.float())
    bias = torch.randn(shape[1])
    expected = vae.group_moments(x.double(), groups, 1 << 30, bias)
    for got, want in zip(fused_vae.group_moments(x, groups, 1, bias), expected):
        close(got, want.float())


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("shape, grid, groups", CLIPS)
def test_apply_field(shape, grid, groups, dtype):
    x = torch.randn(shape).to(dtype).contiguous(memory_format=LAST)
    field = AffineField(*(torch.randn(*shape[:2], *grid) for _ in range(2)))
    b, c, t, h, w = shape
    staged = torch.full((b, c, t + 2, h, w), float("nan"), dtype=dtype).contiguous(memory_format=LAST)
    fused_vae.apply_field(x, field, swish=True, out=staged[:, :, 2:])
    close(staged[:, :, 2:], vae.apply_field(x.float(), field, swish=True).to(dtype))
    assert staged[:, :, :2].isnan().all()  # what lies in front is left alone
    close(fused_vae.apply_field(x, field, swish=False), vae.apply_field(x.float(), field, swish=False).to(dtype))


# (b, c, t, h, w), latent's (t, h, w), frames of x that are cut off in front
LATENTS = [((2, 32, 9, 4, 12), (3, 2, 3), 0), ((1, 96, 5, 6, 10), (2, 3, 5), 3), ((2, 32, 8, 4, 4), (2, 4, 4), 5)]


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("shape, grid, start", LATENTS)
def test_field_under_a_latent(shape, grid, start, dtype):
    """Of a latent that is not dense, as a chunk of a clip is; and a run of frames in the midst of x."""
    moments, width = (torch.randn(shape[0], 16), torch.rand(shape[0], 16) + 0.1), shape[1]
    weight, bias, added = torch.randn(3, width).to(dtype)
    convolutions = [nn.Conv3d(7, width, 1).to(dtype) for _ in range(2)]
    latent, frame_map = vae.fit_latent(
        torch.randn(shape[0], 7, 9, *grid[1:]).to(dtype)[:, :, 2 : 2 + grid[0]], shape[2:]
    )
    modulation = Modulation(latent, frame_map, *convolutions)
    exact = Modulation(latent.float(), frame_map, *(copy.deepcopy(conv).float() for conv in convolutions))
    x = torch.randn(shape).to(dtype).contiguous(memory_format=LAST)[:, :, start:]
    with torch.no_grad():
        field = fused_vae.latent_field(moments, weight, bias, 1e-6, modulation, added)
        expected = vae.latent_field(moments, weight.float(), bias.float(), 1e-6, exact, added.float())
        close(field.scale, expected.scale)
        close(field.shift, expected.shift)
        assert field.scale.shape == (*shape[:2], *grid) and field.scale.is_contiguous(memory_format=LAST)
        got = fused_vae.apply_field(x, field.after(start), swish=True)
        whole = vae.apply_field(x.float(), expected.after(start), swish=True)
        close(got, whole.to(dtype))
        plain = fused_vae.latent_field(moments, weight, bias, 1e-6)
        close(plain.shift, vae.latent_field(moments, weight.float(), bias.float(), 1e-6).shift)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("frame_map, frames", [(FrameMap(2, 1), 5), (FrameMap(2, 0), 6), (FrameMap(), 3)])
def test_phases_come_together(frame_map, frames, dtype):
    parts = torch.randn(2, 4 * 96, 3, 4, 6).to(dtype).contiguous(memory_format=LAST)
    bias = torch.randn(96).to(dtype)
    made, expected = (
        torch.full((2, 96, frames + 1, 6, 10), 7.0, dtype=dtype).contiguous(memory_format=LAST) for _ in range(2)
    )
    fused_vae.join_phases(parts, made[:, :, 1:], frame_map, bias)
    vae.join_phases(parts, expected[:, :, 1:], frame_map, bias)
    close(made, expected)
    assert (made[:, :, 0] == 7).all()


@pytest.mark.parametrize("dtype", TYPES)
def test_sums_with_a_bias(dtype):
    h, x = (torch.randn(2, 32, 3, 5, 9).to(dtype).contiguous(memory_format=LAST) for _ in range(2))
    bias = torch.randn(32).to(dtype)
    expected = (h.float() + x.float() + bias.float()[:, None, None, None]).to(dtype)
    close(
        fused_vae.add_residual(h.clone(memory_format=torch.preserve_format)[:, :, 1:], x[:, :, 1:], bias),
        expected[:, :, 1:],
    )
    larger = torch.full((2, 32, 6, 10, 18), float("nan"), dtype=dtype).contiguous(memory_format=LAST)
    fused_vae.place(x, larger[:, :, ::2, 1::2, ::2], bias)
    close(larger[:, :, ::2, 1::2, ::2], (x.float() + bias.float()[:, None, None, None]).to(dtype))
    assert int(larger.isnan().sum()) == larger.numel() - x.numel()


@torch.no_grad()
@pytest.mark.parametrize("widths", [(3, 16), (16, 3), (5, 7), (8, 16)])
@pytest.mark.parametrize("bare", [True, False])
def test_convolution_with_channels_that_are_no_multiple_of_eight(widths, bare):
    conv = nn.Conv3d(*widths, 3, padding=(0, 1, 1)).to(torch.bfloat16, memory_format=LAST)
    x = torch.randn(2, widths[0], 4, 3, 5).to(torch.bfloat16)
    got = fused_vae.convolve(conv, x, bare)
    close(got, vae.convolve(copy.deepcopy(conv).float(), x.float(), bare).to(torch.bfloat16))
    assert got.is_contiguous(memory_format=LAST)


@torch.no_grad()
def test_decoding_in_chunks():
    """All operations together, against the plain ones."""
    small = {"ch_mult": [1, 2], "temporal_compress_times": 2, "num_res_blocks": 0}
    model = VideoAutoencoderInferenceWrapper(*configs({**TINY, **small}))
    for parameter in model.parameters():
        if parameter.ndim == 1:  # norms that are not the identity, biases that are not small
            parameter.add_(0.3 * torch.randn_like(parameter))
    z = torch.randn(1, 16, 5, 1, 2)
    expected = model.decode(z)
    model.use_ops(choose_kernels("triton", "default", torch.device("cpu")).vae)
    model.set_channels_last()
    model.set_low_memory(slice_bytes=4_000)  # some convolutions are cut, some are not
    torch.testing.assert_close(model.decode(z), expected, rtol=0, atol=2e-5 * expected.abs().max().item())


@pytest.mark.parametrize("swish", [True, False])
@pytest.mark.parametrize(
    "shape, grid, groups", [*CLIPS, ((2, 32, 3, 16, 24), (3, 2, 3), 32), ((2, 32, 5, 4, 8), (2, 2, 2), 32)]
)
def test_gradients_of_norm_and_field(shape, grid, groups, swish):
    """A training step's way through a norm, against automatic differentiation of the plain twin in float32."""
    half = torch.randn(shape).to(torch.bfloat16).contiguous(memory_format=LAST)
    y, z = torch.randn(2, *shape[:2], *grid)
    weight, bias = torch.randn(2, shape[1])
    direction = torch.randn(shape).to(torch.bfloat16)

    def gradients(ops, x: Tensor) -> list[Tensor]:
        leaves = [part.clone(memory_format=torch.preserve_format).requires_grad_() for part in (x, y, z, weight, bias)]
        moments = ops.group_moments(leaves[0], groups, 1 << 30)
        frame_map = vae.fit_latent(y, shape[2:])[1] if grid[0] > 1 else vae.SAME_FRAMES
        modulation = Modulation(x, frame_map, lambda _: leaves[1], lambda _: leaves[2])
        field = vae.latent_field(moments, leaves[3], leaves[4], 1e-6, modulation)
        made = ops.apply_field(leaves[0], field, swish=swish)
        assert made.grad_fn is not None
        (made.float() * direction.float()).sum().backward()
        return [made.detach(), *(leaf.grad for leaf in leaves)]

    for got, expected in zip(gradients(fused_vae, half), gradients(vae, half.float()), strict=True):
        error = (got.float() - expected).norm() / expected.norm()
        assert got.shape == expected.shape and error < 1e-2


def test_gradients_of_a_view():
    """The front frames that a causal convolution puts before a clip leave a gap between samples."""
    whole = torch.randn(2, 32, 5, 8, 8).to(torch.bfloat16).contiguous(memory_format=LAST)
    field = AffineField(torch.randn(2, 32, 1, 1, 1), torch.randn(2, 32, 1, 1, 1))
    x = whole[:, :, 2:].requires_grad_()
    fused_vae.apply_field(x, field, swish=True).float().square().sum().backward()
    plain = whole[:, :, 2:].float().requires_grad_()
    vae.apply_field(plain, field, swish=True).square().sum().backward()
    assert (x.grad.float() - plain.grad).norm() / plain.grad.norm() < 2e-2


def results_and_gradients(run, ops, inputs: list[Tensor], norms: list[nn.Module], kind: torch.dtype) -> list[Tensor]:
    """run(ops, *inputs), and gradients for inputs and norms' weights under fixed random slopes, calculated in `kind`."""
    leaves = [x.detach().to(kind, copy=True).requires_grad_() for x in inputs]
    leaves += [p.requires_grad_() for norm in norms for p in norm.to(kind).parameters()]
    outputs = run(ops, *leaves[: len(inputs)])
    outputs = (outputs,) if isinstance(outputs, Tensor) else outputs
    assert outputs[0].grad_fn.name().startswith("_") == (ops is fused_block)  # a function of ours, and not the twin
    draw = torch.Generator().manual_seed(3)
    slopes = [torch.randn(out.shape, generator=draw).to(inputs[0].dtype).to(kind) for out in outputs]
    found = torch.autograd.grad(outputs, leaves, slopes, allow_unused=True)
    return [*outputs, *(torch.zeros_like(x) if grad is None else grad for x, grad in zip(leaves, found))]


def same_gradients(run, inputs: list[Tensor], norms: list[nn.Module], dtype: torch.dtype) -> None:
    """The fused operations' results and gradients are the plain ones' in float32."""
    expected = results_and_gradients(run, block_ops, inputs, norms, torch.float32)
    got = results_and_gradients(run, fused_block, inputs, norms, dtype)
    limit = {torch.float32: 1e-5, torch.bfloat16: 1e-2}[dtype]
    for a, b in zip(got, expected):
        assert a.dtype == dtype and a.shape == b.shape
        assert (a.double() - b.double()).norm() <= limit * b.double().norm()


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("size", SEQUENCES)
@pytest.mark.parametrize("affine", [True, False])
def test_gradients_of_residual_and_norm(size, affine, dtype, monkeypatch):
    monkeypatch.setattr(triton_block, "_PROGRAMS", 3)  # few: each goes through several runs of rows
    b, length, n, heads, width = size
    d = heads * width
    hidden, update = torch.randn(2, b, n, d).to(dtype)
    raw = torch.randn(b, 12 * d).to(dtype)
    norm = random_norm(d, 1e-5, dtype) if affine else nn.LayerNorm(d, elementwise_affine=False)

    def residual_norm(ops, hidden, update, raw):
        m = split_modulation(raw)
        gates = (m.text_attention.gate, m.video_attention.gate)
        return ops.residual_norm(hidden, update, *gates, norm, m.text_mlp, m.video_mlp, length)

    def norm_modulate(ops, hidden, update, raw):
        m = split_modulation(raw)
        return ops.norm_modulate(hidden, norm, m.text_mlp, m.video_mlp, length)

    def gated_residual(ops, hidden, update, raw):
        m = split_modulation(raw)
        return ops.gated_residual(hidden, update, m.text_mlp.gate, m.video_mlp.gate, length)

    for run in (residual_norm, norm_modulate, gated_residual, lambda *args: residual_norm(*args)[1]):
        same_gradients(run, [hidden, update, raw], [norm], dtype)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("size", HEADS)
def test_gradients_of_split_heads(size, dtype, monkeypatch):
    monkeypatch.setattr(triton_block, "_PROGRAMS", 2)
    monkeypatch.setattr(triton_block, "_HEAD_TILE", 128)
    b, length, n, heads, width = size
    qkv = torch.randn(b, n, 3 * heads * width).to(dtype)
    norms = random_norm(width, 1e-6, dtype), random_norm(width, 1e-2, dtype)
    table = RotaryTable(torch.randn(n - length, width), torch.randn(n - length, width))
    for pair, rotary in ((norms, table), (norms, None), ((None, None), table)):
        same_gradients(
            lambda ops, x, pair=pair, rotary=rotary: ops.split_heads(x, width, *pair, rotary, length),
            [qkv], [norm for norm in pair if norm is not None], dtype,
        )  # fmt: skip


def test_a_training_step_of_the_network():
    network = tiny_network(num_layers=1).train()
    draw = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in network.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=draw))
    network.transformer.checkpoint_activations = "selective"
    found = []
    for kernels in ("triton", "plain"):
        network.use_ops(choose_kernels(kernels, "cudnn", torch.device("cpu")).block)
        network.zero_grad()
        network(**random_inputs(batch=2, frames=1)).square().sum().backward()
        found.append({name: p.grad for name, p in network.named_parameters() if p.grad is not None})
    assert found[0].keys() == found[1].keys()
    largest = max(grad.abs().max().item() for grad in found[1].values())
    for name, expected in found[1].items():  # that of the keys' bias is zero but for rounding
        torch.testing.assert_close(found[0][name], expected, rtol=1e-4, atol=1e-6 * largest)


@pytest.mark.parametrize("dtype", TYPES)
def test_rows_to_eight_bits(dtype):
    x = (torch.randn(7, 96) * torch.rand(7, 1)).to(dtype)
    x[3] = 0
    codes, scale = fp8.quantize_quickly(x)
    expected, its_scale = fp8.quantize_rows(x)
    assert codes.dtype == expected.dtype and torch.equal(scale, its_scale)
    # The interpreter (not the GPU) loses the carry where rounding reaches the next power of two, and breaks ties otherwise.
    codes, expected = codes.float(), expected.float()
    step = (expected.abs() / 8).clamp_min(2.0**-9)
    assert bool((((codes - expected).abs() <= step) | (2 * codes == expected)).all())
    assert (codes == expected).float().mean() > 0.9


def variant(kernel, *arguments, **constants) -> tuple:
    """What Triton compiles a kernel for: types of tensors, what it takes numbers for, constants."""
    numbers = {True: "a multiple of 16", False: "any"}
    kinds = [
        str(a.dtype)
        if isinstance(a, Tensor)
        else a
        if a == 1
        else numbers[a % 16 == 0]
        if isinstance(a, int)
        else "real"
        for a in arguments
    ]
    return kernel.__name__, *kinds, *constants.items()


def test_a_rehearsal_meets_every_kernel_of_a_real_pass(monkeypatch):
    met: dict[bool, set[tuple]] = {True: set(), False: set()}

    def launch(kernel, grid, x, *arguments, **constants):
        met[x.is_meta].add(variant(kernel, x, *arguments, **constants))  # which one does not depend on values

    for module in (triton_block, triton_vae):
        monkeypatch.setattr(module, "launch", launch)
    kernels = choose_kernels("triton", "default", torch.device("cpu"))
    small = {"ch_mult": [1, 2], "temporal_compress_times": 2, "num_res_blocks": 1}
    for device in ("meta", "cpu"):
        with torch.device(device):
            network, stage = (
                tiny_network(num_layers=1),
                VideoAutoencoderInferenceWrapper(*configs({**TINY, **small})).eval(),
            )
        engine = SimpleNamespace(network=network, kernels=kernels, dtype=torch.float32)
        network.use_ops(kernels.block), stage.use_ops(kernels.vae)
        if device == "meta":
            rehearsal.run_block(engine, (1, 16, 2, 4))
            rehearsal.run_decoder(stage, (3, 16, 1, 2), torch.float32)
            continue
        stage.set_channels_last()
        with torch.no_grad():
            network(**random_inputs(batch=2, frames=1, height=2, width=4))
            stage.decode(torch.randn(1, 3, 16, 1, 2).transpose(1, 2))
    assert {name for name, *_ in met[True]} == {name for name, *_ in met[False]} and len(met[True]) > 10
    assert met[False] <= met[True]
