"""Fast mode through the sampling command: what the record says, what is refused, and all placements alike."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from sgm.config import ConfigError, load_run_config
from sgm.inference.options import SampleArgs
from sgm.inference.placement import BlockStreamer
from sgm.training.setup.model import refuse_approximations
from tests.sampling_tiny import REPO, configuration, main, write_release, write_yaml
from tools.bench import quality
from tools.demo.captions import caption
from tools.demo.shapes import render_clip, sample_spec

FAST = REPO / "configs" / "fast.yaml"
KEEP = tuple(f"accelerate.{k}" for k in ("step_cache_keep_first=2", "step_cache_keep_last=1", "guidance_keep_first=2"))


@pytest.fixture(scope="module")
def release(tmp_path_factory) -> Path:
    return write_release(tmp_path_factory.mktemp("release"))


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
    assert main(config, FAST, *common, *sets(*KEEP, "accelerate.fp8=true"), "--output-dir", tmp_path / "fast") == 0
    fast = record(tmp_path / "fast")
    assert fast["approximate"]["step_cache"] is True and fast["approximate"]["fp8"] is True
    passes = fast["network_passes"]
    assert 8 <= passes["whole"] + passes["first_layer"] < passes["usual"] == 16 and passes["first_layer"] == 4
    assert fast["latents_sha256"] != exact["latents_sha256"]


def test_samples_do_not_depend_on_their_company(config, tmp_path):
    common = [config, FAST, *sets(*KEEP), "--prompt", "x", "--only-save-latents"]
    assert main(*common, "--batch-size", 2, "--output-dir", tmp_path / "two") == 0
    assert main(*common, "--batch-size", 1, "--output-dir", tmp_path / "one") == 0
    digests = [json.loads(p.read_text())["latents_sha256"] for p in sorted(tmp_path.rglob("000000.json"))]
    assert len(digests) == 3 and digests[0] == digests[1] != digests[2]


def test_refusals(config, tmp_path, capsys):
    assert main(config, FAST, "--steps", 4, "--prompt", "x") == 2
    assert "step_cache never skips" in capsys.readouterr().err
    assert main(config, "--set", "accelerate.guidance_interval=[0.9,0.1]", "--prompt", "x") == 2
    assert "0 <= start < end <= 1" in capsys.readouterr().err
    assert main(config, "--set", "accelerate.step_cach=true", "--prompt", "x") == 2
    assert "did you mean `step_cache`" in capsys.readouterr().err
    fast = load_run_config([config, FAST], SampleArgs).accelerate
    with pytest.raises(ConfigError, match="step_cache.*for sampling"):
        refuse_approximations(fast)


def test_streamed_blocks_give_the_same_under_a_step_cache():
    """The streamer brings block after block; a skipped step asks for the first one only, again and again."""
    from sgm.modules.ops.step_cache import FirstBlockCache, SkipRule
    from tests.dit_tiny import random_inputs, tiny_network

    network = tiny_network(num_layers=3)
    with torch.no_grad():
        for parameter in network.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(2)))

    def run() -> list[torch.Tensor]:
        cache, outputs = FirstBlockCache(SkipRule(float("inf"), 1, 0, max_skips=2), 6, 1), []
        for step in range(6):
            cache.step = step
            with torch.no_grad():
                outputs.append(network(**random_inputs(batch=1, seed=step), layer_runner=cache))
        return outputs

    expected = run()
    streamer = BlockStreamer(network, network.streamable_blocks(), torch.device("cpu"), pin=False)
    streamer.enter()
    got = run()
    streamer.leave()
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


def test_the_bench_prints_each_switch_and_all_together(config, tmp_path, capsys):
    prompts = tmp_path / "p.txt"
    prompts.write_text("one\n")
    arguments = [str(config), "--fast", str(FAST), "--input-file", str(prompts), *sets("args.num_steps=14")]
    assert quality.main([*arguments, "--variant", "guidance_every=2;fp8=true"]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    totals = {line["variant"]: line for line in lines if "psnr_mean" in line}
    assert list(totals) == ["exact", "step_cache", "guidance", "fast", "guidance_every=2;fp8=true"]
    assert totals["exact"]["psnr_mean"] == 99 and totals["exact"]["passes"] is None
    assert totals["fast"]["passes"]["usual"] == 28 and totals["fast"]["passes"]["first_layer"] > 0
    assert all(0 < line["psnr_mean"] <= 99 and line["prompt_score"] is None for line in totals.values())


def test_the_bench_scores_clips_by_their_captions():
    rng = np.random.default_rng(3)
    specs = [sample_spec(rng, 17, two=0.0) for _ in range(2)]
    texts = [caption(spec, rng) for spec in specs]
    clips = [quality.Clip(torch.zeros(1), render_clip(spec), 0.0, None) for spec in specs]
    right, wrong = quality.prompt_score(texts, clips), quality.prompt_score(texts[::-1], clips)
    assert right > 0.9 > wrong
    assert quality.prompt_score(["no such grammar", texts[0]], clips) is None
    assert len(set(quality.demo_captions(3, 9, seed=1))) == 3
