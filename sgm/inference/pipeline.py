"""Text, picture or clip to video. The engine's parts are loaded when first needed and placed as the run asks.

`Pipeline` knows tensors, not files of results; `sgm.inference.runner` goes through prompts and writes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

from sgm.config import RunConfig
from sgm.data.video_out import to_uint8
from sgm.inference.adapters import read_adapter, with_adapters
from sgm.inference.few_steps import with_few_steps
from sgm.inference.fit import (
    SamplingError,
    Scaled,
    check_finite,
    check_fit,
    check_latents,
    check_same_model,
    check_shortcuts,
    shortcuts_of,
    video_size,
)
from sgm.inference.length import CLEAN_BELOW
from sgm.inference.options import SampleArgs
from sgm.inference.placement import Placement
from sgm.inference.rehearsal import compile_ahead, run_block, run_decoder
from sgm.inference.setup import for_inference
from sgm.inference.stages import Stages, Use
from sgm.inference.visual import NOTHING, InMemory
from sgm.models.autoencoder import VideoAutoencoder
from sgm.models.diffusion import SATVideoDiffusionEngine
from sgm.models.loading import (
    Adapter,
    LoadedNetwork,
    load_first_stage,
    load_network,
    load_text_encoder,
    replace_adapters,
)
from sgm.models.small_decoder import load_small_decoder
from sgm.modules.autoencoding.small_decoder import SmallDecoder
from sgm.modules.diffusionmodules.guiders import DynamicCFG
from sgm.modules.ops.choice import choose_kernels
from sgm.modules.ops.fp8 import check_fp8
from sgm.modules.transformer.quantize import quantize_network
from sgm.parallel.apply import share_network
from sgm.parallel.team import ParallelError, Team
from sgm.util import instantiate_from_config
from sgm.weights import weights_fingerprint
from sgm.weights.checksums import Checks

Part = Literal["conditioner", "network", "first_stage", "small_decoder"]

PREVIEWED = 4  # latent frames that a preview by the full decoder shows


@dataclass
class WeightFacts:
    """Which weights a run used, for its records."""

    network: LoadedNetwork | None = None
    first_stage: str | None = None
    text_encoder: str | None = None
    notes: list[str] = field(default_factory=list)


class Pipeline(Stages):
    """The stages of a run configuration, on one device.

    Its text encoder's files are looked up at once (not read), unless it is built `with_text_encoder=False`, to plan or
    to decode latents only.
    """

    def __init__(self, config: RunConfig[SampleArgs], device: torch.device, *, with_text_encoder: bool = True):
        config, self.notes = with_few_steps(with_adapters(config))  # what is to be said of it
        self.placement = Placement(config.args.placement, device)
        model = for_inference(config.model)
        if not with_text_encoder:
            del model["conditioner_config"]
        with torch.device("meta"):
            engine = SATVideoDiffusionEngine(**model, dtype=config.args.dtype)
        super().__init__(engine.eval().requires_grad_(False), device)
        if config.accelerate.fp8:
            check_fp8(device)
        self.facts = WeightFacts()
        self._decoder_compiles = False
        self._small_decoder: SmallDecoder | None = None
        self._loaded: set[Part] = set()
        self._adapters: list[str] | None = None  # that the network has; None: no base is there yet, or in between
        self._checks = Checks()  # of what was loaded; nothing that came of it leaves here before they are done
        self._arrange(config)

    def ask(self, config: RunConfig[SampleArgs], held: InMemory = NOTHING) -> None:
        """Take another configuration; what is loaded stays, but for adapters that it does not name.

        Args:
            held: in place of the picture and the clip that `config` names.
        Raises:
            ConfigError: it differs in what is decided when a model is loaded.
            SamplingError: its options do not fit the model, or each other.
        """
        check_same_model(self.config, config)
        config, self.notes = with_few_steps(with_adapters(config))
        self.engine.sampler = instantiate_from_config(config.model["sampler_config"])
        self._arrange(config, held)
        if self.args.lora != self._adapters:
            self._loaded.discard("network")

    def _arrange(self, config: RunConfig[SampleArgs], held: InMemory = NOTHING) -> None:
        """Let kernels, sampler, guider and the rooms for pictures and clips be as `config` has them."""
        self.config, args, fast = config, config.args, config.accelerate
        self.engine.use_kernels(choose_kernels(fast.kernels, fast.attention, self.device, fast.cpu_bf16))
        if args.share_taken is not None and self.engine.has_sampler:
            self.engine.sampler.strength = args.share_taken
        check_fit(self.engine, args, video_size(self.engine, args))
        self.take(args, shortcuts_of(fast), held)
        sampler = self.engine.sampler
        check_shortcuts(self.shortcuts, sampler, self.num_steps)
        sampler.verbose = False  # the caller shows progress
        sampler.clean_below = CLEAN_BELOW  # of what windows and clips hand on
        guider = sampler.guider
        if args.guidance_scale is not None and isinstance(guider, Scaled):  # else it did not fit
            # Set on the guider: the release's one ignores a scale that is given to a call, as in the original.
            guider.scale = args.guidance_scale
        if args.share_taken is not None and isinstance(guider, DynamicCFG):
            guider.num_steps = self.num_steps  # its curve is that of the steps taken, as in diffusers

    def join(self, team: Team) -> None:
        """Make videos together with the other processes of a team, which make the same calls.

        Raises:
            ParallelError: the network, or an approximation, cannot be shared.
        """
        if team.size > 1 and self.config.accelerate.reuse_error:
            raise ParallelError(
                "accelerate.reuse_error lets each process decide by what it measures: leave it out "
                "(configs/fast.yaml), or args.cfg_parallel and args.sequence_parallel_size."
            )
        share_network(self.engine, team)
        self.team = team

    @property
    def max_batch(self) -> int:
        """Samples that run together. Where errors are measured each decides for itself, so that its company changes
        nothing; with the single random stream they follow each other as in the original."""
        alone = self.args.seed_mode == "upstream" or self.config.accelerate.reuse_error
        return 1 if alone else self.args.max_batch

    # --- loading --------------------------------------------------------------------------------------------------

    def load(self, part: Part) -> None:
        """Read a part's weights unless they are there. Whether a file is damaged is told when it is first used."""
        if part not in self._loaded:
            with self._checks.collecting():
                self._load(part)
            self._loaded.add(part)

    def _load(self, part: Part) -> None:
        device, dtype = self.placement.load_device, self.engine.dtype
        if part == "conditioner":
            self.facts.text_encoder = load_text_encoder(self.engine.text_conditioner, device=device, dtype=dtype)
        elif part == "first_stage":
            self.facts.first_stage = load_first_stage(self.engine.autoencoder, device=device, dtype=dtype)
            self._arrange_first_stage()
        elif part == "small_decoder":
            self._load_small_decoder(device, dtype)
        else:
            if self._fuses_on_gpu and self.facts.network is None:
                compile_ahead(partial(run_block, self.engine, self.latent_shape))
            self.facts.network = self._load_network(device, dtype)

    @property
    def _fuses_on_gpu(self) -> bool:
        return self.engine.kernels.fused and self.device.type == "cuda"

    def _compile_decoder(self) -> None:
        """Begin to, once, by means of a second one without values."""
        section = self.config.model.get("first_stage_config")
        if not self._fuses_on_gpu or self._decoder_compiles or not section or self.args.decoder == "small":
            return
        self._decoder_compiles = True
        with torch.device("meta"):
            stage: VideoAutoencoder = instantiate_from_config(section)
        stage.to(self.engine.dtype).eval().use_ops(self.engine.kernels.vae)
        shape = (self.visual.length.decoded, *self.latent_shape[1:])
        compile_ahead(partial(run_decoder, stage, shape, self.engine.dtype))

    def _load_small_decoder(self, device: torch.device, dtype: torch.dtype) -> None:
        stage = self.engine.autoencoder
        if not (stage.small_decoder and stage.ckpt_path):
            raise SamplingError("--decoder small needs ckpt_path and small_decoder in first_stage_config.params.")
        # on a CPU its activations have the type of its products: conversions would take longer than these
        dtype = torch.bfloat16 if self.engine.kernels.cpu_bf16 else dtype
        self._small_decoder = load_small_decoder(stage.small_decoder, stage.ckpt_path, device=device, dtype=dtype)
        self.facts.first_stage = weights_fingerprint(stage.ckpt_path)

    def _arrange_first_stage(self) -> None:
        stage, lean = self.engine.autoencoder, self.placement.kind == "lean"
        if self.engine.kernels.fused or (lean and self.device.type == "cuda"):
            # In the other layout cuDNN turns its input and result around, in memory of its own.
            stage.set_channels_last()
        stage.set_low_memory(lean, cache_on_cpu=lean)
        if self.args.vae_tiling:
            stage.set_tiling()

    def _load_network(self, device: torch.device, dtype: torch.dtype) -> LoadedNetwork:
        """The base, unless it is there, with the adapters that are asked for."""
        if not self.args.load:
            raise SamplingError("args.load is not set: give the transformer weights (release folder or file).")
        network, loaded = self.engine.network, self.facts.network
        adapters = [Adapter.parse(text) for text in self.args.lora]
        if loaded is None:
            allow_absent = self.args.force_inference
            loaded = load_network(
                network, self.args.load, device=device, dtype=dtype, allow_absent=allow_absent, adapters=adapters,
                read=read_adapter, merge=self.args.merge_lora,
            )  # fmt: skip
            self.facts.notes += loaded.notes
        elif self.args.lora == self._adapters:
            return loaded
        elif self.config.accelerate.fp8:
            raise SamplingError("the adapters of a network in 8-bit floats (accelerate.fp8) cannot be changed.")
        else:
            self._adapters, told = None, len(loaded.notes)
            self.placement.forget(self.engine.model)
            replace_adapters(network, loaded, self.args.load, adapters, read=read_adapter, merge=self.args.merge_lora)
            self.facts.notes += loaded.notes[told:]
        self._adapters = list(self.args.lora)
        if self.config.accelerate.fp8:
            quantize_network(network)
        return loaded

    @property
    def small_decoder_weights(self) -> str | None:
        """Fingerprint of the small decoder's file; None where the full one decodes."""
        file = self.engine.autoencoder.small_decoder if self.args.decoder == "small" else None
        return weights_fingerprint(file) if file else None

    @property
    def decoder_part(self) -> Part:
        """What decodes."""
        return "small_decoder" if self.args.decoder == "small" else "first_stage"

    def is_loaded(self, part: Part) -> bool:
        return part in self._loaded

    def drop_text_encoder(self) -> None:
        """Free the text encoder when no further prompt will come."""
        if "conditioner" in self._loaded:
            self.placement.forget(self.engine.text_conditioner)
            self.engine.text_conditioner.to("meta")
            self._loaded.discard("conditioner")

    # --- the stages, with parts that are loaded and placed ---------------------------------------------------------

    @contextmanager
    def using(self, part: Use) -> Iterator[None]:
        """That part is loaded, and on the device for the time of the block."""
        module, blocks = self._ready(part)
        with self._checks.first(), self.placement.use(module, blocks, pin=part == "network"):
            yield

    def _ready(self, part: Use) -> tuple[nn.Module, Sequence[Sequence[nn.Module]]]:
        """It, loaded, and the blocks in which it can be streamed."""
        if part == "conditioner":
            self.load("conditioner")
            return self.engine.text_conditioner, [[block] for block in self.engine.text_encoder.blocks()]
        if part == "network":
            self.load("network")
            return self.engine.model, self.engine.network.streamable_blocks()
        self.load(self.decoder_part if part == "decoder" else "first_stage")
        return _decoding_part(self.decoder) if part == "decoder" else self.engine.autoencoder.encoder, ()

    def check(self, x: Tensor, what: str) -> None:
        """Raises SamplingError: it is not finite."""
        check_finite(x, what, self.args.dtype)

    @property
    def decoder(self) -> VideoAutoencoder | SmallDecoder:
        """What decodes."""
        small = self._small_decoder if self.args.decoder == "small" else None
        return small or self.engine.autoencoder

    def after_step(self) -> None:
        """The GPU has a step to work at: see whether weights are whole, and begin to compile the decoder."""
        self._checks.wait()
        if not self.args.only_save_latents:
            self._compile_decoder()

    def decode(self, latents: Tensor) -> np.ndarray:
        """See `Stages`."""
        check_latents(self.engine, latents, any_length=self.args.decoder == "small")
        self._compile_decoder()
        frames = super().decode(latents)
        self._checks.wait()
        return frames

    def preview(self, latents: Tensor) -> np.ndarray:
        """What is foreseen of one sample (t, c, h, w) while it is made: uint8 (f, height, width, 3).

        By the small decoder where the configuration names one; else up to `PREVIEWED` of its latent frames, each
        decoded alone, as a picture.
        """
        stage, z = self.engine.autoencoder, self.unscaled(latents)
        if stage.small_decoder and Path(stage.small_decoder).exists():
            self.load("small_decoder")
            small, parts = self._small_decoder, [z]
        else:
            self.load("first_stage")
            shown = np.linspace(0, z.shape[2] - 1, min(PREVIEWED, z.shape[2])).round().astype(int)
            small, parts = None, [z[:, :, k : k + 1] for k in shown.tolist()]
        decoder = small or stage
        with torch.no_grad(), self.placement.use(_decoding_part(decoder)):
            pieces = [to_uint8(x)[0] for part in parts for x in decoder.decode_chunks(part.to(decoder.dtype))]
            return np.concatenate([piece.cpu().numpy() for piece in pieces])


def _decoding_part(decoder: VideoAutoencoder | SmallDecoder) -> nn.Module:
    return decoder if isinstance(decoder, SmallDecoder) else decoder.decoder
