"""The sampling command as a user runs it: real subprocesses, tiny random release folders, real mp4 files."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

REPO = Path(__file__).resolve().parents[2]
DEMO = REPO / "configs" / "demo_infer.yaml"


@pytest.fixture(scope="module")
def release(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("release") / "w"
    done = subprocess.run(
        [sys.executable, "tools/make_weights.py", "--config", str(DEMO), "--out", str(out), "--dtype", "fp32"],
        cwd=REPO, capture_output=True, text=True,
    )
    assert done.returncode == 0, done.stderr
    return out


def settings(release: Path) -> list[str]:
    return [
        "--device", "cpu", "--steps", "2", "--num-frames", "1", "--load", str(release / "transformer"),
        "--set", f"model.first_stage_config.params.ckpt_path={release / 'vae' / '3d-vae.pt'}",
        "--set", f"model.conditioner_config.params.emb_models.0.params.model_dir={release / 't5'}",
    ]


def sample(*arguments: str, cwd: Path = REPO, **kwargs) -> subprocess.CompletedProcess:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(REPO / "sample_video.py"), *arguments]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, env=environment, timeout=300, **kwargs)


def test_writes_video_record_and_sheet_and_repeats_with_the_seed(release, tmp_path):
    digests = []
    for name in ("a", "b"):
        out = tmp_path / name
        done = sample(str(DEMO), *settings(release), "--prompt", "a/../red 'ball' 😀", "--output-dir", str(out), "--num-frames", "3")
        assert done.returncode == 0, done.stderr
        (record,) = out.rglob("000000.json")
        facts = json.loads(record.read_text())
        digests.append(facts["latents_sha256"])
        assert facts["num_steps"] == 2 and facts["prompt"] == "a/../red 'ball' 😀"
        assert record.with_suffix(".png").stat().st_size > 0
        assert record.parent.parent.parent == out  # nothing escapes the output folder
        import decord

        video = decord.VideoReader(str(record.with_suffix(".mp4")))
        assert len(video) == 9 and video[0].shape == (128, 192, 3) and round(video.get_avg_fps()) == 8
    assert digests[0] == digests[1]


def test_saved_latents_decode_to_the_same_frames(release, tmp_path):
    common = [str(DEMO), *settings(release), "--prompt", "a blue square"]
    assert sample(*common, "--output-dir", str(tmp_path / "direct")).returncode == 0
    assert sample(*common, "--output-dir", str(tmp_path / "later"), "--only-save-latents").returncode == 0
    assert not list((tmp_path / "later").rglob("*.mp4"))
    done = sample(*common, "--output-dir", str(tmp_path / "later"), "--decode-latents", str(tmp_path / "later"))
    assert done.returncode == 0, done.stderr
    (direct,), (later,) = ((tmp_path / n).rglob("000000.png") for n in ("direct", "later"))
    assert direct.read_bytes() == later.read_bytes()


def test_prompt_file_blank_lines_and_skip_done(release, tmp_path):
    prompts = tmp_path / "p.txt"
    prompts.write_text("one red ball\n\n a ring \n", encoding="utf-8")
    common = [str(DEMO), *settings(release), "--input-file", str(prompts), "--output-dir", str(tmp_path / "out"), "--skip-done"]
    first = sample(*common)
    assert first.returncode == 0 and "1 blank lines left out" in first.stderr, first.stderr
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["0_one_red_ball", "2_a_ring"]
    stamps = {p: p.stat().st_mtime_ns for p in (tmp_path / "out").rglob("*.mp4")}
    again = sample(*common)
    assert again.returncode == 0 and "done already" in again.stderr
    assert stamps == {p: p.stat().st_mtime_ns for p in (tmp_path / "out").rglob("*.mp4")}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--load", "/nowhere/transformer"], ["/nowhere/transformer", "does not exist"]),
        (["--num-frames", "4"], ["odd", "3 or 5"]),
        (["--image-size", "100", "192"], ["multiples of 16"]),
        (["--set", "args.sampling_fsp=3"], ["sampling_fsp", "sampling_fps"]),
        (["--set", "args.batch_size=many"], ["batch_size", "many"]),
        (["--set", "model.sampler_config.target=sat.helpers.os.system"], ["sat.helpers.os.system"]),
        (["--set", "model.sampler_config.params.num_stepz=3"], ["num_stepz", "num_steps"]),
        (["--input-file", "no-such-file.txt"], ["no-such-file.txt"]),
        (["--set", "args.fp16=true", "--set", "args.bf16=true"], ["choose one"]),
    ],
)
def test_bad_input_is_one_clear_error(release, tmp_path, arguments, words):
    done = sample(str(DEMO), *settings(release), "--output-dir", str(tmp_path), *arguments)
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
    assert all(word in done.stderr for word in words), done.stderr


def test_missing_keys_are_listed(release, tmp_path):
    content = torch.load(release / "transformer/1000/mp_rank_00_model_states.pt", weights_only=True)
    del content["module"]["model.diffusion_model.time_embed.0.bias"]
    file = tmp_path / "cut.pt"
    torch.save(content, file)
    done = sample(str(DEMO), *settings(release), "--load", str(file), "--prompt", "x", "--output-dir", str(tmp_path))
    assert done.returncode == 2 and "time_embed.0.bias" in done.stderr and "missing" in done.stderr


def test_shipped_file_with_some_paths_edited_names_the_rest(tmp_path):
    (tmp_path / "t").mkdir()
    done = sample("configs/cogvideox_2b_infer.yaml", "--load", str(tmp_path / "t"), "--output-dir", str(tmp_path))
    assert done.returncode == 2 and "ckpt_path" in done.stderr and "args.load" not in done.stderr


@pytest.mark.parametrize("folder", [REPO, None])
def test_dry_run_prints_configuration_and_plan_and_makes_nothing(tmp_path, folder):
    before = set((REPO / "demo").rglob("*"))
    done = sample("--dry-run", "--device", "cpu", cwd=folder or tmp_path)
    assert done.returncode == 0, done.stderr
    assert "sampler_config" in done.stdout and "5 latent frames" in done.stdout and "prompt 2:" in done.stdout
    assert "args.load" in done.stdout and "demo/" in done.stdout
    assert set((REPO / "demo").rglob("*")) == before and not list(tmp_path.iterdir())
