"""The bundled demo from a picture: small, whole, keeps what the picture shows, and moves as the words say."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from sgm.data.images import read_image
from sgm.data.video_io import probe, read_frames
from sgm.modules.transformer.patch_embed import PATCHES
from sgm.weights.release import read_transformer
from tests.sampling_tiny import REPO, main
from tools.bench.quality import psnr
from tools.demo.attributes import read_withheld
from tools.demo.bundle_adapter import LIMITS, fault_of
from tools.demo.measure import measure

I2V = REPO / "demo" / "i2v"
PICTURE = I2V / "star.png"
CAPTION = "A medium-sized green star moves to the left over a light blue background with white dots."


def test_it_is_an_adapter_of_the_demo_with_its_parts_and_small():
    state = read_transformer(I2V)
    assert fault_of("i2v", state) is None and state.lora["base_hash"]
    assert tuple(state.network[PATCHES].shape) == (256, 32, 2, 2)
    assert sum(path.stat().st_size for path in I2V.iterdir()) <= LIMITS["i2v"]


def test_a_clip_keeps_the_picture_and_moves_as_the_caption_says(tmp_path: Path):
    """Green stars that move to the left were withheld from training."""
    assert ("star", "green", "left") in read_withheld(REPO / "tools" / "demo" / "withheld.json")
    run = [REPO / "configs" / "demo_i2v_infer.yaml", "--device", "cpu", "--seed", 1, "--steps", 12, "--num-frames", 5]
    assert main(*run, "--prompt", CAPTION, "--image", PICTURE, "--output-dir", tmp_path) == 0
    (file,) = tmp_path.rglob("*.mp4")
    frames = read_frames(file, range(probe(file).frames)).permute(0, 2, 3, 1).numpy()
    assert psnr(frames[0], np.asarray(read_image(PICTURE))) > 23  # dB; 25.1 of 12 steps, 19.9 where the dots are lost
    shapes, _ = measure(frames)
    assert [s.motion for s in shapes] == ["left"]
    last, ground = measure(frames[-1:])
    assert [(s.shape, s.colour) for s in last] == [("star", "green")]
    assert (ground.pattern, ground.background) == ("dots", "light blue")
    facts = json.loads(file.with_suffix(".json").read_text())
    assert facts["image"] and facts["image_sha256"] and facts["guidance"]["scale"] == 3
