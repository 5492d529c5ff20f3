"""The memory estimate: exact where it can be, measured where not; the tool; what the shipped settings add up to."""

from __future__ import annotations

import multiprocessing
import shlex
from dataclasses import replace

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks

from sgm.modules.ops.recompute import MODES
from sgm.training.faults import out_of_memory_advice
from sgm.training.memory import BACKWARD_TENSORS, GIB, MemoryNeeds
from sgm.training.optimizers.adam8bit import AdamW8bit
from tests.conftest import REPO
from tests.dit_tiny import random_inputs, tiny_network
from tools import estimate_memory

SFT, LORA, LOW = (REPO / "configs" / f"{name}.yaml" for name in ("cogvideox_2b_sft", "lora", "low_memory"))


def needs(**changes) -> MemoryNeeds:
    base = dict(
        trained=1_693_783_872, frozen=5_000_000_000, tokens=17_776, width=1920, layers=30,
        vae_values=128 * 49 * 480 * 720, micro_batch=1, dtype="fp16", ranks=1, stage=2, offload=False,
        moment_bytes=8.0, ema=True, checkpointing=True, encoder_values=4_970_000_000, bucket=1_000_000_000,
    )  # fmt: skip
    return MemoryNeeds(**{**base, **changes})


def test_estimate_counts_exactly_what_is_exact():
    full = needs()
    assert full.weights == (full.trained + full.frozen) * 2
    assert full.optimizer_state == full.trained * 16  # master, two moments, average: 4 bytes each
    assert needs(ema=False).optimizer_state == full.trained * 12
    assert needs(ranks=8).optimizer_state == full.trained * 2
    assert needs(stage=3, ranks=8).weights == full.weights // 8
    assert full.gradients == full.trained * 2 + 2 * 10**9
    assert full.update - full.gradients == full.trained * 6  # flat, and in float32
    offloaded = needs(offload=True)
    assert offloaded.gradients == 2 * 10**9 and offloaded.on_cpu == full.trained * (16 + 4 + 2)
    assert needs().cached().weights == (full.trained + 30_000_000) * 2


def test_processes_that_share_a_clip_share_its_activations():
    """Text, positions and what comes behind the last layer are whole on each; so is the state of ZeRO as before."""
    alone, shared = needs(ranks=2, checkpointing=False), needs(ranks=2, checkpointing=False, shares=2)
    assert alone.activations / 2 < shared.activations < alone.activations * 0.56
    assert shared.encoding == alone.encoding // 2 and shared.optimizer_state == alone.optimizer_state
    how = "--set args.sequence_parallel_size={}"
    assert alone.variants()[how.format(2)] == shared
    assert how.format(4) not in shared.variants() and how.format(4) in needs(ranks=8, shares=2).variants()
    for refused in ({"stage": 3}, {"most_shares": 1}):
        assert how.format(2) not in needs(ranks=2, **refused).variants()
    assert not any("stage=3" in said for said in shared.variants())
    kept = ["args.checkpoint_activations=false", "model.network_config.params.transformer_args.checkpoint_activations=false"]  # fmt: skip
    for given, most in (([], 30), (["args.cuda_graphs=true", *kept], 1)):
        assert estimate_memory.needs_of([SFT], given, 4, "cuda").most_shares == most
    for given in ([], ["args.sequence_parallel_size=2"]):
        found = estimate_memory.needs_of([SFT], given, 4, "cuda")
        assert (found.ranks, found.shares) == (4, 1 + len(given))
    assert estimate_memory.main([str(SFT), "--set", "args.sequence_parallel_size=2", "--gpus", "3"]) == 2


def test_an_adapter_is_what_trains_less_than_a_fifth_of_the_frozen_network():
    """Encoders do not count. Its layers keep less for the backward pass, and LoRA is not advised again."""
    whole = needs(trained=100, frozen=1500, encoder_values=1000)
    adapter = needs(trained=100, frozen=1501, encoder_values=1000)
    assert not whole.trains_adapter and adapter.trains_adapter
    assert adapter.activations < whole.activations
    advised = [any(how.startswith("LoRA") for how in found.variants()) for found in (whole, adapter)]
    assert advised == [True, False]


def test_only_one_of_three_moments_counts():
    """Encoding, backward pass and update follow each other."""
    full = needs(offload=True)
    assert full.total == full.weights + max(full.encoding, full.gradients + full.activations)
    assert full.encoding > full.activations > 0 and full.cached().encoding == 0
    plain = needs(stage=0, dtype="fp32", checkpointing=False)
    assert plain.total == plain.weights + plain.optimizer_state + plain.gradients + plain.activations


def kept(layers: int, lora: dict[str, int] | None) -> int:
    """Bytes that autograd keeps of a forward pass of a network with so many layers."""
    network = tiny_network(num_layers=layers, lora=lora, latent_width=20, latent_height=16, dtype="bf16").train()
    for name, p in network.named_parameters():
        p.requires_grad_(p.requires_grad and (lora is None or "matrix_" in name))
    weights = {p.untyped_storage().data_ptr() for p in network.parameters()}
    found: dict[int, torch.Tensor] = {}

    def note(t: torch.Tensor) -> torch.Tensor:
        found[t.untyped_storage().data_ptr()] = t  # and keeps it, so that no address comes twice
        return t

    with saved_tensors_hooks(note, lambda t: t):
        network(**random_inputs(1, 3, 16, 20))
    return sum(t.untyped_storage().nbytes() for at, t in found.items() if at not in weights)


@pytest.fixture(scope="module")
def kept_by_third_and_second_layer() -> list[int]:
    """Without and with an adapter; in a process of their own, since what other tests' engines leave does not count."""
    with multiprocessing.get_context("spawn").Pool(1) as fresh:
        found = fresh.starmap(kept, [(layers, lora) for lora in (None, {"r": 4}) for layers in (3, 1)])
    return [found[0] - found[1], found[2] - found[3]]


@pytest.mark.parametrize("lora", [False, True])
def test_activations_are_what_autograd_keeps(kept_by_third_and_second_layer, lora):
    """Without checkpointing, per layer, on a real network; the estimate adds what the backward pass has in hand."""
    tokens, width = 12 + 3 * 8 * 10, 192
    trained, frozen = (10, 1000) if lora else (1000, 10)
    estimate = needs(
        trained=trained, frozen=frozen, encoder_values=0, tokens=tokens, width=width, layers=2, dtype="bf16",
        checkpointing=False,
    ).activations  # fmt: skip
    on_cpu = 0 if lora else 2 * 2 * tokens * width * 4  # two layers' queries and keys in float32, see HeadNorm
    found = kept_by_third_and_second_layer[lora] - on_cpu
    assert found == pytest.approx(estimate - BACKWARD_TENSORS * tokens * width * 2, rel=0.1)


def test_recomputing_keeps_an_input_and_perhaps_a_product_a_layer():
    sequence = 17_776 * 1920 * 2
    kept, full, selective, products = (needs(checkpointing=mode).activations for mode in MODES)
    assert selective - full == 30 * sequence and kept > 9 * full
    assert products - full == 300 * sequence and products < kept
    offloaded = needs(checkpointing=True, offloads_inputs=True)
    assert full - offloaded.activations == 28 * sequence == offloaded.on_cpu


def test_streamed_blocks_are_on_the_cpu_but_for_two():
    adapter = needs(
        trained=58_982_400, frozen=1_700_000_000, encoder_values=0, in_blocks=1_500_000_000, in_block=50_000_000
    )
    (streamed,) = (found for how, found in adapter.variants().items() if how == "--set args.stream_frozen=true")
    assert adapter.weights - streamed.weights == 1_400_000_000 * 2 and streamed.on_cpu == 1_500_000_000 * 2
    assert not any("stage=3" in how for how in streamed.variants())
    both = replace(adapter, checkpointing=False).variants()
    assert both["--set args.checkpoint_activations=true --set args.stream_frozen=true"].checkpointing is True


def test_advice_is_ordered_by_effect():
    advice = out_of_memory_advice(needs(checkpointing=False))
    saved = [float(line.split("saves about ")[1].split()[0]) for line in advice.splitlines() if "saves about" in line]
    assert len(saved) >= 4 and saved == sorted(saved, reverse=True)
    assert all(name in advice for name in ("checkpoint_activations", "offload_optimizer", "cache_dir", "AdamW8bit"))
    assert all("LoRA" not in how for how in needs(trained=58_982_400, frozen=6_700_000_000).variants())


def test_report_warns_only_when_it_will_not_fit():
    assert len(needs().report(free=200 * GIB)) == 1
    assert "what helps" in needs().report(free=10 * GIB)[1]


# --- the tool and the shipped settings ------------------------------------------------------------------------------


@pytest.mark.parametrize("configs, most", [([SFT, LOW], 13.0), ([SFT, LORA, LOW], 10.0), ([SFT, LORA], 10.0)])
def test_shipped_settings_reach_the_goals_with_a_cache(configs, most):
    """Full size, 49x480x720, one clip at a time: 13 GiB for full fine-tuning, 10 GiB for LoRA."""
    found = estimate_memory.needs_of(configs, [], 1, "cuda")
    assert found.tokens == 17_776 and found.trains_adapter == (LORA in configs)
    assert found.trained == (58_982_400 if LORA in configs else 1_693_783_872)
    assert found.cached().total < (most - 0.5) * GIB  # the driver takes some
    assert found.checkpointing is True
    if LOW in configs:  # there is room to recompute less
        assert replace(found.cached(), checkpointing="selective").total < (most - 0.5) * GIB


@pytest.mark.parametrize(
    ("name", "values", "tokens"),
    [
        ("cogvideox_5b_i2v", 5_625_284_160, 17_550 + 226),
        ("cogvideox1.5_5b", 5_570_872_960, 44_880 + 224),  # 21 latents, the first of them twice, in pairs
        ("cogvideox1.5_5b_i2v", 5_571_791_488, 44_880 + 224),
    ],
)
def test_the_family_s_clips_and_what_its_runs_on_cached_clips_keep(name, values, tokens):
    """The encoder, and the memory of one frame through it, where pictures are encoded in each step."""
    config = [REPO / "configs" / f"{name}_sft.yaml"]
    found = [estimate_memory.needs_of(config, given, 1, "cuda") for given in ([], ["args.cache_dir=cache"])]
    for needs in (found[0].cached(), found[1]):
        encoder, frame = (92_215_456, 128 * 480 * 720) if "i2v" in name else (0, 0)
        frame = frame * 768 * 1360 // (480 * 720) if "1.5" in name else frame
        assert (needs.trained, needs.frozen, needs.tokens) == (values, encoder, tokens)
        assert needs.vae_values == frame and (needs.encoding > 0) == ("i2v" in name)


def test_tool_prints_a_row_for_each_switch(capsys):
    assert estimate_memory.main([str(SFT), "--set", "deepspeed.zero_optimization.stage=1", "--gpus", "4"]) == 0
    shown = capsys.readouterr().out
    assert "1,693,783,872 trained" in shown and "fp16, ZeRO 1 over 4 GPUs" in shown
    rows = [line.split(maxsplit=2) for line in shown.splitlines() if line[:10].strip().replace(".", "").isdigit()]
    assert rows[0][2] == "as configured" and any("AdamW8bit" in row[2] for row in rows)
    sizes = [float(row[0]) for row in rows[1:]]
    assert sizes == sorted(sizes, reverse=True) and "low_memory.yaml and args.cache_dir" in rows[-1][2]


def test_tool_finds_the_project_s_weights_from_any_folder(tmp_path, monkeypatch):
    def encoders() -> int:
        return estimate_memory.needs_of(
            [REPO / "configs" / "demo_lora.yaml"], ["args.cache_dir=null"], 1, "cuda"
        ).frozen

    at_home = encoders()
    monkeypatch.chdir(tmp_path)
    assert encoders() == at_home  # not with T5 XXL in place of the demo's


def test_tool_names_what_is_wrong(capsys):
    assert estimate_memory.main([str(SFT), "--set", "deepspeed.zero_optimization.stage=7"]) == 2
    assert "stage must be 0, 1, 2 or 3" in capsys.readouterr().err


def test_overlays_change_what_they_say():
    from sgm.config import load_run_config
    from sgm.training.options import TrainArgs
    from sgm.training.setup.deepspeed import plan_deepspeed

    config = load_run_config([SFT, LORA, LOW], TrainArgs, overrides=["deepspeed.optimizer.type=AdamW8bit"])
    plan = plan_deepspeed(config.deepspeed, device_type="cuda")
    assert plan.offload and plan.optimizer.target is AdamW8bit and not plan.optimizer.keeps_ema
    assert plan.config["zero_optimization"]["offload_optimizer"] == {"device": "cpu", "pin_memory": True}
    assert config.model["not_trainable_prefixes"] == ["all"] and plan.optimizer.lr == 1e-3


SINGLY = ([], ["deepspeed.zero_optimization.stage=0"], ["deepspeed.optimizer.type=AdamW"])
NO_PRIOR = ["args.prior_data=[]", "args.train_data_weights=null"]
GRAPHS = [*NO_PRIOR, "args.cuda_graphs=true", "args.checkpoint_activations=false"]
GRAPHS += ["model.network_config.params.transformer_args.checkpoint_activations=false"]
HEAD = ["model.also_trainable_prefixes=[model.diffusion_model.mixins.final_layer]"]  # beside an adapter


@pytest.mark.parametrize(
    "files, given, gpus",
    [
        *(([file], given, 1) for file in ("demo_sft", "cogvideox_2b_sft") for given in SINGLY),
        (["demo_sft"], [], 4),  # with prior preservation
        (["demo_lora"], HEAD, 4),
        (["demo_lora", "distill"], ["args.load=demo/transformer"], 4),
        (["demo_lora"], GRAPHS, 4),
    ],
)
def test_what_is_said_to_help_can_be_given_and_helps(files, given, gpus):
    config = [REPO / "configs" / f"{file}.yaml" for file in files]
    base = estimate_memory.needs_of(config, given, gpus, "cuda")
    advised = [how for how, needs in base.variants().items() if needs.total < base.total and how.startswith("--set")]
    assert len(advised) >= 2
    for how in advised:
        overrides = shlex.split(how.replace("FOLDER", "/tmp/cache"))[1::2]
        assert estimate_memory.needs_of(config, [*given, *overrides], gpus, "cuda").total < base.total, how
