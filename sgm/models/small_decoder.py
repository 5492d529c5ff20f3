"""Files of small decoders: one safetensors file each, whose header says its sizes and which VAE it was learned from."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from sgm.modules.autoencoding.small_decoder import SmallDecoder, SmallDecoderSizes
from sgm.modules.autoencoding.strides import Strides
from sgm.weights import WeightsError, assign_state, read_checkpoint
from sgm.weights.checksums import read_header, verifying
from sgm.weights.files import tensors_of
from sgm.weights.preflight import HOW_TO_GET_SMALL_DECODER
from sgm.weights.save import save_safetensors

ENTRY = "small_decoder"  # of the header's metadata
_SAMPLED = 256  # values of each tensor that a fingerprint takes


def vae_tensors(path: str | Path) -> dict[str, Tensor]:
    """The tensors of a VAE file, mapped from it."""
    content = read_checkpoint(path)
    return tensors_of(content["state_dict"] if isinstance(content.get("state_dict"), Mapping) else content)


def decoder_fingerprint(state: Mapping[str, Tensor]) -> str:
    """What tells a VAE's decoder from others, 16 hex digits: SHA-256 of names, shapes and some values of each tensor.

    The values count as float16, so a copy in that type is the same decoder; so is one in another file.
    """
    digest = hashlib.sha256()
    for name in sorted(name for name in state if name.startswith("decoder.")):
        values = state[name].reshape(-1)
        digest.update(f"{name} {list(state[name].shape)}".encode())
        digest.update(values[:: max(1, values.numel() // _SAMPLED)].to(torch.float16).numpy().tobytes())
    return digest.hexdigest()[:16]


def save_small_decoder(path: str | Path, decoder: SmallDecoder, vae: str, dtype: torch.dtype) -> Path:
    """Write a decoder that was learned from the VAE of the fingerprint `vae`.

    Raises:
        WeightsError: a value is not finite in `dtype`.
        SaveError: it cannot be written.
    """
    state = {name: value.detach().to("cpu", dtype).contiguous() for name, value in decoder.state_dict().items()}
    if broken := [name for name, value in state.items() if not bool(value.isfinite().all())]:
        raise WeightsError(f"{path} is not written: {', '.join(broken[:5])} not finite in {dtype}.")
    facts = json.dumps(asdict(decoder.sizes) | {"vae": vae})
    return save_safetensors(path, state, {"format": "pt", ENTRY: facts})


@verifying()
def load_small_decoder(
    path: str | Path, vae: str | Path, *, device: torch.device | str, dtype: torch.dtype
) -> SmallDecoder:
    """The decoder in a file, frozen, for the VAE whose weights are the file `vae`.

    Raises:
        WeightsError: no such file, damaged, no small decoder, or one that was learned from another VAE.
    """
    facts = facts_of(Path(path))
    if facts.vae != decoder_fingerprint(vae_tensors(vae)):
        raise WeightsError(
            f"{path} was learned from another VAE than {vae}: its frames would not be those of these latents. Name the "
            f"one that belongs to it (first_stage_config.params.small_decoder), or: {HOW_TO_GET_SMALL_DECODER}"
        )
    with torch.device("meta"):
        decoder = SmallDecoder(facts.sizes)
    assign_state(decoder, read_checkpoint(path), source=str(path), device=device, dtype=dtype)
    decoder.set_channels_last()
    return decoder.requires_grad_(False).eval()


@dataclass(frozen=True)
class Facts:
    """What a file's header says of its decoder; `vae`: the fingerprint of the VAE's own decoder."""

    sizes: SmallDecoderSizes
    vae: str


def facts_of(path: Path) -> Facts:
    """Of a small decoder's file. Raises WeightsError: it is none, or damaged."""
    if path.suffix != ".safetensors":
        raise WeightsError(f"{path} is no small decoder, which is a .safetensors file. {HOW_TO_GET_SMALL_DECODER}")
    text = read_header(path).metadata.get(ENTRY)
    if text is None:
        raise WeightsError(f"{path} is no small decoder: its header has no entry {ENTRY}. {HOW_TO_GET_SMALL_DECODER}")
    try:
        fields = dict(json.loads(text))
        vae, strides = fields.pop("vae"), Strides(**fields.pop("strides"))
        lists = {name: tuple(map(int, fields.pop(name))) for name in ("widths", "blocks")}
        return Facts(SmallDecoderSizes(lists["widths"], lists["blocks"], strides=strides, **fields), vae)
    except (ValueError, TypeError, KeyError) as error:
        raise WeightsError(f"{path} says of itself what no small decoder here has: {error}") from error
