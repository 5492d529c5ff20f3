"""Whether the clips of a `data:` section suit the network."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from sgm.config import ConfigError, RunConfig
from sgm.data.buckets import Bucket
from sgm.data.dataset import DataSection
from sgm.modules.autoencoding.strides import STRIDES
from sgm.modules.diffusionmodules.image_condition import sampled_frames
from sgm.modules.transformer.positions import LARGEST_STRETCH
from sgm.training.options import TrainArgs
from sgm.training.setup.model import meta_engine, training_model_section
from sgm.typed import listing

if TYPE_CHECKING:
    from sgm.models.network import DiffusionTransformer  # brings SAT, and with it seconds


def check_clips(config: RunConfig[TrainArgs], dtype: str) -> list[str]:
    """Whether the `data:` section's clips are possible and the network has positions for them; loads nothing.

    A distillation needs no such section; if there is one, it makes clips of that size.

    Returns:
        Warnings of what the published models of this kind were not made for.

    Raises:
        ConfigError: wrong settings, too many frames, a side that the network cannot cut into patches, or one of more
            than `LARGEST_STRETCH` times the network's own; for a distillation several sizes.
    """
    if config.args.distill and not config.data:
        return []
    if config.args.distill and ((config.data or {}).get("params") or {}).get("buckets"):
        raise ConfigError(
            "args.distill makes clips of one size: leave out data.params.buckets (--set data.params.buckets=null) and "
            "name max_num_frames and video_size"
        )
    if not config.data:
        raise ConfigError("training needs a `data:` section (target: data_video.SFTDataset and its params)")
    section = DataSection.parse(config.data)
    settings = section.settings()
    if settings is None:
        return []
    wrong = _wrong_inputs(config.model)
    if wrong:
        raise ConfigError(listing(wrong, "what the network is to learn from"))
    model = training_model_section(config.model, config.args)
    model["conditioner_config"] = None
    network = meta_engine(model, dtype).network
    clips = settings.buckets or (Bucket(settings.max_num_frames, *settings.video_size),)
    problems = [f"{clip}: {problem}" for clip in clips if (problem := _unsuitable(clip, network))]
    if problems:
        sizes = " and ".join(section.names_of("max_num_frames", "video_size"))
        keys = "data.params.buckets does" if settings.buckets else f"data.params.{sizes} do"
        raise ConfigError(f"{keys} not suit this network: {'; '.join(problems)}")
    return _warnings(clips, network, dtype)


def _warnings(clips: Sequence[Bucket], network: DiffusionTransformer, dtype: str) -> list[str]:
    found = []
    if dtype == "fp16" and network.positions.rotates:
        found.append(
            "warning: models of the 5B family are published in bf16, and give NaN or black frames in fp16; "
            "--set deepspeed.fp16.enabled=false --set deepspeed.bf16.enabled=true"
        )
    pairs = [f"{clip}" for clip in clips if network.patch.t == 2 and STRIDES.latent_frames(clip.frames) % 2 == 0]
    if pairs:
        found.append(
            f"warning: clips of {' and '.join(pairs)} have an even number of latents, which are taken as they are; the "
            "1.5 models know clips of 8k + 1 frames, whose first latent they see twice"
        )
    return found


def _wrong_inputs(model: dict[str, Any]) -> list[str]:
    """What parts of the engine ask of a batch, and our data sets do not give."""
    problems = []
    if model.get("input_key", "mp4") != "mp4":
        problems.append(f"model.input_key is {model['input_key']!r}; the data set gives clips as mp4")
    embedders = ((model.get("conditioner_config") or {}).get("params") or {}).get("emb_models") or []
    return problems + [
        f"model.conditioner_config.params.emb_models[{k}].input_key is {key!r}; the data set gives captions as txt"
        for k, entry in enumerate(embedders)
        if (key := entry.get("input_key", "txt")) != "txt"
    ]


def _unsuitable(clip: Bucket, network: DiffusionTransformer) -> str | None:
    """Why a network cannot train on such clips, or None."""
    if clip.height % STRIDES.size_step or clip.width % STRIDES.size_step:
        return f"height and width must be multiples of {STRIDES.size_step}"
    try:
        frames = sampled_frames(STRIDES.latent_frames(clip.frames), network.patch.t)
        grid = network.patch.grid(frames, *STRIDES.latent_size(clip.height, clip.width))
        network.mixins.pos_embed.check_grid(grid)
    except ValueError as error:
        return str(error)
    stretch = network.mixins.pos_embed.stretch(grid)
    if stretch > LARGEST_STRETCH:
        own = "x".join(map(str, STRIDES.pixel_size(network.latent_height, network.latent_width)))
        return f"a side is {stretch:.2g} times that of the network's {own} pixels, more than {LARGEST_STRETCH:g}"
    return None
