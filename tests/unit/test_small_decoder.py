"""The small decoder: causal, the same in pieces as whole, its file, and what a file of another VAE leads to."""

from __future__ import annotations

import json

import pytest
import torch

from sgm.models.small_decoder import decoder_fingerprint, load_small_decoder, save_small_decoder
from sgm.modules.autoencoding.small_decoder import SmallDecoder, SmallDecoderSizes
from sgm.modules.autoencoding.strides import Strides
from sgm.weights import WeightsError
from sgm.weights.checksums import read_header
from sgm.weights.save import save_safetensors

SIZES = SmallDecoderSizes((12, 8, 6, 4), (1, 2, 1, 1), 4)
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def decoder() -> SmallDecoder:
    torch.manual_seed(0)
    return SmallDecoder(SIZES).requires_grad_(False)


def latents(t: int, b: int = 2, **kind) -> torch.Tensor:
    return torch.randn(b, 4, t, 3, 2, generator=torch.Generator().manual_seed(t), **kind)


@pytest.mark.parametrize("t", [1, 2, 3, 6])
def test_piece_by_piece_it_gives_the_whole_to_the_bit(decoder, t):
    z = latents(t)
    whole, pieces = decoder(z), list(decoder.decode_chunks(z))
    assert whole.shape == (2, 3, 4 * t - 3, 24, 16)
    assert [piece.shape[2] for piece in pieces] == [1] + [4] * (t - 1)
    assert torch.equal(torch.cat(pieces, 2), whole) and torch.equal(decoder.decode(z), whole)


def test_no_frame_depends_on_a_later_latent_or_another_clip(decoder):
    z, changed = latents(4), latents(4)
    changed[0, :, 2] += 1
    same = (decoder(z) == decoder(changed)).flatten(3).all(3).all(1)
    assert same[0].tolist() == [True] * 5 + [False] * 8 and same[1].all()
    changed[0, :, 0] += 1
    assert not (decoder(z) == decoder(changed)).flatten(3).all(3).all(1)[0].any()  # the past is remembered


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_near(decoder, dtype):
    half = SmallDecoder(SIZES)
    half.load_state_dict(decoder.state_dict())
    z = latents(3)
    made = half.to(dtype).decode(z.to(dtype))
    assert made.dtype == dtype
    assert (made.float() - decoder(z)).norm() < 0.05 * decoder(z).norm()


def test_what_is_kept_between_pieces_does_not_grow(decoder):
    from sgm.modules.autoencoding.causal_conv import CausalCache

    cache, sizes = CausalCache(), []
    for k in range(4):
        decoder(latents(4)[:, :, k : k + 1], cache, starts=k == 0)
        sizes.append((len(cache), sum(frames.numel() for frames in cache._frames.values())))
    assert len(set(sizes)) == 1 and sizes[0][0] == sum(SIZES.blocks)


@pytest.mark.parametrize(
    "widths, blocks", [((8, 8), (1, 1)), ((8,) * 6, (1,) * 6), ((8, 8, 8), (1, 1)), ((8, 0, 8), (1, 1, 1))]
)
def test_levels_that_make_no_clip_are_refused(widths, blocks):
    with pytest.raises(ValueError, match="widths"):
        SmallDecoderSizes(widths, blocks)


def test_other_strides_and_numbers_of_levels():
    for widths, strides in (((4,), Strides(1, 2)), ((4, 4, 4), Strides(4, 8)), ((4,) * 5, Strides(4, 8))):
        sizes = SmallDecoderSizes(widths, (1,) * len(widths), 4, strides)
        made = SmallDecoder(sizes).decode(latents(3, 1))
        assert made.shape == (1, 3, strides.pixel_frames(3), 3 * strides.space, 2 * strides.space)


def test_latents_of_another_vae_are_refused(decoder):
    with pytest.raises(ValueError, match=r"takes latents \(b, 4, t"):
        decoder.decode(torch.zeros(1, 16, 1, 2, 2))


# --- files -------------------------------------------------------------------------------------------------------


def vae_file(path, seed: int = 0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    names = ("decoder.conv_in.conv.weight", "decoder.conv_out.conv.bias", "encoder.conv_in.conv.weight")
    state = {name: torch.randn(700, generator=generator).half().to(dtype) for name in names}
    torch.save({"state_dict": state}, path)
    return path, decoder_fingerprint(state)


def test_a_file_comes_back_with_its_sizes(decoder, tmp_path):
    vae, fingerprint = vae_file(tmp_path / "vae.pt")
    path = save_small_decoder(tmp_path / "small.safetensors", decoder, fingerprint, torch.float32)
    loaded = load_small_decoder(path, vae, device=CPU, dtype=torch.float32)
    assert loaded.sizes == SIZES and torch.equal(loaded.decode(latents(3)), decoder(latents(3)))
    assert not any(p.requires_grad for p in loaded.parameters())
    assert read_header(path).stretches and json.loads(read_header(path).metadata["small_decoder"])["vae"] == fingerprint
    half, _ = vae_file(tmp_path / "half.pt", dtype=torch.float16)  # the same VAE in another type and file
    assert load_small_decoder(path, half, device=CPU, dtype=torch.bfloat16).dtype == torch.bfloat16


def test_files_that_do_not_belong_here_are_refused(decoder, tmp_path):
    (vae, own), (other, _) = vae_file(tmp_path / "vae.pt"), vae_file(tmp_path / "other.pt", seed=1)
    path = save_small_decoder(tmp_path / "small.safetensors", decoder, own, torch.float16)

    def refused(file, match, of=vae):
        with pytest.raises(WeightsError, match=match):
            load_small_decoder(file, of, device=CPU, dtype=torch.float32)

    refused(path, "another VAE than .*other.pt", other)
    refused(vae, "is no small decoder, which is a .safetensors file.*train_decoder")
    refused(tmp_path / "absent.safetensors", "missing")
    plain = save_safetensors(tmp_path / "plain.safetensors", decoder.state_dict())
    refused(plain, "no entry small_decoder")
    facts = json.loads(read_header(path).metadata["small_decoder"])
    for change, match in (({"widths": [8, 8, 8, 4]}, "does not fit SmallDecoder"), ({"depth": 1}, "depth"), ({"blocks": [1]}, "levels")):  # fmt: skip
        text = {"small_decoder": json.dumps(facts | change)}
        refused(save_safetensors(tmp_path / "odd.safetensors", decoder.half().state_dict(), text), match)
    decoder.float()
    content = bytearray(path.read_bytes())
    content[-3] ^= 64
    (tmp_path / "damaged.safetensors").write_bytes(content)
    refused(tmp_path / "damaged.safetensors", "checksum")


def test_values_that_half_precision_cannot_hold_are_not_written(tmp_path):
    decoder = SmallDecoder(SIZES)
    with torch.no_grad():
        decoder.conv_in.bias[0] = 1e6
    with pytest.raises(WeightsError, match=r"conv_in\.bias not finite"):
        save_small_decoder(tmp_path / "small.safetensors", decoder, "0", torch.float16)
    assert not list(tmp_path.iterdir())
