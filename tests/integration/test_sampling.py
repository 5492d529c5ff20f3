"""The sampling command on a tiny model: real weight files, real mp4 files. In this process, save where that cannot be."""

from __future__ import annotations

import gc
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from PIL import Image

from sgm.data.video_io import probe
from tests.sampling_tiny import (
    REPO,
    changed,
    environment,
    main,
    network_file,
    records,
    start,
)

ROOM = ["--set", "model.network_config.params.num_frames=9"]  # positions for three latent frames


# --- results -----------------------------------------------------------------------------------------------------


def test_writes_video_record_and_sheet_and_repeats_with_the_seed(config, tmp_path):
    for name in ("a", "b"):
        out = tmp_path / name
        code = main(config, "--output-dir", out, "--prompt", "a/../red 'ball' 😀", "--prompt", "..", "--set",
                    "args.sampling_num_frames=1", "--set", "model.network_config.params.num_frames=9",
                    "--num-frames", 3, "--seed", 7)  # fmt: skip
        assert code == 0
        assert {p.relative_to(out).parts[0] for p in out.rglob("*.mp4")} == {"0_a..red_'ball'_😀", "1_prompt"}
        assert not list(tmp_path.rglob(".partial*"))
    first, second = records(tmp_path / "a"), records(tmp_path / "b")
    for name, facts in first.items():
        assert facts["latents_sha256"] == second[name]["latents_sha256"]
        folder = tmp_path / "a" / name
        video = probe(folder / "000000.mp4")
        assert (video.frames, video.height, video.width, round(video.fps)) == (9, 16, 32, 8)
        assert Image.open(folder / "000000.png").size == (4 * 32, 2 * 16)
    facts = first["0_a..red_'ball'_😀/0"]
    assert facts["prompt"] == "a/../red 'ball' 😀" and facts["seed"] == 7 and facts["num_steps"] == 2
    assert facts["guidance"] == {"guider": "DynamicCFG", "scale": 6} and facts["dtype"] == "fp32"
    assert {"load network", "encode", "sample", "decode", "write"} <= set(facts["seconds"])
    assert {"torch", "python", "cogvideox-sat"} <= set(facts["versions"]) and facts["weights"]["transformer"]
    assert facts["weights"]["text_encoder"] and facts["first_stage_weights"]
    assert facts["config_hash"] and facts["peak_memory_bytes"]["sample"] > 0
    assert len({facts["latents_sha256"] for facts in first.values()}) == 2


def test_noise_depends_on_seed_prompt_and_sample_only(config, tmp_path):
    """Whatever the batching: one at a time, together. To the bit where a lost sample is made again."""
    common = [config, "--prompt", "one", "--prompt", "two", "--batch-size", 3]
    assert main(*common, "--output-dir", tmp_path / "a", "--max-batch", 1, "--only-save-latents") == 0
    assert main(*common, "--output-dir", tmp_path / "b", "--max-batch", 2, "--only-save-latents") == 0
    from sgm.inference.writer import read_latents

    latents = {}
    for name in ("a", "b"):
        files = sorted((tmp_path / name).rglob("latents.safetensors"))
        latents[name] = torch.stack([read_latents(f)[0] for f in files])
    assert latents["a"].shape == (6, 1, 16, 2, 4)
    torch.testing.assert_close(latents["a"], latents["b"], rtol=0, atol=1e-5)
    assert len({x.sum().item() for x in latents["a"]}) == 6
    lost, other = (tmp_path / "b" / "1_two" / k / "latents.safetensors" for k in "10")
    kept = other.stat().st_mtime_ns
    lost.write_bytes(lost.read_bytes()[:-1])
    more = ["--max-batch", 2, "--skip-done", "--only-save-latents"]
    assert main(*common, "--output-dir", tmp_path / "b", *more) == 0
    assert torch.equal(read_latents(lost)[0], latents["b"][4]) and other.stat().st_mtime_ns == kept


def test_few_prompts_are_held_encoded_and_their_number_changes_nothing(config, tmp_path, monkeypatch):
    """However many there are; the text encoder comes back for the next ones, and the negative is held once."""
    from sgm.inference.pipeline import Pipeline
    from sgm.inference.stages import EncodedPrompt

    sample, held, loaded = Pipeline.sample, [], []
    load = Pipeline.load

    def watched(self, prompt, *rest):
        encoded = [x for x in gc.get_objects() if type(x) is EncodedPrompt]
        held.append((len(encoded), len({x.uncond["crossattn"].data_ptr() for x in encoded})))
        return sample(self, prompt, *rest)

    def counted(self, part):
        loaded.extend({part} - self._loaded)
        load(self, part)

    monkeypatch.setattr(Pipeline, "sample", watched)
    monkeypatch.setattr(Pipeline, "load", counted)
    wish = [config, "--only-save-latents", "--negative-prompt", "dull"]
    wish += [word for k in range(5) for word in ("--prompt", f"number {k}")]
    for ahead, placement, loads in ((128, "stages", 1), (2, "stages", 3), (2, "all", 1)):
        monkeypatch.setattr("sgm.inference.runner.ENCODED_AHEAD", ahead)
        assert main(*wish, "--output-dir", tmp_path / f"{ahead}{placement}", "--placement", placement) == 0
        assert max(held) == (min(5, ahead), 1) and loaded.count("conditioner") == loads, (held, loaded)
        held.clear(), loaded.clear()
    digests = [
        [r["latents_sha256"] for r in records(folder).values()] for folder in tmp_path.iterdir() if folder.is_dir()
    ]
    assert digests == digests[:1] * 3 and len(set(digests[0])) == 5


def test_the_single_stream_is_gone_through_again_up_to_what_is_missing(config, tmp_path):
    wish = [config, "--seed-mode", "upstream", "--batch-size", 2, "--only-save-latents", "--skip-done"]
    wish += ["--prompt", "a", "--prompt", "b", "--prompt", "c"]
    assert main(*wish) == 0
    before, out = records(tmp_path / "out"), tmp_path / "out"
    shutil.rmtree(out / "1_b" / "1")
    assert main(*wish) == 0
    after = records(out)
    assert [n for n in after if after[n] != before[n]] == ["1_b/1"]
    assert after["1_b/1"]["latents_sha256"] == before["1_b/1"]["latents_sha256"]


def test_saved_latents_decode_to_the_same_frames_without_the_other_weights(config, release, tmp_path):
    assert main(config, "--output-dir", tmp_path / "direct", "--prompt", "x") == 0
    assert main(config, "--output-dir", tmp_path / "later", "--prompt", "x", "--only-save-latents") == 0
    assert not list((tmp_path / "later").rglob("*.mp4"))
    absent = ["--load", "/nowhere", "--set", "model.conditioner_config.params.emb_models.0.params.model_dir=/nowhere"]
    assert main(config, *absent, "--output-dir", tmp_path / "later", "--decode-latents", tmp_path / "later") == 0
    (direct,), (later,) = ((tmp_path / n).rglob("000000.png") for n in ("direct", "later"))
    assert direct.read_bytes() == later.read_bytes()
    assert records(tmp_path / "later")["0_x/0"]["decoded_from"] == "latents.safetensors"


def test_prompt_file_blank_lines_skip_done_and_long_prompts(config, tmp_path, capsys):
    (tmp_path / "prompts.txt").write_text(f"one red ball\n\n a ring \n{'very long ' * 1000}end\n", encoding="utf-8")
    assert main(config, "--skip-done") == 0  # found beside the YAML
    err = capsys.readouterr().err
    assert "1 blank lines left out" in err and "warning: prompt 3 is longer" in err and "long very" in err
    out = tmp_path / "out"
    assert sorted(p.name[:14] for p in out.iterdir()) == ["0_one_red_ball", "2_a_ring", "3_very_long_ve"]
    assert all(len(p.name) < 130 for p in out.iterdir())
    stamps = {p: p.stat().st_mtime_ns for p in out.rglob("*.mp4")}
    next(iter(out.glob("2_*/0/000000.mp4"))).unlink()
    assert main(config, "--skip-done") == 0
    assert "2 of 3 prompts are done already" in capsys.readouterr().err
    made = {p: p.stat().st_mtime_ns for p in out.rglob("*.mp4")}
    assert made.keys() == stamps.keys() and sum(made[p] != stamps[p] for p in made) == 1


def test_skip_done_tells_requests_apart(config, tmp_path, capsys):
    """Another seed, or a long prompt with another end, which the folder's name does not show, is not done already."""
    long = "a " * 70
    wish = [config, "--prompt", f"{long}red", "--only-save-latents", "--skip-done"]
    for more, said in [
        ([], ""),
        ([], "1 of 1 prompts are done already"),
        (["--seed", 5], "made anew, it was made otherwise: seed 42, now 5"),
        (["--seed", 5, "--steps", 3], "it was made otherwise: num_steps 2, now 3"),
        (["--prompt", f"{long}blue"], "it was made otherwise: another prompt"),
    ]:
        arguments = [*wish[:1], *more, *wish[3:]] if "--prompt" in more else [*wish, *more]
        (before,) = list(records(tmp_path / "out").values()) or [None]
        assert main(*arguments) == 0
        err = capsys.readouterr().err
        assert said in err and ("made anew" in err) == ("made otherwise" in said), err
        (after,) = records(tmp_path / "out").values()
        assert (before == after) == ("done already" in said)


def test_guidance_scale_and_negative_prompt_have_their_effect(config, tmp_path):
    digests = []
    for k, extra in enumerate(([], ["--guidance-scale", 2], ["--negative-prompt", "blurry"], ["--seed", 5])):
        assert main(config, "--prompt", "x", "--output-dir", tmp_path / str(k), "--only-save-latents", *extra) == 0
        (facts,) = records(tmp_path / str(k)).values()
        digests.append(facts["latents_sha256"])
        assert facts["guidance"]["scale"] == (2 if k == 1 else 6)
    assert len(set(digests)) == 4


def test_single_stream_of_the_original_draws_as_the_engine_does(config, release, tmp_path):
    """seed_mode upstream: the global stream, seeded once; two prompts in a row."""
    assert (
        main(config, "--seed-mode", "upstream", "--seed", 3, "--prompt", "a", "--prompt", "b", "--only-save-latents")
        == 0
    )
    from sgm.config import load_run_config
    from sgm.inference.options import SampleArgs
    from sgm.inference.pipeline import Pipeline
    from sgm.inference.writer import read_latents

    pipeline = Pipeline(load_run_config([config], SampleArgs), torch.device("cpu"))
    pipeline.load("network")
    encoded = pipeline.encode(["a", "b"])
    torch.manual_seed(3)
    for prompt, name in zip(encoded, ("0_a", "1_b")):
        expected = pipeline.engine.sample(prompt.cond, prompt.uncond, shape=(1, 16, 2, 4))
        found, _ = read_latents(tmp_path / "out" / name / "0" / "latents.safetensors")
        torch.testing.assert_close(found, expected[0], rtol=0, atol=1e-6)


@pytest.mark.parametrize("placement", ["all", "stages", "lean"])
@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_half_precision_and_every_placement(config, release, tmp_path, precision, placement):
    assert main(config, "--prompt", "x", "--set", f"args.{precision}=true", "--placement", placement) == 0
    (facts,) = records(tmp_path / "out").values()
    assert facts["dtype"] == {"bf16": "bf16", "fp16": "fp32"}[precision] and facts["placement"] == placement


def test_float16_is_not_computed_on_a_cpu(config, capsys):
    for cpu_bf16 in ("auto", "false"):
        wish = ["--prompt", "x", "--set", "args.fp16=true", "--set", f"accelerate.cpu_bf16={cpu_bf16}"]
        assert main(config, *wish, "--only-save-latents") == 0
        assert "a CPU has no use for float16; this run computes in float32" in capsys.readouterr().err
        assert main(config, *wish, "--dry-run") == 0
        said = capsys.readouterr()
        assert "computes in float32" in said.err and "device cpu, fp32" in said.out


def test_adapters_act_and_are_recorded(config, release, tmp_path, capsys):
    from tests.training_tiny import network_section

    def adapter(content):
        draw = torch.Generator().manual_seed(3)
        state = {}
        width = network_section()["params"]["hidden_size"]
        for layer in range(2):
            for name, parts in (("dense", 1), ("query_key_value", 3)):
                for part in range(parts):
                    stem = f"model.diffusion_model.transformer.layers.{layer}.attention.{name}"
                    state[f"{stem}.matrix_A.{part}"] = torch.randn(4, width, generator=draw)
                    state[f"{stem}.matrix_B.{part}"] = torch.randn(width, 4, generator=draw) * 0.3
        return {"module": state}

    lora = changed(release, tmp_path / "lora.pt", adapter)
    digests = {}
    for k, extra in enumerate(([], ["--lora", lora], ["--lora", lora, "--merge-lora"], ["--lora", f"{lora}:0.0"])):
        assert main(config, "--prompt", "x", "--output-dir", tmp_path / str(k), "--only-save-latents", *extra) == 0
        (facts,) = records(tmp_path / str(k)).values()
        from sgm.inference.writer import read_latents

        digests[k] = read_latents(next((tmp_path / str(k)).rglob("latents.safetensors")))[0]
        assert (str(lora) in str(facts["weights"]["adapters"])) == (k > 0)
    assert (digests[1] - digests[0]).abs().max() > 1e-3
    torch.testing.assert_close(digests[1], digests[2], rtol=0, atol=1e-4)
    torch.testing.assert_close(digests[3], digests[0], rtol=0, atol=1e-5)
    assert main(config, "--prompt", "x", "--lora", network_file(release)) == 2
    assert "holds already" in capsys.readouterr().err
    other = changed(release, tmp_path / "other.pt", lambda content: content)
    assert main(config, "--prompt", "x", "--lora", other) == 2
    assert "holds no LoRA matrices" in capsys.readouterr().err


def test_questions_are_asked_and_a_failed_prompt_does_not_end_it(config, tmp_path, monkeypatch, capsys):
    import io

    from sgm.inference.fit import SamplingError
    from sgm.inference.pipeline import Pipeline

    sample = Pipeline.sample

    def fragile(self, prompt, samples, steps):
        if samples[0].prompt_index == 1:
            raise SamplingError("this one fails")
        return sample(self, prompt, samples, steps)

    monkeypatch.setattr(Pipeline, "sample", fragile)
    monkeypatch.setattr(sys, "stdin", io.StringIO("first\n\n  \nsecond\nthird\nfourth@@x.png\n"))
    assert main(config, "--set", "args.input_type=cli") == 0
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["0_first", "2_third"]
    said = capsys.readouterr().err
    assert "error: this one fails" in said and "error: prompt 3 asks for a video that begins with the image" in said


# --- dry run -----------------------------------------------------------------------------------------------------


def test_dry_run_prints_configuration_and_plan_and_makes_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    before = set((REPO / "demo").rglob("*"))
    assert main("--dry-run", "--device", "cpu") == 0
    shown = capsys.readouterr().out
    assert "sampler_config" in shown and "13 latent frames" in shown and "prompt 2:" in shown and "demo/" in shown
    assert set((REPO / "demo").rglob("*")) == before and not list(tmp_path.iterdir())
    (tmp_path / "resolved.yaml").write_text(shown)  # what is printed is a configuration again
    assert main(tmp_path / "resolved.yaml", "--dry-run", "--prompt", "x") == 0


def test_dry_run_of_the_full_size_without_weights(capsys):
    assert main(REPO / "configs" / "cogvideox_2b_infer.yaml", "--dry-run", "--device", "cpu", "--prompt", "x") == 0
    shown = capsys.readouterr().out
    assert (
        "49 frames of 720x480" in shown and "weights of the transformer: 6.44 GiB" in shown and "placeholder" in shown
    )


# --- processes ---------------------------------------------------------------------------------------------------


def test_prompts_are_shared_over_two_processes(config, tmp_path):
    (tmp_path / "prompts.txt").write_text("zero\none\n\nthree\n", encoding="utf-8")
    run = start(config, "--only-save-latents", ranks=2)
    _, err = run.communicate(timeout=240)
    assert run.returncode == 0, err
    assert main(config, "--only-save-latents", "--output-dir", tmp_path / "one") == 0
    together, alone = records(tmp_path / "out"), records(tmp_path / "one")
    assert together.keys() == alone.keys() and len(alone) == 3
    assert all(together[k]["latents_sha256"] == alone[k]["latents_sha256"] for k in alone)
    assert err.count("3 prompts from") == 1  # only the first process talks


def test_a_failing_process_fails_the_job(config, tmp_path):
    """Line 1 belongs to the second process, whose folder cannot be made."""
    (tmp_path / "prompts.txt").write_text("zero\none\n", encoding="utf-8")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "1_one").write_text("in the way")
    run = start(config, "--only-save-latents", ranks=2)
    _, err = run.communicate(timeout=240)
    assert run.returncode != 0 and "1_one" in err
    assert not list((tmp_path / "out").rglob(".partial*"))


def test_a_killed_run_goes_on_to_the_same_bytes(config, tmp_path):
    """Two processes are killed while they write; one alone makes what is missing, and clears what they left."""
    (tmp_path / "prompts.txt").write_text("".join(f"number {k}\n" for k in range(6)), encoding="utf-8")
    wish, out, whole = (
        [config, "--batch-size", 2, "--num-frames", 3, "--steps", 6],
        tmp_path / "out",
        tmp_path / "whole",
    )
    run = start(*wish, *ROOM, ranks=2)
    deadline = time.monotonic() + 200
    while not list(out.rglob("000000.json")) and time.monotonic() < deadline and run.poll() is None:
        time.sleep(0.002)
    for process in (*Path(f"/proc/{run.pid}/task/{run.pid}/children").read_text().split(), run.pid):
        os.kill(int(process), signal.SIGKILL)
    run.communicate()
    before = {p: p.stat().st_mtime_ns for p in out.rglob("000000.json")}
    assert 0 < len(before) < 12 and list(out.glob(".partial*"))
    assert main(*wish, *ROOM, "--skip-done") == main(*wish, *ROOM, "--output-dir", whole) == 0
    videos = sorted(p.relative_to(whole) for p in whole.rglob("*.mp4"))
    assert len(videos) == 12 and all((out / v).read_bytes() == (whole / v).read_bytes() for v in videos)
    again, once = records(out), records(whole)
    assert {n: r["latents_sha256"] for n, r in again.items()} == {n: r["latents_sha256"] for n, r in once.items()}
    assert not list(out.rglob(".partial*")) and all(p.stat().st_mtime_ns == stamp for p, stamp in before.items())


def test_interrupt_keeps_finished_videos(config, tmp_path):
    (tmp_path / "prompts.txt").write_text("".join(f"number {k}\n" for k in range(500)), encoding="utf-8")
    run = start(config, "--steps", 30)
    deadline = time.monotonic() + 200
    while not list((tmp_path / "out").rglob("000000.json")) and time.monotonic() < deadline and run.poll() is None:
        time.sleep(0.05)
    run.send_signal(signal.SIGINT)
    _, err = run.communicate(timeout=60)
    assert run.returncode == 130 and "--skip-done" in err and "Traceback" not in err, err
    out = tmp_path / "out"
    assert not list(out.rglob(".partial*"))
    done = list(out.rglob("*.json"))
    assert done and all(probe(p.with_suffix(".mp4")).frames == 1 for p in done)


def test_help_is_quick_and_light():
    code = (
        "import sys, sample_video\ntry: sample_video.main(['--help'])\nexcept SystemExit: pass\n"
        "assert 'torch' not in sys.modules and 'omegaconf' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=REPO, capture_output=True, text=True, env=environment())
    assert done.returncode == 0 and "--prompt" in done.stdout, done.stderr
