"""What moves a few-step student: levels, the teacher's guidance, the gradient; and its sampler and its header."""

from __future__ import annotations

import dataclasses
import json
import math
import weakref

import pytest
import torch

from sgm.config import UPSTREAM_ARGS, ConfigError, load_run_config
from sgm.inference.options import SampleArgs
from sgm.modules.diffusionmodules.few_steps import FewSteps, FewStepsError
from sgm.modules.diffusionmodules.sampling import RenoisingSampler, VideoDDIMSampler
from sgm.training.distill import prompts
from sgm.training.distill.engine import compared_timesteps, guidance_tables, matching_loss
from sgm.training.options import SAMPLING_ARGS, DistillArgs, TrainArgs
from tests.sampling_tiny import REPO
from tests.training_tiny import DISCRETIZATION

DYNAMIC = {
    "target": "sgm.modules.diffusionmodules.guiders.DynamicCFG", "params": {"scale": 6, "exp": 5, "num_steps": 20}
}  # fmt: skip


def teacher(guider: dict | None = DYNAMIC) -> VideoDDIMSampler:
    return VideoDDIMSampler(DISCRETIZATION, num_steps=20, guider_config=guider)


def test_a_step_is_compared_down_to_where_the_next_one_takes_over():
    schedule = teacher().schedule(4)
    found = compared_timesteps(schedule, "segment")
    assert found == [range(749, 999), range(499, 749), range(249, 499), range(249)]
    assert compared_timesteps(schedule, "all") == [range(999)] * 4
    assert all(len(span) for span in compared_timesteps(teacher().schedule(1000), "segment"))


def test_the_teachers_guidance_is_that_of_its_own_steps():
    sampler = teacher()
    (table, *others) = guidance_tables(sampler, 1000, DistillArgs())
    assert len(others) == 3 and all(torch.equal(table, other) for other in others)
    for timestep, scale in zip(sampler.schedule().timesteps, sampler.guidance_scales(), strict=True):
        assert table[timestep] == pytest.approx(scale) and table[timestep - 49] == pytest.approx(scale)
    assert set(guidance_tables(teacher(None), 1000, DistillArgs())[0].tolist()) == {1.0}
    given = guidance_tables(sampler, 1000, DistillArgs(steps=2, guidance_scale=[1.5, 4.0]))
    assert [set(part.tolist()) for part in given] == [{1.5}, {4.0}]


def test_options_that_contradict_each_other():
    with pytest.raises(ConfigError, match=r"guidance_scale is \[1.0, 2.0\]; it needs one number, or one for each of"):
        DistillArgs(guidance_scale=[1.0, 2.0])
    with pytest.raises(ConfigError, match="critic_rate is 0; it must be above 0"):
        DistillArgs(critic_rate=0)


def test_the_gradient_is_what_critic_and_teacher_differ_in():
    estimate = torch.randn(3, 2, 4, requires_grad=True)
    critic, wanted = torch.randn(3, 2, 4), torch.randn(3, 2, 4)
    matching_loss(estimate, critic, wanted).sum().backward()
    away = (estimate.detach() - wanted).abs().mean((1, 2), keepdim=True)
    torch.testing.assert_close(estimate.grad * 8, (critic - wanted) / away)
    assert not matching_loss(estimate, wanted, wanted).any()  # nothing moves a student that is where the teacher is


def test_fresh_noise_between_two_passes():
    sampler = RenoisingSampler(DISCRETIZATION, num_steps=4)
    seen, draws = [], []

    def denoise(x, signal, cond, idx):
        seen.append((x, float(idx[0])))
        return torch.full_like(x, 0.5)

    def draw(like):
        draws.append(torch.randn_like(like))
        return draws[-1]

    x = torch.randn(1, 1, 2, 2, 2)
    assert torch.equal(sampler(denoise, x, {}, noise_sampler=draw), torch.full_like(x, 0.5))
    assert [t for _, t in seen] == [999, 749, 499, 249] and torch.equal(seen[0][0], x)
    assert len(draws) == 3
    for (inner, _), noise, a in zip(seen[1:], draws, sampler.schedule().signal[1:], strict=False):
        torch.testing.assert_close(inner, a * 0.5 + math.sqrt(1 - a * a) * noise)


def test_a_configuration_of_sampling_may_be_distilled():
    names = [{field.name for field in dataclasses.fields(record)} for record in (SampleArgs, TrainArgs)]
    assert names[0] - names[1] - UPSTREAM_ARGS == SAMPLING_ARGS
    files = [REPO / "configs" / "demo_infer.yaml", REPO / "configs" / "distill.yaml"]
    config = load_run_config(files, TrainArgs, overrides=["args.distill.prompts=p.txt"])
    assert "args.student has no effect here" in config.notes


def test_a_header_says_how_a_student_is_sampled():
    stated = FewSteps(2, (999, 499), "renoise")
    assert FewSteps.parse(json.dumps(stated.as_dict() | {"later": 1})) == stated == FewSteps.parse(stated.as_dict())
    own = {
        "target": "x",
        "params": {"num_steps": 20, "guider_config": DYNAMIC, "discretization_config": DISCRETIZATION},
    }
    section = stated.sampler_config(own)
    assert section["target"].endswith(".RenoisingSampler")
    assert section["params"] == {"num_steps": 2, "discretization_config": DISCRETIZATION}
    assert "guider_config" in FewSteps(2, (999, 499), "ddim", True).sampler_config(own)["params"]


@pytest.mark.parametrize(
    ("stated", "message"),
    [
        ("{", "cannot be read"),
        ('{"steps": 2}', "cannot be read"),
        ('{"steps": 2, "timesteps": [9], "sampler": "ddim"}', "2 steps with 1 timesteps"),
        ('{"steps": 1, "timesteps": [9], "sampler": "os.system"}', "'os.system' is not one of renoise, ddim"),
    ],
)
def test_a_header_that_cannot_be_used(stated, message):
    with pytest.raises(FewStepsError, match=message):
        FewSteps.parse(stated)


# --- prompts -----------------------------------------------------------------------------------------------------------


class Embedder:
    """Stands for the engine: a text's embedding is its number. Tells whether what it gave is still held."""

    def __init__(self):
        self.given: list[weakref.ref] = []

    def condition_batch(self, batch: dict) -> tuple[dict, dict]:
        assert sum(given() is not None for given in self.given) <= 1
        made = torch.tensor([float(text) for text in batch["txt"]]).bfloat16().view(-1, 1, 1).repeat(1, 2, 3)
        self.given.append(weakref.ref(made))
        return {"crossattn": made}, {"crossattn": torch.zeros_like(made)}


def test_prompts_are_embedded_into_one_place():
    """No batch's own tensor outlives the next: all of them beside their sum would be twice the memory."""
    found, nothing = prompts.embed(Embedder(), [str(k) for k in range(40)])
    conditions = found.conditions["crossattn"]
    assert conditions.shape == (40, 2, 3) and conditions.dtype == torch.bfloat16
    assert conditions[:, 1, 2].tolist() == list(range(40)) and found[17]["txt"] == "17"
    assert nothing["crossattn"].shape == (1, 2, 3) and not nothing["crossattn"].any()


def test_more_prompts_than_memory_are_refused_before_they_are_embedded(monkeypatch):
    monkeypatch.setattr(prompts, "free_memory", lambda device: 12 * 40)
    texts = [str(k) for k in range(40)]
    prompts.embed(Embedder(), texts)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    embedder = Embedder()
    with pytest.raises(ConfigError, match="40 prompts .* in 2 processes.*head -n 16 FILE"):
        prompts.embed(embedder, texts)
    assert len(embedder.given) == 1
