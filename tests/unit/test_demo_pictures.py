"""The demo from a picture: first frames with prompts that say the motion alone, and how samples from them are scored."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sgm.data.video_io import read_frames
from tests.conftest import REPO
from tools.demo.captions import DOING, WAYS, motion_caption, parse
from tools.demo.make_dataset import Options, main, make_clip, write_video
from tools.demo.score_pictures import main as score
from tools.demo.shapes import ClipSpec, render_clip

WITHHELD = ["--withheld", str(REPO / "tools" / "demo" / "withheld.json"), "--only-withheld"]


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("pictures")
    words = ["--frames", "17", "--two", "0", "--pictures", "--motion-words", "1", "--workers", "1", "--seed", "9"]
    assert main([str(out), "--count", "3", *WITHHELD, *words]) == 0
    return out


def test_pictures_are_the_first_frames_and_prompts_name_them(pictures):
    prompts = (pictures / "prompts.txt").read_text().splitlines()
    lines = [json.loads(line) for line in (pictures / "meta.jsonl").read_text().splitlines()]
    assert len(prompts) == len(lines) == 3
    for k, (prompt, line) in enumerate(zip(prompts, lines, strict=True)):
        text, _, name = prompt.partition("@@")
        assert text == line["prompt"] == (pictures / "labels" / f"{k:06d}.txt").read_text().strip()
        drawn = render_clip(ClipSpec.from_dict(line["spec"]))[0]
        assert np.array_equal(np.asarray(Image.open(pictures / name)), drawn)


@pytest.mark.parametrize("two", [0.0, 1.0])
def test_motion_captions_say_the_motions_and_nothing_of_the_ground(two):
    texts = set()
    for k in range(60):
        spec, _ = make_clip(k, Options(seed=3, two=two))
        text = motion_caption(spec, np.random.default_rng(k)).lower()
        texts.add(text)
        for item in spec.objects:
            forms = WAYS.get(item.motion) or [form for pair in DOING[item.motion] for form in pair]
            assert any(form in text for form in forms), (item, text)
        assert len(spec.objects) == 1 or text.count("the ") >= 2  # each is named
        with pytest.raises(ValueError):
            parse(text)  # no background
    assert len(texts) > 50


def test_other_labels_are_as_before():
    """The share that says the motion alone is drawn apart."""
    from tools.demo.make_dataset import Words, other_words

    spec, _ = make_clip(5, Options(seed=3))
    found = [other_words(k, spec, 3, Words(0.5)) for k in range(40)]
    mixed = [other_words(k, spec, 3, Words(0.5, motion=0.5)) for k in range(40)]
    changed = [k for k in range(40) if found[k] != mixed[k]]
    assert 8 < len(changed) < 32 and None in found and None in mixed


def write_sample(folder: Path, picture: Path, frames: np.ndarray) -> None:
    folder.mkdir(parents=True)
    write_video(folder / "000000.mp4", frames, 8)
    (folder / "000000.json").write_text(json.dumps({"prompt": "it moves", "image": str(picture)}))


def test_scores_tell_what_is_kept(pictures, tmp_path, capsys):
    files = [pictures / "videos" / f"{k:06d}.mp4" for k in range(3)]
    clips = [read_frames(file, range(17)).permute(0, 2, 3, 1).numpy() for file in files]
    given = [pictures / "pictures" / f"{k:06d}.png" for k in range(3)]
    gray = clips[2].copy()
    gray[-1] = 128  # the last frame shows nothing
    for name, shown in {"true": clips, "spoilt": [np.repeat(clips[0][:1], 17, axis=0), clips[0], gray]}.items():
        for k, clip in enumerate(shown):
            write_sample(tmp_path / name / str(k), given[k], clip)
    found = {}
    for name in ("true", "spoilt"):
        out = tmp_path / f"{name}.json"
        assert score([str(pictures), "--samples", str(tmp_path / name), "--json", str(out), "--workers", "1"]) == 0
        found[name] = json.loads(out.read_text())
    summary = found["true"]["summary"]
    assert summary["least psnr"] > 32 and summary["kept"] == summary["background"] == summary["motion"] == 1
    still, other, empty = found["spoilt"]["clips"]
    assert still["psnr"] > 32 and still["right"]["colour"] == [True] and still["right"]["motion"] == [False]
    assert other["psnr"] < 25 and not all(other["right"]["colour"] + other["right"]["shape"])
    assert empty["right"]["shape"] == empty["right"]["colour"] == [False]
    write_sample(tmp_path / "foreign" / "0", tmp_path / "000000.png", clips[0])
    assert score([str(pictures), "--samples", str(tmp_path / "foreign"), "--workers", "1"]) == 2
    assert "which is none of" in capsys.readouterr().err
