"""The 3D VAE against diffusers' AutoencoderKLCogVideoX with random weights, through our own key map."""

from __future__ import annotations

import pytest
import torch

from sgm.convert.lazy import ConvertError
from sgm.convert.vae_keys import hf_config, hf_to_sat, params_of, refuse_foreign, sat_to_hf
from sgm.models.autoencoder import VideoAutoencoderInferenceWrapper

diffusers = pytest.importorskip("diffusers")

TOLERANCE = 5e-5
PARAMS = {"double_z": True, "z_channels": 16, "resolution": 256, "in_channels": 3, "out_ch": 3, "ch": 32,
          "ch_mult": [1, 2, 2, 4], "attn_resolutions": [], "num_res_blocks": 1, "dropout": 0.0}  # fmt: skip


@pytest.fixture(scope="module")
def ours() -> VideoAutoencoderInferenceWrapper:
    torch.manual_seed(3)
    coders = "sgm.modules.autoencoding.coders.ContextParallel"
    model = VideoAutoencoderInferenceWrapper(
        {"target": f"{coders}Encoder3D", "params": PARAMS}, {"target": f"{coders}Decoder3D", "params": PARAMS}
    )
    for name, parameter in model.named_parameters():
        if "norm" in name:  # ones and zeros would hide a mix-up of weights
            parameter.data += 0.3 * torch.randn_like(parameter)
    return model


@pytest.fixture(scope="module")
def theirs(ours: VideoAutoencoderInferenceWrapper) -> torch.nn.Module:
    model = diffusers.AutoencoderKLCogVideoX(**hf_config(PARAMS, scale_factor=1.15258426)).eval()
    model.load_state_dict(sat_to_hf(ours.state_dict()), strict=True)
    return model


@torch.no_grad()
@pytest.mark.parametrize("frames", [1, 5, 9])
def test_moments(ours: VideoAutoencoderInferenceWrapper, theirs: torch.nn.Module, frames: int) -> None:
    x = torch.rand(1, 3, frames, 32, 24, generator=torch.Generator().manual_seed(frames)) * 2 - 1
    expected = theirs.encode(x).latent_dist.parameters
    torch.testing.assert_close(ours.moments(x), expected, rtol=0, atol=TOLERANCE)


@torch.no_grad()
@pytest.mark.parametrize("latents", [1, 3, 5, 7])
@pytest.mark.parametrize("slice_bytes", [2 << 30, 1000])
def test_chunked_decode(
    ours: VideoAutoencoderInferenceWrapper, theirs: torch.nn.Module, latents: int, slice_bytes: int
) -> None:
    z = torch.randn(1, 16, latents, 4, 3, generator=torch.Generator().manual_seed(latents))
    ours.set_low_memory(slice_bytes=slice_bytes)
    torch.testing.assert_close(ours.decode(z), theirs.decode(z).sample, rtol=0, atol=TOLERANCE)


def test_key_map_is_a_bijection(ours: VideoAutoencoderInferenceWrapper, theirs: torch.nn.Module) -> None:
    state = ours.state_dict()
    back = hf_to_sat(theirs.state_dict())
    assert back.keys() == state.keys()
    assert all(torch.equal(back[name], state[name]) for name in state)


def test_config_round_trip(theirs: torch.nn.Module) -> None:
    refuse_foreign(theirs.config)
    assert params_of(hf_to_sat(theirs.state_dict()), "theirs") == PARAMS
    with pytest.raises(ConvertError, match="use_quant_conv"):
        refuse_foreign({**theirs.config, "use_quant_conv": True})


def test_foreign_names_are_listed(ours: VideoAutoencoderInferenceWrapper) -> None:
    with pytest.raises(ConvertError, match=r"loss\.discriminator"):
        sat_to_hf({**ours.state_dict(), "loss.discriminator": torch.zeros(1)})
    with pytest.raises(ConvertError, match="diffusers"):
        hf_to_sat(ours.state_dict())
