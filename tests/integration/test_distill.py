"""Few-step students (args.distill): training from prompts alone, going on exactly, what the file says, and who heeds it."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from sgm.config import ConfigError, load_run_config
from sgm.convert.lora_files import open_adapter, sat_matrices, write_peft
from sgm.models.loading import load_network
from sgm.modules.diffusionmodules.few_steps import FewSteps
from sgm.training.checkpoints.state import CheckpointError
from sgm.training.options import TrainArgs
from sgm.training.run import train
from sgm.training.setup.deepspeed import plan_deepspeed
from sgm.training.setup.estimate import memory_needs, planned_needs
from sgm.training.setup.model import clip_size, load_engine, meta_engine, training_model_section
from sgm.util import instantiate_from_config
from sgm.weights.files import read_checkpoint
from sgm.weights.release import read_transformer
from tests.integration.test_training_runs import records
from tests.sampling_tiny import REPO, main
from tests.sampling_tiny import configuration as sampling
from tests.training_tiny import DISCRETIZATION, configuration, write_clips, write_release, write_yaml
from tools.demo.bundle_adapter import main as bundle_adapter

PROMPTS = ["a red ball", "a blue square", "a green star", "a yellow ring"]
EVALUATED = ["a cube", "a cone", "a cup"]
FILE = "mp_rank_00_model_states.pt"


@pytest.fixture(scope="module")
def parts(tmp_path_factory) -> SimpleNamespace:
    folder = tmp_path_factory.mktemp("distill")
    prompts = folder / "prompts.txt"
    prompts.write_text("\n".join(PROMPTS) + "\n")
    return SimpleNamespace(release=write_release(folder / "release"), prompts=prompts)


def content_of(parts, save: Path | None, lora: int | None = 4, **distill) -> dict:
    content = configuration(parts.release, Path("unused"), save, lora=lora, lora_only=bool(lora))
    content["args"] |= {"train_data": [], "distill": {"prompts": [str(parts.prompts)], "steps": 2, **distill}}
    content["deepspeed"]["train_micro_batch_size_per_gpu"] = 2
    del content["data"], content["model"]["loss_fn_config"]
    return content


def run(content: dict, folder: Path, *overrides: str, resume: str | None = None) -> Path:
    """Train in this process; the run's folder."""
    path = write_yaml(folder / "config.yaml", content)
    assert train(load_run_config([path], TrainArgs, overrides=overrides, flags={"resume": resume})) == 0
    (found,) = (folder / "save").iterdir()
    return found


def test_a_run_goes_on_bit_for_bit(parts, tmp_path):
    (tmp_path / "a").mkdir(), (tmp_path / "b").mkdir()
    whole = run(content_of(parts, tmp_path / "a" / "save"), tmp_path / "a", "args.train_iters=4")
    content = content_of(parts, tmp_path / "b" / "save")
    lean = [f"args.{switch}=true" for switch in ("checkpoint_activations", "stream_frozen", "offload_activations")]
    run(content, tmp_path / "b", "args.train_iters=4", "args.exit_interval=2", *lean)  # which changes no number
    broken = run(content, tmp_path / "b", "args.train_iters=4", resume="auto")
    for name in ("4", "4-ema"):
        one, other = (read_transformer(folder / name).network for folder in (whole, broken))
        assert one.keys() == other.keys() and all(torch.equal(one[n], other[n]) for n in one)
    assert [line["loss"] for line in records(whole, "train")] == [line["loss"] for line in records(broken, "train")]


@pytest.fixture(scope="module")
def student(parts, tmp_path_factory) -> Path:
    """A run's folder, with the latents of its evaluations."""
    folder = tmp_path_factory.mktemp("student")
    content = content_of(parts, folder / "save", levels="all", critic_rate=2.0, sampler="ddim")
    content["args"] |= {"log_image": True, "only_log_video_latents": True, "eval_iters": 1}
    content["args"]["eval_prompts"] = EVALUATED
    return run(content, folder, "args.train_iters=4", "args.eval_interval=2")


def test_student_and_critic_learn_and_the_base_does_not(parts, student):
    own = read_transformer(student / "4").network
    assert all(".matrix_" in name for name in own)
    assert any(value.any() for name, value in own.items() if ".matrix_B." in name)
    state = read_checkpoint(next((student / "4" / "resume").iterdir()))["optimizer"]
    adapter = sum(value.numel() for value in own.values())
    assert sum(master.numel() for master in state["masters"]) == 2 * adapter
    assert len(records(student, "valid")) == 2
    assert len(list(student.rglob("latent*.pt"))) == 2 * len(EVALUATED)  # more than a batch
    assert next((student / "video_texts").iterdir()).read_text().splitlines() == EVALUATED
    latents = [torch.load(path, weights_only=True) for path in sorted(student.rglob("latent.pt"))]
    assert len(latents) == 2 and not torch.equal(*latents)


def test_the_file_says_how_it_is_sampled_and_a_run_heeds_it(parts, student, tmp_path, capsys):
    stated = {"steps": 2, "timesteps": [999, 499], "sampler": "ddim", "guidance": False}
    assert read_transformer(student).lora["few_steps"] == stated
    assert json.loads(read_transformer(student / "4" / "lora.safetensors").lora["few_steps"]) == stated
    config = write_yaml(tmp_path / "c.yaml", sampling(parts.release))
    adapter = tmp_path / "alone"
    adapter.mkdir()
    shutil.copy(student / "4" / "lora.safetensors", adapter)
    for lora, out in ((student, "a"), (adapter, "b")):
        assert main(config, "--lora", lora, "--prompt", "a red ball", "--output-dir", tmp_path / out) == 0
        said = capsys.readouterr()
        assert (
            f"note: {lora} was distilled for 2 steps (ddim), without guidance: so it is sampled" in said.out + said.err
        )
        assert "warning" not in said.out + said.err
    one, other = (json.loads(next((tmp_path / out).rglob("*.json")).read_text()) for out in "ab")
    assert one["latents_sha256"] == other["latents_sha256"]
    assert (one["sampler"], one["num_steps"]) == ("VideoDDIMSampler", 2)
    assert one["guidance"] == {"guider": "IdentityGuider", "scale": None}


def test_what_fights_a_student_is_said(parts, student, tmp_path, capsys):
    config = write_yaml(tmp_path / "c.yaml", sampling(parts.release))
    options = ["--lora", student, "--prompt", "a", "--dry-run"]
    assert main(config, *options, "--steps", 3, "--guidance-scale", 2) == 0
    said = capsys.readouterr()
    assert "this run takes 3 (args.num_steps, --steps)" in said.out + said.err
    assert "this run guides (args.guidance_scale, --guidance-scale)" in said.out + said.err
    assert main(config, *options, "--negative-prompt", "fog") == 0
    assert "args.negative_prompt has no effect" in "".join(capsys.readouterr())
    shifted = "model.sampler_config.params.discretization_config.params.num_timesteps=900"
    assert main(config, *options, "--set", shifted) == 0
    assert "at timesteps [999, 499]; this configuration's discretization_config gives [899, 449]" in "".join(
        capsys.readouterr()
    )
    for override in ("reuse_error=0.5", "guidance_interval=[0.0,0.5]"):
        assert main(config, *options, "--set", f"accelerate.{override}") == 2
        refused = capsys.readouterr().err
        assert override.split("=")[0] in refused and f"{student} was distilled for 2 steps" in refused
    assert main(config, *options, "--set", shifted.replace("=900", "=1")) == 2
    assert (
        f"{student} was distilled for 2 steps (ddim), which this configuration cannot take" in capsys.readouterr().err
    )
    assert main(config, *options, "--set", "model.sampler_config.params=null") == 2
    assert "discretization_config" in capsys.readouterr().err
    other = tmp_path / "other.pt"
    content = read_checkpoint(student / "4" / "mp_rank_00_model_states.pt")
    content = {
        **content,
        "lora": content["lora"] | {"few_steps": content["lora"]["few_steps"] | {"sampler": "renoise"}},
    }
    torch.save(content, other)
    assert main(config, *options, "--lora", other) == 2
    assert "were distilled in different ways" in capsys.readouterr().err


def test_a_whole_network_learns_as_well(parts, tmp_path):
    """With its checkpoint as args.load any configuration samples it in its steps."""
    content = content_of(parts, tmp_path / "save", lora=None, prompts=[])
    clips = write_clips(tmp_path / "clips", 2)
    evaluation = {"eval_interval": 2, "eval_iters": 1, "log_image": True}
    content["args"] |= {"train_data": [str(clips)], "train_iters": 2, **evaluation}
    folder = run(content, tmp_path)
    assert len(list((folder / "video" / "samples_gs-000002").glob("*.mp4"))) == 2
    before, after = (read_transformer(path).network for path in (parts.release / "transformer", folder))
    assert any(not torch.equal(after[name], value) for name, value in before.items())
    assert not any(name.startswith("critic") for name in after)
    other = write_yaml(tmp_path / "c.yaml", sampling(parts.release))
    for words, out in (((folder / "infer.yaml", "--device", "cpu"), "a"), ((other, "--load", folder), "b")):
        assert main(*words, "--prompt", "a", "--output-dir", tmp_path / out) == 0
        record = json.loads(next((tmp_path / out).rglob("*.json")).read_text())
        assert (record["sampler"], record["num_steps"]) == ("RenoisingSampler", 2)


def adapted(parts, folder: Path) -> Path:
    """A run's folder: the base with an adapter of rank 2 that was trained on it, not merged."""
    folder.mkdir()
    section = configuration(parts.release, Path("unused"), None, lora=2)["model"]["network_config"]
    network = instantiate_from_config(section, dtype="fp32")
    state = read_transformer(parts.release / "transformer").network
    state |= {n: torch.randn_like(v) for n, v in network.state_dict().items() if ".matrix_" in n}
    torch.save({"module": {f"model.diffusion_model.{n}": v for n, v in state.items()}}, folder / FILE)
    return folder


def test_an_adapter_within_the_load_is_part_of_the_teacher(parts, tmp_path):
    """And the student's own begins beside it, of its own rank, in files that hold all and say how they are sampled."""
    base = adapted(parts, tmp_path / "base")
    content = content_of(parts, tmp_path / "save")
    content["args"] |= {"load": str(base), "lora_only": False, "save_merged": True, "train_iters": 1}
    path = write_yaml(tmp_path / "c.yaml", content)
    config = load_run_config([path], TrainArgs)
    plan = plan_deepspeed(config.deepspeed, device_type="cpu")
    base_alone = load_run_config([path], TrainArgs, overrides=[f"args.load={parts.release / 'transformer'}"])
    engine, _ = load_engine(config, plan, torch.device("cpu"))
    x, t = torch.randn(1, 2, 16, 2, 4), torch.tensor([500])
    cond = {"crossattn": torch.randn(1, 12, 32)}
    whole = meta_engine(training_model_section(config.model, config.args), "fp32").network
    load_network(whole, base, device=torch.device("cpu"), dtype=torch.float32, allow_absent=True)
    expected = whole(x, t, cond["crossattn"])
    assert not torch.allclose(
        expected, load_engine(base_alone, plan, torch.device("cpu"))[0].model(x, t, cond), atol=1e-2
    )
    assert engine.network.mixins.lora.r == 4 and whole.mixins.lora.r == 2
    for network in (engine.teacher, engine.model, engine.critic):
        torch.testing.assert_close(network(x, t, cond), expected, rtol=1e-3, atol=1e-3)

    folder = run(content, tmp_path)
    for place in ("1", "1-ema", "merged/1"):
        facts = read_transformer(folder / place).lora
        assert FewSteps.parse(facts["few_steps"]).steps == 2 and ("rank" in facts) == (place != "merged/1")


def test_the_plan_counts_the_critic_and_the_teachers_copy(parts, tmp_path):
    sizes = {}
    for lora in (4, None):
        config = load_run_config([write_yaml(tmp_path / "c.yaml", content_of(parts, None, lora=lora))], TrainArgs)
        plan = plan_deepspeed(config.deepspeed, device_type="cpu")
        engine, _ = load_engine(config, plan, torch.device("cpu"))
        planned, loaded = planned_needs(config, plan, 1), memory_needs(engine, config, plan, 1)
        assert (planned.trained, planned.frozen) == (loaded.trained, loaded.frozen)
        sizes[lora] = sum(p.numel() for p in engine.model.parameters() if p.requires_grad), loaded
    assert all(needs.trained == 2 * learns for learns, needs in sizes.values())
    assert sizes[None][1].frozen >= sizes[None][0]  # the teacher's copy


def test_a_network_of_1_5_is_distilled_at_the_size_that_it_was_trained_at():
    files = [REPO / "configs" / "cogvideox1.5_5b_infer.yaml", REPO / "configs" / "distill.yaml"]
    config = load_run_config(files, TrainArgs, overrides=["args.distill.prompts=p.txt"])
    model = {k: v for k, v in config.model.items() if k not in ("conditioner_config", "first_stage_config")}
    assert clip_size(config, meta_engine(model, "bf16"))[1:] == (768, 1360)


def test_few_steps_with_what_is_no_student(parts, student, tmp_path, capsys):
    other = tmp_path / "other.pt"
    content = read_checkpoint(student / "4" / "mp_rank_00_model_states.pt")
    lora = {name: fact for name, fact in content["lora"].items() if name != "few_steps"}
    torch.save({**content, "lora": lora}, other)
    config = write_yaml(tmp_path / "c.yaml", sampling(parts.release))
    for lora in ((), ("--lora", other)):
        options = ("--prompt", "a", "--dry-run", "--set", "args.few_steps=true", *lora)
        assert main(config, *options, "--set", f"args.student={other}") == 2
        assert f"{other} (args.student) was not distilled" in capsys.readouterr().err
        assert main(config, *options, "--set", f"args.student={student}") == 0


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("args.cache_dir=somewhere", "args.cache_dir: a distillation learns from prompts alone"),
        ("args.prior_data=[a]", "args.prior_data: a distillation learns from prompts alone"),
        ("args.model_parallel_size=2", "does not go with args.model_parallel_size above 1"),
        ("deepspeed.zero_optimization.stage=3", "--set deepspeed.zero_optimization.stage=2"),
        ("args.load=null", "args.distill needs a teacher"),
        ("args.distill.prompts=[/nowhere.txt]", "args.distill.prompts: no file /nowhere.txt"),
        ("args.distill.step=2", "unknown key args.distill.step; did you mean `steps`"),
        ("args.distill.steps=0", "args.distill.steps: must be at least 1"),
        ("args.distill.steps=900", "args.distill.steps is 900: the schedule has 800 timesteps"),
        ("model.sampler_config=null", "needs model.sampler_config"),
        ("data.params.buckets=[[5,16,32]]", "leave out data.params.buckets"),
    ],
)
def test_what_does_not_go_with_it_is_refused(parts, tmp_path, override, message):
    content = content_of(parts, None)
    if "900" in override:
        content["model"]["sampler_config"]["params"]["discretization_config"] = {
            **DISCRETIZATION, "params": {"shift_scale": 3.0, "num_timesteps": 800}
        }  # fmt: skip
    with pytest.raises(ConfigError, match=re.escape(message)):
        train(load_run_config([write_yaml(tmp_path / "c.yaml", content)], TrainArgs, overrides=[override]))


def test_another_teacher_is_another_run(parts, tmp_path):
    content = content_of(parts, tmp_path / "save")
    run(content, tmp_path, "args.train_iters=1")
    with pytest.raises(CheckpointError, match="model.sampler_config.params.guider_config.params.scale: 6 -> 3"):
        run(content, tmp_path, "model.sampler_config.params.guider_config.params.scale=3", resume="auto")


def test_conversion_keeps_how_it_is_sampled(student, tmp_path):
    adapter = open_adapter(student)
    again = open_adapter(write_peft(tmp_path, adapter, None, False))
    assert FewSteps.parse(again.few_steps) == FewSteps.parse(adapter.few_steps) == FewSteps(2, (999, 499), "ddim")
    assert sat_matrices(again)[1]["few_steps"] == again.few_steps


def test_the_bundled_student_is_made_of_a_run(parts, student, tmp_path, capsys):
    assert bundle_adapter(["student", str(student / "4-ema"), "--out", str(tmp_path)]) == 0
    bundled = read_transformer(tmp_path / "student")
    assert FewSteps.parse(bundled.lora["few_steps"]).sampler == "ddim"
    assert {value.dtype for value in bundled.network.values()} == {torch.float16}
    assert "student/lora.safetensors" in (tmp_path / "SHA256SUMS").read_text()
    assert bundle_adapter(["student", str(parts.release / "transformer"), "--out", str(tmp_path)]) == 2
    assert "is no adapter alone (args.lora_only: True)" in capsys.readouterr().err
