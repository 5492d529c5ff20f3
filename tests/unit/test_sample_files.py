"""Files of samples: what they hold, that each is whole or absent, when a sample counts as done; what a plan says."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import imageio_ffmpeg
import numpy as np
import pytest
import torch
from PIL import Image

from sgm.config import AccelerateArgs
from sgm.data import video_out
from sgm.data.video_io import probe, read_frames
from sgm.files import SaveError, replacing, unfinished_names, write_json
from sgm.inference import writer
from sgm.inference.fit import SamplingError, check_latents
from sgm.inference.generation import Generation, out_of_memory_advice
from sgm.inference.length import Length, Window
from sgm.inference.options import SampleArgs
from sgm.inference.plan import memory_lines
from sgm.inference.progress import Progress, StageTimes
from sgm.inference.prompts import Prompt
from sgm.inference.requests import Guidance, Request, Requests, Wanted
from sgm.inference.runner import Runner
from sgm.inference.writer import SampleFiles
from sgm.modules.diffusionmodules.guiders import IdentityGuider, VanillaCFG
from sgm.parallel.team import Layout, Team
from sgm.weights.checksums import WeightsError


def frames(count: int = 5, height: int = 32, width: int = 64) -> np.ndarray:
    grey = np.linspace(0, 255, count).astype(np.uint8)
    return np.broadcast_to(grey[:, None, None, None], (count, height, width, 3)).copy()


def test_pixels_are_clamped_and_truncated_as_the_original_does():
    x = torch.tensor([-2.0, -1.0, 0.0, 0.5, 0.999, 1.0, 3.0]).view(1, 1, 7, 1, 1).expand(1, 3, 7, 1, 1)
    assert video_out.to_uint8(x)[0, :, 0, 0, 0].tolist() == [0, 0, 127, 191, 254, 255, 255]
    assert video_out.to_uint8(x.half()).dtype == torch.uint8 and video_out.to_uint8(x).shape == (1, 7, 1, 1, 3)


def test_video_and_contact_sheet(tmp_path):
    files = SampleFiles(tmp_path / "0_x" / "0")
    files.folder.mkdir(parents=True)
    video_out.write_video(files.video, frames(9), 8)
    video = probe(files.video)
    assert (video.frames, video.height, video.width, round(video.fps)) == (9, 32, 64, 8)
    assert abs(int(read_frames(files.video, [4]).float().mean()) - 127) < 6
    y, x = np.mgrid[:64, :96]
    grain = np.random.default_rng(0).normal(127 + 60 * np.sin(x / 7) + 50 * np.cos(y / 5), 12)
    moving = np.stack([np.roll(grain, k, 1).clip(0, 255).astype(np.uint8) for k in range(9)])[..., None].repeat(3, -1)
    video_out.write_video(files.folder / "grain.mp4", moving, 8)
    shown = read_frames(files.folder / "grain.mp4", list(range(9))).permute(0, 2, 3, 1).numpy()
    assert 10 * np.log10(255**2 / ((shown - moving.astype(float)) ** 2).mean()) > 43  # dB
    (files.folder / "grain.mp4").unlink()
    video_out.write_contact_sheet(files.sheet, frames(9))
    assert Image.open(files.sheet).size == (4 * 64, 2 * 32)
    video_out.write_contact_sheet(files.sheet, frames(1, 480, 720))
    assert Image.open(files.sheet).size == (240, 160)
    write_json(files.record, {"prompt": "été"})
    assert json.loads(files.record.read_text(encoding="utf-8")) == {"prompt": "été"}
    assert {p.name for p in files.folder.iterdir()} == {"000000.mp4", "000000.png", "000000.json"}


def test_latents_keep_values_and_facts(tmp_path):
    latents = torch.randn(1, 16, 2, 4).half()
    (tmp_path / "a").mkdir()
    writer.write_latents(tmp_path / "a" / "latents.safetensors", latents, {"prompt": "x"})
    read, facts = writer.read_latents(tmp_path / "a" / "latents.safetensors")
    assert torch.equal(read, latents) and facts == {"prompt": "x"}
    assert writer.find_latents(tmp_path) == [tmp_path / "a" / "latents.safetensors"]
    assert writer.latents_digest(latents) == writer.latents_digest(read.float()) != writer.latents_digest(-latents)
    (tmp_path / "bad.safetensors").write_text("no")
    with pytest.raises(WeightsError, match="bad.safetensors holds no saved latents"):
        writer.read_latents(tmp_path / "bad.safetensors")
    with pytest.raises(WeightsError, match="--only-save-latents"):
        writer.find_latents(tmp_path / "nothing")


@pytest.mark.parametrize("shape", [(2, 16, 4, 4), (3, 8, 4, 4), (16, 4, 4), (3, 16, 0, 4), (0, 16, 4, 4)])
def test_latents_of_another_shape_are_not_decoded(shape):
    engine = SimpleNamespace(autoencoder=SimpleNamespace(decoder=SimpleNamespace(z_channels=16)))
    engine.network = SimpleNamespace(patch=SimpleNamespace(t=1))
    check_latents(engine, torch.zeros(3, 16, 4, 4))
    with pytest.raises(SamplingError, match=r"decodes \(t, 16, h, w\) with an odd t"):
        check_latents(engine, torch.zeros(shape))
    check_latents(engine, torch.zeros(2, 16, 4, 4), any_length=True)  # the small decoder's


REQUEST = Request(
    "a fox",
    False,
    "",
    42,
    "sample",
    "DPM",
    50,
    Guidance("DynamicCFG", 6),
    13,
    (480, 720),
    8,
    "fp16",
    {},
    "full",
    None,
    "/w",
    ["/l:1"],
    *[None] * 7,
)


def test_in_what_a_request_differs_from_a_record():
    request = REQUEST
    record = json.loads(json.dumps(asdict(request))) | {"latents_sha256": "0"}
    assert request.differences(record) == []
    earlier = {name: value for name, value in record.items() if name not in ("refine", "approximate")}
    assert request.differences(earlier) == []  # of a version that did not know them
    asked = replace(
        request, decoder="small", small_decoder_weights="f", image_sha256="0", video_sha256="1", strength=0.5
    )
    known = ("decoder", "small_decoder_weights", "image_sha256", "video_sha256", "strength")
    earlier = {name: value for name, value in record.items() if name not in known}
    assert request.differences(earlier) == []
    assert asked.differences(earlier) == [
        "decoder full, now small",
        "small_decoder_weights None, now f",
        "image_sha256 None, now 0",
        "video_sha256 None, now 1",
        "strength None, now 0.5",
    ]
    changed = record | {"seed": 7, "guidance": {"guider": "DynamicCFG", "scale": 5}, "prompt": "x " * 40 + "y"}
    assert request.differences(changed) == [
        f"prompt {'x ' * 28}..., now a fox",
        "seed 7, now 42",
        "guidance {'guider': 'DynamicCFG', 'scale': 5}, now {'guider': 'DynamicCFG', 'scale': 6}",
    ]


def test_a_request_names_weights_by_whole_paths(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    args = SampleArgs(load="w", lora=["a.pt:0.5", "/b.pt"])
    engine = SimpleNamespace(sampler=SimpleNamespace(guider=VanillaCFG(6.0)))
    engine.sampler.num_steps = 50
    pipeline = SimpleNamespace(
        engine=engine,
        num_steps=50,
        visual=SimpleNamespace(
            source=None, reads_picture=False, length=Length(13, 13, (Window(0, 13),)), size=lambda: (480, 720)
        ),
        small_decoder_weights=None,
    )
    requests = Requests(SimpleNamespace(args=args, accelerate=AccelerateArgs()), pipeline)
    request = requests.of(Prompt(0, "x"))
    assert (request.load, request.lora) == (f"{tmp_path}/w", [f"{tmp_path}/a.pt:0.5", "/b.pt"])
    assert request.guidance == Guidance("VanillaCFG", 6.0)
    requests = Requests(SimpleNamespace(args=args, accelerate=AccelerateArgs()), pipeline)
    engine.sampler.guider = IdentityGuider()
    assert requests.of(Prompt(0, "x")).guidance == Guidance("IdentityGuider", None)


@pytest.mark.parametrize(
    ("placement", "held"), [("all", "at most 13.0 MiB"), ("stages", "at most 8.0 MiB"), ("lean", "")]
)
def test_the_plan_says_how_much_a_placement_holds(placement, held):
    sizes = {"conditioner": 8, "model": 4, "first_stage_model": 1}
    engine = torch.nn.ModuleDict({name: torch.nn.Linear(1 << 18, mib, bias=False) for name, mib in sizes.items()})
    pipeline = SimpleNamespace(engine=engine, args=SampleArgs(placement=placement))
    *lines, last = memory_lines(pipeline)
    assert "weights of the text encoder: 8.0 MiB" in lines and (held in last if held else "VAE" in last)
    del engine["conditioner"]
    assert memory_lines(pipeline)[-1] == "weights of the text encoder: unknown until its folder is there"


def test_advice_when_memory_is_short_names_what_is_left_to_try():
    first = out_of_memory_advice(SampleArgs(placement="all", batch_size=2))
    assert all(way in first for way in ("--placement stages", "--max-batch 1", "--vae-tiling", "--num-frames 9"))
    last = out_of_memory_advice(SampleArgs(placement="lean", batch_size=2, max_batch=1, vae_tiling=True))
    assert not any(way in last for way in ("stages", "--max-batch", "--vae-tiling")) and "--image-size" in last
    assert "--max-batch" not in out_of_memory_advice(SampleArgs())  # one sample a prompt


def test_ranks_share_saved_latents_out(tmp_path, monkeypatch):
    for k in range(3):
        (tmp_path / str(k)).mkdir()
        writer.write_latents(tmp_path / str(k) / "latents.safetensors", torch.zeros(1, 16, 2, 2), {"k": k})
    decoded: list[tuple[int, int]] = []
    config = SimpleNamespace(args=SampleArgs(decode_latents=str(tmp_path), output_dir=str(tmp_path / "out")))
    for rank in range(2):
        monkeypatch.setattr(Runner, "_write_frames", lambda *_: None)
        monkeypatch.setattr(Generation, "measured", lambda _, facts, *__, rank=rank: decoded.append((rank, facts["k"])))
        team = Team(Layout(2), data_rank=rank)
        pipeline = SimpleNamespace(
            team=team, small_decoder_weights=None, decoder_part="first_stage", is_loaded=lambda part: True
        )
        Runner(Generation(config, pipeline, Progress(False, torch.device("cpu")))).run()
    assert decoded == [(0, 0), (0, 2), (1, 1)]


def test_a_stage_that_runs_again_adds_its_time_and_keeps_its_peak():
    times = StageTimes()
    times.add("decode", 1.0, 7)
    times.add("decode", 0.5, 3)
    assert times == StageTimes({"decode": 1.5}, {"decode": 7})


def wanted_of(prompt: Prompt, **args) -> Wanted:
    requests = Requests(SimpleNamespace(args=SampleArgs(**args)), None)
    requests.__dict__["_of_every_prompt"] = REQUEST
    return requests.wanted(prompt)


def test_a_caption_of_another_prompt_of_the_same_folder_is_not_taken(tmp_path):
    prompt, other = (Prompt(0, "a " * 70 + end) for end in ("red", "blue"))
    assert prompt.folder == other.folder
    record = SampleFiles(tmp_path / prompt.folder / "1").record
    record.parent.mkdir(parents=True)
    write_json(record, {"prompt": prompt.text, "refined_prompt": "A red one."})
    args = {"output_dir": str(tmp_path), "batch_size": 2}
    assert [wanted_of(p, skip_done=True, **args).caption for p in (prompt, other)] == ["A red one.", ""]
    assert wanted_of(prompt, **args).caption == ""


def test_what_skip_done_leaves_out_is_whole(tmp_path, monkeypatch):
    """By its record, which is read once; one from before sizes were written down is believed."""
    prompt = Prompt(0, REQUEST.prompt)
    for k, sizes in enumerate(({}, {"file_bytes": {"000000.mp4": 5}}, {"file_bytes": {"000000.mp4": 6}},
                               {"file_bytes": {"latents.safetensors": 5}}, {"seed": 1}, None)):  # fmt: skip
        files = SampleFiles(tmp_path / prompt.folder / str(k))
        files.folder.mkdir(parents=True)
        files.video.write_bytes(b"video")
        if sizes is not None:
            write_json(files.record, asdict(REQUEST) | sizes)
    SampleFiles(tmp_path / prompt.folder / "0").sheet.touch()
    read = []
    monkeypatch.setattr(
        "sgm.inference.requests.read_record", lambda path: read.append(path) or writer.read_record(path)
    )
    wanted = wanted_of(prompt, output_dir=str(tmp_path), batch_size=7, skip_done=True)
    assert wanted.missing == [2, 3, 4, 5, 6] and len(read) == len(set(read)) == 7
    assert wanted.changed == [[f"seed 1, now {REQUEST.seed}"]]
    assert wanted_of(prompt, output_dir=str(tmp_path), batch_size=2).missing == [0, 1]  # without skip_done


def test_files_of_a_sample_take_their_places_together(tmp_path):
    """A record never stands beside files of another sample, whatever fails and when."""
    files, names = SampleFiles(tmp_path / "0_x" / "0"), ".partial-run7-"
    with files.replaced_together(names) as new:
        new.video.write_text("first")
        write_json(new.record, {"file_bytes": new.sizes()})
    (files.folder / ".partial-77-000000.mp4").touch()  # of an earlier version
    with pytest.raises(KeyboardInterrupt), files.replaced_together(names) as new:
        new.video.write_text("second")
        raise KeyboardInterrupt
    assert files.video.read_text() == "first" and files.done(writer.read_record(files.record), latents_only=False)
    (files.folder / "000000.png").mkdir()  # in the way: the last of the renames that can fail
    (files.folder / "000000.png" / "x").touch()
    with pytest.raises(SaveError, match="0_x/0"), files.replaced_together(names) as new:
        new.sheet.write_text("third")
        write_json(new.record, {"file_bytes": new.sizes()})
    assert not files.record.exists() and not list(files.folder.glob(".partial*"))


def test_a_writer_that_fails_leaves_nothing_new(tmp_path, monkeypatch):
    target = tmp_path / "x.json"
    target.write_text("before")
    with pytest.raises(KeyboardInterrupt), replacing(target) as temporary:
        temporary.write_text("half")
        raise KeyboardInterrupt
    assert target.read_text() == "before" and list(tmp_path.iterdir()) == [target]
    monkeypatch.setattr("imageio_ffmpeg.get_ffmpeg_exe", lambda: "/bin/false")
    with pytest.raises(video_out.EncodingError, match=r"cannot encode .*v\.mp4"):
        video_out.write_video(tmp_path / "v.mp4", frames(200), 8)
    assert list(tmp_path.iterdir()) == [target]


@pytest.mark.parametrize("suffix", ["mp4", "mkv", "avi"])
@pytest.mark.parametrize(
    ("script", "error", "words"),
    [
        ("trap '' XFSZ; ulimit -f 1; exec {real} \"$@\"", SaveError, "the file grew too large"),
        ("{real} \"$@\"; kill -9 $$", video_out.EncodingError, "ended with -9"),
        ("{real} \"$@\" && case $* in *libx264*) exit 1; esac", video_out.EncodingError, "ended with 1: no word"),
        ("case $* in *libx264*) head -c 18432 | {real} \"$@\";; *) exec {real} \"$@\"; esac",
         video_out.EncodingError, "of 40 frames the encoder kept 3"),
        (("case $* in *libx264*) {real} \"$@\" && for last; do :; done && truncate -s 3000 \"$last\";; "
         "*) exec {real} \"$@\"; esac"), video_out.EncodingError, "ended with|kept"),
    ],
)  # fmt: skip
def test_a_video_is_whole_or_absent(tmp_path, monkeypatch, suffix, script, error, words):
    """Encoders that fail with a word, without one, by a signal, or not at all while frames are missing."""
    encoder, real = tmp_path / "ffmpeg", imageio_ffmpeg.get_ffmpeg_exe()
    encoder.write_text("#!/bin/bash\n" + script.replace("{real}", real) + "\n")
    encoder.chmod(0o755)
    monkeypatch.setattr("imageio_ffmpeg.get_ffmpeg_exe", lambda: str(encoder))
    noise = np.random.default_rng(0).integers(0, 255, (40, 32, 64, 3), dtype=np.uint8)
    with pytest.raises(error, match=words):
        video_out.write_video(tmp_path / f"v.{suffix}", noise, 8)
    assert list(tmp_path.iterdir()) == [encoder]


def test_folders_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", tmp_path / "file" / "sub", Path("/proc/none")):
        with pytest.raises(SaveError, match="--output-dir"):
            config = SimpleNamespace(args=SampleArgs(output_dir=str(folder)))
            Runner(Generation(config, SimpleNamespace(team=Team()), None)).run()
        for write in (
            lambda folder=folder: writer.write_latents(folder / "latents.safetensors", torch.zeros(1), {}),
            lambda folder=folder: SampleFiles(folder).replaced_together("x").__enter__(),
            lambda folder=folder: write_json(folder / "x.json", {}),
        ):
            with pytest.raises(SaveError) as bare:  # as training does, which has no such option
                write()
            assert "--output-dir" not in str(bare.value)


def test_a_folder_is_begun_by_many_at_once(tmp_path):
    """Ranks, and commands that share an output folder, must not take each other's names away."""

    def work(_):
        with unfinished_names(tmp_path / "out") as prefix:
            return (tmp_path / "out" / f"{prefix.removesuffix('-')}.lock").exists() and prefix

    with ThreadPoolExecutor(8) as pool:
        names = list(pool.map(work, range(400)))  # raises what any of them raised
    assert all(names) and len(set(names)) == 400 and not list((tmp_path / "out").iterdir())
