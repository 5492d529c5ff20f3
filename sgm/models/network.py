"""The diffusion transformer: the mixins of `sgm.modules.transformer` on SAT's `BaseModel`.

Axes: b batch, t latent frames, c channels, h w latent height and width, l text tokens, d width, e time embedding.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, TypedDict, get_type_hints

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sgm.distributed import (
    broadcast_in_model_parallel,
    ensure_groups,
    model_parallel_world_size,
    preserve_rng,
    quiet_libraries,
)
from sgm.errors import SgmError
from sgm.models.network_args import TransformerArgs, check_sizes
from sgm.modules.autoencoding.strides import STRIDES
from sgm.modules.diffusionmodules.image_condition import OFS
from sgm.modules.diffusionmodules.util import timestep_embedding
from sgm.modules.ops.block_ops import BlockOps
from sgm.modules.transformer.adaln import AdaLNMixin, FinalLayerMixin
from sgm.modules.transformer.block import DiTTransformer, NetworkInputs
from sgm.modules.transformer.hooks import collect_hooks, require_called
from sgm.modules.transformer.lora import LoraMixin, SatLoraMixin
from sgm.modules.transformer.lora_state import OWN_MIXINS
from sgm.modules.transformer.patch_embed import PATCHES, ImagePatchEmbeddingMixin, Patch, PatchSize
from sgm.modules.transformer.positions import Divisor, PositionMixin
from sgm.modules.transformer.sat_base import BaseMixin, BaseModel
from sgm.typed import ConfigError, Layers, Range, Record, Size, Slots
from sgm.util import Config, Role, TargetError, get_obj_from_str, instantiate_from_config, split_config
from sgm.weights import DTYPES
from sgm.weights.assign import without_values
from sgm.weights.identify import PUBLISHED

logger = logging.getLogger(__name__)
MIXINS = ("pos_embed", "patch_embed", "adaln_layer", "final_layer")
# What a further mixin's constructor is given where it takes it and YAML lacks it.
OFFERED = (
    "hidden_size", "num_layers", "layer_num", "num_attention_heads", "hidden_size_head",
    "hidden_size_per_attention_head", "time_embed_dim",
)  # fmt: skip

Side = Annotated[int, Range(1, 4096)]  # in latent pixels
# Latent rows and columns that CogVideoX 1.5 was trained at; its table of positions is larger.
TRAINED_15 = STRIDES.latent_size(*PUBLISHED[3072, 42, 2, False].size)
Channels = Annotated[int, Range(1, 65536)]


class Adapter(TypedDict, total=False):
    """The mixin that a network may have."""

    lora_config: Annotated[Config, Role(SatLoraMixin, ("sgm.", "sat."), given=None)]


class Mixins(Adapter):
    """The mixins of a network."""

    pos_embed_config: Annotated[Config, Role(PositionMixin, given=None)]
    patch_embed_config: Annotated[Config, Role(ImagePatchEmbeddingMixin, given=None)]
    adaln_layer_config: Annotated[Config, Role(AdaLNMixin, given=None)]
    final_layer_config: Annotated[Config, Role(FinalLayerMixin, given=None)]


@dataclass(frozen=True)
class FurtherMixin(Role):
    """The slot of a mixin beyond a release's own: SAT's or the user's, of none of the other slots."""

    def find(self, name: str) -> Any:
        """The class of that name. Raises TargetError: there is none, or it is no such mixin."""
        if not self._takes(name):
            raise TargetError(f"{name!r} is no mixin: it must be derived from sat.model.base_model.BaseMixin")
        own = {slot: kind.__metadata__[0].base for slot, kind in get_type_hints(Mixins, include_extras=True).items()}
        for slot, base in own.items():
            if issubclass(get_obj_from_str(name), base):
                raise TargetError(f"{name!r} belongs under {slot}")
        return get_obj_from_str(name)


FURTHER = Annotated[Config, FurtherMixin(BaseMixin, ("sgm.", "sat."), given=None)]


class DiffusionTransformer(BaseModel):
    """Predicts the diffusion target of video latents from noisy latents, timestep and text (CogVideoX).

    The parameters are the keys of `network_config.params` in the original's YAML files.

    Args:
        num_frames: pixel frames of the longest clip, 4k + 1.
        latent_width, latent_height: latent size of the training resolution.
        patch_size: p (2B, 5B as released) or [pt, ph, pw] (later releases), see `PatchSize`.
        in_channels, out_channels: latent channels; `in_channels` includes a conditioning image's.
        elementwise_affine: norms have weights (all published models).
        time_embed_dim: width e of the time embedding; None means `hidden_size`.
        modules: configs of the mixins `pos_embed_config`, `patch_embed_config`, `adaln_layer_config`,
            `final_layer_config`, and optionally `lora_config` and further ones, each as NAME_config: they answer hooks,
            see `sgm.modules.transformer.hooks`.
        dtype: "fp32", "fp16" or "bf16": type of all weights and of the computation.
        ofs_embed_dim: width of the embedding of `ofs` (1.5 image-to-video); must equal `time_embed_dim`.
        height_interpolation, width_interpolation, time_interpolation: divisors of the positions, where the
            position mixin's own params do not give them.
        defer_lora: build without LoRA and further mixins; `attach_mixins` adds them once the base weights are in place.
        parallel_output: handed to SAT; this network's output is always whole.
        adm_in_channels: accepted and without effect, as in the original (there is no class conditioning).
        num_classes, use_RMSNorm, use_SwiGLU, zero_init_y_embed, input_time: names the original also knows; only the
            values of the published models are available.
    Raises:
        ConfigError: values that do not fit each other or are not available.
    """

    transformer: DiTTransformer

    def __init__(
        self,
        transformer_args: Annotated[Mapping[str, Any], Record(TransformerArgs)],
        num_frames: Size,
        time_compressed_rate: Size,
        latent_width: Side,
        latent_height: Side,
        patch_size: Patch | Sequence[Patch],
        in_channels: Channels,
        out_channels: Channels,
        hidden_size: Size,
        num_layers: Layers,
        num_attention_heads: Size,
        modules: Annotated[dict[str, Any], Slots(Mixins, "_config", FURTHER)],
        elementwise_affine: bool = True,
        time_embed_dim: Size | None = None,
        dtype: str = "fp32",
        parallel_output: bool = True,
        ofs_embed_dim: Size | None = None,
        height_interpolation: Divisor = 1.0,
        width_interpolation: Divisor = 1.0,
        time_interpolation: Divisor = 1.0,
        defer_lora: bool = False,
        num_classes: None = None,
        adm_in_channels: int | None = None,
        input_time: Literal["adaln"] = "adaln",
        use_SwiGLU: Literal[False] = False,
        use_RMSNorm: Literal[False] = False,
        zero_init_y_embed: Literal[False] = False,
    ):
        if adm_in_channels is not None:
            logger.info("network_config.params.adm_in_channels has no effect (nor in the original)")
        args = TransformerArgs.parse(transformer_args)
        check_sizes(hidden_size, num_attention_heads, args.model_parallel_size, dtype)
        patch = PatchSize.parse(patch_size)
        offers = dict(
            height=latent_height // patch.h,
            width=latent_width // patch.w,
            compressed_num_frames=(num_frames - 1) // time_compressed_rate + 1,
            latent_height=latent_height,
            latent_width=latent_width,
            hidden_size=hidden_size,
            hidden_size_head=hidden_size // num_attention_heads,
            hidden_size_per_attention_head=hidden_size // num_attention_heads,
            num_attention_heads=num_attention_heads,
            num_layers=num_layers,
            layer_num=num_layers,
            patch_size=patch_size,
            in_channels=in_channels,
            out_channels=out_channels,
            time_embed_dim=time_embed_dim or hidden_size,
            elementwise_affine=elementwise_affine,
            persistent=patch.per_frame,
            height_interpolation=height_interpolation,
            width_interpolation=width_interpolation,
            time_interpolation=time_interpolation,
        )
        ensure_groups(args.model_parallel_size)
        with preserve_rng(), quiet_libraries(), without_values():
            # SAT leaves process groups and seeds alone when it is handed a transformer.
            trunk = DiTTransformer(
                num_layers=num_layers,
                hidden_size=hidden_size,
                num_attention_heads=num_attention_heads,
                max_sequence_length=args.max_sequence_length,
                elementwise_affine=elementwise_affine,
                checkpoint_activations=args.checkpoint_activations,
                parallel_output=parallel_output,
                model_parallel_size=args.model_parallel_size,
                skip_init=args.skip_init,
                hooks={},
                params_dtype=DTYPES[dtype],
            )
            super().__init__(None, transformer=trunk)
            self.hidden_size, self.num_layers, self.patch = hidden_size, num_layers, patch
            self.in_channels, self.out_channels = in_channels, out_channels
            self.latent_height, self.latent_width = latent_height, latent_width
            self._build(modules, offers, ofs_embed_dim)
            self.to(DTYPES[dtype])
            if args.model_parallel_size > 1:  # what is not split starts from the first process's values
                for parameter in self.parameters():
                    if not getattr(parameter, "model_parallel", False) and not parameter.is_meta:
                        broadcast_in_model_parallel(parameter.data)
            if not defer_lora:
                self.attach_mixins()

    def _build(self, modules: Mapping[str, Any], offers: dict[str, Any], ofs_dim: int | None) -> None:
        """Mixins in the original's order, then the embeddings of time and ofs."""
        self._lora_config, self.ofs_embed_dim = modules.get("lora_config"), ofs_dim
        self._offers = offers
        self.further_configs: dict[str, Config] = {
            slot.removesuffix("_config"): config
            for slot, config in modules.items()
            if slot.removesuffix("_config") not in OWN_MIXINS
        }
        for name in MIXINS:
            self.add_mixin(name, _build_mixin(modules[f"{name}_config"], offers), reinit=True)
        if not self.positions.rotates:
            # The sine table replaces SAT's own; rotary models keep that one, unused, in their files.
            del self.transformer.position_embeddings
        width = offers["time_embed_dim"]
        self.time_embed = nn.Sequential(nn.Linear(self.hidden_size, width), nn.SiLU(), nn.Linear(width, width))
        if ofs_dim is not None:
            if ofs_dim != width:
                raise ConfigError(f"ofs_embed_dim {ofs_dim} must equal time_embed_dim {width}: they are added.")
            self.ofs_embed = nn.Sequential(nn.Linear(ofs_dim, ofs_dim), nn.SiLU(), nn.Linear(ofs_dim, ofs_dim))

    def collect_hooks_(self) -> dict[str, Any]:
        """SAT: gather the mixins' hooks. Raises HookError: one would not be called."""
        self.hooks, self.hook_origins, self._watched = collect_hooks(self, self.mixins)
        return self.hooks

    # --- parts: mixins by the names that files have for them ----------------------------------------------------------

    @property
    def positions(self) -> PositionMixin:
        """Position tables, or rotations."""
        return self.mixins.pos_embed

    @property
    def patches(self) -> ImagePatchEmbeddingMixin:
        """From latents and text to tokens."""
        return self.mixins.patch_embed

    @property
    def trained_size(self) -> tuple[int, int]:
        """Latent rows and columns that the model was trained at: those that it has positions for, and of 1.5 fewer."""
        own = (self.latent_height, self.latent_width)
        return TRAINED_15 if self.patch.t > 1 and own[0] >= TRAINED_15[0] and own[1] >= TRAINED_15[1] else own

    @property
    def modulation(self) -> AdaLNMixin:
        """What the time embedding does to each layer, and the layers' operations."""
        return self.mixins.adaln_layer

    # --- forward --------------------------------------------------------------------------------------------------

    @property
    def dtype(self) -> torch.dtype:
        """Type of the weights, and so of the computation and the result."""
        return next(self.time_embed.parameters()).dtype

    def forward(
        self,
        x: Tensor,
        timesteps: Tensor,
        context: Tensor,
        *,
        y: None = None,
        concat_images: Tensor | None = None,
        ofs: Tensor | None = None,
    ) -> Tensor:
        """Prediction (b, t, out_channels, h, w) in the model's type.

        Args:
            x: noisy latents (b, t, c, h, w); t up to the configured number, any h and w that are multiples of the
                patch (learned position tables fix them).
            timesteps: (b,), whole or real numbers.
            context: text embeddings (b, text_length, width).
            concat_images: latents (b or b/2, t, c', h, w) appended to the channels; a batch of half the size is
                repeated, for guidance.
            ofs: (b,) or (1,), only for models with `ofs_embed_dim`; None: the published model's 2.
        Raises:
            ValueError: shapes that do not fit the model.
        """
        if y is not None:
            raise ValueError("class conditioning (y) was given, but this network has none.")
        x = _append_images(x, concat_images).to(self.dtype)
        context = context.to(self.dtype)
        self._check_inputs(x, timesteps, context)
        grid = self.patch.grid(x.shape[1], *x.shape[3:])
        embedded = self._embed_time(timesteps, ofs)
        rotary = self.positions.rotary(grid, x)
        inputs = NetworkInputs(x, context, embedded, F.silu(embedded), grid, context.shape[1], rotary)
        names = inputs.by_original_names() if self._watched else {}
        ones = x.new_ones(1, 1)  # SAT's mark for no ids and no mask
        result = super().forward(ones, ones, ones, inputs=inputs, **names)[0]
        require_called(self._watched)
        return result

    def _embed_time(self, timesteps: Tensor, ofs: Tensor | None) -> Tensor:
        """(b, e): embedding of the timestep, plus that of ofs where the model has one."""
        embedded = self.time_embed(timestep_embedding(timesteps, self.hidden_size, dtype=self.dtype))
        if self.ofs_embed_dim is None:
            if ofs is not None:
                raise ValueError("this model takes no `ofs`.")
            return embedded
        ofs = timesteps.new_full((1,), OFS, dtype=torch.float32) if ofs is None else ofs
        return embedded + self.ofs_embed(timestep_embedding(ofs, self.ofs_embed_dim, dtype=self.dtype))

    def _check_inputs(self, x: Tensor, timesteps: Tensor, context: Tensor) -> None:
        if x.ndim != 5:
            raise ValueError(f"x must be (b, t, c, h, w), got {tuple(x.shape)}.")
        text_length, text_width = self.positions.text_length, self.patches.text_hidden_size
        expected = (x.shape[0], text_length, text_width)
        if tuple(context.shape) != expected:
            raise ValueError(
                f"text embeddings are {tuple(context.shape)}, this network takes {expected}: batch of x, text_length "
                "and text_hidden_size of its config. The text encoder's max_length must equal text_length."
            )
        if timesteps.shape != x.shape[:1]:
            raise ValueError(f"timesteps must be ({x.shape[0]},), one per sample of x, got {tuple(timesteps.shape)}.")
        channels = self.patches.in_channels
        if x.shape[2] != channels:
            raise ValueError(f"x has {x.shape[2]} channels (with concat_images), the network takes {channels}.")

    # --- for loading, adapters and memory management ----------------------------------------------------------------

    def attach_mixins(self) -> None:
        """Add the configured mixins that are not there yet: `attach_further`, then `attach_lora`."""
        self.attach_further()
        if self.has_lora_config and "lora" not in self.mixins:
            self.attach_lora()

    def attach_further(self) -> None:
        """Add the mixins beyond a release's own that are not there yet, with their initial values.

        Raises:
            ConfigError: one cannot be built.
            HookError: one would have no effect.
        """
        for name, config in self.further_configs.items():
            if name not in self.mixins:
                with preserve_rng(), quiet_libraries():
                    mixin = self._build_further(name, config).to(self.dtype)
                    self.add_mixin(name, mixin.train(self.training), reinit=True)

    def _build_further(self, name: str, config: Config) -> nn.Module:
        try:
            return _build_mixin(config, {offered: self._offers[offered] for offered in OFFERED})
        except Exception as error:
            if isinstance(error, SgmError) or not str(config["target"]).startswith("sat."):
                raise
            fault = f"modules.{name}_config: {config['target']} cannot be built: {type(error).__name__}: {error}"
            raise ConfigError(fault) from error

    def attach_lora(self, config: Mapping[str, Any] | None = None) -> None:
        """Add the LoRA mixin: `config` or the `lora_config` that the network was built with.

        Raises:
            ConfigError: there is no config, there is a LoRA mixin already, or the mixin is SAT's own under
                tensor parallelism, where its results are wrong.
        """
        config = config or self._lora_config
        if config is None:
            raise ConfigError("attach_lora: no config was given and modules has no lora_config.")
        if "lora" in self.mixins:
            raise ConfigError("attach_lora: this network already has a LoRA mixin; merge or remove it first.")
        ensure_groups(model_parallel_world_size())  # a run that ended in this process has taken them away
        with preserve_rng(), quiet_libraries():
            mixin = _build_mixin(config, {"layer_num": self.num_layers})
            if model_parallel_world_size() > 1 and not isinstance(mixin, LoraMixin):
                raise ConfigError(
                    f"{type(mixin).__module__}.{type(mixin).__name__} gives wrong results under tensor parallelism; "
                    f"use {LoraMixin.__module__}.{LoraMixin.__name__}, which reads and writes the same tensors."
                )
            self.add_mixin("lora", mixin, reinit=True)

    @property
    def has_lora_config(self) -> bool:
        """Whether the network was configured with a LoRA mixin, attached or not."""
        return self._lora_config is not None

    def lora_facts(self) -> dict[str, Any]:
        """What the configured LoRA mixin says of the factor on its matrices: "alpha", "rank_stabilised"."""
        params = (self._lora_config or {}).get("params") or {}
        names = {"lora_alpha": "alpha", "rank_stabilised": "rank_stabilised"}
        return {fact: params[name] for name, fact in names.items() if name in params}

    def computed_state(self) -> dict[str, Tensor]:
        """Entries that a published file may lack and that the configuration determines: float32, on the CPU."""
        table = self.positions.computed_state()
        return {f"mixins.pos_embed.{name}": value for name, value in table.items()}

    def dead_keys(self) -> list[str]:
        """Entries of the state dict that nothing reads; files may lack them."""
        return [name for name in self.state_dict() if name.startswith("transformer.position_embeddings.")]

    def in_own_form(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """A file's entries as this network has them, whichever version of the original it comes from.

        Patches of one frame are embedded by a convolution or by a linear layer, with the same numbers; the tables of
        rotations are kept in files or not.
        """
        patches, own = PATCHES, self.patches.proj.weight
        tables = () if self.positions.computed_state() else ("mixins.pos_embed.freqs_sin", "mixins.pos_embed.freqs_cos")
        found = {name: value for name, value in state.items() if name not in tables}
        given = found.get(patches)
        if given is not None and len(given) == len(own) and given.numel() == own.numel():
            found[patches] = given.reshape(own.shape)
        return found

    def lacks_image_channels(self, state: Mapping[str, Tensor]) -> bool:
        """Whether a file's patch projection would fit with twice its channels, as an image-to-video network's does."""
        given, own = state.get(PATCHES), self.patches.proj.weight
        takes_image = self.in_channels == 2 * self.out_channels
        return takes_image and given is not None and len(given) == len(own) and 2 * given.numel() == own.numel()

    def use_ops(self, ops: BlockOps) -> None:
        """Run the blocks with this implementation of their operations."""
        self.modulation.ops = ops

    def streamable_blocks(self) -> list[list[nn.Module]]:
        """For each layer, the modules it needs: the layer itself first (the one that is called), then the mixins'."""
        return [[layer, *self.modulation.layer_parts(i)] for i, layer in enumerate(self.transformer.layers)]


def _build_mixin(config: Mapping[str, Any], offers: Mapping[str, Any]) -> nn.Module:
    """Build a mixin from its config, with those of the network's values that its constructor takes and YAML lacks."""
    target, params = split_config(config)
    taken = inspect.signature(get_obj_from_str(target)).parameters
    return instantiate_from_config(config, **{k: v for k, v in offers.items() if k in taken and k not in params})


def _append_images(x: Tensor, images: Tensor | None) -> Tensor:
    if images is None:
        return x
    if images.shape[0] * 2 == x.shape[0]:
        images = images.repeat(2, 1, 1, 1, 1)
    expected = (*x.shape[:2], images.shape[2], *x.shape[3:])
    if tuple(images.shape) != expected:
        raise ValueError(f"concat_images is {tuple(images.shape)}; with x {tuple(x.shape)} it must be {expected}.")
    return torch.cat((x, images.to(x)), dim=2)
