"""The clips of a training run: whether they suit the network, data sets for training and validation, the loader."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.distributed as dist
from torch.utils.data import Dataset, Subset

from sgm.cache.dataset import CachedBatches, CachedClips, in_lengths
from sgm.cache.ready import ReadyCache
from sgm.config import ConfigError, RunConfig
from sgm.data.buckets import Bucket
from sgm.data.dataset import DataSection, SFTDataset
from sgm.data.loader import ClipLoader, clip_count, create_loader
from sgm.data.report import first_reasons
from sgm.distributed import data_parallel_rank, data_parallel_world_size, wait_for_all
from sgm.modules.autoencoding.strides import STRIDES
from sgm.modules.diffusionmodules.image_condition import sampled_frames
from sgm.modules.transformer.positions import LARGEST_STRETCH
from sgm.training.distill.engine import DistillationEngine
from sgm.training.distill.prompts import PromptBatches, embed, read_prompts
from sgm.training.options import TrainArgs, split_shares
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


class ClipSets(NamedTuple):
    """The data sets of a run; `valid` is empty where no evaluation is asked for."""

    train: list[Dataset]
    valid: list[Dataset]


def clip_sets(config: RunConfig[TrainArgs], reports: Path, cache: ReadyCache | None) -> ClipSets:
    """One data set a folder of the configuration. Collective.

    Raises:
        ConfigError: no `data:` section, or one that does not fit its class.
        DatasetError: a folder without usable clips.
    """
    args = config.args

    def build(folders: Sequence[str], name: str) -> list[Dataset]:
        if cache:
            return [*cache.datasets(folders, reports, name)]
        return build_datasets(config.data, folders, reports, name)

    train, prior = build(args.train_data, "train_data"), build(args.prior_data, "prior_data")
    for dataset in prior:
        mark_prior(dataset)
    if not args.eval_interval and not args.epochs:
        return ClipSets(train + prior, [])
    if args.valid_data == args.train_data:
        return ClipSets(train + prior, train)
    if args.valid_data:
        return ClipSets(train + prior, build(args.valid_data, "valid_data"))
    train, valid = split_validation(train, args.split, args.seed)
    return ClipSets(train + prior, valid)


def prompt_sets(args: TrainArgs, engine: DistillationEngine) -> ClipSets:
    """The prompts of a run, embedded; the engine's text encoder is given up for it.

    `valid`: `args.eval_prompts`, or else those that are trained on; empty where no evaluation is asked for.

    Raises:
        ConfigError: see `read_prompts`.
    """
    sets = []
    for texts in [*read_prompts(args), *([args.eval_prompts] if args.eval_prompts else [])]:
        found, engine.unconditional = embed(engine, texts)
        sets.append(found)
    engine.conditioner = None
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    train, valid = (sets[:-1], sets[-1:]) if args.eval_prompts else (sets, sets)
    return ClipSets([*train], [*valid] if args.eval_interval or args.epochs else [])


def build_datasets(data: Mapping[str, Any] | None, folders: Sequence[str], reports: Path, name: str) -> list[Dataset]:
    """One data set a folder. Rank 0 checks the videos and writes `reports/NAME_k.jsonl`; the others take its word."""
    if not data:
        raise ConfigError("training needs a `data:` section (target: data_video.SFTDataset and its params)")
    section = DataSection.parse(data)
    cls, params = section.cls, section.params
    takes_report = "report" in inspect.signature(cls).parameters
    first = dist.get_rank() == 0
    made: list[Dataset] = []
    for k, folder in enumerate(folders):
        extra: dict[str, Any] = {"data_dir": str(Path(folder).expanduser())}
        if takes_report:
            extra["report"] = reports / f"{name}_{k}.jsonl"
        if first or not takes_report:
            made.append(cls(**{**params, **extra}))
        wait_for_all()
        if not first and takes_report:
            made.append(cls(**{**params, **extra, "validate": "report"}))
    return made


def mark_prior(dataset: Any) -> None:
    """Let a data set's items say that they keep what the model knows.

    Raises:
        ConfigError: a class that is not made for it.
    """
    if not hasattr(dataset, "prior"):
        raise ConfigError(f"args.prior_data: {type(dataset).__name__} gives items without `prior`, see SFTDataset")
    dataset.prior = True


def split_validation(datasets: Sequence[Dataset], split: str, seed: int) -> tuple[list[Dataset], list[Dataset]]:
    """(training, validation) parts of each data set, by `split`'s first two shares; validation may come out empty."""
    _, valid_share, test_share = split_shares(split)
    train: list[Dataset] = []
    valid: list[Dataset] = []
    for dataset in datasets:
        count = clip_count(dataset)
        order = torch.randperm(count, generator=torch.Generator().manual_seed(seed)).tolist()
        held = int(count * valid_share)
        last = count - int(count * test_share)
        train.append(Subset(dataset, sorted(order[held:last])) if last - held < count else dataset)
        if held:
            valid.append(Subset(dataset, sorted(order[:held])))
    return train, valid


def left_out(datasets: Sequence[Dataset]) -> list[str]:
    """A warning for each data set that cannot use all videos of its folder."""
    lines = []
    for dataset in datasets:
        whole = dataset.dataset if isinstance(dataset, Subset) else dataset
        if isinstance(whole, SFTDataset | CachedClips) and whole.report.rejected:
            rejected = whole.report.rejected
            lines.append(
                f"warning: {whole.data_dir}: {len(rejected)} of {len(rejected) + len(whole)} videos are left out, all "
                f"named in {whole.report_path} (first: {first_reasons(rejected, 1)})"
            )
    return list(dict.fromkeys(lines))


def training_loader(args: TrainArgs, micro_batch: int, datasets: Sequence[Dataset]) -> ClipLoader:
    """This rank's batches of `micro_batch` clips; cached ones in `args.cache_lengths`, where these are given."""
    if args.cache_lengths:
        datasets = [in_lengths(dataset, args.cache_lengths) for dataset in datasets]
    return create_loader(
        datasets,
        micro_batch,
        args.num_workers,
        seed=args.seed,
        rank=data_parallel_rank(),
        world_size=data_parallel_world_size(),
        order=args.data_order,
        weights=args.train_data_weights,
        prefetch=args.prefetch_factor,
        read=PromptBatches if args.distill else CachedBatches if args.cache_dir else None,
    )
