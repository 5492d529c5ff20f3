"""Options of training, the `deepspeed:` section, advice."""

from __future__ import annotations

import copy

import pytest

from sgm.config import ConfigError, load_run_config
from sgm.training.faults import OVERFLOW, SkipGuard, TrainingStopped
from sgm.training.options import TrainArgs, sensible_rates, split_shares, training_advice
from sgm.training.setup.deepspeed import plan_deepspeed
from tests.conftest import REPO

SHIPPED = REPO / "configs" / "cogvideox_2b_sft.yaml"
SECTION = {
    "train_micro_batch_size_per_gpu": 1,
    "gradient_accumulation_steps": 2,
    "gradient_clipping": 0.1,
    "zero_optimization": {"stage": 2},
    "optimizer": {"type": "sat.ops.FusedEmaAdam", "params": {"lr": 1e-5, "eps": "1e-8"}},
}


def plan(device: str = "cpu", ranks: int = 1, **changes):
    return plan_deepspeed({**copy.deepcopy(SECTION), **changes}, device_type=device, data_parallel_size=ranks)


def test_shipped_configuration_is_read_whole():
    config = load_run_config([SHIPPED], TrainArgs)
    assert not config.notes  # every key has its effect
    assert config.args.mode == "finetune" and config.args.train_iters == 1000 and config.args.save == "ckpts"
    done = plan_deepspeed(config.deepspeed, device_type="cuda")
    assert (done.dtype, done.stage, done.micro_batch, done.accumulation, done.clipping) == ("fp16", 2, 1, 1, 0.1)
    assert done.optimizer.params["eps"] == 1e-8 and not done.offload
    assert not [line for line in training_advice(config.args, config.model, done.optimizer.lr) if "rate" in line]


def test_lora_part_of_the_shipped_configuration_can_be_uncommented(tmp_path):
    lines = SHIPPED.read_text().splitlines()
    text = "\n".join(lines)
    text = text.replace("# not_trainable_prefixes", "not_trainable_prefixes").replace("# lora_config", "lora_config")
    for line in ("  target: sat.model.finetune.lora2.LoraMixin", "  params:", "    r: 128"):
        text = text.replace(f"        # {line}", f"        {line}")
    (tmp_path / "lora.yaml").write_text(text)
    config = load_run_config([tmp_path / "lora.yaml"], TrainArgs)
    assert config.model["not_trainable_prefixes"] == ["all"]
    lora = config.model["network_config"]["params"]["modules"]["lora_config"]
    assert lora == {"target": "sat.model.finetune.lora2.LoraMixin", "params": {"r": 128}}
    low = training_advice(config.args, config.model, 1e-7)
    assert any("LoRA" in line for line in low)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"train_data": []}, "train_data is empty"),
        ({"load": None}, "args.load is not set"),
        ({"cache_dir": "cache", "eval_prompts": ["a boat"]}, "args.eval_prompts needs the text encoder"),
        ({"train_data_weights": [1.0, 2.0]}, "one positive number"),
        ({"split": "a,b"}, "split"),
        ({"lr_decay_style": "sine"}, "lr_decay_style"),
        ({"train_iters": 0}, "train_iters"),
    ],
)
def test_contradictions_are_refused(change, message):
    overrides = [f"args.{k}={'null' if v is None else v}" for k, v in change.items()]
    with pytest.raises(ConfigError, match=message):
        load_run_config([SHIPPED], TrainArgs, overrides=overrides)


def test_split_shares():
    assert split_shares("1,0,0") == (1.0, 0.0, 0.0)
    assert split_shares("8,1,1") == pytest.approx((0.8, 0.1, 0.1))


def test_sensible_rates_follow_the_model():
    full = {"network_config": {"params": {"hidden_size": 1920}}}
    low, good, high = sensible_rates(full)
    assert (low, good) == (1e-7, 1e-5) and low < good < high
    narrow = {"network_config": {"params": {"hidden_size": 192}}}
    assert sensible_rates(narrow) == pytest.approx([10 * r for r in (low, good, high)])

    def lora(**params):
        modules = {"lora_config": {"params": {"r": 16, **params}}}
        return {
            "not_trainable_prefixes": ["all"],
            "network_config": {"params": {"hidden_size": 192, "modules": modules}},
        }

    plain = sensible_rates(lora())
    assert plain == pytest.approx([3e-4, 3e-3, 3e-2])  # 1e-4, 1e-3, 1e-2 at 1920, by the root of the width
    assert plain == sensible_rates(lora(r=128))
    assert sensible_rates(lora(lora_alpha=10)) == pytest.approx([r / 10 for r in plain])
    assert sensible_rates(lora(rank_stabilised=True))[1] == pytest.approx(plain[1] / 4, rel=0.3)


def test_pretraining_is_not_warned_of_its_rate():
    config = load_run_config([SHIPPED], TrainArgs, overrides=["args.mode=pretrain"])
    assert not [line for line in training_advice(config.args, config.model, 1e-2) if "rate" in line]


def test_short_runs_are_warned_of_the_held_start():
    config = load_run_config([SHIPPED], TrainArgs, overrides=["args.train_iters=60"])
    assert any("auto_warmup_steps=0" in line for line in training_advice(config.args, config.model, 1e-5))


# --- the deepspeed section ----------------------------------------------------------------------------------------


def test_numbers_written_as_text():
    done = plan()
    assert done.optimizer.params["eps"] == 1e-8
    assert any("'1e-8' is read as the number" in note for note in done.notes)
    assert plan(gradient_clipping="1e-1").clipping == 0.1


@pytest.mark.parametrize("place", [None, "bf16", "zero_optimization"])
def test_loss_scale_keys_move_home(place):
    stray = {"loss_scale": 0, "loss_scale_window": 400, "hysteresis": 2, "min_loss_scale": 1}
    changes = stray if place is None else {place: {**SECTION.get(place, {}), **stray}}
    done = plan(device="cuda", **({"fp16": {"enabled": True}} | changes))
    assert {k: done.config["fp16"][k] for k in stray} == stray
    assert not set(stray) & set(done.config) and not set(stray) & set(done.config["zero_optimization"])
    assert sum(note.startswith("warning") for note in done.notes) == 4


def test_fp16_on_a_cpu_names_the_switches():
    with pytest.raises(ConfigError, match=r"--set deepspeed.fp16.enabled=false(.|\n)*deepspeed.bf16.enabled=true"):
        plan(fp16={"enabled": True})


def test_both_precisions_are_refused():
    with pytest.raises(ConfigError, match="choose one"):
        plan(device="cuda", fp16={"enabled": True}, bf16={"enabled": True})


def test_old_offload_switch():
    done = plan(device="cuda", zero_optimization={"stage": 2, "cpu_offload": True})
    zero = done.config["zero_optimization"]
    assert done.offload and zero["offload_optimizer"] == {"device": "cpu", "pin_memory": True}
    assert "cpu_offload" not in zero
    assert done.config["zero_force_ds_cpu_optimizer"] is False
    assert not plan(zero_optimization={"stage": 2, "cpu_offload": False}).offload
    with pytest.raises(ConfigError, match="stage 1"):
        plan(zero_optimization={"stage": 0, "cpu_offload": True})


def test_problems_are_listed_together():
    with pytest.raises(ConfigError) as caught:
        plan(gradient_cliping=1, zero_optimization={"stage": 4, "overlap_com": True}, scheduler={"type": "WarmupLR"})
    message = str(caught.value)
    for part in ("gradient_clipping", "stage must be", "overlap_comm", "scheduler"):
        assert part in message


REMOVED = {
    "amp": {"enabled": True}, "curriculum_learning": {"enabled": True}, "eigenvalue": {"enabled": True},
    "elasticity": {"enabled": True}, "graph_harvesting": True, "nebula": {"enabled": True},
    "progressive_layer_drop": {"enabled": True, "theta": 0.5}, "quantize_training": {"enabled": True},
    "sparse_gradients": True, "compression_training": {"weight_quantization": {"shared_parameters": {"enabled": True}}},
}  # fmt: skip


def switched_off(value):
    if isinstance(value, dict):
        return {name: switched_off(inner) if isinstance(inner, bool | dict) else inner for name, inner in value.items()}
    return False


def test_what_deepspeed_has_removed_may_stand_there_switched_off():
    done = plan(**switched_off(REMOVED), zero_optimization={"stage": 2, "mics_shard_size": -1, "zeropp_loco_param": {}})
    assert not REMOVED.keys() & done.config.keys() and "mics_shard_size" not in done.config["zero_optimization"]
    said = "\n".join(done.notes)
    assert all(f"deepspeed.{name} has no effect" in said for name in [*REMOVED, "zero_optimization.mics_shard_size"])
    with pytest.raises(ConfigError) as caught:
        plan(**REMOVED, zero_optimization={"stage": 3, "mics_shard_size": 2})
    named = [line.split(":")[0] for line in str(caught.value).splitlines()[1:]]
    assert sorted(named) == sorted(f"  - deepspeed.{n}" for n in [*REMOVED, "zero_optimization.mics_shard_size"])


def test_what_has_no_part_in_a_training_here():
    idle = {"checkpoint": {"load_universal": False, "tag_validation": "Warn"}, "dataloader_drop_last": True}
    done = plan(**idle, tensorboard={"enabled": False}, zero_optimization={"stage": 1, "elastic_checkpoint": True})
    assert not {*idle, "tensorboard"} & done.config.keys()
    assert sum("has no effect" in note for note in done.notes) == 5
    absent = {
        "load_universal_checkpoint": True,
        "hybrid_engine": {"enabled": True},
        "data_efficiency": {"enabled": True},
    }
    with pytest.raises(ConfigError) as caught:
        plan(**absent, checkpoint={"load_universal": True}, wandb={"enabled": True}, gradient_allreduce_op="sum")
    for place in (*absent, "checkpoint.load_universal", "wandb", "gradient_allreduce_op"):
        assert f"deepspeed.{place} is " in str(caught.value)


@pytest.mark.parametrize(
    "changes, place, words",
    [
        ({"zero_optimization": {"stage": 1, "offload_optimizer": {"devce": "cpu"}}},
         "zero_optimization.offload_optimizer.devce", "unknown key; did you mean `device`"),
        ({"zero_optimization": {"stage": 3, "stage3_max_live_paramters": 5}},
         "zero_optimization.stage3_max_live_paramters", "did you mean `stage3_max_live_parameters`"),
        ({"zero_optimization": {"stage": 3, "leaf_module": {"clases": ["x"]}}},
         "zero_optimization.leaf_module.clases", "did you mean `classes`"),
        ({"bfloat16": {"enabled": True}}, "bfloat16", "unknown key"),
        ({"fp16": {"initial_scal_power": 8}}, "fp16.initial_scal_power", "did you mean `initial_scale_power`"),
        ({"timers": {"throughput": {"enabld": True}}}, "timers.throughput.enabld", "did you mean `enabled`"),
        ({"activation_checkpointing": {"profil": True}}, "activation_checkpointing.profil", "did you mean `profile`"),
        ({"flops_profiler": {"enabled": True, "top_moduls": 3}}, "flops_profiler.top_moduls", "`top_modules`"),
        ({"aio": {"blok_size": 3}}, "aio.blok_size", "did you mean `block_size`"),
        ({"data_types": {"grad_acum_dtype": "fp32"}}, "data_types.grad_acum_dtype", "`grad_accum_dtype`"),
        ({"zero_optimization": {"stage": 1, "reduce_bucket_size": "many"}},
         "zero_optimization.reduce_bucket_size", "valid integer"),
        ({"zero_optimization": {"stage": 1, "offload_optimizer": {"device": "gpu"}}},
         "zero_optimization.offload_optimizer.device", "'cpu' or 'nvme', got 'gpu'"),
        ({"flops_profiler": {"profile_step": "late"}}, "flops_profiler.profile_step", "whole number, got 'late'"),
        ({"flops_profiler": True}, "flops_profiler", "True"),
        ({"comms_logger": 5}, "comms_logger", "must be a mapping, not int"),
        ({"prescale_gradients": "yes"}, "prescale_gradients", "true or false, got 'yes'"),
        ({"communication_data_type": "fp8"}, "communication_data_type", "['fp16', 'bf16', 'fp32']"),
        ({"data_types": {"keep_in_fp32_modules": 5}}, "data_types.keep_in_fp32_modules", "list of name patterns"),
        ({"bf16": {"enabled": True, "bf16_optimizer_states": True}}, "", "requires bf16_master_weights_and_grads"),
        ({"timers": 5}, "timers", "5"),
    ],
)  # fmt: skip
def test_each_key_at_each_depth_is_checked_by_deepspeed_itself(changes, place, words):
    with pytest.raises(ConfigError) as caught:
        plan(**changes)
    title, *lines = str(caught.value).splitlines()
    assert title == "1 problem in the deepspeed section:" and words in lines[0], lines
    assert lines[0].startswith(f"  - deepspeed{place and '.'}{place}: ")


@pytest.mark.parametrize("dtype", ["float16", "fp16", "torch.float32", None])
@pytest.mark.parametrize("stage", range(4))
def test_autocast_is_for_bfloat16(stage, dtype):
    """DeepSpeed 0.19.8 clips the gradients of float16 while they are scaled."""
    with pytest.raises(ConfigError, match=r"--set deepspeed.torch_autocast.dtype=bfloat16"):
        plan(torch_autocast={"enabled": True, "dtype": dtype}, zero_optimization={"stage": stage})
    assert plan(torch_autocast={"enabled": True, "dtype": "bfloat16"}, zero_optimization={"stage": stage})
    assert plan(torch_autocast={"enabled": False, "dtype": dtype}, zero_optimization={"stage": stage})


def test_a_report_of_deepspeeds_own_needs_a_number_of_steps():
    with pytest.raises(ConfigError, match="steps_per_print must be a whole number >= 1, got 0"):
        plan(steps_per_print=0)


def test_batch_sizes_must_agree():
    assert plan(ranks=4).config["train_micro_batch_size_per_gpu"] == 1
    done = plan(ranks=2, train_batch_size=8, gradient_accumulation_steps=None)
    assert (done.micro_batch, done.accumulation) == (1, 4)
    with pytest.raises(ConfigError, match="train_batch_size is 8"):
        plan(ranks=3, train_batch_size=8)


# --- faults and memory ---------------------------------------------------------------------------------------------


def skips(pattern: str) -> SkipGuard:
    """A run's steps: `.` applied, `o` skipped for float16's range, `n` for a loss that is not finite."""
    guard = SkipGuard(limit=99)
    for iteration, step in enumerate(pattern, 1):
        if step == ".":
            guard.applied()
        else:
            guard.skipped(OVERFLOW if step == "o" else "the loss is not finite", iteration, "fp16")
    return guard


@pytest.mark.parametrize(
    "pattern, mostly",
    [
        ("....", False), ("ooooo.", False), ("oooooo", True), ("n", True), ("nn..", False), ("nnn..", True),
        (".oo", True), ("oo.nn", True), ("oo..n", False), ("ono.", True),
    ],
)  # fmt: skip
def test_a_search_for_the_loss_scale_is_no_failure(pattern, mostly):
    assert skips(pattern).mostly_skipped(len(pattern)) == mostly


@pytest.mark.parametrize(
    "pattern, worth", [("..", True), ("..n", True), ("..nn", False), ("..ooo", True), ("oo", False), ("n", False)]
)
def test_a_row_of_bad_losses_says_that_the_weights_are_bad(pattern, worth):
    assert skips(pattern).worth_saving(len(pattern)) == worth


def test_skips_in_a_row_end_a_run_with_a_reason():
    guard = SkipGuard(limit=3)
    for _ in range(2):
        guard.skipped("the gradient is not finite", 1, "fp16")
    guard.applied()
    for _ in range(2):
        guard.skipped("the gradient is not finite", 5, "fp16")
    with pytest.raises(TrainingStopped, match=r"3 steps in a row(.|\n)*deepspeed.bf16.enabled=true"):
        guard.skipped("the gradient is not finite", 6, "fp16")
    assert guard.total == 5
