"""A small decoder from training to videos: the tool's files and refusals, and `--decoder small` of the sampling command."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from sgm.data.video_io import probe
from sgm.inference.writer import write_latents
from sgm.weights import read_checkpoint
from tests.sampling_tiny import REPO, configuration, main, model_section, write_yaml
from tools import train_decoder

SIZES = ["--widths", "8,8,4", "--blocks", "1,1,1", "--device", "cpu"]
ROOM = ["--set", "model.network_config.params.num_frames=13"]  # positions for four latent frames


def learn(*arguments) -> int:
    return train_decoder.main([str(a) for a in arguments])


@pytest.fixture(scope="module")
def config(release, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("config")
    return write_yaml(folder / "c.yaml", configuration(release, output_dir=str(folder / "out")))


@pytest.fixture(scope="module")
def latents(tmp_path_factory) -> Path:
    """What a run with --only-save-latents leaves: clips of three latent frames, an image, and one of an even length."""
    folder = tmp_path_factory.mktemp("latents")
    for k in range(8):
        t = {6: 1, 7: 4}.get(k, 3)
        generator = torch.Generator().manual_seed(k)
        (folder / str(k)).mkdir()
        write_latents(folder / str(k) / "latents.safetensors", torch.randn(t, 16, 2, 4, generator=generator), {})
    return folder


@pytest.fixture(scope="module")
def trained(config, latents, tmp_path_factory) -> Path:
    """The folder of a run of six steps, with a checkpoint after each."""
    out = tmp_path_factory.mktemp("runs") / "run"
    assert learn(config, out, "--latents", latents, "--steps", 6, *SIZES) == 0
    return out


def test_a_run_leaves_decoder_log_and_preview(trained):
    assert {p.name for p in trained.iterdir()} == {
        "small_decoder.safetensors", "metrics.jsonl", "preview.png", "checkpoint.pt"
    }  # fmt: skip
    lines = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()]
    assert lines[-2]["step"] == 6 and lines[-2]["total"] > 0 and lines[-1]["test_psnr"] >= lines[-1]["test_psnr_least"]


@pytest.mark.parametrize("memory", ["4", "0.00002"], ids=["all pairs at once", "pairs that take turns"])
def test_an_interrupted_run_ends_as_one_that_was_not(config, latents, tmp_path, memory, monkeypatch):
    from tools.decoder_training import Learner

    monkeypatch.setattr(train_decoder, "SAVE_SECONDS", 0.0)
    wish = ["--latents", latents, "--steps", 9, "--memory", memory, *SIZES]
    assert learn(config, tmp_path / "whole", *wish) == 0
    step = Learner.step

    def stopped(self, *batch):
        if self.averages.count == 4:
            raise KeyboardInterrupt
        return step(self, *batch)

    monkeypatch.setattr(Learner, "step", stopped)
    assert learn(config, tmp_path / "halves", *wish) == 130
    monkeypatch.setattr(Learner, "step", step)
    assert learn(config, tmp_path / "halves", *wish, "--resume") == 0
    whole, halves = (read_checkpoint(tmp_path / name / "small_decoder.safetensors") for name in ("whole", "halves"))
    for name, value in whole.items():
        assert torch.equal(value, halves[name]), name


def test_it_learns(config, latents, tmp_path):
    """One picture by heart: measured 17.1 dB after one step, 19.6 after 25."""
    wish = ["--latents", latents / "6", "--test", latents / "6", "--batch", 2, "--rate", 0.01, "--noise", 0, *SIZES]
    figures = []
    for steps in (1, 25):
        assert learn(config, tmp_path / str(steps), *wish, "--steps", steps) == 0
        figures.append(json.loads((tmp_path / str(steps) / "metrics.jsonl").read_text().splitlines()[-1])["test_psnr"])
    assert figures[1] > figures[0] + 1


def test_refusals_of_training(config, latents, trained, release, tmp_path, capsys):
    def refused(text, *arguments):
        try:
            code = learn(*arguments)
        except SystemExit as stop:
            code = stop.code
        assert code == 2 and text in capsys.readouterr().err

    wish = ["--latents", latents, "--steps", 2, *SIZES]
    refused("--resume goes on with it", config, trained, *wish)
    refused('"widths": [8, 8, 4]', config, trained, *wish, "--resume", "--widths", "8,8,8")
    refused("checkpoint.pt", config, tmp_path / "new", *wish, "--resume")
    refused("nothing to learn from", config, tmp_path / "new", "--steps", 2)
    refused("no latents.safetensors", config, tmp_path / "new", "--latents", tmp_path, "--steps", 2)
    refused("--widths and --blocks", config, tmp_path / "new", *wish, "--widths", "8")
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "cache.json").write_text(json.dumps({"identity": {"vae weights": "0"}}))
    refused("cache of another VAE", config, tmp_path / "new", "--latents", tmp_path / "cache", "--steps", 2)


def test_a_run_goes_on_only_with_the_clips_and_options_that_it_had(config, latents, trained, tmp_path, capsys):
    def refused(text, *arguments):
        assert learn(config, trained, *arguments, "--resume") == 2 and text in capsys.readouterr().err

    wish = ["--latents", latents, "--steps", 2, *SIZES]
    shutil.copytree(latents, tmp_path / "others")
    shutil.copy(latents / "2" / "latents.safetensors", tmp_path / "others" / "1")
    others = ("--latents", tmp_path / "others", "--steps", 2, *SIZES)
    refused("is of another run: latents was", *others)
    refused("is of another run: test was ''", *wish, "--test", latents / "0")
    for option, was, now in (
        ("batch", 4, 2),
        ("seed", 0, 1),
        ("crop", 32, 8),
        ("noise", 0.1, 0.2),
        ("rate", 0.001, 0.1),
    ):
        said = f"is of another run: {option} was {was}, now {now}. Give what it had, or another OUT"
        refused(said, *wish, f"--{option}", now)


def test_latents_of_a_cache(release, tmp_path):
    from sgm.weights import weights_fingerprint
    from sgm.weights.save import save_safetensors
    from tools.decoder_latents import Origin, fingerprint, read_all

    vae, folder = release / "vae" / "3d-vae.pt", tmp_path / "cache"
    folder.mkdir()
    (folder / "cache.json").write_text(json.dumps({"identity": {"vae weights": weights_fingerprint(vae)}}))
    moments = torch.cat([torch.randn(2, 3, 16, 2, 4), torch.full((2, 3, 16, 2, 4), -30.0)], 2)
    save_safetensors(folder / "video-0.safetensors", {"video:a": moments[0], "video:b": moments[1]}, {"identity": "x"})
    before = fingerprint(folder)
    found = read_all(folder, Origin(2.0, 1), vae, 0)
    for z, expected in zip(found, moments, strict=True):
        torch.testing.assert_close(z.float(), expected[:, :16].transpose(0, 1), atol=1e-2, rtol=1e-2)
    assert fingerprint(folder) == before
    save_safetensors(folder / "video-1.safetensors", {"video:c": moments[0]}, {"identity": "x"})
    assert fingerprint(folder) != before


def test_the_frame_that_is_dropped_in_decoding_is_not_learned_from(tmp_path):
    """CogVideoX 1.5 samples an even number; of others the last is left out, since the full decoder takes none."""
    from tools.decoder_latents import Origin, read_all

    z = torch.randn(4, 16, 2, 4)
    write_latents(tmp_path / "latents.safetensors", z, {})
    for patch, kept in ((2, z[1:]), (1, z[:-1])):
        (found,) = read_all(tmp_path, Origin(2.0, patch), tmp_path, 0)
        torch.testing.assert_close(found.float(), kept.transpose(0, 1) / 2, atol=1e-2, rtol=1e-2)
    model = {"scale_factor": 0.7, "network_config": {"params": {"patch_size": [2, 2, 2]}}}
    assert Origin.of(model) == Origin(0.7, 2) and Origin.of({}) == Origin(1.0, 1)


# --- sampling ----------------------------------------------------------------------------------------------------


def small(trained: Path) -> list[str]:
    path = trained / "small_decoder.safetensors"
    return ["--decoder", "small", "--set", f"model.first_stage_config.params.small_decoder={path}"]


def record(out: Path) -> dict:
    (file,) = out.rglob("*.json")
    return json.loads(file.read_text())


@pytest.mark.parametrize("placement", ["all", "stages", "lean"])
def test_a_video_by_the_small_decoder(config, trained, tmp_path, placement):
    wish = [config, "--prompt", "a fox", *ROOM, "--num-frames", 4, "--placement", placement]  # even: this one takes it
    assert main(*wish, *small(trained), "--output-dir", tmp_path) == 0
    facts, (video,) = record(tmp_path), tmp_path.rglob("*.mp4")
    assert probe(video).frames == 13
    assert facts["decoder"] == "small" and facts["small_decoder_weights"] and facts["first_stage_weights"]


def test_saved_latents_are_decoded_by_either_and_the_record_says_by_which(config, trained, tmp_path):
    assert main(config, "--prompt", "a fox", "--only-save-latents", "--output-dir", tmp_path) == 0
    for decoder, options in (("full", []), ("small", small(trained))):
        assert main(config, "--decode-latents", tmp_path, *options) == 0
        facts = record(tmp_path)
        assert facts["decoder"] == decoder and (facts["small_decoder_weights"] is None) == (decoder == "full")


def test_what_another_decoder_made_is_made_anew(config, trained, latents, tmp_path, capsys):
    wish = [config, "--prompt", "a fox", "--output-dir", tmp_path, "--skip-done"]
    assert main(*wish) == 0 and main(*wish, *small(trained)) == 0
    assert "decoder full, now small" in "".join(capsys.readouterr())
    assert main(*wish, *small(trained)) == 0 and "1 of 1 prompts are done" in "".join(capsys.readouterr())
    assert learn(config, tmp_path / "two", "--latents", latents, "--steps", 1, *SIZES) == 0
    before = record(tmp_path)["small_decoder_weights"]
    assert main(*wish, *small(tmp_path / "two")) == 0
    assert f"small_decoder_weights {before}, now" in "".join(capsys.readouterr())


def test_refusals_of_sampling(config, trained, release, tmp_path, capsys):
    wish = [config, "--prompt", "a fox", "--output-dir", tmp_path / "out"]

    def refused(text, *options):
        assert main(*wish, *options) == 2
        assert text in capsys.readouterr().err

    refused("names no small_decoder: `python tools/train_decoder.py", "--decoder", "small")
    place = "model.first_stage_config.params.small_decoder"
    refused(f"{place}: absent.safetensors does not exist", "--decoder", "small", "--set", f"{place}=absent.safetensors")
    refused("needs no tiles", *small(trained), "--vae-tiling")
    state = torch.load(release / "vae" / "3d-vae.pt", weights_only=True)["state_dict"]
    torch.save({"state_dict": {n: v + 0.01 for n, v in state.items()}}, tmp_path / "other.pt")
    other = f"model.first_stage_config.params.ckpt_path={tmp_path / 'other.pt'}"
    refused("was learned from another VAE", *small(trained), "--set", other)
    assert main(*wish, "--set", f"{place}=absent.safetensors") == 0  # who does not ask for it does not need it


def test_few_steps_over_a_configuration_without_their_files(config, capsys):
    assert main(config, REPO / "configs" / "few_steps.yaml", "--prompt", "a fox") == 2
    said = capsys.readouterr().err
    assert "names no small_decoder" in said and "args.student names no adapter" in said


def test_few_steps_decode_without_a_student(config, trained, tmp_path):
    assert main(config, "--prompt", "a fox", "--only-save-latents", "--output-dir", tmp_path) == 0
    assert main(config, REPO / "configs" / "few_steps.yaml", *small(trained), "--decode-latents", tmp_path) == 0
    assert record(tmp_path)["decoder"] == "small" and list(tmp_path.rglob("*.mp4"))


def test_the_plan_tells_of_it(config, trained, capsys):
    assert main(config, "--prompt", "a fox", *small(trained), "--dry-run") == 0
    assert "weights of the small decoder" in capsys.readouterr().out


def test_training_and_caches_take_no_notice(release):
    """A configuration of training may name it (the demo's do): a cache or a run from before stays what it is."""
    from sgm.cache.ready import cache_identity
    from sgm.data.clips import ClipSettings
    from sgm.training.checkpoints.load import Change

    model = model_section(release)
    settings = ClipSettings(video_size=(16, 32), fps=8, max_num_frames=5)
    before = cache_identity(model, settings)
    model["first_stage_config"]["params"]["small_decoder"] = "small.safetensors"
    assert cache_identity(model, settings) == before
    assert Change("model.first_stage_config.params.small_decoder", None, "small.safetensors").allowed
