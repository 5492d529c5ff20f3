"""Further mixins in whole runs, as docs/extending.md says: trained, saved, resumed, loaded, sampled, and refused."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

import sample_video
from sgm import util
from sgm.config import ConfigError, load_run_config
from sgm.convert.lazy import ConvertError
from sgm.convert.sat_source import open_sat
from sgm.modules.transformer.lora_state import further_mixin
from sgm.training.options import TrainArgs
from sgm.training.run import train
from sgm.weights.release import read_transformer
from tests.sampling_tiny import REPO
from tests.training_tiny import configuration, write_clips, write_yaml

PAGE = (REPO / "docs" / "extending.md").read_text()
PREFIX = REPO / "configs" / "prefix_tuning.yaml"


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_clips(tmp_path_factory.mktemp("clip"), 1)


@pytest.fixture(scope="module")
def scaled(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The page's package and its YAML file, as the page has them."""
    folder = tmp_path_factory.mktemp("packages")
    (source,) = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    (snippet,) = re.findall(r"```yaml\n(.*?)```", PAGE, re.DOTALL)
    (folder / "my_mixins").mkdir()
    (folder / "my_mixins" / "__init__.py").write_text(source)
    (folder / "my_mixins" / "scaled.yaml").write_text(snippet)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(folder))
        patch.setattr(util, "ALLOWED_PREFIXES", [*util.ALLOWED_PREFIXES, "my_mixins."])
        yield folder / "my_mixins" / "scaled.yaml"


def run(folder: Path, content: dict[str, Any], files: list[Path], *overrides: str) -> Path:
    """Train in this process; the run's folder."""
    config = load_run_config([write_yaml(folder / "config.yaml", content), *files], TrainArgs, overrides=overrides)
    assert train(config) == 0
    return max((folder / "save").iterdir(), key=lambda path: path.stat().st_mtime)


def records(folder: Path, kind: str) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["kind"] == kind]


def sample(out: Path, *arguments: Any) -> torch.Tensor:
    """Latents; exit codes other than 0 are an AssertionError."""
    words = [*map(str, arguments), "--prompt", "a boat", "--device", "cpu", "--set", f"args.output_dir={out}"]
    assert sample_video.main([*words, "--set", "args.only_save_latents=true"]) == 0
    (file,) = out.rglob("*latents.safetensors")
    return load_file(file)["latents"]


def added(folder: Path) -> dict[str, torch.Tensor]:
    """Entries of further mixins in a checkpoint; its other entries are an AssertionError unless it is whole."""
    state = read_transformer(folder).network
    found = {name: value for name, value in state.items() if further_mixin(name)}
    assert len(found) == len(state) or "transformer.final_layernorm.weight" in state
    return found


@pytest.fixture(scope="module")
def runs(release: Path, clip: Path, scaled: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The same training twice: checkpoints of adapters alone, and of the whole network."""
    found = {}
    for name, alone in (("alone", True), ("whole", False)):
        folder = tmp_path_factory.mktemp(name)
        content = configuration(
            release, clip, folder / "save", train_iters=6, save_interval=3, lora_only=alone, valid_data=[str(clip)],
            eval_interval=3, eval_iters=2, only_log_video_latents=True, lr_decay_style="constant", warmup=0.0,
        )  # fmt: skip
        found[name] = run(folder, content, [PREFIX, scaled], "deepspeed.optimizer.params.lr=0.1")
    return found


def test_the_added_mixins_alone_are_trained_and_saved(runs: dict[str, Path], release: Path) -> None:
    before, after = added(runs["alone"] / "3"), added(runs["alone"])
    sizes = {name: tuple(value.shape) for name, value in after.items()}
    assert sizes == {f"mixins.prefix.prefix.{k}": (2, 2, 16, 32) for k in (0, 1)} | {
        f"mixins.scaled.scales.{k}": (64,) for k in (0, 1)
    }
    assert not any(torch.equal(before[name], value) for name, value in after.items())
    whole, base = read_transformer(runs["whole"]).network, read_transformer(release / "transformer").network
    assert all(torch.equal(whole[name], value) for name, value in [*after.items(), *base.items()])
    first, last = (line["loss"] for line in records(runs["alone"], "valid"))
    assert last < first  # same clip, noise and timesteps


def test_a_run_goes_on_bit_for_bit(runs: dict[str, Path], scaled: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = runs["alone"]
    kept = {name: value.clone() for name, value in added(folder).items()}
    content = yaml.safe_load((folder / "training_config.yaml").read_text())
    assert run(folder.parent.parent, content, [], f"args.resume={folder / '3'}") == folder
    assert all(torch.equal(value, kept[name]) for name, value in added(folder).items())
    assert "infer.yaml --allow-target my_mixins --prompt" in capsys.readouterr().out


def test_sampling_from_either_file(runs: dict[str, Path], release: Path, scaled: Path, tmp_path: Path) -> None:
    """By the run's own file, and by the training's overlays over a sampling configuration."""
    alone = sample(tmp_path / "1", runs["alone"] / "infer.yaml")
    whole = sample(tmp_path / "2", runs["whole"] / "infer.yaml")
    assert torch.equal(alone, whole)
    config = yaml.safe_load((runs["whole"] / "infer.yaml").read_text())
    modules = config["model"]["network_config"]["params"]["modules"]
    del modules["prefix_config"], modules["scaled_config"]
    plain = write_yaml(tmp_path / "plain.yaml", config)
    base = ("--load", release / "transformer")
    assert not torch.allclose(sample(tmp_path / "3", plain, *base), alone, atol=1e-5)
    assert torch.equal(sample(tmp_path / "4", plain, PREFIX, scaled, *base, "--lora", runs["alone"]), alone)


def test_files_and_configurations_that_do_not_belong_together(
    runs: dict[str, Path], release: Path, scaled: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = yaml.safe_load((runs["whole"] / "infer.yaml").read_text())
    modules, base = config["model"]["network_config"]["params"]["modules"], release / "transformer"

    def refused(*arguments: Any) -> str:
        words = [*map(str, arguments), "--prompt", "a boat", "--device", "cpu", "--set", f"args.output_dir={tmp_path}"]
        assert sample_video.main(words) == 2
        return capsys.readouterr().err

    both = write_yaml(tmp_path / "both.yaml", config)
    assert "holds nothing of that mixin: name the run" in refused(both, "--load", base)
    assert "has no scale" in refused(both, "--load", base, "--lora", f"{runs['alone']}:0.5")
    assert "without base weights" in refused(both, "--load", runs["alone"])
    assert "only one of them" in refused(both, "--load", runs["whole"], "--lora", runs["alone"])
    del modules["prefix_config"]
    one = write_yaml(tmp_path / "one.yaml", config)
    assert "holds the mixin prefix, which the configuration lacks: give modules prefix_config" in refused(one)
    modules["prefix_config"] = {
        "target": "sat.model.finetune.prompt_tuning.PTuningV2Mixin",
        "params": {"prefix_len": 9},
    }
    other = write_yaml(tmp_path / "other.yaml", config)
    assert "prefix.0 is [2, 2, 16, 32] in the file, [2, 2, 9, 32] in the model" in refused(other)
    with pytest.raises(ConvertError, match=r"holds mixins \(prefix, scaled\)"):
        open_sat(runs["whole"])


def test_what_further_mixins_do_not_go_with(release: Path, clip: Path, tmp_path: Path) -> None:
    content = configuration(release, clip, None)
    path = write_yaml(tmp_path / "config.yaml", content)
    for override in ("args.cuda_graphs=true", "deepspeed.zero_optimization.stage=3"):
        with pytest.raises(ConfigError, match="modules.prefix_config does not go with"):
            train(load_run_config([path, PREFIX], TrainArgs, overrides=[override]))
