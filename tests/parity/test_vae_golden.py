"""The 3D VAE against tensors recorded from the original: single blocks (committed) and the whole model (full set)."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from sgm.models.autoencoder import VideoAutoencoderInferenceWrapper
from sgm.modules.autoencoding.blocks import Downsample3D, SpatialNorm3D, Upsample3D
from sgm.modules.autoencoding.causal_conv import CausalCache, CausalConv3d, ClipPass
from sgm.weights import assign_state

TOLERANCE = 5e-5  # max abs; wrong chunking, normalisation or frame rules land at 0.6 and above
ENCODED = ["enc1", "enc5", "enc8_even", "enc9", "enc17"]
CHUNKED = ["dec1", "chunk3", "chunk5", "chunk7"]


def close(actual: torch.Tensor, expected: torch.Tensor, tolerance: float = TOLERANCE) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance)


# ---- single blocks. The committed file holds the first few output channels of each convolution and what they need.


@pytest.fixture(scope="module")
def blocks(golden: Path) -> dict[str, torch.Tensor]:
    return {name: tensor.float() for name, tensor in load_file(golden / "vae_blocks.safetensors").items()}


def give_rows(conv: nn.Module, blocks: dict[str, torch.Tensor], name: str) -> int:
    """Fill the first output channels of `conv` and return how many they are; the others are zero."""
    count = len(blocks[f"{name}.bias"])
    with torch.no_grad():
        for leaf, parameter in conv.named_parameters():
            parameter.zero_()[:count] = blocks[f"{name}.{leaf}"]
    return count


@torch.no_grad()
@pytest.mark.parametrize("slice_bytes", [2 << 30, 1])
def test_causal_conv_repeats_the_first_frame(blocks: dict[str, torch.Tensor], slice_bytes: int) -> None:
    conv = CausalConv3d(32, 4)
    give_rows(conv.conv, blocks, "causal_conv")
    close(conv(blocks["g"], ClipPass(slice_bytes=slice_bytes)), blocks["causal_conv.out"])


@torch.no_grad()
def test_causal_conv_continues_from_the_cache(blocks: dict[str, torch.Tensor]) -> None:
    conv, cache = CausalConv3d(32, 4), CausalCache()
    give_rows(conv.conv, blocks, "causal_conv")
    first = conv(blocks["g"][:, :, :1], ClipPass(cache, last=False))
    second = conv(blocks["g"][:, :, 1:], ClipPass(cache))
    close(torch.cat([first, second], dim=2), blocks["causal_conv.out"])
    assert len(cache) == 0


@pytest.mark.parametrize(("frames", "case"), [(3, "odd"), (4, "even")])
def test_downsample_pools_time_by_parity(blocks: dict[str, torch.Tensor], frames: int, case: str) -> None:
    down = Downsample3D(32, time=True)
    rows = give_rows(down.conv, blocks, "down")
    close(down(blocks["g"][:, :, :frames])[:, :rows], blocks[f"down.{case}"])


@pytest.mark.parametrize(("frames", "case"), [(3, "odd"), (2, "even")])
def test_upsample_doubles_time_by_parity(blocks: dict[str, torch.Tensor], frames: int, case: str) -> None:
    up = Upsample3D(128, time=True)
    rows = give_rows(up.conv, blocks, "up_time")
    close(up(blocks["h"][:, :, :frames])[:, :rows], blocks[f"up_time.{case}"])


def test_upsample_in_space_alone(blocks: dict[str, torch.Tensor]) -> None:
    up = Upsample3D(64, time=False)
    rows = give_rows(up.conv, blocks, "up_space")
    close(up(blocks["h"][:, :64])[:, :rows], blocks["up_space.out"])


@pytest.mark.parametrize(("frames", "latents", "case"), [(9, 3, "odd"), (8, 2, "even")])
def test_spatial_norm_resizes_the_first_frame_apart(
    blocks: dict[str, torch.Tensor], frames: int, latents: int, case: str
) -> None:
    norm = SpatialNorm3D(4, 16, groups=1)
    norm.load_state_dict({k[5:]: v for k, v in blocks.items() if k.startswith("norm.") and k.count(".") > 1})
    close(norm(blocks["h9"][:, :, :frames], blocks["zq"][:, :, :latents]), blocks[f"norm.{case}"])


# ---- the whole model


@pytest.fixture(scope="module")
def io(shared_golden: Path) -> dict[str, torch.Tensor]:
    return load_file(shared_golden / "vae_io.safetensors")


@pytest.fixture(scope="module")
def facts(shared_golden: Path) -> dict:
    return json.loads((shared_golden / "vae_facts.json").read_text())


@pytest.fixture(params=["plain", "low memory", "channels last"])
def vae(request: pytest.FixtureRequest, shared_golden: Path) -> VideoAutoencoderInferenceWrapper:
    params = {"double_z": True, "z_channels": 16, "resolution": 64, "in_channels": 3, "out_ch": 3, "ch": 32,
              "ch_mult": [1, 2, 2, 4], "attn_resolutions": [], "num_res_blocks": 1, "dropout": 0.0}  # fmt: skip
    with torch.device("meta"):
        model = VideoAutoencoderInferenceWrapper(
            {"target": "vae_modules.cp_enc_dec.ContextParallelEncoder3D", "params": {**params, "gather_norm": True}},
            {"target": "vae_modules.cp_enc_dec.ContextParallelDecoder3D", "params": {**params, "gather_norm": False}},
            {"target": "torch.nn.Identity"},
            {"target": "vae_modules.regularizers.DiagonalGaussianRegularizer"},
            cp_size=1,
        )
    state = load_file(shared_golden / "vae_state_fp16.safetensors")
    assign_state(model, state, source="golden", dtype=torch.float32)
    if request.param == "low memory":
        model.set_low_memory(slice_bytes=1, cache_on_cpu=True)
    if request.param == "channels last":
        model.set_channels_last()
    return model


@pytest.mark.parametrize("case", ENCODED)
def test_encode(case: str, vae: VideoAutoencoderInferenceWrapper, io: dict, facts: dict) -> None:
    x = io[f"{case}.x"].float()
    any_length = case == "enc8_even"
    moments = vae.moments(x, allow_any_length=any_length)
    close(moments, io[f"{case}.moments"])
    close(vae.encode(x, noise=io[f"{case}.noise"], allow_any_length=any_length), io[f"{case}.sample"])
    _, log = vae.regularization(moments)
    assert log["kl_loss"].item() == pytest.approx(facts[case]["kl_loss"], rel=1e-6)


@pytest.mark.parametrize("case", ["dec1", "dec2_even", "dec3", "dec5"])
def test_decode_in_one_go(case: str, vae: VideoAutoencoderInferenceWrapper, io: dict) -> None:
    close(vae.decode(io[f"{case}.z"], chunked=False), io[f"{case}.out"])


@pytest.mark.parametrize("case", CHUNKED)
def test_decode_in_chunks(case: str, vae: VideoAutoencoderInferenceWrapper, io: dict) -> None:
    close(vae.decode(io[f"{case}.z"]), io[f"{case}.out"])


@torch.no_grad()
def test_cache_after_the_first_chunk(vae: VideoAutoencoderInferenceWrapper, io: dict, facts: dict) -> None:
    cache = CausalCache()
    vae.decoder(io["chunk5.z"][:, :, :3], ClipPass(cache, last=False))
    kept = {name: cache.take(module) for name, module in vae.named_modules()}
    shapes = {name: list(frames.shape) for name, frames in kept.items() if frames is not None}
    assert shapes == facts["caches_after_first_chunk"]
    for name in ("conv_in", "conv_out"):
        close(kept[f"decoder.{name}"], io[f"chunk5.cache.{name}"])


@torch.no_grad()
def test_whole_blocks(vae: VideoAutoencoderInferenceWrapper, io: dict) -> None:
    g, h, zq = (io[f"block.{name}"] for name in ("g", "h", "zq"))
    close(vae.encoder.down[0].block[0](g), io["block.enc_res0"])
    close(vae.encoder.down[0].block[0].conv1(g), io["block.causal_conv"])
    close(vae.decoder.mid.block_1(h, zq), io["block.mid1"])
