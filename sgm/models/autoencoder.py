"""The 3D causal video autoencoder: pixels to latents and back, whole clips, exact and within bounded memory.

`VideoAutoencoder` is trainable; `VideoAutoencoderInferenceWrapper` is the same, frozen, with a weight file.

Axes: b batch, c channels, f pixel frames, t latent frames, h w pixels; latents have h/8, w/8. With the release's
sizes f = 4t - 3: 1, 5, 9, ..., 49 pixel frames are 1, 2, 3, ..., 13 latent frames.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Protocol

import torch
from torch import Tensor, nn

from sgm.modules.autoencoding.causal_conv import (
    CPU_SLICE_BYTES,
    DECODE_SLICE_BYTES,
    SLICE_BYTES,
    CausalCache,
    ClipPass,
    cache_on,
)
from sgm.modules.autoencoding.coders import (
    ContextParallelDecoder3D,
    ContextParallelEncoder3D,
)
from sgm.modules.autoencoding.first_stage import FirstStage
from sgm.modules.autoencoding.regularizers import DiagonalGaussianRegularizer
from sgm.modules.autoencoding.tiling import Tiling, blend_tiles
from sgm.modules.ops.vae import PLAIN, VaeOps
from sgm.typed import Count, PathText
from sgm.util import Config, Role, instantiate_from_config
from sgm.weights import assign_state, read_checkpoint

LOW_MEMORY_SLICE_BYTES = 192 << 20  # two frames of the first level at 480x720 in half precision
TORCH_LOSS = Role(nn.Module, ("torch.nn.",))


@dataclass(frozen=True)
class MemoryPlan:
    """How much memory a pass may take.

    Attributes:
        slice_bytes: bound on the temporary copies of one convolution (exact); decoding takes at most
            DECODE_SLICE_BYTES, a CPU CPU_SLICE_BYTES.
        host_cache: frames wait between chunks in host memory (exact).
        recompute: the largest activation is made again where it is read (exact).
        tiling: spatial tiles (approximate), None: whole frames.
    """

    slice_bytes: int = SLICE_BYTES
    host_cache: bool = False
    recompute: bool = False
    tiling: Tiling | None = None


class ChunkShare(Protocol):
    """Which chunks of a decode are computed here, and what carries frames between them."""

    def owns(self, chunk: int) -> bool: ...
    def cache(self, chunk: int) -> CausalCache: ...


class FrameShare(Protocol):
    """The frames of an encode that are computed here."""

    def takes(self, encoder: ContextParallelEncoder3D, x: Tensor) -> bool: ...
    def encode(self, encoder: ContextParallelEncoder3D, x: Tensor, run: ClipPass) -> Tensor: ...


def chunk_bounds(t: int) -> list[tuple[int, int]]:
    """(start, stop) of the chunks in which a clip of `t` latent frames is decoded: [0:1], or [0:3], [3:5], [5:7] ...

    Raises:
        ValueError: t is even or below 1.
    """
    if t < 1 or t % 2 == 0:
        raise ValueError(
            f"{t} latent frames cannot be decoded as a clip: the number must be odd (1 image, or 3, 5, ..., 13), "
            f"since chunks of 3, 2, 2, ... frames make it up. Use {max(1, t - 1)} or {t + 1}, or decode in one go "
            "with chunked=False, which gives other frames."
        )
    return [(0, 1)] if t == 1 else [(0, 3), *((k, k + 2) for k in range(3, t, 2))]


class VideoAutoencoder(FirstStage):
    """Encoder, posterior and decoder, with gradients.

    Args:
        loss_config: built and held as `loss` for a trainer; default torch.nn.Identity.
        regularizer_config: from moments to latents; default a sampled diagonal Gaussian.
    """

    frozen = False
    encoder: ContextParallelEncoder3D
    decoder: ContextParallelDecoder3D
    ops: VaeOps = PLAIN  # implementation of the coders' operations
    share: FrameShare | None = None  # where several processes encode a clip

    def __init__(
        self,
        encoder_config: Annotated[Config, Role(ContextParallelEncoder3D)],
        decoder_config: Annotated[Config, Role(ContextParallelDecoder3D)],
        loss_config: Annotated[Config, TORCH_LOSS] | None = None,
        regularizer_config: Annotated[Config, Role(DiagonalGaussianRegularizer)] | None = None,
    ) -> None:
        super().__init__()
        self.encoder = instantiate_from_config(encoder_config)
        self.decoder = instantiate_from_config(decoder_config)
        self.loss = instantiate_from_config(loss_config) if loss_config else nn.Identity()
        self.strides = self.encoder.strides
        if self.strides != self.decoder.strides or self.encoder.out_channels != 2 * self.decoder.z_channels:
            raise ValueError(
                f"the encoder makes {self.encoder.out_channels} channels (mean and log variance) with {self.strides}, "
                f"the decoder takes {self.decoder.z_channels} with {self.decoder.strides}: give both one z_channels, "
                "double_z: true, one ch_mult and one temporal_compress_times."
            )
        given = regularizer_config
        self.regularization = instantiate_from_config(given) if given else DiagonalGaussianRegularizer()
        self.memory = MemoryPlan()

    @property
    def dtype(self) -> torch.dtype:
        """The parameters' type; inputs are converted to it."""
        return self.encoder.conv_in.conv.weight.dtype

    def forward(self, x: Tensor, noise: Tensor | None = None) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """A training pass in one go: x (b, 3, f, h, w) -> latents, reconstruction like x, {"kl_loss": scalar}."""
        with self._grad_mode(x):
            z, log = self.regularization(self.moments(x), _noise_source(noise))
        return z, self.decode(z, chunked=False), log

    def encode(self, x: Tensor, *, noise: Tensor | None = None, allow_any_length: bool = False) -> Tensor:
        """Latents of a clip or an image, drawn from the posterior.

        Args:
            x: (b, 3, f, h, w) in [-1, 1]; f = 1 or 4k + 1, h and w multiples of 8.
            noise: the posterior's; None: `randn_like(mean)`.
            allow_any_length: accept other f too, which give ceil(f / 4) latent frames. Wherever a level meets an even
                number of frames it pools all of them in pairs, frame 0 included: another function than for 4k + 1.
        Returns:
            z (b, c, t, h/8, w/8) with t = (f - 1) / 4 + 1, in the model's dtype, not scaled by `scale_factor`.
        Raises:
            ValueError: wrong shape or length.
        """
        with self._grad_mode(x):
            return self.regularization.latents(self.moments(x, allow_any_length=allow_any_length), _noise_source(noise))

    def moments(self, x: Tensor, *, allow_any_length: bool = False) -> Tensor:
        """Mean and log variance of the posterior, (b, 2c, t, h/8, w/8), for `encode`'s x."""
        self._check_pixels(x, allow_any_length)
        with self._grad_mode(x):
            # randn_like follows the memory layout, which must not change what a seed gives
            return self._run_encoder(x.to(self.dtype)).contiguous()

    def decode(self, z: Tensor, chunked: bool = True) -> Tensor:
        """Pixels of latents z (b, c, t, h', w') (already divided by `scale_factor`): (b, 3, f, 8h', 8w'), near [-1, 1].

        Args:
            chunked: as the model samples: latents [0:3], [3:5], ... one after the other, the convolutions' last frames
                carried along; t = 1 or odd, f = 4t - 3. Normalisations span a chunk, so this is not what False gives:
                all frames in one go, any t (f = 4t - 3 for odd t, 4t for even t).
        Raises:
            ValueError: wrong shape, or an even t with `chunked`.
        """
        if not chunked:
            return self._decode_bounds(z, [(0, self._check_latents(z))])
        return self._decode_bounds(z, chunk_bounds(self._check_latents(z)))

    def decode_chunks(self, z: Tensor, share: ChunkShare | None = None) -> Iterator[Tensor]:
        """`decode(z)` piece by piece, for a writer that streams: 9 (or 1) pixel frames first, then 8 at a time.

        With a `share`, only the pieces that are computed here.

        Raises:
            ValueError: as `decode`, at the call and not at the first piece.
        """
        return self._iterate(z, chunk_bounds(self._check_latents(z)), share)

    def piece_shapes(self, z: Tensor) -> list[tuple[int, int, int, int]]:
        """(f, height, width, 3) of each piece that `decode_chunks` gives of one clip's latents z."""
        time, space = self.strides.time, self.strides.space
        size, first = (z.shape[3] * space, z.shape[4] * space), time - 1  # frames that the first latent lacks
        return [((b - a) * time - first * (a == 0), *size, 3) for a, b in chunk_bounds(z.shape[2])]

    def set_low_memory(
        self, enabled: bool = True, *, slice_bytes: int = LOW_MEMORY_SLICE_BYTES, cache_on_cpu: bool = False
    ) -> None:
        """Bound the memory of encode and decode by exact means: convolutions and normalisations in runs of frames.

        Decoding then also makes the result of its last upsampling, the largest activation, three times over (6 % more
        arithmetic) rather than keep it.

        Args:
            slice_bytes: bytes of activations that one run may hold beside the input and output of a layer.
            cache_on_cpu: let frames wait in pinned host memory between chunks, copied while other layers compute
                (2.3 GiB less on the device at 480x720 in half precision).
        """
        self.memory = replace(
            self.memory,
            slice_bytes=slice_bytes if enabled else SLICE_BYTES,
            host_cache=enabled and cache_on_cpu,
            recompute=enabled,
        )

    def set_tiling(self, tile: tuple[int, int] | None = (240, 360), overlap: int = 64) -> None:
        """Work in spatial tiles with blended overlaps: an approximation, for frames that do not fit otherwise.

        Args:
            tile: height and width in pixels, multiples of 8; None turns tiles off.
            overlap: pixels, a multiple of 8, below both.
        """
        if tile is None:
            self.memory = replace(self.memory, tiling=None)
            return
        factor = self.decoder.strides.space
        if any(size % factor for size in (*tile, overlap)):
            raise ValueError(f"tile {tile} and overlap {overlap} must be multiples of {factor} pixels.")
        self.memory = replace(self.memory, tiling=Tiling(tile[0] // factor, tile[1] // factor, overlap // factor))

    def use_ops(self, ops: VaeOps) -> None:
        """Run both coders with this implementation of their operations."""
        self.ops = ops

    def set_channels_last(self) -> None:
        """Store convolution weights channels-last, in which cuDNN runs 3D convolutions in half precision faster."""
        for part in self.modules():
            if isinstance(part, nn.Conv2d | nn.Conv3d):
                layout = torch.channels_last if part.weight.ndim == 4 else torch.channels_last_3d
                part.weight.data = part.weight.data.contiguous(memory_format=layout)

    def load_file(
        self,
        path: str | Path,
        *,
        ignore_keys: Sequence[str] = (),
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """Read weights from `path`: a mapping, or one with the entry `state_dict`, in `.pt` or safetensors form.

        Args:
            ignore_keys: prefixes of names to leave out (a training file also holds its loss's networks).
            device, dtype: where and as what; None keeps what the parameters have.
        Raises:
            WeightsError: unreadable file, or names and shapes that do not fit; lists all of them.
        """
        state = read_checkpoint(path)
        state = state["state_dict"] if isinstance(state.get("state_dict"), Mapping) else state
        hint = ""
        if any(".resnets." in name for name in state):
            hint = "These are names of diffusers: convert the file with tools/convert_weight_hf2sat.py."
        assign_state(
            self, state, source=str(path), device=device, dtype=dtype, ignore_prefixes=tuple(ignore_keys), hint=hint
        )

    def _run_encoder(self, x: Tensor) -> Tensor:
        run = ClipPass(slice_bytes=self._slice_bytes(x), ops=self.ops)
        tiling, factor = self.memory.tiling, self.strides.space
        if tiling is None or x.shape[2] == 1:  # one frame needs no tiles, which would make it approximate
            shared = self.share is not None and not torch.is_grad_enabled() and self.share.takes(self.encoder, x)
            return self.share.encode(self.encoder, x, run) if shared and self.share else self.encoder(x, run)
        size = self.strides.latent_size(x.shape[3], x.shape[4])

        def render(_: int, rows: slice, cols: slice) -> Tensor:
            rows, cols = (slice(part.start * factor, part.stop * factor) for part in (rows, cols))
            return self.encoder(x[..., rows, cols], run)

        return blend_tiles(tiling.boxes(*size), render, size, scale=1)

    def _decode_bounds(self, z: Tensor, bounds: list[tuple[int, int]]) -> Tensor:
        """All pieces in one tensor, allocated once."""
        pieces = self._iterate(z, bounds)
        if self._wants_grad(z):
            return torch.cat(list(pieces), dim=2)
        first = next(pieces)
        if len(bounds) == 1:
            return first
        frames = self.decoder.strides.pixel_frames(z.shape[2])
        result = first.new_empty((*first.shape[:2], frames, *first.shape[3:]))
        result[:, :, : first.shape[2]] = first
        done = first.shape[2]
        del first
        for piece in pieces:
            result[:, :, done : done + piece.shape[2]] = piece
            done += piece.shape[2]
        return result

    def _iterate(self, z: Tensor, bounds: list[tuple[int, int]], share: ChunkShare | None = None) -> Iterator[Tensor]:
        tiling = self.memory.tiling
        size = (z.shape[3], z.shape[4])
        boxes = [(slice(0, size[0]), slice(0, size[1]))] if tiling is None else tiling.boxes(*size)
        with ExitStack() as clip:
            caches = [clip.enter_context(closing(cache_on(self.memory.host_cache, z.device))) for _ in boxes]
            for k, (start, stop) in enumerate(bounds):
                if share is not None:
                    if not share.owns(k):
                        continue
                    caches = [clip.enter_context(closing(share.cache(k))) for _ in boxes]
                # entered anew for each piece: a mode held across a yield would be the caller's, too
                with self._grad_mode(z):
                    chunk, is_last = z[:, :, start:stop].to(self.dtype), stop == bounds[-1][1]
                    limits = (min(self._slice_bytes(z), DECODE_SLICE_BYTES), self.ops, self.memory.recompute)
                    runs = [ClipPass(cache, is_last, *limits) for cache in caches]
                    piece = self._decode_chunk(chunk, boxes, runs)
                yield piece
                del piece

    def _decode_chunk(self, z: Tensor, boxes: list[tuple[slice, slice]], runs: list[ClipPass]) -> Tensor:
        if len(boxes) == 1:
            return self.decoder(z, runs[0])

        def render(index: int, rows: slice, cols: slice) -> Tensor:
            return self.decoder(z[..., rows, cols], runs[index])

        return blend_tiles(boxes, render, (z.shape[3], z.shape[4]), scale=self.decoder.strides.space)

    def _slice_bytes(self, x: Tensor) -> int:
        return min(self.memory.slice_bytes, CPU_SLICE_BYTES) if x.device.type == "cpu" else self.memory.slice_bytes

    def _wants_grad(self, x: Tensor) -> bool:
        """A frozen model tracks gradients only towards its input."""
        return torch.is_grad_enabled() and (x.requires_grad or not self.frozen)

    def _grad_mode(self, x: Tensor) -> torch.set_grad_enabled:
        return torch.set_grad_enabled(self._wants_grad(x))

    def _check_pixels(self, x: Tensor, any_length: bool) -> None:
        channels, factor, step = self.encoder.in_channels, self.strides.space, self.strides.time
        if x.ndim != 5 or x.shape[1] != channels:
            raise ValueError(f"encode takes (b, {channels}, f, h, w), got shape {tuple(x.shape)}.")
        frames, height, width = x.shape[2:]
        if height % factor or width % factor or 0 in x.shape:
            raise ValueError(
                f"encode takes a height and width that are multiples of {factor}, got {height}x{width}. "
                f"Resize or crop to {max(1, height // factor) * factor}x{max(1, width // factor) * factor}."
            )
        if not self.strides.is_whole(frames) and not any_length:
            below = self.strides.longest_clip(frames)
            raise ValueError(
                f"encode takes {self.strides.clip_lengths} frames (1, {step + 1}, {2 * step + 1}, ...), got {frames}. "
                f"Trim the clip to {below}, or pass allow_any_length=True for what the network does with other lengths."
            )

    def _check_latents(self, z: Tensor) -> int:
        """The number of latent frames, after a check of the shape."""
        channels = self.decoder.z_channels
        if z.ndim != 5 or z.shape[1] != channels or 0 in z.shape:
            raise ValueError(f"decode takes latents (b, {channels}, t, h/8, w/8), got shape {tuple(z.shape)}.")
        return z.shape[2]


class VideoAutoencoderInferenceWrapper(VideoAutoencoder):
    """The frozen autoencoder of a diffusion model: always in eval mode, no gradients of its own parameters.

    Built on the meta device it has a structure and no values until `load_weights`; otherwise the constructor loads
    `ckpt_path` where one is given.

    Args:
        small_decoder: file of a small decoder that may stand in for this one's (`sgm.models.small_decoder`); a run
            that wants it (`args.decoder`) loads it.
        ignore_keys: prefixes of names in `ckpt_path` to leave out.
        cp_size: processes that share a clip in sampling (`sgm.parallel`); 0 and 1 leave that to the run.
    Raises:
        WeightsError: the file does not exist, cannot be read or does not fit.
    """

    frozen = True

    def __init__(
        self,
        encoder_config: Annotated[Config, Role(ContextParallelEncoder3D)],
        decoder_config: Annotated[Config, Role(ContextParallelDecoder3D)],
        loss_config: Annotated[Config, TORCH_LOSS] | None = None,
        regularizer_config: Annotated[Config, Role(DiagonalGaussianRegularizer)] | None = None,
        ckpt_path: PathText | None = None,
        ignore_keys: Sequence[str] = (),
        cp_size: Count = 0,
        small_decoder: PathText | None = None,
    ) -> None:
        super().__init__(encoder_config, decoder_config, loss_config, regularizer_config)
        self.ckpt_path, self.ignore_keys, self.small_decoder = ckpt_path, tuple(ignore_keys), small_decoder
        self.cp_size = cp_size
        self.requires_grad_(False)
        self.eval()
        if ckpt_path is not None and not next(self.parameters()).is_meta:
            self.load_weights()

    def load_weights(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> None:
        """Load `ckpt_path`; see `load_file` for the arguments and errors."""
        if self.ckpt_path is None:
            raise ValueError("the autoencoder has no weight file: set first_stage_config.params.ckpt_path in the YAML.")
        self.load_file(self.ckpt_path, ignore_keys=self.ignore_keys, device=device, dtype=dtype)

    def drop_decoder(self) -> None:
        """Keep the encoder alone, also when weights are loaded from now on."""
        del self.decoder
        self.ignore_keys = (*self.ignore_keys, "decoder.")

    def train(self, mode: bool = True) -> VideoAutoencoderInferenceWrapper:
        """Stay in eval mode, whatever the model around it does."""
        return super().train(False)


def _noise_source(noise: Tensor | None) -> Callable[[Tensor], Tensor]:
    """From the posterior's mean to its noise."""

    def given(mean: Tensor) -> Tensor:
        assert noise is not None
        if noise.shape != mean.shape:
            raise ValueError(f"noise has shape {tuple(noise.shape)}, the latents have {tuple(mean.shape)}.")
        return noise.to(device=mean.device, dtype=mean.dtype)

    return torch.randn_like if noise is None else given
