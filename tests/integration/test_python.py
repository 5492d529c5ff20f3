"""The Python interface on a tiny model: equal to the command, kept loaded, changed from call to call, stopped."""

from __future__ import annotations

import ast
import inspect
import json
import re
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import sgm
from sgm import Preview, StepReport, TextToVideo, Video
from sgm.config import ConfigError
from sgm.data.video_io import probe, read_frames
from sgm.inference.fit import SamplingError
from sgm.inference.model import Asked
from sgm.inference.prompts import PromptError
from sgm.weights import WeightsError
from tests.family_tiny import write_kind
from tests.sampling_tiny import REPO, configuration, main, write_yaml
from tests.training_tiny import write_clips

ROOM = {"model.network_config.params.num_frames": 9}  # positions for three latent frames
FEW_STEPS = REPO / "configs" / "few_steps.yaml"


@pytest.fixture(scope="module")
def config(release, tmp_path_factory) -> Path:
    return write_yaml(tmp_path_factory.mktemp("config") / "c.yaml", configuration(release))


@pytest.fixture(scope="module")
def model(config) -> TextToVideo:
    return TextToVideo.from_config(config, overrides=ROOM)


@pytest.fixture(scope="module")
def adapters(release, tmp_path_factory) -> list[str]:
    """Two that change what the network gives; the second one of other rank and layers."""
    folder, made = tmp_path_factory.mktemp("adapters"), []
    state = torch.load(release / "transformer/1000/mp_rank_00_model_states.pt", weights_only=True)["module"]
    dense = "model.diffusion_model.transformer.layers.{}.attention.dense"
    for number, (layer, rank) in enumerate(((0, 2), (1, 3))):
        width = state[f"{dense.format(layer)}.weight"].shape[0]
        generator = torch.Generator().manual_seed(number)
        pair = {"A": torch.randn(rank, width, generator=generator), "B": torch.randn(width, rank, generator=generator)}
        module = {f"{dense.format(layer)}.matrix_{name}.0": value for name, value in pair.items()}
        torch.save({"module": module, "lora": {"rank": rank, "alpha": 4.0}}, folder / f"{number}.pt")
        made.append(str(folder / f"{number}.pt"))
    return made


def digest(video: Video) -> str:
    return video.record["latents_sha256"]


def test_equal_to_the_command_with_the_same_record(config, model, tmp_path):
    out, room = tmp_path / "out", [f"{key}={value}" for key, value in ROOM.items()]
    asked = ["--prompt", "a red ball", "--prompt", "a dog", "--batch-size", 2, "--seed", 7, "--steps", 3]
    assert main(config, "--set", *room, *asked, "--num-frames", 3, "--negative-prompt", "x", "--output-dir", out) == 0
    prompts = ["a red ball", " a dog"]
    made = model(prompts, samples=2, seed=7, steps=3, num_frames=3, negative_prompt="x")
    assert [v.prompt for v in made] == ["a red ball"] * 2 + ["a dog"] * 2 and len({*map(digest, made)}) == 4
    theirs = [json.loads(file.read_text()) for file in sorted(out.rglob("*.json"))]
    measured = {"seconds", "peak_memory_bytes", "file_bytes", "config_hash", "config_files"}  # the hash: output_dir
    for video, record in zip(made, theirs, strict=True):
        saved = video.save(tmp_path / "new" / "v.mp4")
        ours = json.loads(saved.with_suffix(".json").read_text())
        assert ours.keys() == record.keys()
        assert {k: v for k, v in ours.items() if k not in measured} == {
            k: v for k, v in record.items() if k not in measured
        }
        assert ours["file_bytes"] == {"v.mp4": saved.stat().st_size}
    (file,) = out.glob("0_*/0/*.mp4")
    assert made[0].save(tmp_path / "v.mp4").read_bytes() == file.read_bytes()
    assert made[0].frames.shape == (9, 16, 32, 3) and made[0].frames.dtype == np.uint8 and made[0].seed == 7
    assert (probe(file).frames, made[0].fps) == (9, 8)
    with pytest.raises(ConfigError, match=r"v\.png has no ending of a video"):
        made[0].save(tmp_path / "v.png")


def test_calls_differ_in_what_they_say_alone(model):
    first = model("a dog", seed=1)
    assert isinstance(first, Video) and isinstance(model(["a dog"], seed=1), list)
    others = [
        model("a dog", seed=2), model("a dog", seed=1, steps=3), model("a dog", seed=1, guidance_scale=2.0),
        model("a dog", seed=1, size=(32, 16)), model("a dog", seed=1, num_frames=3), model("a cat", seed=1),
        model("a dog", seed=1, negative_prompt="a cat"),
    ]  # fmt: skip
    assert len({*map(digest, [first, *others])}) == 8
    assert others[3].frames.shape == (1, 32, 16, 3) and others[4].frames.shape == (9, 16, 32, 3)
    assert digest(model("a dog", seed=1)) == digest(first)


def test_adapters_are_exchanged_while_the_base_stays(model, config, adapters, tmp_path):
    first, second = adapters
    wishes = [[], [first], [f"{first}:0.5"], [second], [first, f"{second}:-1"], [second], []]
    base = model("a dog", seed=1)  # reads the base
    (file,) = {model.pipeline.facts.network.source}
    made = [model("a dog", seed=1, lora=wish) for wish in wishes]
    assert len({*map(digest, made)}) == 5 and digest(made[3]) == digest(made[5])
    assert digest(base) == digest(made[0]) == digest(made[-1]) and file in made[0].record["weights"]["transformer_file"]
    fresh = TextToVideo.from_config(config, overrides=ROOM, lora=wishes[4])
    assert digest(fresh("a dog", seed=1)) == digest(made[4])
    assert made[4].record["lora"] == wishes[4] and len(made[4].record["weights"]["adapters"]) == 2
    assert digest(fresh("a dog", seed=1, lora=[])) == digest(base)
    assert digest(fresh("a dog", seed=1)) == digest(made[4]), "a model's own adapters come back"
    with pytest.raises(ConfigError, match="absent does not exist"):
        model("a dog", lora="absent:0.5")
    wide = torch.load(first, weights_only=True)
    wide["module"] = {name: torch.ones(2, 2) for name in wide["module"]}
    torch.save(wide, tmp_path / "wide.pt")
    for wish in ([str(tmp_path / "wide.pt")], [second, str(tmp_path / "wide.pt")]):
        with pytest.raises(WeightsError, match="the adapter of .* is for a weight"):
            model("a dog", lora=wish)
        assert digest(model("a dog", seed=1)) == digest(base)


def test_what_cannot_be_exchanged_is_refused_and_the_rest_goes_on(config, adapters):
    model = TextToVideo.from_config(config, overrides={"accelerate.fp8": True})
    first = digest(model("a dog", seed=1))
    with pytest.raises(SamplingError, match=r"in 8-bit floats \(accelerate.fp8\) cannot be changed"):
        model("a dog", lora=adapters[0])
    assert digest(model("a dog", seed=1)) == first


def test_steps_are_told_with_previews_and_may_stop_a_call(model):
    reports: list[StepReport] = []
    shapes = []

    def watch(report: StepReport) -> None:
        reports.append(report)
        shapes.append((report.step, report.total, report.prompt, report.preview().shape))

    plain, watched = (model(["a", "b"], steps=2, num_frames=3, on_step=w) for w in (None, watch))
    assert [*map(digest, plain)] == [*map(digest, watched)], "previews change nothing"
    assert shapes == [(k, 2, prompt, (3, 16, 32, 3)) for prompt in (0, 1) for k in (1, 2)]
    with pytest.raises(SamplingError, match="within on_step"):
        reports[0].preview()

    class Cancelled(Exception):
        pass

    def cancel(report: StepReport) -> None:
        if report.step == 2:
            raise Cancelled

    with pytest.raises(Cancelled):
        model("a", steps=3, on_step=cancel)
    with pytest.raises(SamplingError, match="is called again"):
        model("a", steps=3, on_step=lambda _: model("b"))
    assert digest(model("a", steps=2, num_frames=3)) == digest(plain[0])


def test_a_stream_ends_with_the_video_or_where_nobody_listens(model):
    *previews, last = model.stream("a dog", seed=1, steps=5, every=2)
    assert [p.step for p in previews if isinstance(p, Preview)] == [2, 4, 5] and previews[0].frames.shape[1:] == (
        16,
        32,
        3,
    )
    assert isinstance(last, Video) and digest(last) == digest(model("a dog", seed=1, steps=5))
    with pytest.raises(PromptError, match="prompt 0 is blank"):
        list(model.stream("  "))
    with pytest.raises(ConfigError, match="every is 0"):
        next(model.stream("a dog", every=0))
    stream = model.stream("a dog", steps=40)
    next(stream)
    with pytest.raises(SamplingError, match=r"let that one end, or close\(\)"):
        model("a cat")  # waits for nobody: only this thread can let the stream go on
    stream.close()
    assert not [t for t in threading.enumerate() if t.name == "sgm-stream"]
    assert digest(model("a dog", seed=1, steps=5)) == digest(last)


def test_threads_take_turns(model):
    made: dict[int, str] = {}

    def work(seed: int) -> None:
        made[seed] = digest(model("a dog", seed=seed))

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    [thread.start() for thread in threads], [thread.join() for thread in threads]
    assert made == {seed: digest(model("a dog", seed=seed)) for seed in range(4)}


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ({"step": 3}, "unknown option 'step'; did you mean `steps`"),
        ({"placement": "lean"}, "placement is decided when a model is loaded"),
        ({"steps": 1}, r"args\.num_steps"),
        ({"seed": "x"}, r"args\.seed"),
        ({"size": (20, 32)}, "multiples of 16"),
        ({"num_frames": 2}, "must be odd"),
        ({"strength": 0.5}, "args.strength is of a clip"),
        ({"image": "fox.png"}, "makes videos from text alone"),
        ({"video": "absent.mp4"}, "absent.mp4 does not exist"),
        ({"configs": ["absent.yaml"]}, "no configuration file at absent.yaml"),
        ({"configs": [FEW_STEPS]}, "small_decoder"),
    ],
)
def test_what_cannot_be_is_one_error_and_leaves_the_model(model, asked, words):
    with pytest.raises(ValueError, match=words):
        model("a dog", **asked)
    assert model("a dog", seed=1).record["num_steps"] == 2


def test_what_loading_decides_is_refused_in_a_call(model, tmp_path):
    other = write_yaml(tmp_path / "o.yaml", {"args": {"placement": "all"}, "model": {"scale_factor": 2.0}})
    with pytest.raises(SamplingError, match=r"args\.placement, model\.scale_factor: this is decided when"):
        model("a dog", configs=[other])
    slower = write_yaml(tmp_path / "s.yaml", {"args": {"num_steps": 4}, "accelerate": {"guidance_interval": [0, 0.5]}})
    video = model("a dog", configs=[slower])
    assert (video.record["num_steps"], video.record["approximate"]) == (4, {"guidance_interval": [0.0, 0.5]})
    with pytest.raises(ConfigError, match="for the command"):
        TextToVideo.from_config(REPO / "configs/demo_infer.yaml", overrides={"args.only_save_latents": True})


def test_what_is_unusual_is_warned_of(model):
    with pytest.warns(UserWarning, match="longer than the text encoder reads"):
        video = model("a dog " * 200)
    assert any("longer than" in text for text in video.warnings)


def test_the_package_offers_it_without_loading_it():
    code = "import sgm, sys; assert 'torch' not in sys.modules and 'sgm.inference' not in sys.modules; sgm.absent"
    done = subprocess.run([sys.executable, "-c", code], cwd=REPO, capture_output=True, text=True)
    assert "module 'sgm' has no attribute 'absent'" in done.stderr
    assert {"TextToVideo", "Video"} <= set(dir(sgm)) and (Path(sgm.__file__).parent / "py.typed").is_file()


def test_the_first_lines_of_the_guide(tmp_path, monkeypatch):
    """On the demo, from any folder; as short as it can be."""
    monkeypatch.chdir(tmp_path)
    model = TextToVideo.from_config("configs/demo_infer.yaml", overrides={"args.sampling_num_frames": 1})
    video = model("a small red star drifts to the left over a white background", seed=7, steps=2)
    assert video.frames.shape == (1, 128, 192, 3) and len(read_frames(video.save("star.mp4"), [0])) == 1
    with pytest.warns(UserWarning, match="the model does not know fox. It knows shapes: circle"):
        fast = model("a small red fox", configs=["configs/few_steps.yaml"])
    assert "does not know fox" in fast.warnings[0] and not video.warnings
    assert (fast.record["decoder"], fast.record["num_steps"]) == ("small", 4)
    again = model(
        "a small red star drifts to the left over a white background", seed=7, overrides={"args.num_steps": 2}
    )
    assert np.array_equal(again.frames, video.frames)


def test_a_clip_or_a_picture_may_lie_in_memory(model, release, tmp_path):
    """The same numbers as from a file."""
    clip = write_clips(tmp_path, 1, 9) / "videos" / "0.mp4"
    frames = read_frames(clip, range(9)).permute(0, 2, 3, 1).numpy()
    asked = {"num_frames": 3, "steps": 4, "strength": 0.5}
    made = [model("a dog", video=given, **asked) for given in (clip, frames, str(clip))]
    assert digest(made[0]) == digest(made[1]) == digest(made[2]) != digest(model("a dog", num_frames=3, steps=4))
    assert (made[0].record["video"], made[1].record["video"]) == (str(clip), None) and made[1].record["video_sha256"]
    assert model("a dog", video=made[0], **asked).record["steps_taken"] == 2
    for wrong, words in ((frames[:4], "has 4 frames"), (frames[0], r"uint8 \(16, 32, 3\); give uint8 \(f, h, w, 3\)")):
        with pytest.raises(ValueError, match=words):
            model("a dog", video=wrong, **asked)
    file = tmp_path / "x.png"
    Image.fromarray(frames[0]).save(file)
    kind = write_kind(tmp_path / "i2v", "5b_i2v")
    args = configuration(release)["args"] | {"load": str(tmp_path / "i2v" / "transformer")}
    begins = TextToVideo.from_config(write_yaml(tmp_path / "c.yaml", {"args": args, "model": kind}))
    asked = {"steps": 2, "size": (16, 32)}
    turned = [begins("a dog", image=given, **asked) for given in (file, frames[0], Image.open(file))]
    assert len({*map(digest, turned)}) == 1 and digest(begins("a dog", image=frames[5], **asked)) != digest(turned[0])
    assert [v.record["image"] for v in turned] == [str(file), None, None]
    with pytest.raises(PromptError, match="no picture is named"):
        begins("a dog", **asked)


def test_the_notebook_runs(tmp_path, monkeypatch):
    """All its cells, one after the other; the last line of each is shown, as notebooks do."""
    monkeypatch.chdir(tmp_path)
    cells = json.loads((REPO / "docs" / "python.ipynb").read_text(encoding="utf-8"))["cells"]
    sources = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    assert all(cell.get("outputs", []) == [] for cell in cells) and len(sources) > 5
    names: dict[str, object] = {}
    for source in sources:
        *body, last = ast.parse(source).body
        exec(compile(ast.Module(body, []), "notebook", "exec"), names)
        if isinstance(last, ast.Expr):
            names["shown"] = eval(compile(ast.Expression(last.value), "notebook", "eval"), names)
        else:
            exec(compile(ast.Module([last], []), "notebook", "exec"), names)
    video, shown = names["video"], names["shown"]
    assert isinstance(video, Video) and video.frames.shape == (17, 128, 192, 3) and Path("star.json").is_file()
    assert isinstance(shown, Video) and shown._repr_html_().startswith("<video") and shown.record["strength"] == 0.6


def test_the_guide_names_what_there_is():
    """Every keyword that its examples and tables give, and every attribute of what comes back."""
    text = (REPO / "docs" / "python.md").read_text(encoding="utf-8")
    calls = [
        node
        for block in re.findall(r"^```python\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)
        for node in ast.walk(ast.parse(block))
        if isinstance(node, ast.Call)
    ]
    known = {"samples", "on_step", *Asked.__annotations__}
    taken = {"model": known, "stream": known | {"every"}, "from_config": set(inspect.signature(TextToVideo.from_config).parameters)}  # fmt: skip
    found = {ast.unparse(call.func).rpartition(".")[2]: set() for call in calls}
    for call in calls:
        found[ast.unparse(call.func).rpartition(".")[2]] |= {str(word.arg) for word in call.keywords}
    assert all(words <= taken[name] for name, words in found.items() if name in taken) and taken.keys() <= found.keys()
    rows = [row.split("|")[1] for row in text.splitlines() if row.startswith("| `")]
    assert {name for row in rows for name in re.findall(r"`(\w+)`", row)} == known
