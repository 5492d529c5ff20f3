"""tools/validate_dataset.py on a small data set with every kind of fault."""

from __future__ import annotations

import importlib.util
import json
import shutil
from pathlib import Path

import pytest
import yaml
from PIL import Image

from tests.training_tiny import REPO, T5, write_clips


def load_tool():
    spec = importlib.util.spec_from_file_location("validate_dataset", REPO / "tools" / "validate_dataset.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


TOOL = load_tool()


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """Four good clips; one without caption, one broken, one with a long caption, and a picture."""
    folder = write_clips(tmp_path_factory.mktemp("data"), 4)
    videos, labels = folder / "videos", folder / "labels"
    (videos / "uncaptioned.mp4").write_bytes((videos / "0.mp4").read_bytes())
    (videos / "broken.mp4").write_bytes((videos / "0.mp4").read_bytes()[:200])
    (labels / "broken.txt").write_text("a broken one\n")
    (labels / "3.txt").write_text("word " * 40 + "\n")
    Image.new("RGB", (64, 64)).save(videos / "square.png")
    (labels / "square.txt").write_text("a square\n")
    return folder


@pytest.fixture(scope="module")
def config(data, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("config") / "c.yaml"
    params = {"buckets": [[5, 16, 32], [1, 16, 32]], "skip_frms_num": 0, "images": True}
    embedder = {
        "target": "sgm.modules.encoders.modules.FrozenT5Embedder",
        "params": {"model_dir": str(T5), "max_length": 12},
    }
    path.write_text(yaml.safe_dump({
        "args": {"train_data": [str(data)]},
        "data": {"target": "data_video.SFTDataset", "params": params},
        "model": {"conditioner_config": {"params": {"emb_models": [embedder]}}},
    }))  # fmt: skip
    return path


def test_table_json_and_sheet(config, data, tmp_path, capsys):
    code = TOOL.main([str(config), "--json", str(tmp_path / "f.json"), "--sheet", str(tmp_path / "s.png")])
    said = capsys.readouterr().out
    assert code == 0
    assert "4 of 7 clips usable" in said and "4 of 5 frames, 16x32" in said and " captions are cut" in said
    facts = {Path(clip["path"]).name: clip for clip in json.loads((tmp_path / "f.json").read_text())["clips"]}
    assert facts["0.mp4"] | {"path": ""} == {
        "usable": True, "source": str(data), "path": "", "reason": "", "frames": 6, "fps": 8.0, "height": 16,
        "width": 32, "codec": "h264", "seconds": 0.75, "caption": "clip number 0 of a moving gradient",
        "tokens": facts["0.mp4"]["tokens"], "cut": max(0, facts["0.mp4"]["tokens"] - 12), "clip": [5, 16, 32],
        "cropped": 0.0, "hidden": 0, "turned": [], "pixel_aspect": 1.0, "interlaced": False, "tracks": 1,
        "uneven": 0.0, "unknown": facts["0.mp4"]["unknown"], "dropped_lines": 0, "enlarged": 1.0, "repeats": 0, "notes": [],
    }  # fmt: skip
    assert facts["3.mp4"]["tokens"] >= 40 and facts["3.mp4"]["cut"] == facts["3.mp4"]["tokens"] - 12
    assert "no such caption file" in facts["uncaptioned.mp4"]["reason"] and facts["uncaptioned.mp4"]["frames"] == 6
    assert "cut short" in facts["broken.mp4"]["reason"]
    assert "would crop 50%" in facts["square.png"]["reason"]
    for name in ("uncaptioned", "broken", "square"):
        assert any(line.startswith("NO") and name in line for line in said.splitlines())
    with Image.open(tmp_path / "s.png") as sheet:
        assert sheet.width > 1000 and sheet.height == 2 * (160 + 16)
        assert len(sheet.getcolors(1 << 24)) > 100  # pictures, not paper


def test_exit_status(config, data, tmp_path, capsys):
    assert TOOL.main([str(config), "--strict"]) == 1
    assert TOOL.main(["--data", str(data), "--rows", "1"]) == 1  # 480x720 from tiny clips, but skipping 3 leaves none
    said = capsys.readouterr().out
    assert "and 5 more" in said and "give --tokenizer DIR" in said
    assert TOOL.main(["--data", str(tmp_path / "none")]) == 2
    assert "no such folder" in capsys.readouterr().err


def test_the_project_s_text_encoder_is_found_from_any_folder(data, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    small = ["--set", "data.params.video_size=[16,32]", "data.params.max_num_frames=5", "data.params.skip_frms_num=0"]
    options = [small[0], small[1], small[0], small[2], small[0], small[3]]
    assert TOOL.main([str(REPO / "configs" / "demo_lora.yaml"), "--data", str(data), *options]) == 0
    said = capsys.readouterr().out
    assert "longest caption" in said and "no text encoder" not in said


def test_files_of_other_kinds_are_counted(config, data, tmp_path, capsys):
    folder = tmp_path / "data"
    shutil.copytree(data, folder)
    (folder / "notes.md").write_text("no clip")
    (folder / "images").mkdir()
    shutil.move(folder / "videos" / "square.png", folder / "images" / "square.png")
    assert TOOL.main([str(config), "--data", str(folder)]) == 0
    said = capsys.readouterr().out
    assert "4 of 7 clips usable" in said and "passed over" not in said  # pictures are on
    options = ["--set", "data.params.images=false", "--json", str(tmp_path / "f.json")]
    assert TOOL.main([str(config), "--data", str(folder), *options]) == 0
    said = capsys.readouterr().out
    assert "4 of 6 clips usable" in said and "passed over: 1 .png (pictures: data.params.images=true)" in said
    assert json.loads((tmp_path / "f.json").read_text())["passed_over"] == {".png": 1}
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "a.png").write_bytes(b"")
    assert TOOL.main([str(config), "--data", str(tmp_path / "pictures"), *options[:2]]) == 2
    assert "passed over: 1 .png (pictures: data.params.images=true)" in capsys.readouterr().err


def test_nothing_is_said_where_nothing_is_passed_over(config, capsys):
    assert TOOL.main([str(config)]) == 0
    assert "passed over" not in capsys.readouterr().out
