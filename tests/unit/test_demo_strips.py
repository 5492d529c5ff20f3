"""The picture of sampled clips."""

from __future__ import annotations

import json

import numpy as np
from PIL import Image

from tools.demo import strips
from tools.demo.make_dataset import write_video


def test_a_strip_a_clip_in_the_order_of_the_prompts(tmp_path, capsys):
    for name, index, levels in (("a", 1, (200, 250)), ("b", 0, (20, 60))):
        video = np.repeat(np.linspace(*levels, 9).astype(np.uint8), 32 * 48 * 3).reshape(9, 32, 48, 3)
        (tmp_path / name).mkdir()
        write_video(tmp_path / name / "000000.mp4", video, 8)
        facts = {"prompt": f"prompt {name}", "prompt_index": index, "sample_index": 0}
        (tmp_path / name / "000000.json").write_text(json.dumps(facts))
    out = tmp_path / "picture.png"
    assert strips.main([str(tmp_path), "--out", str(out), "--frames", "3", "--width", "148"]) == 0
    picture = np.asarray(Image.open(out).convert("L")).astype(int)
    height = picture.shape[0] // 2
    assert picture.shape == (2 * height, 148)
    for part, (first, last) in ((picture[:height], (20, 60)), (picture[height:], (200, 250))):
        row = part[height // 2 + 8]
        assert abs(row[24] - first) < 8 and abs(row[74] - (first + last) / 2) < 8 and abs(row[124] - last) < 8
        assert part[:12].min() < 100  # the prompt
    beside = np.asarray(strips.picture([tmp_path / "a", tmp_path / "b"], 1, 3, 148).convert("L")).astype(int)
    assert abs(beside[height // 2 + 8, 24] - 200) < 8 and abs(beside[height + height // 2 + 8, 24] - 20) < 8
    assert strips.main([str(tmp_path / "none"), "--out", str(out)]) == 2
    assert "--output-dir" in capsys.readouterr().err


def test_a_picture_that_a_clip_began_with_stands_in_front(tmp_path):
    write_video(tmp_path / "000000.mp4", np.full((5, 32, 48, 3), 40, np.uint8), 8)
    Image.new("RGB", (96, 64), (220, 220, 220)).save(tmp_path / "given.png")
    facts = {"prompt": "it moves", "prompt_index": 0, "sample_index": 0, "image": str(tmp_path / "given.png")}
    (tmp_path / "000000.json").write_text(json.dumps(facts))
    shown = np.asarray(strips.picture([tmp_path], 1, 2, 148).convert("L")).astype(int)
    row = shown[shown.shape[0] // 2 + 8]
    assert abs(row[24] - 220) < 8 and abs(row[74] - 40) < 8 and abs(row[124] - 40) < 8
    (tmp_path / "given.png").unlink()
    assert strips.main([str(tmp_path), "--out", str(tmp_path / "strips.png")]) == 2
