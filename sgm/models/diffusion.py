"""The engine: one prompt's way and one clip's way through conditioner, network, sampler and first stage.

No files, no printing, no devices chosen here: `sgm.inference` and `sgm.training` decide where parts lie and what is
written. Axes: b batch, t latent frames, f pixel frames, c channels, h w (latent or pixel) height and width.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, Protocol, TypeVar

import torch
from torch import Tensor, nn

from sgm.distributed import same_for_clip
from sgm.models.autoencoder import VideoAutoencoderInferenceWrapper
from sgm.modules.autoencoding.first_stage import FirstStage
from sgm.modules.autoencoding.strides import STRIDES, Strides
from sgm.modules.conditioner import GeneralConditioner
from sgm.modules.diffusionmodules.denoiser import Denoiser, DiscreteDenoiser, Network
from sgm.modules.diffusionmodules.few_steps import FewSteps
from sgm.modules.diffusionmodules.image_condition import drop_first, image_latents, scales_image_latents
from sgm.modules.diffusionmodules.loss import Loss, VideoDiffusionLoss, add_noise
from sgm.modules.diffusionmodules.sampling import DenoiserFn, VideoDDIMSampler
from sgm.modules.diffusionmodules.shortcuts import ShortcutRun
from sgm.modules.diffusionmodules.wrappers import NetworkWrapper, OpenAIWrapper
from sgm.modules.encoders.modules import FrozenT5Embedder
from sgm.modules.ops.choice import Kernels
from sgm.modules.ops.graphs import NetworkGraphs
from sgm.modules.ops.recompute import ActivationOffload
from sgm.modules.transformer.lora_state import further_mixin
from sgm.typed import ConfigError, NotNegative, Positive, Share
from sgm.util import Config, Role, check_params, get_obj_from_str, instantiate_from_config
from sgm.weights import DTYPES
from sgm.weights.streaming import FrozenStream

if TYPE_CHECKING:
    from sgm.models.network import DiffusionTransformer  # at run time its `target:` brings it, and SAT with it

FROZEN_PARTS = ("first_stage_model", "conditioner")
LORA_MARKS = ("matrix_A", "matrix_B")

Cond = dict[str, Tensor]
T = TypeVar("T")


class BranchShare(Protocol):
    """The branch of a guided call (2b, unconditional half first) that is computed here."""

    def around(self, denoiser: DenoiserFn, samples: int) -> DenoiserFn: ...


class SATVideoDiffusionEngine(nn.Module):
    """Latent video diffusion: `conditioner`, `first_stage_model` and `model.diffusion_model` under one roof.

    The constructor's arguments are the keys of a YAML file's `model:` section. Parts whose config is None are left
    out (training from cached latents and embeddings needs neither VAE nor text encoder). Built under
    `torch.device("meta")`, nothing is read and no memory is used; `sgm.models.loading` fills the parts later.

    Args:
        dtype: "fp32", "fp16" or "bf16": type of all three parts' weights. Denoiser, sampler and loss stay in float32.
        scale_factor: latents handed to the network are `scale_factor` times the first stage's.
        input_key: entry of a training batch with the clip, (b, f, 3, h, w) in [-1, 1].
        latent_input: the batch holds first-stage samples (b, c, t, h, w), unscaled, in place of pixels.
        noised_image_input: the network reads an image's latents behind the noise, `in_channels` = 2 `out_channels`, and
            is trained with the first frame's; None: so it is where the channels are so.
        noised_image_all_concat: those latents stand beside every frame, not beside the first alone.
        noised_image_dropout: share of training batches whose image latents are zero.
        scale_image_latents: they are multiplied by `scale_factor`; None: as the published models were trained, see
            `image_condition.scales_image_latents`.
        augmentation_dropout, lora_train, use_pd, lr_scale, en_and_decode_n_samples_a_time: names that the original's
            later files know; without effect.
        not_trainable_prefixes: parameter-name prefixes that stay frozen; "all" leaves LoRA matrices and the mixins that
            `modules` has beyond a release's own.
        also_trainable_prefixes: beside "all", parameter-name prefixes of what is trained whole all the same, such as
            `model.diffusion_model.mixins.patch_embed.proj`: it is saved with the adapter.
        also_trainable_rate: factor on the learning rate of these; whole weights bear less than an adapter's.
        log_keys: without effect; validation logs captions.

    Attributes:
        model: wrapper around the network, as denoiser and loss call it.
        image_scale: image latents handed to the network are this times the first stage's.
        conditioner, first_stage_model, loss_fn: None where their config is; who cannot do without takes
            `text_conditioner`, `first_stage`, `loss`, `sampler` instead, which are never None.
    """

    model: NetworkWrapper[DiffusionTransformer]
    conditioner: GeneralConditioner | None
    first_stage_model: FirstStage | None
    denoiser: Denoiser
    loss_fn: Loss | None

    def __init__(
        self,
        network_config: Annotated[Config, Role("sgm.models.network.DiffusionTransformer")],
        denoiser_config: Annotated[Config, Role(Denoiser)],
        conditioner_config: Annotated[Config, Role(GeneralConditioner)] | None = None,
        first_stage_config: Annotated[Config, Role(FirstStage)] | None = None,
        sampler_config: Annotated[Config, Role(VideoDDIMSampler)] | None = None,
        loss_fn_config: Annotated[Config, Role(Loss)] | None = None,
        network_wrapper: Annotated[str, Role(NetworkWrapper)] | None = None,
        scale_factor: Positive = 1.0,
        latent_input: bool = False,
        noised_image_input: bool | None = None,
        noised_image_all_concat: bool = False,
        noised_image_dropout: Share = 0.0,
        scale_image_latents: bool | None = None,
        input_key: str = "mp4",
        log_keys: Sequence[str] = (),
        not_trainable_prefixes: Sequence[str] = FROZEN_PARTS,
        also_trainable_prefixes: Sequence[str] = (),
        also_trainable_rate: Positive = 1.0,
        disable_first_stage_autocast: bool = True,
        augmentation_dropout: Share = 0.0,
        lora_train: bool = False,
        use_pd: bool = False,
        lr_scale: NotNegative | None = None,
        en_and_decode_n_samples_a_time: int | None = None,
        dtype: str = "fp32",
    ):
        super().__init__()
        self.dtype = DTYPES[dtype]
        self.scale_factor = float(scale_factor)
        self.latent_input = latent_input
        self.input_key = input_key
        self.not_trainable_prefixes = tuple(not_trainable_prefixes)
        self.also_trainable_prefixes = tuple(also_trainable_prefixes)
        self.also_trainable_rate = float(also_trainable_rate)
        self.first_stage_autocast = not disable_first_stage_autocast
        self.kernels = Kernels()
        self.few_steps: FewSteps | None = None  # how it is sampled, if it is a student
        self.base: Network | None = None  # what the network was, for samples of a batch that are to keep it
        self.base_weight = 1.0  # of their loss
        self.frozen: FrozenStream | None = None  # the network's frozen weights, where they lie on the host
        self.branches: BranchShare | None = None  # where other processes compute the other branch of guidance

        nodes = check_params(
            "the engine",
            SATVideoDiffusionEngine,
            {"network_config": network_config, "denoiser_config": denoiser_config, "sampler_config": sampler_config,
             "conditioner_config": conditioner_config, "first_stage_config": first_stage_config,
             "loss_fn_config": loss_fn_config, "network_wrapper": network_wrapper},
            "model",
        )  # fmt: skip
        wrapper = get_obj_from_str(network_wrapper) if network_wrapper else OpenAIWrapper
        network = instantiate_from_config(nodes["network_config"], dtype=dtype)
        self.model = wrapper(network, dtype=self.dtype)
        reads_image = network.in_channels > network.out_channels
        self.noised_image_input = reads_image if noised_image_input is None else noised_image_input
        self.noised_image_all_concat = noised_image_all_concat
        self.noised_image_dropout = float(noised_image_dropout)
        scaled = scales_image_latents(network.patch.t) if scale_image_latents is None else scale_image_latents
        self.scales_image_latents = scaled
        self.image_scale = self.scale_factor if scaled else 1.0
        self.conditioner = _build_frozen(nodes["conditioner_config"], self.dtype)
        self.first_stage_model = _build_frozen(nodes["first_stage_config"], self.dtype)
        self.denoiser = instantiate_from_config(nodes["denoiser_config"])
        self._sampler: VideoDDIMSampler | None = _build(nodes["sampler_config"])
        self.loss_fn = _build(nodes["loss_fn_config"])

    # --- parts; those that a configuration may lack raise ConfigError ---------------------------------------------

    @property
    def network(self) -> DiffusionTransformer:
        """The transformer."""
        return self.model.diffusion_model

    @property
    def text_conditioner(self) -> GeneralConditioner:
        """The conditioner."""
        return _required(self.conditioner, "conditioner")

    @property
    def text_encoder(self) -> FrozenT5Embedder:
        """The conditioner's first embedder."""
        embedder = self.text_conditioner.embedders[0]
        if not isinstance(embedder, FrozenT5Embedder):
            raise ConfigError(f"this engine has no text encoder: captions are embedded by {_class_name(embedder)}")
        return embedder

    @property
    def first_stage(self) -> FirstStage:
        """The autoencoder, or what stands in for it."""
        return _required(self.first_stage_model, "first_stage")

    @property
    def strides(self) -> Strides:
        """How clips and latents belong together; the releases' where there is no first stage."""
        return STRIDES if self.first_stage_model is None else self.first_stage_model.strides

    @property
    def autoencoder(self) -> VideoAutoencoderInferenceWrapper:
        """The first stage, where it is the autoencoder itself."""
        stage = self.first_stage
        if not isinstance(stage, VideoAutoencoderInferenceWrapper):
            raise ConfigError(f"this engine has no autoencoder: its first stage is {_class_name(stage)}")
        return stage

    @property
    def loss(self) -> Loss:
        """The training loss."""
        return _required(self.loss_fn, "loss_fn")

    @property
    def has_sampler(self) -> bool:
        """Whether the configuration has a sampler."""
        return self._sampler is not None

    @property
    def sampler(self) -> VideoDDIMSampler:
        """The sampler."""
        return _required(self._sampler, "sampler")

    @sampler.setter
    def sampler(self, sampler: VideoDDIMSampler) -> None:
        self._sampler = sampler

    def use_kernels(self, kernels: Kernels) -> None:
        """Run network and first stage with these implementations of their operations."""
        self.kernels = kernels
        self.network.use_ops(kernels.block)
        if self.first_stage_model is not None:
            self.first_stage_model.use_ops(kernels.vae)

    def use_graphs(self) -> None:
        """Train with CUDA graphs of the network; its trainable parameters, on the GPU, stay where they are from now on.

        Raises:
            ValueError: a `network_wrapper` that is not made for it.
        """
        if not isinstance(self.model, OpenAIWrapper):
            raise ValueError(f"args.cuda_graphs does not go with the network_wrapper {type(self.model).__name__}.")
        self.model.graphs = NetworkGraphs(self.network)

    def offload_activations(self, offload: ActivationOffload) -> None:
        """Train with the inputs of checkpointed layers on the host until their backward pass."""
        self.network.transformer.offload = offload

    def stream_frozen(self, device: torch.device, pin: bool) -> None:
        """Train with the frozen weights of the network's blocks on the host; all else lies on `device`."""
        self.frozen = FrozenStream(self.network.streamable_blocks(), device, pin)

    # --- pixels <-> latents ---------------------------------------------------------------------------------------

    @torch.no_grad()
    def encode_first_stage(self, x: Tensor) -> Tensor:
        """Pixels (b, 3, f, h, w) in [-1, 1] to scaled latents (b, c, t, h/8, w/8), a draw from the posterior.

        With `latent_input`, x is such a draw already.
        """
        if self.latent_input:
            return x * self.scale_factor
        with self._first_stage_precision(x.device):
            z = self.first_stage.encode(x.to(self.dtype))
        return z * self.scale_factor

    @torch.no_grad()
    def encode_image(self, x: Tensor, frames: int, noise: Tensor | None = None) -> Tensor:
        """What the network reads of images (b, 3, 1, h, w) in [-1, 1], see `image_latents`.

        A draw from the posterior, with `noise` (b, c, 1, h/8, w/8) where it is given.
        """
        with self._first_stage_precision(x.device):
            moments = self.first_stage.moments(x.to(self.dtype))
            draw = torch.randn_like if noise is None else noise.to
            z = self.first_stage.regularization.latents(moments, draw)
        return self.image_latents(z, frames)

    def image_latents(self, z: Tensor, frames: int) -> Tensor:
        """First-stage latents (b, c, 1, h, w) of images as the network reads them: (b, `frames`, c, h, w)."""
        return image_latents(z.transpose(1, 2) * self.image_scale, frames, self.noised_image_all_concat)

    def drop_first(self, z: Tensor) -> Tensor:
        """Of sampled latents (b, t, c, h, w) those that are decoded: all but the first where patches need t even."""
        return drop_first(z, self.network.patch.t)

    def _first_stage_precision(self, device: torch.device) -> torch.autocast:
        enabled = self.first_stage_autocast and self.dtype != torch.float32
        return torch.autocast(device.type, dtype=self.dtype, enabled=enabled)

    # --- text -----------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def condition(self, prompts: Sequence[str], negative_prompts: Sequence[str] | None = None) -> tuple[Cond, Cond]:
        """Conditioning of each prompt and of its negative, `{"crossattn": (b, l, d)}` each.

        As in the original an empty negative prompt means zeros, not the embedding of "" (`force_uc_zero_embeddings`);
        as soon as one negative prompt has text, all are embedded.
        """
        negatives = list(negative_prompts) if negative_prompts else [""] * len(prompts)
        return self.text_conditioner.get_unconditional_conditioning(
            {"txt": list(prompts)},
            batch_uc={"txt": negatives},
            force_uc_zero_embeddings=None if any(negatives) else ["txt"],
        )

    @torch.no_grad()
    def condition_batch(self, batch: Mapping[str, Any]) -> tuple[Cond, Cond]:
        """Conditioning of a training batch without dropout, and zeros of the same shapes to steer away from."""
        return self.text_conditioner.get_unconditional_conditioning(batch, force_uc_zero_embeddings=["txt"])

    # --- training -------------------------------------------------------------------------------------------------

    def forward(self, z: Tensor, batch: Mapping[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss of scaled latents z (b, t, c, h, w) under the conditioning of `batch`: scalar, and what to log.

        That is `loss`, and from a loss function that tells them, per sample (b,) `sample_loss` and `timestep_share`.
        """
        parts = (self.model, self.denoiser, self.text_conditioner)
        if not isinstance(self.loss, VideoDiffusionLoss):
            loss = self.loss(*parts, z, batch).mean()
            return loss, {"loss": loss.detach()}
        details = self.loss.detailed(*parts, z, batch, base=self.base, base_weight=self.base_weight)
        loss = details.loss.mean()
        logs = {"sample_loss": details.loss.detach(), "timestep_share": details.timestep_share}
        return loss, {"loss": loss.detach()} | logs

    def freeze_untrained(self) -> list[str]:
        """Set requires_grad by `not_trainable_prefixes`; returns the trainable names.

        "all" leaves LoRA's matrices, further mixins' parameters and what `also_trainable_prefixes` names trainable and
        nothing else. Tensors that the network itself holds frozen (the sin-cos position table) stay so.
        """
        adapters_only = "all" in self.not_trainable_prefixes
        never = (*FROZEN_PARTS, *(prefix for prefix in self.not_trainable_prefixes if prefix != "all"))
        for name, parameter in self.named_parameters():
            adapter = any(mark in name for mark in LORA_MARKS) or further_mixin(name) is not None
            also = name.startswith(self.also_trainable_prefixes)
            if name.startswith(never) or (adapters_only and not adapter and not also):
                parameter.requires_grad_(False)
            elif adapters_only and not adapter:
                vars(parameter)["lr_scale"] = self.also_trainable_rate  # for the optimizer's groups
        return [name for name, parameter in self.named_parameters() if parameter.requires_grad]

    # --- sampling -------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def sample(
        self,
        cond: Cond,
        uc: Cond | None = None,
        batch_size: int = 1,
        shape: Sequence[int] | None = None,
        *,
        noise: Tensor | None = None,
        num_steps: int | None = None,
        scale: float | None = None,
        prefix: Tensor | None = None,
        image: Tensor | None = None,
        clip: Tensor | None = None,
        noise_sampler: Callable[[Tensor], Tensor] | None = None,
        callback: Callable[..., None] | None = None,
        shortcuts: ShortcutRun | None = None,
        **network_inputs: Any,
    ) -> Tensor:
        """Latents (b, t, c, h, w) in the engine's dtype, scaled, from conditioning.

        Args:
            shape: (t, c, h, w) of one sample; the start is then `torch.randn` on the CPU, as in the original.
            noise: the start (b, t, c, h, w) itself, in place of `batch_size` and `shape`.
            prefix: clean latents (b, k, c, h, w) that are kept as the first k frames (the samplers' `fixed_frames`).
            image: what `encode_image` gives, (b, t, c, h, w), for both branches of guidance.
            clip: clean latents (b, t, c, h, w), scaled, to which noise is added, as much as training had at the first
                timestep of a run of the sampler's `strength`.
            noise_sampler: replaces `torch.randn_like` inside stochastic samplers.
            shortcuts: leaves out network calls (approximate); counts those that remain.
        """
        device = next(iter(cond.values())).device
        if noise is None:
            if shape is None:
                raise ValueError("sample() needs either `shape` (t, c, h, w) or `noise` (b, t, c, h, w).")
            noise = torch.randn(batch_size, *shape, dtype=torch.float32)
        x = noise.to(device=device, dtype=torch.float32)
        if clip is not None:
            x = self._noised(clip.to(x), x, self.sampler.schedule(num_steps).timesteps[0])
        if prefix is not None:
            x = torch.cat([prefix.to(x), x[:, prefix.shape[1] :]], dim=1)
        x = same_for_clip(x)
        if image is not None:
            concat = {"concat": same_for_clip(image.to(device))}
            cond, uc = cond | concat, None if uc is None else uc | concat

        def denoise(x: Tensor, sigma: Tensor, c: Cond, **kw: Any) -> Tensor:
            return self.denoiser(self.model, x, sigma, c, **kw, **network_inputs)

        denoiser: DenoiserFn = denoise
        if self.branches is not None:
            denoiser = self.branches.around(denoiser, len(x))
        if shortcuts is not None:
            scales, arithmetic = self.sampler.guidance_scales(num_steps, scale), self.sampler.linear_steps(num_steps)
            denoiser = shortcuts.around(denoiser, len(x), scales, arithmetic)
        samples = self.sampler(
            denoiser,
            x,
            cond,
            uc=uc,
            num_steps=num_steps,
            scale=scale,
            noise_sampler=noise_sampler,
            callback=callback,
            fixed_frames=None if prefix is None else prefix.shape[1],
        )
        return samples.to(self.dtype)

    def _noised(self, clip: Tensor, noise: Tensor, timestep: int) -> Tensor:
        """As training would at that timestep. Raises ConfigError: the denoiser has no table of timesteps."""
        if not isinstance(self.denoiser, DiscreteDenoiser):
            raise ConfigError(f"a DiscreteDenoiser says how clips are noised; here is {_class_name(self.denoiser)}")
        signal = self.denoiser.idx_to_sigma(torch.tensor([timestep], device=clip.device))
        return add_noise(clip, noise, signal)


def _required(part: T | None, name: str) -> T:
    if part is None:
        raise ConfigError(f"this engine was built without a {name}: its model section has no `{name}_config`")
    return part


def _class_name(part: object) -> str:
    return type(part).__name__


def _build_frozen(config: Mapping[str, Any] | None, dtype: torch.dtype) -> Any:
    part = _build(config)
    return None if part is None else part.to(dtype).eval().requires_grad_(False)


def _build(config: Mapping[str, Any] | None) -> Any:
    return None if config is None else instantiate_from_config(config)
