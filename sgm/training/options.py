"""The `args:` section of a training run, its `distill:` with it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sgm.modules.autoencoding.strides import STRIDES
from sgm.modules.diffusionmodules.few_steps import SAMPLERS
from sgm.modules.ops.recompute_modes import MODES
from sgm.training.optimizers.schedule import STYLES, ScheduleSettings
from sgm.typed import ConfigError, PathText, option

SEGMENT, ALL = "segment", "all"


@dataclass(frozen=True)
class DistillArgs:
    """What a few-step student is to be, and how it learns."""

    prompts: list[PathText] = option([], "text files with a prompt a line; none: the captions of args.train_data")
    steps: int = option(4, "passes of the network that the student needs", at_least=1)
    sampler: str = option(
        "renoise",
        "between two passes: renoise (fresh noise on the estimate) or ddim (deterministic)",
        choices=tuple(SAMPLERS),
    )
    levels: str = option(
        SEGMENT,
        "noise levels at which student and teacher are compared: segment: those of the student's step (trajectory "
        "distribution matching), all (distribution matching)",
        choices=(SEGMENT, ALL),
    )
    guidance_scale: list[float] = option(
        [], "of the teacher, one for all or one for each of the student's steps, noisiest first; none: what the "
        "configuration's guider has at each noise level"
    )  # fmt: skip
    critic_rate: float = option(3.0, "the critic's learning rate, in parts of the student's")

    def __post_init__(self) -> None:
        problems = []
        if not self.critic_rate > 0:
            problems.append(f"args.distill.critic_rate is {self.critic_rate}; it must be above 0")
        if len(self.guidance_scale) not in (0, 1, self.steps):
            problems.append(
                f"args.distill.guidance_scale is {self.guidance_scale}; it needs one number, or one for each of the "
                f"{self.steps} steps"
            )
        if problems:
            raise ConfigError("; ".join(problems))


AUTO = "auto"  # of a switch: where it goes with the rest

# (lowest, recommended, highest) rates with Adam; a run outside is warned. See `sensible_rates`.
PUBLISHED_WIDTH = 1920  # of CogVideoX-2B, for which these are meant
FULL_RATES = (1e-7, 1e-5, 1e-4)
LORA_RATES = (1e-4, 1e-3, 1e-2)

# What may change between a run and its continuation: how far it goes, what is written when, where it runs.
RESUME_MAY_CHANGE = frozenset(
    """train_iters epochs lr_decay_iters
    resume save save_interval keep_last lora_only save_merged save_frozen log_interval eval_interval eval_iters
    eval_batch_size strict_eval only_log_video_latents log_image num_workers prefetch_factor exit_interval device
    eval_prompts tensorboard summary_dir wandb wandb_project_name
    max_skipped_steps no_load_rng force_train checkpoint_activations cuda_graphs offload_activations stream_frozen
    vae_low_memory cache_dir cache_fill cache_dtype sequence_parallel_size""".split()
)


# Options of sampling that the original has not: a configuration of sampling may be distilled as it is.
SAMPLING_ARGS = frozenset(
    """decode_latents decoder extend few_steps guidance_scale image lora max_batch merge_lora negative_prompt num_steps
    placement prompts refine refine_model seed_mode skip_done strength student vae_tiling video vocabulary window_frames
    window_overlap""".split()
)


@dataclass(frozen=True)
class TrainArgs:
    """Options of `train_video.py`; names and meanings of the original where it has them."""

    IDLE = SAMPLING_ARGS

    mode: str = option(
        "finetune", "finetune, or pretrain (no held start of the learning rate)", choices=("finetune", "pretrain")
    )
    load: PathText | None = option(None, "transformer weights to start from: release folder, iteration folder or file")
    force_train: bool = option(False, "accept a transformer file without what the configuration determines")
    add_image_channels: bool = option(
        False,
        "load is a text-to-video model's: add a picture's channels to its patch projection, with zeros (for networks "
        "whose in_channels are twice their out_channels, see configs/image_to_video.yaml)",
    )
    no_load_rng: bool = option(False, "kept for upstream files: random state comes from --resume only, never from load")
    resume: PathText | None = option(
        None,
        "go on exactly with the run in this folder; auto, or the flag alone: with the newest run of this configuration",
        metavar="FOLDER",
        bare="auto",
    )
    train_iters: int = option(10000, "iterations (optimizer steps, skipped ones included)", at_least=1)
    epochs: int | None = option(None, "passes over the training data; replaces train_iters", at_least=1)
    eval_iters: int = option(100, "evaluation batches a rank", at_least=1)
    eval_interval: int | None = option(
        None, "iterations between evaluations; default: none, with `epochs` one epoch", at_least=1
    )
    eval_batch_size: int | None = option(None, "clips in an evaluation batch; default: the training batch", at_least=1)
    strict_eval: bool = option(False, "evaluate on all of valid_data instead of eval_iters batches")
    save: PathText | None = option(None, "folder for runs; nothing is saved without it")
    save_interval: int | None = option(None, "iterations between checkpoints; the last one is always saved", at_least=1)
    keep_last: int | None = option(None, "how many checkpoints to keep; default: all", at_least=1)
    lora_only: bool = option(False, "save the adapter alone (LoRA, mixins; a small file) instead of a whole network")
    save_merged: bool = option(False, "LoRA: also save the network with the adapter folded in, under merged/")
    save_frozen: bool = option(False, "save text encoder and VAE as well, as the original does (10 GB more at 2B)")
    log_interval: int = option(50, "iterations between progress lines", at_least=1)
    train_data: list[PathText] = option([], "training folders, each with videos/ and labels/")
    prior_data: list[PathText] = option(
        [], "further training folders, of clips like those that the model knows: their target is the prediction of the "
        "model as it was loaded, so that it does not forget them; full fine-tuning keeps a copy of the network for it"
    )  # fmt: skip
    prior_weight: float = option(1.0, "weight of the loss of prior_data's clips", at_least=0)
    distill: DistillArgs | None = option(
        None, "learn a student that needs a few steps and no guidance, from prompts alone (docs/distillation.md)"
    )
    train_data_weights: list[float] | None = option(
        None, "share of each folder of train_data and prior_data; default: its size"
    )
    valid_data: list[PathText] | None = option(None, "validation folders; may be the training ones")
    split: str = option("1000,1,1", "shares of train, validation and test data, where valid_data is not given")
    data_order: str = option(
        "shuffle",
        "shuffle: every clip once an epoch; upstream: the original's draws with repetition, whatever the seed",
        choices=("shuffle", "sequential", "upstream"),
    )
    num_workers: int = option(1, "decoding processes a rank; with cache_dir, reading threads", at_least=0)
    prefetch_factor: int = option(4, "batches that each worker reads ahead", at_least=1)
    cache_dir: PathText | None = option(
        None,
        "folder of encoded clips, filled where needed: VAE and text encoder are not loaded once it is full",
        metavar="DIR",
    )
    cache_fill: bool = option(True, "encode what the cache lacks before training; false refuses")
    cache_dtype: str = option("fp16", "type of a new cache's values", choices=("fp16", "bf16", "fp32"))
    cache_lengths: list[int] = option(
        [], "pixel frames, 4k + 1: cached clips are trained on in each of these lengths that they have, from their "
        "beginning ([1, 17]: as images and as short clips); none: as they are"
    )  # fmt: skip
    only_log_video_latents: bool = option(False, "evaluation writes sampled latents, decodes no video")
    log_image: bool = option(True, "evaluation samples a video (or its latents), and writes it")
    eval_prompts: list[str] = option(
        [], "prompts that evaluation samples beside the first validation clip's caption; image to video: TEXT@@FILE"
    )
    tensorboard: bool = option(True, "write TensorBoard's files into the run folder")
    summary_dir: PathText | None = option(None, "another folder for TensorBoard's files")
    wandb: bool = option(False, "report to Weights & Biases as well (wandb login, or WANDB_MODE=offline)")
    wandb_project_name: str = option("default_project", "project of the run there")
    experiment_name: PathText = option("MyModel", "name of the run folder, which also gets the date")
    checkpoint_activations: bool | str = option(
        False,
        "true: recompute activations in the backward pass, less memory, 1/3 slower; selective: all but attention; "
        "products: all but attention and products with weights",
        choices=MODES,
    )
    cuda_graphs: bool = option(
        False,
        "replay the network's forward and backward pass as CUDA graphs, one for each shape of batch: for small models, "
        "whose steps wait for the CPU; without effect on a CPU",
    )
    offload_activations: bool = option(
        False,
        "keep the inputs of layers that are run again in CPU memory until the backward pass: the same numbers, less "
        "memory. Needs checkpoint_activations",
    )
    stream_frozen: bool | str = option(
        False,
        "keep frozen weights of the transformer's blocks in CPU memory; they come to the GPU block by block: the same "
        "numbers, less memory. Needs checkpoint_activations; without effect where all weights learn; auto: where it "
        "goes with the rest",
        choices=(False, True, AUTO),
    )
    vae_low_memory: bool = option(False, "encode clips a few frames at a time: the same result, less memory, slower")
    model_parallel_size: int = option(1, "processes that share each layer (tensor parallelism)", at_least=1)
    sequence_parallel_size: int = option(
        1, "processes that train on one clip together, each on a share of its tokens (docs/several_gpus.md)", at_least=1
    )
    cfg_parallel: bool | None = option(None, "of sampling: training has no branches of guidance to share out")
    seed: int = option(42, "base seed; each data-parallel rank adds its number", at_least=0)
    device: str | None = option(None, "cpu or cuda; default: the GPU if there is one")
    warmup: float = option(0.01, "share of the run over which the learning rate rises", at_least=0)
    lr_decay_style: str = option("linear", "how the learning rate falls", choices=STYLES)
    lr_decay_ratio: float = option(0.1, "final share of the learning rate under `cosine`")
    lr_decay_iters: int | None = option(None, "steps over which it falls; default: train_iters", at_least=1)
    auto_warmup_steps: int = option(
        100, "fine-tuning holds its first steps at auto_warmup_rate x lr, as the original; 0 turns that off", at_least=0
    )
    auto_warmup_rate: float = option(0.05, "see auto_warmup_steps", at_least=0)
    exit_interval: int | None = option(None, "save and stop once this many iterations are a divisor", at_least=1)
    max_skipped_steps: int = option(25, "stop after this many skipped steps (NaN, overflow) in a row", at_least=1)

    def __post_init__(self) -> None:
        problems = []
        if not self.train_data and not (self.distill and self.distill.prompts):
            instead = " (or prompts in args.distill.prompts)" if self.distill else ""
            problems.append(f"args.train_data is empty: name at least one folder with videos/ and labels/{instead}")
        if self.cfg_parallel:
            problems.append(
                "args.cfg_parallel shares out the branches of guidance, which training has not; leave it out "
                "(args.sequence_parallel_size shares out a clip's tokens)"
            )
        problems += self._distill_problems()
        weights = self.train_data_weights
        folders = self.training_folders
        if weights is not None and (len(weights) != len(folders) or not all(0 < w < math.inf for w in weights)):
            problems.append(
                f"args.train_data_weights is {weights}; it needs one positive number for each of the "
                f"{len(folders)} folders of train_data{' and prior_data' if self.prior_data else ''}"
            )
        both = set(self.train_data) & set(self.prior_data)
        if both:
            problems.append(f"args.prior_data and args.train_data both name {min(both)}; a folder is one or the other")
        if self.prior_data and not self.load:
            problems.append("args.prior_data keeps what a loaded model knows; set args.load, or leave it out")
        if self.mode == "finetune" and not self.load:
            problems.append("args.load is not set: fine-tuning starts from transformer weights (or set mode: pretrain)")
        if self.cache_dir and self.save_frozen:
            problems.append("args.save_frozen needs VAE and text encoder, which a run with args.cache_dir never loads")
        if self.cache_dir and self.eval_prompts:
            problems.append("args.eval_prompts needs the text encoder, which a run with args.cache_dir never loads")
        if any(isinstance(n, bool) or not STRIDES.is_whole(n) for n in self.cache_lengths):
            problems.append(
                f"args.cache_lengths is {self.cache_lengths}; lengths are {STRIDES.clip_lengths} frames: 1, 5, 9, ..."
            )
        if self.cache_lengths and not self.cache_dir:
            problems.append("args.cache_lengths cuts cached clips; set args.cache_dir, or leave it out")
        try:
            split_shares(self.split)
            self.schedule(lr=1.0)
        except ValueError as error:
            problems.append(f"args: {error}")
        if problems:
            raise ConfigError("; ".join(problems))

    def _distill_problems(self) -> list[str]:
        """What a distillation has no use for."""
        if self.distill is None:
            return []
        given = {
            "cache_dir": self.cache_dir, "prior_data": self.prior_data, "valid_data": self.valid_data,
            "train_data_weights": self.train_data_weights, "save_frozen": self.save_frozen,
        }  # fmt: skip
        problems = [
            f"args.{name}: a distillation learns from prompts alone (args.distill.prompts, or captions of "
            f"args.train_data); leave it out, or --set args.{name}=null"
            for name, value in given.items()
            if value
        ]
        problems += [
            f"args.distill does not go with args.{name} above 1; leave one of them out"
            for name in ("model_parallel_size", "sequence_parallel_size")
            if getattr(self, name) > 1
        ]
        if not self.load:
            problems.append("args.distill needs a teacher: set args.load to its transformer weights")
        return problems

    @property
    def training_folders(self) -> list[str]:
        """Those that are trained on: of the new, then of the known."""
        return [*self.train_data, *self.prior_data]

    @property
    def data_folders(self) -> list[str]:
        """Each folder of the run once."""
        return list(dict.fromkeys([*self.training_folders, *(self.valid_data or [])]))

    def schedule(self, lr: float) -> ScheduleSettings:
        """The learning-rate settings of a run of `train_iters` steps."""
        return ScheduleSettings(
            base_lr=lr,
            total_steps=self.lr_decay_iters or self.train_iters,
            warmup=self.warmup,
            style=self.lr_decay_style,
            decay_ratio=self.lr_decay_ratio,
            hold_steps=self.auto_warmup_steps if self.mode == "finetune" else 0,
            hold_rate=self.auto_warmup_rate,
        )


def split_shares(text: str) -> tuple[float, float, float]:
    """Shares of training, validation and test data, summing to 1, from "1000,1,1".

    Raises:
        ConfigError: not three numbers >= 0 with a positive first one.
    """
    try:
        values = [float(part) for part in text.replace("/", ",").split(",")]
    except ValueError:
        values = []
    if not 1 <= len(values) <= 3 or not all(0 <= v < math.inf for v in values) or not values[0] > 0:
        raise ConfigError(f"split {text!r} must be up to three numbers, for example 1000,1,1")
    values += [0.0] * (3 - len(values))
    return values[0] / sum(values), values[1] / sum(values), values[2] / sum(values)


def trains_adapter(model: Mapping[str, Any]) -> bool:
    """Does the `model:` section train adapters only: LoRA's matrices, mixins beyond a release's own?"""
    return "all" in (model.get("not_trainable_prefixes") or ())


def trains_lora(model: Mapping[str, Any]) -> bool:
    """Is one of these a LoRA?"""
    return trains_adapter(model) and _modules(model).get("lora_config") is not None


def _modules(model: Mapping[str, Any]) -> Mapping[str, Any]:
    network = (model.get("network_config") or {}).get("params") or {}
    return network.get("modules") or {}


def sensible_rates(model: Mapping[str, Any]) -> tuple[float, float, float]:
    """(lowest, recommended, highest) learning rate for fine-tuning what the `model:` section trains.

    Under Adam every weight moves by about the rate in a step, so the output of a linear of d inputs moves by about
    d times the rate: the rates for whole networks go with 1/width (Yang et al. 2022, arXiv:2203.03466, table 3). Of an
    adapter's contribution (alpha/r) B A x, a mean over r terms, B's part moves by about alpha times the rate and A's by
    as much times the width. Measured on fine-tuning small networks to a style in 150 steps, the best rate was 0.03 at
    width 64 (0.1 harms) and 0.01 to 0.03 at width 256, 0.001 was slow and 0.0002 learnt next to nothing, and ranks 16
    and 64 gave the same to 1 %: so the rates go with 1/sqrt(width) and not with the rank.
    """
    network = (model.get("network_config") or {}).get("params") or {}
    rates = FULL_RATES
    factor = PUBLISHED_WIDTH / (network.get("hidden_size") or PUBLISHED_WIDTH)  # how much narrower
    if trains_lora(model):
        lora = _modules(model)["lora_config"].get("params") or {}
        root = math.sqrt(lora.get("r") or 1) if lora.get("rank_stabilised") else 1.0
        rates, factor = LORA_RATES, math.sqrt(factor) / (root * (lora.get("lora_alpha") or 1.0))
    low, good, high = (float(f"{rate * factor:.1g}") for rate in rates)
    return low, good, high


def training_advice(args: TrainArgs, model: Mapping[str, Any], lr: float) -> list[str]:
    """What is allowed, but probably not meant."""
    advice = []
    adapter, lora = trains_adapter(model), trains_lora(model)
    low, good, high = sensible_rates(model)
    known = lora or not adapter  # nobody knows the rate of another's mixin
    if known and lr and args.mode == "finetune" and not low <= lr <= high:
        advice.append(
            f"warning: learning rate {lr:g} is far outside {low:g} to {high:g}, the range for "
            f"{'LoRA' if lora else 'full fine-tuning'} of this model; try --set "
            f"deepspeed.optimizer.params.lr={good:g}"
        )
    schedule = args.schedule(lr)
    if schedule.hold_steps >= args.train_iters:
        advice.append(
            f"warning: all {args.train_iters} iterations lie in the first {schedule.hold_steps} steps, which run at "
            f"{schedule.hold_rate:.0%} of the learning rate as in the original; for a short run --set "
            "args.auto_warmup_steps=0"
        )
    idle = [name for name, used in (("lora_only", adapter), ("save_merged", lora)) if getattr(args, name) and not used]
    if idle:
        what = "a mixin, no LoRA" if adapter else "the network, no adapter"
        advice.append(f"warning: {' and '.join(idle)} (args) without effect: this run trains {what}")
    if not args.save:
        advice.append("warning: args.save is not set: this run keeps nothing")
    return advice
