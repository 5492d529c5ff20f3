"""Comparisons (--grid): which clips are made, what page and picture show, and what cannot be one."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from PIL import Image

from tests.browser import Browser, find_browser
from tests.sampling_tiny import configuration, main, write_yaml


@pytest.fixture
def config(release, tmp_path) -> Path:
    args = {"output_dir": str(tmp_path / "out"), "sampling_num_frames": 3, "num_steps": 2}
    content = configuration(release, **args)
    content["model"]["network_config"]["params"]["num_frames"] = 9
    return write_yaml(tmp_path / "c.yaml", content)


@pytest.fixture
def adapter(release, tmp_path) -> str:
    state = torch.load(release / "transformer/1000/mp_rank_00_model_states.pt", weights_only=True)["module"]
    name = "model.diffusion_model.transformer.layers.0.attention.dense"
    width = state[f"{name}.weight"].shape[0]
    module = {f"{name}.matrix_A.0": torch.randn(2, width), f"{name}.matrix_B.0": torch.randn(width, 2)}
    torch.save({"module": module, "lora": {"rank": 2, "alpha": 2.0}}, tmp_path / "lora.pt")
    return str(tmp_path / "lora.pt")


def records(folder: Path) -> dict[str, dict]:
    return {p.stem: json.loads(p.read_text()) for p in sorted(folder.glob("*.json"))}


def test_clips_of_all_combinations_are_shown_in_rows_and_columns(config, adapter, tmp_path):
    asked = ["--prompt", "a <b>dog</b>", "--lora", f"{adapter}:0.5", "--grid", "seeds=1,2", "lora=0,1,-2"]
    assert main(config, *asked) == 0
    folder = tmp_path / "out" / "grid"
    made = records(folder)
    combinations = [(seed, scale) for seed in (1, 2) for scale in ("0", "1", "-2")]
    assert list(made) == [f"{k:03d}_seed_{seed}_lora_{scale}" for k, (seed, scale) in enumerate(combinations)]
    assert [(r["seed"], r["lora"]) for r in made.values()] == [
        (seed, lora) for seed in (1, 2) for lora in ([], [f"{adapter}:0.5"], [f"{adapter}:-1"])
    ]
    assert len({r["latents_sha256"] for r in made.values()}) == 6
    page = (folder / "index.html").read_text()
    assert re.findall(r"<th>(.*?)</th>", page) == ["lora 0", "lora 1", "lora -2", "seed 1", "seed 2"]
    assert re.findall(r'<video src="(.*?)"', page) == [f"{name}.mp4" for name in made]
    assert "a &lt;b&gt;dog&lt;/b&gt;" in page and "<b>" not in page and "://" not in page
    picture = Image.open(folder / "grid.png").convert("RGB")
    assert picture.width > 3 * 32 and picture.height > 2 * 16 and len(picture.getcolors(1 << 24)) > 20
    assert main(config, "--prompt", "a <b>dog</b>", "--seed", 2, "--output-dir", tmp_path / "alone") == 0
    (alone,) = (json.loads(p.read_text()) for p in (tmp_path / "alone").rglob("*.json"))
    assert alone["latents_sha256"] == made["003_seed_2_lora_0"]["latents_sha256"], "as the command makes it"


def test_prompts_are_an_axis_and_further_axes_make_tables(config, tmp_path, capsys, recwarn):
    (tmp_path / "p.txt").write_text("a dog\na cat\n", encoding="utf-8")
    axes = [f"prompts={tmp_path / 'p.txt'}", "steps=2,3", "guidance=1.5,6", "seeds=7"]
    assert main(config, "--grid", *axes, "--dry-run") == 0 and "# grid: 8 clips" in capsys.readouterr().out
    assert main(config, "--num-frames", 1, "--image-size", 16, 16, "--grid", *axes) == 0
    assert capsys.readouterr().err.count("warning: ") == 1 and not recwarn, "told once, and not as Python's warnings"
    page = (tmp_path / "out" / "grid" / "index.html").read_text()
    assert re.findall("<h2>(.*?)</h2>", page) == ["seed 7, a dog", "seed 7, a cat"]
    assert re.findall(r"<th>(.*?)</th>", page) == ["guidance 1.5", "guidance 6", "steps 2", "steps 3"] * 2
    made = records(tmp_path / "out" / "grid").values()
    assert [(r["prompt"], r["num_steps"], r["guidance"]["scale"]) for r in made] == [
        (prompt, steps, scale) for prompt in ("a dog", "a cat") for steps in (2, 3) for scale in (1.5, 6)
    ]


@pytest.mark.skipif(find_browser() is None, reason="no browser is installed")
def test_the_page_plays_all_clips_together(config, tmp_path):
    assert main(config, "--prompt", "a dog", "--grid", "seeds=1,2") == 0
    clips = "[...document.querySelectorAll('video')]"
    with Browser(find_browser()) as browser:
        browser.open((tmp_path / "out" / "grid" / "index.html").as_uri())
        browser.wait(f"{clips}.length == 2 && {clips}.every(c => !c.paused && c.currentTime > 0)")
        browser.click("#play")
        browser.wait(f"{clips}.every(c => c.paused) && {clips}[0].currentTime == {clips}[1].currentTime")
        assert browser.evaluate("document.querySelector('#play').textContent") == "Play"
        browser.evaluate("(t => { t.value = 0.5; t.oninput({target: t}) })(document.querySelector('#time'))")
        browser.wait(f"{clips}.every(c => Math.abs(c.currentTime - c.duration / 2) < 0.01)")
        assert not browser.errors and all(address.startswith("file://") for address in browser.requested)


def test_a_comparison_that_is_stopped_names_no_way_on(config, capsys, monkeypatch):
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("sgm.inference.model.Pipeline.sample", interrupted)
    for asked, told in (["--grid", "seeds=1,2"], "kept\n"), ([], "kept (--skip-done goes on from there)\n"):
        assert main(config, "--prompt", "a dog", *asked) == 130
        assert capsys.readouterr().err.endswith(told)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--grid", "seeds"], "expected AXIS=VALUES, such as seeds=1,2,3"),
        (["--grid", "sizes=1,2"], "no axis 'sizes'; there are seeds, steps, guidance, lora, prompts"),
        (["--grid", "seeds=1,x"], "--grid seeds=1,x: invalid literal"),
        (["--grid", "seeds=1,1"], "1 stands there twice"),
        (["--grid", "seeds=1", "seeds=2"], "two axes seeds"),
        (["--grid", "lora=0,1"], "a factor on which adapter? Name it by --lora PATH"),
        (["--grid", "seeds=" + ",".join(map(str, range(401)))], "asks for 401 clips; 400 at most"),
        (["--grid", "seeds=1,2", "--batch-size", "2"], "leave out args.batch_size above 1"),
        (["--grid", "seeds=1,2", "--skip-done"], "leave out args.skip_done"),
        (["--grid", "lora=/absent.pt"], "/absent.pt does not exist"),
        (["--grid", "seeds=1,2", "steps=2,0"], "args.num_steps: must be at least 2, got 0"),
    ],
)
def test_what_is_no_comparison_is_one_error(config, tmp_path, capsys, words, told):
    assert main(config, "--prompt", "a dog", *words) == 2
    said = capsys.readouterr().err
    assert told in said and "Traceback" not in said and not list(tmp_path.rglob("*.mp4"))
