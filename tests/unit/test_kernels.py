"""Choice of kernels, their checks on the CPU, and what happens where they do not apply."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import yaml
from PIL import Image
from torch import nn

from sgm.config import AccelerateArgs, ConfigError, load_run_config, merge_yaml
from sgm.inference.options import SampleArgs
from sgm.modules.autoencoding.blocks import ResnetBlock3D, Upsample3D
from sgm.modules.autoencoding.causal_conv import CausalConv3d, ClipPass
from sgm.modules.ops import block_ops, vae
from sgm.modules.ops.block_ops import split_modulation
from sgm.modules.ops.choice import choose_kernels
from sgm.util import instantiate_from_config
from tests.dit_tiny import TEXT_LENGTH, TEXT_WIDTH, tiny_config
from tests.family_tiny import kind_section
from tools.bench import cost, cpu, measure, models, training
from tools.bench.flops import conv_flops
from tools.bench.measure import Ceilings

REPO = Path(__file__).resolve().parents[2]
CPU = torch.device("cpu")


def test_kernels_under_the_interpreter():
    pytest.importorskip("triton")
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "tests/kernels_interpreted.py"]
    done = subprocess.run(
        command, cwd=REPO, env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]


def test_choice():
    assert choose_kernels("plain", "default", CPU).block == block_ops.PLAIN
    assert choose_kernels("auto", "default", CPU).vae == vae.PLAIN
    with pytest.raises(ConfigError, match="cpu.*auto or plain"):
        choose_kernels("triton", "default", CPU)
    with pytest.raises(ConfigError, match="accelerate.attention is 'fast'.*cudnn"):
        choose_kernels("plain", "fast", CPU)


def test_section_is_read_and_checked(tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text("model: {a: 1}\naccelerate: {kernels: auto}\n")
    config = load_run_config([file], SampleArgs, overrides=["accelerate.attention=cudnn"])
    assert config.accelerate == AccelerateArgs(kernels="auto", attention="cudnn")
    assert {"kernels": "auto", "attention": "cudnn"}.items() <= config.as_dict()["accelerate"].items()
    file.write_text("model: {a: 1}\naccelerate: {kernel: auto, attention: fast}\n")
    with pytest.raises(ConfigError, match=r"accelerate.kernel; did you mean `kernels`(.|\n)*accelerate.attention"):
        load_run_config([file], SampleArgs)


@pytest.mark.parametrize("attention", ["cudnn", "flash"])
def test_attention_order_falls_back(attention):
    query, key, value = torch.randn(3, 1, 2, 7, 16)
    attend = choose_kernels("plain", attention, CPU).block.attention
    torch.testing.assert_close(attend(query, key, value), block_ops.attention(query, key, value))


def test_fused_operations_off_the_gpu_are_the_plain_ones():
    """Without a GPU, with gradients or with hooks, the fused forms give the twin's result and its gradients."""
    pytest.importorskip("triton")
    from sgm.modules.ops import fused_block

    d, norm = 32, nn.LayerNorm(32)
    hidden, update = torch.randn(2, 2, 7, d)
    hidden.requires_grad_()
    modulation = split_modulation(torch.randn(2, 12 * d))
    args = (hidden, update, modulation.text_mlp.gate, modulation.video_mlp.gate)
    args += (norm, modulation.text_mlp, modulation.video_mlp, 3)
    grads = []
    for ops in (fused_block, block_ops):
        summed, normed = ops.residual_norm(*args)
        grads.append(torch.autograd.grad((summed * normed).sum(), hidden)[0])
    torch.testing.assert_close(*grads)
    linear = nn.Linear(d, 8)
    torch.testing.assert_close(fused_block.linear_gelu(linear, hidden), block_ops.linear_gelu(linear, hidden))


def test_network_uses_the_operations_it_is_given():
    network = instantiate_from_config(tiny_config())
    calls = []

    def attend(*heads):
        calls.append(heads[0].shape)
        return block_ops.attention(*heads)

    network.use_ops(block_ops.PLAIN._replace(attention=attend))
    with torch.no_grad():
        network(torch.randn(1, 3, 16, 6, 10), torch.tensor([7]), torch.randn(1, TEXT_LENGTH, TEXT_WIDTH))
    assert len(calls) == network.num_layers


@pytest.mark.parametrize("t", [1, 2, 3, 5])
@pytest.mark.parametrize("slice_bytes", [1, 1 << 30])
def test_folded_upsampling_is_upsampling_then_convolution(t, slice_bytes):
    block = Upsample3D(32, time=True)
    x = torch.randn(2, 32, t, 4, 6)
    run = ClipPass(slice_bytes=slice_bytes)
    with torch.no_grad():
        got = block(x, run)
    expected = block(x, run)  # with gradients nothing is folded
    assert got.shape == expected.shape
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


def test_folded_filters_in_half_precision_stay_within_its_rounding():
    block = Upsample3D(32, time=False)
    x = torch.randn(1, 32, 1, 4, 6)
    expected = block(x).detach()
    with torch.no_grad():
        plain = block.bfloat16()(x.bfloat16())
        folded = block(x.bfloat16(), ClipPass(ops=vae.PLAIN._replace(folds_bias=True)))
    errors = [((y.float() - expected).norm() / expected.norm()).item() for y in (plain, folded)]
    assert max(errors) < 1e-2 and errors[1] < 1.5 * errors[0]


@pytest.mark.parametrize("latent", [None, 16])
@pytest.mark.parametrize("slice_bytes", [1, 1 << 30])
def test_biases_may_join_later_passes(latent, slice_bytes):
    block = ResnetBlock3D(32, 64, latent_channels=latent)
    for parameter in block.parameters():
        nn.init.normal_(parameter, std=0.3)
    x, zq = torch.randn(1, 32, 3, 4, 6), None if latent is None else torch.randn(1, latent, 2, 2, 3)
    with torch.no_grad():
        expected = block(x, zq, ClipPass(slice_bytes=slice_bytes))
        got = block(x, zq, ClipPass(slice_bytes=slice_bytes, ops=vae.PLAIN._replace(folds_bias=True)))
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4 * expected.abs().max().item())


@torch.no_grad()
@pytest.mark.parametrize("slice_bytes", [1, 20_000, 1 << 30])
def test_convolutions_may_write_to_spare_memory(slice_bytes):
    """As cuDNN does: straight to their place in a longer result, or where their input was."""
    block, x, zq = ResnetBlock3D(32, 64, latent_channels=16), torch.randn(1, 32, 5, 4, 6), torch.randn(1, 16, 3, 2, 3)
    offered = []

    def convolve(conv, x, bare=False, spare=None):
        y = vae.convolve(conv, x, bare)
        offered.append(spare is not None)
        return y if spare is None else spare.copy_(y)

    expected = block(x, zq)
    ops = vae.PLAIN._replace(convolve=convolve, folds_bias=True)
    got = block(x, zq, ClipPass(slice_bytes=slice_bytes, ops=ops))
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4 * expected.abs().max().item())
    assert any(offered)


@pytest.mark.parametrize("t", range(1, 8))
@pytest.mark.parametrize("start", [0, 2])
def test_latent_frames_of_an_activation(t, start):
    """Those of nearest neighbour, frame 0 of an odd number alone; also where they do not divide, and from the middle."""
    alone, first = t % 2 if t > 1 else 0, min(start, t - 1)
    for count in range(1 + alone, t + 1):
        z = torch.randn(1, 2, count, 2, 3)
        expected = F.interpolate(z[:, :, alone:], (t - alone, 4, 7))
        if alone:
            expected = torch.cat([F.interpolate(z[:, :, :1], (1, 4, 7)), expected], dim=2)
        latent, frame_map = vae.fit_latent(z, (t, 4, 7))
        scale, shift = vae.AffineField(latent, -latent, frame_map).after(first).expand(t - first)
        assert torch.equal(scale.expand(1, 2, t - first, 4, 7), expected[:, :, first:]) and torch.equal(shift, -scale)
    if t > 1 and t % 2:
        with pytest.raises(ValueError, match="at least 2 latent frames"):
            vae.fit_latent(torch.randn(1, 2, 1, 2, 3), (t, 4, 6))


@torch.no_grad()
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last_3d])
@pytest.mark.parametrize("budget", [1, 1 << 30])
def test_moments_far_from_zero_keep_their_precision(layout, budget):
    x = 1000 + torch.randn(2, 64, 5, 12, 16, generator=torch.Generator().manual_seed(0))
    x[:, :2] = 7.0  # a group without any variance
    mean, variance = vae.group_moments(x.contiguous(memory_format=layout), 32, budget)
    groups = x.double().unflatten(1, (32, -1)).flatten(2)
    torch.testing.assert_close(mean.double(), groups.mean(2), rtol=3e-7, atol=0)
    torch.testing.assert_close(variance.double(), groups.var(2, correction=0), rtol=1e-4, atol=1e-7)


def test_convolution_of_a_small_clip_is_the_usual_one():
    """Below the size from which PyTorch itself takes oneDNN."""
    conv, x = CausalConv3d(8, 16).conv, torch.randn(1, 8, 5, 6, 7, requires_grad=True)
    results = []
    for convolve in (conv, lambda x: F.conv3d(x, conv.weight, conv.bias, padding=conv.padding)):
        y = convolve(x)
        results.append((y, *torch.autograd.grad(y.square().sum(), (x, conv.weight, conv.bias))))
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-4)


def test_gelu_on_a_cpu_is_torchs_tanh_form():
    x = torch.linspace(-20, 20, 4001, requires_grad=True)
    got, expected = block_ops.linear_gelu(nn.Identity(), x), F.gelu(x.double(), approximate="tanh")
    torch.testing.assert_close(got, expected.float(), rtol=1e-6, atol=1e-6)
    slopes = [torch.autograd.grad(y.sum(), x)[0] for y in (got, expected)]
    torch.testing.assert_close(*slopes, rtol=1e-5, atol=1e-6)


def test_cpu_benchmark_prints_json_lines(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(cpu, "MATRIX", 64)
    small = ["network_config.params.latent_height=4", "network_config.params.latent_width=4"]
    small += ["network_config.params.num_layers=1", "sampler_config.params.num_steps=1"]
    small += [f"first_stage_config.params.decoder_config.params.{size}" for size in ("ch=32", "ch_mult=[1,1,1,1]")]
    config = merge_yaml([REPO / "configs" / "demo_infer.yaml"], [f"model.{text}" for text in small])
    (tmp_path / "small.yaml").write_text(json.dumps(config))
    arguments = ["--config", str(tmp_path / "small.yaml"), "--frames", "3", "--seconds", "0"]
    assert cpu.main(arguments) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    run = {line["variant"]: line for line in lines if line.get("part") == "run"}
    assert list(run)[-3:] == ["sample", "decode", "whole"] and run["whole"]["peak_gib"] > 0
    assert run["whole"]["ms"] >= run["sample"]["ms"] + run["decode"]["ms"]
    for part in ("dit", "vae_decode", "vae_encode"):
        ours, half, theirs = (line for line in lines if line.get("part") == part)
        assert half["variant"] == "ours, bf16" and 0 < half["error_to_ours"] < 2e-2
        assert ours["variant"] == "ours" and ours["ms"] > 0 and ours["limit_ms"] > 0
        assert theirs["variant"] == "diffusers"
        assert "skipped" in theirs or theirs["error_to_ours"] < 1e-4


@pytest.mark.parametrize("kind", ["5b", "1.5_5b_i2v"])
def test_benchmarks_take_rotary_models_at_the_size_they_were_trained_at(kind, tmp_path, capsys):
    """Beside diffusers' of the same weights: positions, patches of two frames, ofs."""
    pytest.importorskip("diffusers")
    config = tmp_path / "tiny.yaml"
    config.write_text(yaml.safe_dump({"model": kind_section(tmp_path, kind)}))
    network, clip = models.our_network(str(config), "fp32", CPU), models.Clip.of(str(config))
    assert clip == {"5b": (2, 2, 4), "1.5_5b_i2v": (2, 6, 8)}[kind]
    inputs = models.network_inputs(network, clip, CPU)
    theirs = models.diffusers_network_like(network, str(config))
    got = theirs(**models.diffusers_inputs(network, clip, inputs))[0]
    torch.testing.assert_close(got, network(*inputs), rtol=1e-4, atol=1e-4)
    trained = models.diffusers_trained_network(str(config), "fp32", CPU, 0)
    bench = training.TrainingBench("train", 0, str(config), "fp32", CPU, clip, 0.0, 1.0, 1.0)
    training.bench_theirs(bench, trained, models.diffusers_inputs(network, clip, tuple(part[:1] for part in inputs)))
    assert json.loads(capsys.readouterr().out)["finite"]
    shipped = str(REPO / "configs" / "cogvideox1.5_5b_infer.yaml")
    assert models.Clip.of(shipped) == (22, 96, 170) and models.Clip.of(shipped, 42, (480, 720)) == (42, 60, 90)


def test_cost_of_clips_by_length_and_size(tmp_path, capsys, monkeypatch):
    """A line for each clip, also where it is too long or does not fit; a picture of those that were measured."""
    configs = [tmp_path / "small_infer.yaml", tmp_path / "long_infer.yaml"]
    for config, kind in zip(configs, ("2b", "1.5_5b"), strict=True):
        section = kind_section(tmp_path, kind)
        section["network_config"]["params"]["num_frames"] = 9
        config.write_text(yaml.safe_dump({"model": section}))
    once, layers = measure._time_once, []

    def out_of_memory_at_the_largest(run, device):
        ms, result = once(run, device)
        if result.shape[-1] == 8 and result.shape[1] == 4:  # latents of 9x32x64 in patches of two frames
            raise torch.OutOfMemoryError("CUDA out of memory")
        return ms, result

    monkeypatch.setattr(measure, "_time_once", out_of_memory_at_the_largest)
    shown = cost.first_layer_alone
    monkeypatch.setattr(cost, "first_layer_alone", lambda network: layers.append(network) or shown(network))
    arguments = ["--dtype", "fp32", "--seconds", "0", "--clips", "1x16x32", "9x16x32", "9x32x64", "17x32x64"]
    assert cost.main([*arguments, "--config", *map(str, configs)]) == 0
    printed = capsys.readouterr().out
    lines = [json.loads(line) for line in printed.splitlines()][1:]
    assert [line["model"] for line in lines] == ["small"] * 4 + ["long"] * 4 + ["VAE decode"] * 4
    assert [line.get("latent_frames") for line in lines[:8]] == [1, 3, 3, 5, 2, 4, 4, 6]
    assert [line["tokens"] for line in lines[:8]] == [12 + n for n in (2, 6, 24, 40, 2, 4, 16, 24)]
    assert "5 latent frames" in lines[3]["skipped"] and lines[6]["failed"] == "out of memory"
    measured = [line for line in lines if "seconds" in line]
    assert len(measured) == 10 and all(line["finite"] and line["runs"] == 1 for line in measured)
    for line in measured:
        calls = 1 if line["model"] == "VAE decode" else 50
        assert line["seconds"] == pytest.approx(calls * line["ms"] / 1e3, rel=2e-3)
    assert all(len(network.transformer.layers) == network.num_layers for network in layers)

    log = tmp_path / "cost.jsonl"
    log.write_text(printed)
    assert cost.main(["--plot", str(tmp_path / "cost.png"), str(log)]) == 0
    alone = np.asarray(Image.open(tmp_path / "cost.png")).astype(int)
    with_memory = [line | {"peak_gib": 1.0 + k} for k, line in enumerate(measured)]
    log.write_text("".join(json.dumps(line) + "\n" for line in with_memory))
    assert cost.main(["--plot", str(tmp_path / "cost.png"), str(log)]) == 0
    both = np.asarray(Image.open(tmp_path / "cost.png")).astype(int)
    assert both.shape == (2 * alone.shape[0], *alone.shape[1:]) and (both[: len(alone)] == alone).all()
    for color in ((31, 78, 140), (192, 57, 43), (128, 128, 128)):
        for panel in (both[60:480], both[600:1020]):
            assert (np.abs(panel - color).sum(-1) < 30).sum() > 100


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--clips", "48x480x720"], "frames must be 1, 9, 17, 25"),
        (["--clips", "49x480x724"], "multiples of 16 pixels"),
        (["--clips", "49x480"], "frames x height x width"),
        (["--plot", "cost.png"], "results to draw"),
        (["--plot", "cost.png", "none.jsonl"], "there is no file none.jsonl"),
    ],
)
def test_cost_says_what_it_takes(arguments, said, capsys):
    with pytest.raises(SystemExit):
        cost.main(arguments)
    assert said in capsys.readouterr().err


@pytest.mark.parametrize("rank", [0, 4])
def test_training_benchmark(rank, tmp_path, capsys):
    """Each way of checkpointing, with gradients that agree; weights stay as they are, and only what learns has a say."""
    config = tmp_path / "tiny.yaml"
    config.write_text(yaml.safe_dump({"model": {"network_config": tiny_config(num_layers=2)}}))
    network = models.our_trained_network(str(config), "fp32", CPU, rank)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    tokens = models.token_count(network, models.Clip(1, 6, 10))
    flops = training.training_flops(network.hidden_size, tokens, network.num_layers, rank)
    limit = training.training_limit(network, tokens, rank, "cudnn", Ceilings(1e9, 1e9))
    bench = training.TrainingBench(
        "train", rank, str(config), "fp32", CPU, models.Clip(1, 6, 10), 0.0, sum(flops), limit
    )
    kernels = {"plain": choose_kernels("plain", "default", CPU), "fused": choose_kernels("auto", "cudnn", CPU)}
    training.bench_ours(bench, network, kernels)
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(line["variant"], line["checkpointing"]) for line in lines] == [
        *((variant, mode) for variant in kernels for mode in ("true", "selective", "products", "false")),
        *(("fused, streamed" + more, "true") for more in ("", ", inputs offloaded") * (rank > 0)),
    ]
    assert all(line["finite"] and line["limit_ms"] == pytest.approx(limit, rel=1e-3) for line in lines)
    assert all(line["gradient_error_to_plain"] < 1e-5 for line in lines[4:])
    assert all(line.get("gradient_error_to_resident", 0) == 0 for line in lines)
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    learning = {name for name, p in network.named_parameters() if p.requires_grad}
    assert all(("matrix_" in name) == (rank > 0) for name in learning) and learning


def test_counted_flops_are_those_of_the_shapes():
    block = Upsample3D(32, time=True)
    x = torch.randn(1, 32, 3, 4, 6)
    assert conv_flops(block, lambda: block(x)) == 2 * 3 * 32 * 32 * 4 * (8 * 12)  # four taps a value, 3 source frames
    x, block = x.bfloat16(), block.bfloat16()
    assert conv_flops(block, lambda: block(x)) == 2 * 3 * 32 * 32 * 9 * (8 * 12)
