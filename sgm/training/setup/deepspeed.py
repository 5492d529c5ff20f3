"""The YAML's `deepspeed:` section: checked, and translated for today's DeepSpeed.

Upstream files carry keys that DeepSpeed has dropped or never knew; each has its meaning here, or is named with the
reason why it has none.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sgm.config import ConfigError
from sgm.training.optimizers.spec import OptimizerSpec
from sgm.training.setup.deepspeed_verdict import deepspeed_verdict, switched_on, value_at, without
from sgm.typed import listing

# Of what DeepSpeed reads: what has no part in a training here (switched on it is an error), and what has no effect.
_NOT_HERE = {
    "checkpoint.load_universal load_universal_checkpoint datastates_ckpt": "checkpoints are read by --resume alone",
    "comet csv_monitor tensorboard wandb": "args.tensorboard and args.wandb report the run, and metrics.jsonl",
    "pipeline tensor_parallel": "args.model_parallel_size shares a model between processes",
    "sequence_parallel_size": "args.sequence_parallel_size shares a clip's tokens between processes",
    "data_efficiency": "clips come from args.train_data, in args.data_order",
    "autotuning compile expert_parallel hybrid_engine weight_quantization": "training here makes no use of it",
}
_ZERO_CHECKPOINTS = """elastic_checkpoint gather_16bit_weights_on_model_save load_from_fp32_weights
    pipeline_loading_checkpoint stage3_gather_16bit_weights_on_model_save stage3_gather_fp16_weights_on_model_save"""
_NO_EFFECT = {
    " ".join(
        ["checkpoint", *(f"zero_optimization.{name}" for name in _ZERO_CHECKPOINTS.split())]
    ): "checkpoints are this project's own: they hold whole weights, and --resume restores the float32 masters",
    "dataloader_drop_last": "the data loader is this project's own",
    "disable_allgather dump_state local_rank seq_parallel_communication_data_type use_data_before_expert_parallelism "
    "vocabulary_size": "training here makes no use of it",
}
# What `sgm.training.step` counts on.
_FIXED = {
    "gradient_allreduce_op": "mean", "managed_gradient_accumulation": True, "zero_optimization.compute_grad_norm": True,
}  # fmt: skip
LOSS_SCALE_KEYS = frozenset(
    {"loss_scale", "loss_scale_window", "hysteresis", "min_loss_scale", "initial_scale_power", "consecutive_hysteresis"}
)
_BF16_INSTEAD = "--set deepspeed.fp16.enabled=false --set deepspeed.bf16.enabled=true"


@dataclass(frozen=True)
class DeepSpeedPlan:
    """What the `deepspeed:` section asks for.

    Attributes:
        dtype: "fp32", "fp16" or "bf16": type of the model's weights.
        offload: optimizer state and masters lie in CPU memory.
        micro_batch: clips a rank takes at a time; `accumulation` of these make an optimizer step.
        clipping: largest norm of the gradient; 0 for none. Applied by DeepSpeed, or by `sgm.training.step` where the
            gradient is not wrapped (float32 without ZeRO).
        time_phases: `wall_clock_breakdown` was asked for; the run times its phases itself (`watch.timing`).
    """

    config: dict[str, Any]
    optimizer: OptimizerSpec
    dtype: str
    stage: int
    offload: bool
    micro_batch: int
    accumulation: int
    clipping: float
    notes: tuple[str, ...]
    time_phases: bool = False

    def clips_per_step(self, ranks: int) -> int:
        """Of so many data-parallel processes together."""
        return self.micro_batch * self.accumulation * ranks


def plan_deepspeed(
    section: Mapping[str, Any] | None, *, device_type: str, data_parallel_size: int = 1
) -> DeepSpeedPlan:
    """Check and translate a `deepspeed:` section for "cpu" or "cuda".

    Raises:
        ConfigError: lists every problem.
    """
    if not section:
        raise ConfigError("training needs a `deepspeed:` section (batch size, optimizer, precision)")
    notes: list[str] = []
    problems: list[str] = []
    config = _without_absent(_numbers(section, notes), problems, notes)
    _move_loss_scale(config, notes)
    dtype = _precision(config, device_type, problems)
    zero = _zero(config, device_type, problems, notes)
    micro, accumulation = batch_sizes(config, data_parallel_size, problems)
    if config.pop("scheduler", None):
        problems.append("deepspeed.scheduler: the learning rate follows args.lr_decay_style and args.warmup; remove it")
    optimizer = _optimizer(config, problems, notes)
    clipping = config.setdefault("gradient_clipping", 0.0)
    if isinstance(clipping, bool) or not isinstance(clipping, int | float) or clipping < 0:
        problems.append(f"deepspeed.gradient_clipping must be a number >= 0, got {clipping!r}")
    _autocast(config, problems)
    _quiet_defaults(config)
    config = _apply_verdict(config, problems, notes)
    if problems or optimizer is None:
        raise ConfigError(listing(problems, "the deepspeed section"))
    if dtype == "fp32" and not zero["stage"]:
        config["gradient_clipping"] = 0.0  # DeepSpeed's own cannot do without gradients; `training_step` clips
    offload = "offload_optimizer" in config["zero_optimization"]
    if optimizer.target is not None:
        if config.get("zero_allow_untested_optimizer") is False and zero["stage"]:
            allowed = "deepspeed.zero_allow_untested_optimizer is set to true"
            notes.append(f"{allowed}: ZeRO is tested here with this optimizer")
        config["zero_allow_untested_optimizer"] = True
        config["zero_force_ds_cpu_optimizer"] = False
    time_phases = bool(config.get("wall_clock_breakdown"))
    config["wall_clock_breakdown"] = False  # DeepSpeed's own knows neither VAE nor text encoder
    idle = [name for name, value in (config.get("activation_checkpointing") or {}).items() if value]
    if idle:
        notes.append(f"deepspeed.activation_checkpointing.{', '.join(idle)}: no effect, torch recomputes each layer")
    return DeepSpeedPlan(
        config, optimizer, dtype, int(zero["stage"]), offload, micro, accumulation, float(clipping), tuple(notes),
        time_phases,
    )  # fmt: skip


# --- translation, one topic a function ----------------------------------------------------------------------------


def _numbers(value: Any, notes: list[str], place: str = "deepspeed") -> Any:
    """Numbers that YAML gave as text ("1e-8" has no dot) become numbers, everywhere below; what is null is left out."""
    if isinstance(value, Mapping):
        given = {k: v for k, v in value.items() if v is not None or place.startswith("deepspeed.optimizer")}
        return {key: _numbers(inner, notes, f"{place}.{key}") for key, inner in given.items()}
    if isinstance(value, list | tuple):
        return [_numbers(inner, notes, f"{place}.{k}") for k, inner in enumerate(value)]
    if isinstance(value, str):
        try:
            number = float(value)
        except ValueError:
            return value
        if math.isfinite(number):
            notes.append(f"{place}: the text {value!r} is read as the number {number:g}")
            return int(number) if number.is_integer() and "e" not in value.lower() and "." not in value else number
    return value


def _without_absent(config: dict[str, Any], problems: list[str], notes: list[str]) -> dict[str, Any]:
    """The section without what has no part in a training here."""
    for places, instead in (_NOT_HERE | _NO_EFFECT).items():
        for place in places.split():
            value = value_at(config, place)
            config = without(config, place)
            if places in _NOT_HERE and switched_on(value):
                problems.append(f"deepspeed.{place} is not supported: {instead}; remove it")
            elif value is not None:
                notes.append(f"deepspeed.{place} has no effect: {instead}")
    for place, value in _FIXED.items():
        if value_at(config, place) not in (None, value):
            problems.append(f"deepspeed.{place} is {value_at(config, place)!r}; training here needs {value!r}")
            config = without(config, place)
    return config


def _apply_verdict(config: dict[str, Any], problems: list[str], notes: list[str]) -> dict[str, Any]:
    """The section without what is switched off; adds what DeepSpeed refuses of it."""
    refused, idle = deepspeed_verdict(config)
    for place, reason in refused.items():
        named = f"deepspeed.{place}" if place else "deepspeed"
        if not any(f"{named} " in problem for problem in problems):
            problems.append(f"{named}: {reason}")
    for place in idle:
        notes.append(f"deepspeed.{place} has no effect: DeepSpeed has removed what it switches off")
        config = without(config, place)
    for part in ("offload_optimizer", "offload_param"):
        if value_at(config, f"zero_optimization.{part}.device") in (None, "none"):
            config = without(config, f"zero_optimization.{part}")
    return config


def _move_loss_scale(config: dict[str, Any], notes: list[str]) -> None:
    """`loss_scale` and its companions belong under `fp16:`; upstream files also have them elsewhere."""
    for place in (None, "bf16", "zero_optimization", "optimizer"):
        holder = config if place is None else config.get(place)
        if not isinstance(holder, dict):
            continue
        for name in sorted(LOSS_SCALE_KEYS & set(holder)):
            value = holder.pop(name)
            config.setdefault("fp16", {}).setdefault(name, value)
            stands = f"deepspeed.{place}.{name}" if place else f"deepspeed.{name}"
            notes.append(f"warning: {stands} belongs under deepspeed.fp16 and was moved there")


def _precision(config: dict[str, Any], device_type: str, problems: list[str]) -> str:
    enabled = []
    for name in ("fp16", "bf16"):
        part = config.setdefault(name, {})
        if not isinstance(part, dict):
            problems.append(f"deepspeed.{name} must be a mapping with `enabled`, got {part!r}")
            config[name] = part = {}
        flag = part.setdefault("enabled", False)
        if not isinstance(flag, bool):
            problems.append(f"deepspeed.{name}.enabled must be true or false, got {flag!r}")
        elif flag:
            enabled.append(name)
    if len(enabled) == 2:
        problems.append("deepspeed.fp16.enabled and deepspeed.bf16.enabled are both true; choose one")
    if "fp16" in enabled and device_type == "cpu":
        problems.append(
            "deepspeed.fp16.enabled is true, but float16 training does not run on a CPU; use float32 with "
            f"`--set deepspeed.fp16.enabled=false`, or bfloat16 with `{_BF16_INSTEAD}`"
        )
    return enabled[0] if len(enabled) == 1 else "fp32"


def _autocast(config: dict[str, Any], problems: list[str]) -> None:
    dtype = value_at(config, "torch_autocast.dtype")
    if value_at(config, "torch_autocast.enabled") and not str(dtype).endswith(("bf16", "bfloat16")):
        problems.append(
            f"deepspeed.torch_autocast.dtype is {dtype!r}: DeepSpeed clips the gradients of float16 "
            "while they are scaled. Use bfloat16 (`--set deepspeed.torch_autocast.dtype=bfloat16`), or for float16 "
            "`--set deepspeed.torch_autocast.enabled=false --set deepspeed.fp16.enabled=true`"
        )


def _zero(config: dict[str, Any], device_type: str, problems: list[str], notes: list[str]) -> dict[str, Any]:
    zero = config.get("zero_optimization") or {}
    if not isinstance(zero, dict):
        problems.append(f"deepspeed.zero_optimization must be a mapping, got {zero!r}")
        zero = {}
    zero = config["zero_optimization"] = dict(zero)
    stage = zero.setdefault("stage", 0)
    if isinstance(stage, bool) or stage not in (0, 1, 2, 3):
        problems.append(f"deepspeed.zero_optimization.stage must be 0, 1, 2 or 3, got {stage!r}")
        stage = zero["stage"] = 0
    _offload(zero, stage, device_type, problems, notes)
    return zero


def _offload(zero: dict[str, Any], stage: int, device_type: str, problems: list[str], notes: list[str]) -> None:
    """The `cpu_offload` switches of older DeepSpeed become today's sections."""
    pin = device_type == "cuda" and bool(zero.pop("cpu_offload_use_pin_memory", True))
    for old, new, least in (("cpu_offload", "offload_optimizer", 1), ("cpu_offload_param", "offload_param", 3)):
        wanted = zero.pop(old, None)
        if wanted is True:
            zero.setdefault(new, {"device": "cpu", "pin_memory": pin})
            notes.append(f"deepspeed.zero_optimization.{old} is today's {new}: {zero[new]}")
        elif wanted not in (None, False):
            problems.append(f"deepspeed.zero_optimization.{old} must be true or false, got {wanted!r}")
        if value_at(zero, f"{new}.device") == "nvme":
            problems.append(
                f"deepspeed.zero_optimization.{new}.device is 'nvme'; checkpoints read from memory: use cpu"
            )
        if value_at(zero, f"{new}.device") not in (None, "none") and stage < least:
            problems.append(f"deepspeed.zero_optimization.{new} needs stage {least} or higher, the stage is {stage}")


def batch_sizes(config: dict[str, Any], ranks: int, problems: list[str]) -> tuple[int, int]:
    """(micro batch, accumulation steps); `train_batch_size` must agree with them and the number of ranks."""
    values = []
    names = ("train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "train_batch_size", "steps_per_print")
    for name in names:
        value = config.get(name)
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
            problems.append(f"deepspeed.{name} must be a whole number >= 1, got {value!r}")
            return 1, 1
        values.append(value)
    micro, accumulation, total, _ = values
    if total is not None and (micro is None or accumulation is None):
        given = (micro or 1) * (accumulation or 1) * ranks
        if micro is None:
            micro = max(1, total // given)
        else:
            accumulation = max(1, total // given)
    micro, accumulation = micro or 1, accumulation or 1
    if total is not None and total != micro * accumulation * ranks:
        problems.append(
            f"deepspeed.train_batch_size is {total}, but {micro} a GPU x {accumulation} accumulation steps x {ranks} "
            f"data-parallel ranks are {micro * accumulation * ranks}; remove train_batch_size or make them agree"
        )
    config.pop("train_batch_size", None)
    config["train_micro_batch_size_per_gpu"], config["gradient_accumulation_steps"] = micro, accumulation
    return micro, accumulation


def _optimizer(config: dict[str, Any], problems: list[str], notes: list[str]) -> OptimizerSpec | None:
    section = config.pop("optimizer", None)
    if not isinstance(section, dict):
        problems.append("deepspeed.optimizer is missing: give type (sat.ops.FusedEmaAdam) and params (lr, betas, ...)")
        return None
    try:
        spec = OptimizerSpec.parse(section)
    except ConfigError as error:
        problems.append(str(error))
        return None
    notes += spec.notes
    if spec.target is None:
        config["optimizer"] = {"type": section["type"], "params": {**spec.params, "lr": spec.lr}}
        notes.append(f"deepspeed.optimizer {spec.name} is DeepSpeed's own: it may compile a kernel, and keeps no EMA")
    return spec


def _quiet_defaults(config: dict[str, Any]) -> None:
    """Where DeepSpeed's defaults would print or skip a check."""
    config.setdefault("steps_per_print", None)
    # DeepSpeed's own measure of throughput, which nothing here reads, waits for the GPU twice a step.
    timers = config.setdefault("timers", {})
    if isinstance(timers, dict):
        timers.setdefault("throughput", {"enabled": False})
    if config["bf16"]["enabled"]:
        config["bf16"].setdefault("check_grad_overflow", True)
