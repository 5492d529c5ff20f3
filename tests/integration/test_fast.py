"""Fast mode through the sampling command: what the record says, what is refused, and all placements alike."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch

from sgm.config import AccelerateArgs, ConfigError, load_run_config
from sgm.inference.options import SampleArgs
from sgm.training.setup.model import training_kernels
from tests.sampling_tiny import REPO, configuration, main, write_yaml
from tools.bench import quality
from tools.demo.captions import caption
from tools.demo.shapes import render_clip, sample_spec

FAST = REPO / "configs" / "fast.yaml"
REUSE = "accelerate.reuse_error=3"  # on the random network of these tests, whose answers change much


@pytest.fixture
def config(release, tmp_path) -> Path:
    return write_yaml(tmp_path / "c.yaml", configuration(release, output_dir=str(tmp_path / "out"), num_steps=8))


def sets(*changes: str) -> list[str]:
    return [part for change in changes for part in ("--set", change)]


def record(out: Path) -> dict:
    (file,) = out.rglob("000000.json")
    return json.loads(file.read_text())


def test_record_names_the_switches_and_counts_the_passes(config, tmp_path):
    common = ["--prompt", "x", "--only-save-latents"]
    assert main(config, *common, "--output-dir", tmp_path / "exact") == 0
    exact = record(tmp_path / "exact")
    assert exact["approximate"] == {} and exact["network_passes"] is None
    assert main(config, FAST, *common, *sets(REUSE, "accelerate.fp8=true"), "--output-dir", tmp_path / "fast") == 0
    fast = record(tmp_path / "fast")
    assert fast["approximate"]["reuse_error"] == 3 and fast["approximate"]["fp8"] is True
    passes = fast["network_passes"]
    assert 4 <= passes["whole"] < passes["usual"] == 15  # one step's scale is 1
    assert fast["latents_sha256"] != exact["latents_sha256"]


def test_samples_do_not_depend_on_their_company(config, tmp_path):
    common = [config, FAST, *sets(REUSE), "--prompt", "x", "--only-save-latents"]
    assert main(*common, "--batch-size", 2, "--output-dir", tmp_path / "two") == 0
    assert main(*common, "--batch-size", 1, "--output-dir", tmp_path / "one") == 0
    digests = [json.loads(p.read_text())["latents_sha256"] for p in sorted(tmp_path.rglob("000000.json"))]
    assert len(digests) == 3 and digests[0] == digests[1] != digests[2]


def test_refusals(config, tmp_path, capsys):
    assert main(config, FAST, "--steps", 4, "--prompt", "x") == 2
    assert "reuse_error never skips" in capsys.readouterr().err
    assert main(config, "--set", "accelerate.guidance_interval=[0.9,0.1]", "--prompt", "x") == 2
    assert "0 <= start < end <= 1" in capsys.readouterr().err
    assert main(config, *sets("accelerate.step_cache=true", "accelerate.guidance_every=1"), "--prompt", "x") == 2
    assert "step_cache, guidance_every: fast mode in a pattern has gone" in (said := capsys.readouterr().err)
    assert "--set accelerate.reuse_error=0.5" in said and "unknown key" not in said
    off = ["accelerate.step_cache=false", "accelerate.step_cache_order=1", "accelerate.guidance_least=0.0"]  # as saved
    kept = load_run_config([config], SampleArgs, overrides=off)
    assert kept.accelerate == AccelerateArgs() and "without effect" in "".join(kept.notes)
    fast = load_run_config([config, FAST], SampleArgs).accelerate
    with pytest.raises(ConfigError, match="reuse_error.*for sampling"):
        training_kernels(fast, torch.device("cpu"))


def quality_totals(capsys, *arguments: object) -> dict[str, dict]:
    assert quality.main([str(argument) for argument in arguments]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    return {line["variant"]: line for line in lines if "psnr_mean" in line}


@pytest.fixture
def prompts(tmp_path) -> list[object]:
    (tmp_path / "p.txt").write_text("one\n")
    return ["--input-file", tmp_path / "p.txt"]


def test_the_bench_prints_each_switch_and_all_together(config, prompts, tmp_path, capsys):
    fast = tmp_path / "fast.yaml"
    fast.write_text("accelerate: {reuse_error: 3, fp8: true}\n")
    totals = quality_totals(capsys, config, "--fast", fast, *prompts, *sets("args.num_steps=14"),
                            "--variant", "guidance_interval=[0,0.5];fp8=true")  # fmt: skip
    assert list(totals) == ["exact", "reuse", "fp8", "fast", "guidance_interval=[0,0.5];fp8=true"]
    assert totals["exact"]["psnr_mean"] == 99 and totals["exact"]["blocks"] == totals["fp8"]["blocks"] == 1
    assert totals["fast"]["blocks"] < 1 and totals["reuse"]["blocks"] < 1
    assert totals["guidance_interval=[0,0.5];fp8=true"]["blocks"] == 0.7308  # 19 of 26: two steps are never guided
    assert all(0 < line["psnr_mean"] <= 99 and line["prompt_score"] is None for line in totals.values())


def test_the_bench_takes_fast_mode_as_one(config, prompts, capsys):
    totals = quality_totals(capsys, config, "--fast", FAST, *prompts, *sets("accelerate.reuse_keep_last=2"))
    assert list(totals) == ["exact", "fast"] and 0 < totals["fast"]["blocks"] <= 1


def test_the_bench_beside_cache_dit(config, prompts, capsys):
    """The library is not among the tests' requirements: without it, one line says how to get it."""
    arguments = [config, "--only-variants", *prompts, "--cache-dit", "warmup=2,skips=2"]
    if find_spec("cache_dit") is None:
        assert quality.main([str(argument) for argument in arguments]) == 2
        assert "pip install --no-deps cache-dit" in capsys.readouterr().err
        return
    blocks = quality_totals(capsys, *arguments)["cache-dit warmup=2,skips=2"]["blocks"]
    layers, whole = 2, (0, 1, 4, 7)  # of 8 steps; the others run the first layer
    assert blocks == pytest.approx((len(whole) * layers + 8 - len(whole)) / (8 * layers), abs=1e-4)


def test_the_bench_scores_clips_by_their_captions():
    rng = np.random.default_rng(3)
    specs = [sample_spec(rng, 17, two=0.0) for _ in range(2)]
    texts = [caption(spec, rng) for spec in specs]
    clips = [quality.Clip(torch.zeros(1), render_clip(spec), 0.0, 1) for spec in specs]
    right, wrong = quality.prompt_score(texts, clips), quality.prompt_score(texts[::-1], clips)
    assert right > 0.9 > wrong
    assert quality.prompt_score(["no such grammar", texts[0]], clips) is None
    assert len(set(quality.demo_captions(3, 9, seed=1))) == 3
