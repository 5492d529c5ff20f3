"""The video autoencoder's contract: sizes, state dict, chunks, memory, errors, training."""

from __future__ import annotations

import hashlib
import itertools
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from sgm.models.autoencoder import VideoAutoencoder, VideoAutoencoderInferenceWrapper, chunk_bounds
from sgm.modules.autoencoding.causal_conv import CausalConv3d
from sgm.modules.autoencoding.coders import ContextParallelEncoder3D
from sgm.modules.autoencoding.tiling import Tiling, tile_spans
from sgm.weights import WeightsError

CODERS = "sgm.modules.autoencoding.coders.ContextParallel"
TINY = {"double_z": True, "z_channels": 16, "resolution": 64, "in_channels": 3, "out_ch": 3, "ch": 32,
        "ch_mult": [1, 1, 1, 2], "attn_resolutions": [], "num_res_blocks": 1, "dropout": 0.0}  # fmt: skip
RELEASE = {**TINY, "resolution": 256, "ch": 128, "ch_mult": [1, 2, 2, 4], "num_res_blocks": 3}


def configs(params: dict) -> tuple[dict, dict]:
    return (
        {"target": f"{CODERS}Encoder3D", "params": {**params, "gather_norm": True}},
        {"target": f"{CODERS}Decoder3D", "params": {**params, "gather_norm": False}},
    )


@pytest.fixture
def vae() -> VideoAutoencoderInferenceWrapper:
    torch.manual_seed(0)
    return VideoAutoencoderInferenceWrapper(*configs(TINY))


def latents(t: int, height: int = 3, width: int = 2, seed: int = 1) -> Tensor:
    return torch.randn(1, 16, t, height, width, generator=torch.Generator().manual_seed(seed))


def pixels(f: int, height: int = 24, width: int = 16) -> Tensor:
    return torch.rand(1, 3, f, height, width, generator=torch.Generator().manual_seed(f)) * 2 - 1


# ---- structure


def test_release_size_has_the_releases_names_and_shapes() -> None:
    with torch.device("meta"):
        state = VideoAutoencoderInferenceWrapper(*configs(RELEASE), ckpt_path="not/read/on/meta.pt").state_dict()
    lines = "\n".join(f"{name} {list(value.shape)}" for name, value in sorted(state.items()))
    assert len(state) == 436
    assert sum(value.numel() for value in state.values()) == 215_583_907
    digest = "7e0acc81bf93e0550c7c7eb07d784c74c8c91f84853be467b8a527d141953a5d"  # of the released 3d-vae.pt's names
    assert hashlib.sha256(lines.encode()).hexdigest() == digest


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"attn_resolutions": [32]}, "attn_resolutions"),
        ({"ch": 24}, "24 channels"),
        ({"temporal_compress_times": 3}, "temporal_compress_times"),
        ({"temporal_compress_times": 16}, "temporal_compress_times"),
        ({"chh": 32}, "chh"),
    ],
)
def test_wrong_options_are_named(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        VideoAutoencoderInferenceWrapper(*configs({**TINY, **change}))


def test_context_parallel_sizes() -> None:
    with torch.device("meta"):
        VideoAutoencoderInferenceWrapper(*configs(TINY), cp_size=1)


def test_frozen_and_always_in_eval(vae: VideoAutoencoderInferenceWrapper) -> None:
    assert not vae.train().training and not any(module.training for module in vae.modules())
    assert not any(parameter.requires_grad for parameter in vae.parameters())


# ---- encode


@pytest.mark.parametrize(("f", "t"), [(1, 1), (5, 2), (9, 3)])
def test_encode_sizes(vae: VideoAutoencoderInferenceWrapper, f: int, t: int) -> None:
    z = vae.encode(pixels(f))
    assert z.shape == (1, 16, t, 3, 2)
    assert not z.requires_grad


@pytest.mark.parametrize("f", [2, 3, 4, 6, 7, 8])
def test_other_lengths_only_on_request(vae: VideoAutoencoderInferenceWrapper, f: int) -> None:
    with pytest.raises(ValueError, match=f"got {f}"):
        vae.encode(pixels(f))
    assert vae.encode(pixels(f), allow_any_length=True).shape[2] == -(-f // 4)


def test_encode_samples_with_one_draw(vae: VideoAutoencoderInferenceWrapper) -> None:
    x = pixels(5)
    moments = vae.moments(x)
    assert moments.shape == (1, 32, 2, 3, 2)
    mean, logvar = moments.chunk(2, dim=1)
    torch.manual_seed(5)
    expected = mean + torch.exp(0.5 * logvar) * torch.randn_like(mean)
    torch.manual_seed(5)
    torch.testing.assert_close(vae.encode(x), expected)
    torch.manual_seed(5)
    z, _, log = vae(x)
    torch.testing.assert_close(z, expected)
    torch.testing.assert_close(log["kl_loss"], 0.5 * (mean**2 + logvar.exp() - 1 - logvar).sum())


def test_sources_of_noise_agree(vae: VideoAutoencoderInferenceWrapper) -> None:
    x = pixels(1)
    noise = torch.randn(1, 16, 1, 3, 2, generator=torch.Generator().manual_seed(9))

    z = vae.encode(x, noise=noise)
    torch.manual_seed(9)
    torch.testing.assert_close(vae.encode(x), z)
    with pytest.raises(ValueError, match="noise has shape"):
        vae.encode(x, noise=noise[:, :8])


def test_a_seed_gives_the_same_latents_in_any_memory_format(vae: VideoAutoencoderInferenceWrapper) -> None:
    x = pixels(5)
    torch.manual_seed(2)
    z = vae.encode(x)
    vae.set_channels_last()
    torch.manual_seed(2)
    torch.testing.assert_close(vae.encode(x), z, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((1, 3, 5, 20, 16), "20x16"),
        ((1, 3, 5, 24, 12), "24x12"),
        ((1, 4, 5, 24, 16), "shape"),
        ((3, 5, 24, 16), "shape"),
    ],
)
def test_encode_refuses_wrong_shapes(vae: VideoAutoencoderInferenceWrapper, shape: tuple, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        vae.encode(torch.zeros(shape))


# ---- decode


@pytest.mark.parametrize("t", [1, 3, 5, 7])
def test_decode_sizes_and_pieces(vae: VideoAutoencoderInferenceWrapper, t: int) -> None:
    z = latents(t)
    whole = vae.decode(z)
    assert whole.shape == (1, 3, 4 * t - 3, 24, 16)
    pieces = list(vae.decode_chunks(z))
    assert [piece.shape[2] for piece in pieces] == ([1] if t == 1 else [9] + [8] * ((t - 3) // 2))
    torch.testing.assert_close(torch.cat(pieces, dim=2), whole, rtol=0, atol=0)


@pytest.mark.parametrize(("t", "f"), [(1, 1), (2, 8), (3, 9), (4, 16), (5, 17)])
def test_decode_in_one_go_sizes(vae: VideoAutoencoderInferenceWrapper, t: int, f: int) -> None:
    assert vae.decode(latents(t), chunked=False).shape[2] == f


def test_chunk_bounds() -> None:
    assert chunk_bounds(1) == [(0, 1)]
    assert chunk_bounds(13) == [(0, 3), (3, 5), (5, 7), (7, 9), (9, 11), (11, 13)]


def test_even_number_of_latents_is_refused_at_the_call(vae: VideoAutoencoderInferenceWrapper) -> None:
    with pytest.raises(ValueError, match="4 latent frames.*odd"):
        vae.decode(latents(4))
    with pytest.raises(ValueError, match="Use 3 or 5"):
        vae.decode_chunks(latents(4))
    with pytest.raises(ValueError, match="decode takes latents"):
        vae.decode(torch.zeros(1, 8, 3, 3, 2))


def test_a_broken_off_clip_leaves_nothing_behind(vae: VideoAutoencoderInferenceWrapper) -> None:
    z = latents(5)
    expected = vae.decode(z)
    pieces = vae.decode_chunks(latents(5, seed=8))
    next(pieces)
    pieces.close()
    torch.testing.assert_close(vae.decode(z), expected, rtol=0, atol=0)

    def fail(*_: object) -> None:
        raise RuntimeError("stop")

    handle = vae.decoder.up[0].block[0].conv2.register_forward_hook(fail)
    with pytest.raises(RuntimeError, match="stop"):
        vae.decode(latents(5, seed=8))
    handle.remove()
    torch.testing.assert_close(vae.decode(z), expected, rtol=0, atol=0)


def test_two_clips_may_be_decoded_in_turns(vae: VideoAutoencoderInferenceWrapper) -> None:
    first, second = latents(5), latents(5, seed=8)
    turns = list(zip(vae.decode_chunks(first), vae.decode_chunks(second)))
    torch.testing.assert_close(torch.cat([a for a, _ in turns], dim=2), vae.decode(first), rtol=0, atol=0)
    torch.testing.assert_close(torch.cat([b for _, b in turns], dim=2), vae.decode(second), rtol=0, atol=0)


def test_decoding_leaves_the_gradient_mode_of_the_caller(vae: VideoAutoencoderInferenceWrapper) -> None:
    for _ in vae.decode_chunks(latents(5)):
        assert torch.is_grad_enabled()


# ---- memory and precision


@pytest.mark.parametrize("slice_bytes", [1, 20_000])
@pytest.mark.parametrize("channels_last", [False, True])
def test_low_memory_changes_nothing(
    vae: VideoAutoencoderInferenceWrapper, slice_bytes: int, channels_last: bool
) -> None:
    x, z = pixels(9), latents(5)
    moments, frames = vae.moments(x), vae.decode(z)
    if channels_last:
        vae.set_channels_last()
    vae.set_low_memory(slice_bytes=slice_bytes, cache_on_cpu=True)
    torch.testing.assert_close(vae.moments(x), moments, rtol=0, atol=2e-5)
    torch.testing.assert_close(vae.decode(z), frames, rtol=0, atol=2e-5)
    assert torch.equal(x, pixels(9)) and torch.equal(z, latents(5))  # what runs in place is ours, not the caller's


def test_low_memory_bounds_what_a_convolution_sees(vae: VideoAutoencoderInferenceWrapper) -> None:
    longest = []
    for module in vae.modules():
        if isinstance(module, CausalConv3d) and module.front:
            module.conv.register_forward_pre_hook(lambda _, args: longest.append(args[0].shape[2]))
    vae.decode(latents(3))
    assert max(longest) == 9 + 2
    longest.clear()
    vae.set_low_memory(slice_bytes=1)
    vae.decode(latents(3))
    assert max(longest) == 1 + 2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(vae: VideoAutoencoderInferenceWrapper, dtype: torch.dtype) -> None:
    x, z = pixels(5), latents(3)
    moments, frames = vae.moments(x), vae.decode(z)
    vae.to(dtype)
    for result, expected in ((vae.moments(x), moments), (vae.decode(z), frames)):
        assert result.dtype == dtype
        assert (result.float() - expected).abs().mean() < 0.03 * expected.abs().mean()


def test_tiles_cover_and_approximate(vae: VideoAutoencoderInferenceWrapper) -> None:
    x, z = pixels(5, 64, 48), latents(3, 8, 6)
    vae.set_tiling((64, 48), overlap=16)  # one tile: nothing changes
    moments, frames = vae.moments(x), vae.decode(z)
    vae.set_tiling((40, 32), overlap=16)
    tiled = vae.decode(z)
    assert tiled.shape == frames.shape and vae.moments(x).shape == moments.shape
    # Right places: each tile resembles the whole far more than the whole shifted by a tile's step
    shifted = frames.roll((24, 16), dims=(3, 4))
    assert (tiled - frames).square().mean() < 0.5 * (shifted - frames).square().mean()
    vae.set_tiling(None)
    torch.testing.assert_close(vae.decode(z), frames, rtol=0, atol=0)


def test_tile_spans() -> None:
    assert tile_spans(60, 60, 8) == [(0, 60)]
    for length, tile, overlap in ((60, 30, 8), (90, 45, 8), (61, 30, 0), (7, 3, 2)):
        spans = tile_spans(length, tile, overlap)
        assert spans[0][0] == 0 and spans[-1][1] == length
        assert all(stop - start == tile for start, stop in spans)
        assert all(before[1] - after[0] >= overlap for before, after in itertools.pairwise(spans))
    with pytest.raises(ValueError, match="overlap"):
        Tiling(4, 4, 4)


def test_tile_sizes_are_whole_latent_cells(vae: VideoAutoencoderInferenceWrapper) -> None:
    with pytest.raises(ValueError, match="multiples of 8"):
        vae.set_tiling((36, 32), overlap=8)


# ---- weight files


@pytest.fixture
def stored(vae: VideoAutoencoderInferenceWrapper, tmp_path: Path) -> Callable[..., Path]:
    def store(kind: str, **extra: Tensor) -> Path:
        state = {**vae.state_dict(), **extra}
        path = tmp_path / f"vae.{'safetensors' if kind == 'safetensors' else 'pt'}"
        if kind == "safetensors":
            save_file(state, path)
        else:
            torch.save({"state_dict": state} if kind == "pt" else state, path)
        return path

    return store


@pytest.mark.parametrize("kind", ["pt", "plain pt", "safetensors"])
def test_weight_files(vae: VideoAutoencoderInferenceWrapper, stored: Callable[..., Path], kind: str) -> None:
    path = stored(kind, **{"loss.logvar": torch.zeros(1)})
    loaded = VideoAutoencoderInferenceWrapper(*configs(TINY), ckpt_path=str(path), ignore_keys=["loss"])
    torch.testing.assert_close(loaded.decode(latents(1)), vae.decode(latents(1)), rtol=0, atol=0)
    with pytest.raises(WeightsError, match=r"loss\.logvar"):
        VideoAutoencoderInferenceWrapper(*configs(TINY), ckpt_path=str(path))


def test_meta_structure_is_filled_later(vae: VideoAutoencoderInferenceWrapper, stored: Callable[..., Path]) -> None:
    with torch.device("meta"):
        loaded = VideoAutoencoderInferenceWrapper(*configs(TINY), ckpt_path=str(stored("pt")))
    loaded.load_weights(device="cpu", dtype=torch.bfloat16)
    assert loaded.dtype == torch.bfloat16
    assert not any(parameter.requires_grad or parameter.is_meta for parameter in loaded.parameters())


def test_load_weights_without_a_file(vae: VideoAutoencoderInferenceWrapper) -> None:
    with pytest.raises(ValueError, match="ckpt_path"):
        vae.load_weights()


class _Hostile:
    def __reduce__(self) -> tuple:
        return (os.mkdir, ("created-by-unpickling",))


def test_bad_files_are_refused(stored: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)

    def load(path: Path) -> VideoAutoencoderInferenceWrapper:
        return VideoAutoencoderInferenceWrapper(*configs(TINY), ckpt_path=str(path))

    whole = stored("pt").read_bytes()
    truncated, hostile = tmp_path / "truncated.pt", tmp_path / "hostile.pt"
    truncated.write_bytes(whole[: len(whole) // 2])
    torch.save({"state_dict": _Hostile()}, hostile)
    for path in (truncated, hostile, tmp_path / "absent.pt"):
        with pytest.raises(WeightsError, match=path.name):
            load(path)
    assert not (tmp_path / "created-by-unpickling").exists()


def test_names_of_diffusers_get_a_hint(vae: VideoAutoencoderInferenceWrapper, tmp_path: Path) -> None:
    torch.save({"encoder.down_blocks.0.resnets.0.conv1.conv.bias": torch.zeros(32)}, tmp_path / "hf.pt")
    with pytest.raises(WeightsError, match="hf2sat"):
        vae.load_file(tmp_path / "hf.pt")


# ---- training


def test_training_reaches_every_parameter() -> None:
    torch.manual_seed(0)
    model = VideoAutoencoder(*configs({**TINY, "dropout": 0.1})).train()
    x = pixels(9)
    z, reconstruction, log = model(x, noise=torch.zeros(1, 16, 3, 3, 2))
    assert reconstruction.shape == x.shape
    loss = (reconstruction - x).square().mean() + 1e-6 * log["kl_loss"]
    loss.backward()
    without = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()]
    assert without == []


def test_gradients_and_values_agree_between_the_two_paths() -> None:
    """Without gradients the arithmetic runs in place and in runs of frames: same numbers."""
    torch.manual_seed(0)
    model = VideoAutoencoder(*configs(TINY)).eval()
    x, z = pixels(9), latents(5)
    with torch.no_grad():
        moments, frames = model.moments(x), model.decode(z)
    tracked = model.decode(z)
    assert tracked.requires_grad
    torch.testing.assert_close(tracked, frames, rtol=0, atol=2e-5)
    torch.testing.assert_close(model.moments(x), moments, rtol=0, atol=2e-5)


def test_gradient_is_the_derivative() -> None:
    torch.manual_seed(0)
    encoder = ContextParallelEncoder3D(**TINY).double()
    x = pixels(5, 8, 8).double().requires_grad_()
    direction = torch.randn_like(x)
    weight = torch.randn(1, 32, 2, 1, 1, dtype=torch.double)
    (encoder(x) * weight).sum().backward()
    with torch.no_grad():
        ahead, behind = ((encoder(x + step * direction) * weight).sum() for step in (1e-5, -1e-5))
    torch.testing.assert_close((x.grad * direction).sum(), (ahead - behind) / 2e-5, rtol=1e-5, atol=1e-8)


def test_frozen_model_passes_gradients_to_its_input(vae: VideoAutoencoderInferenceWrapper) -> None:
    z = latents(3).requires_grad_()
    vae.decode(z).square().mean().backward()
    assert z.grad is not None and z.grad.abs().max() > 0
    assert all(parameter.grad is None for parameter in vae.parameters())
