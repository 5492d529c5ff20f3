"""The bundled model is whole, loads, and follows a prompt."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest

from sgm.data.video_io import probe, read_frames
from tests.sampling_tiny import REPO, main
from tools.bench.quality import psnr
from tools.demo.attributes import read_withheld
from tools.demo.captions import parse
from tools.demo.measure import measure

DEMO = REPO / "demo"
PROMPT = "A large pink triangle moves to the right over a plain dark blue background."


def test_files_are_those_of_the_hashes():
    lines = (DEMO / "SHA256SUMS").read_text(encoding="utf-8").splitlines()
    named = dict(reversed(line.split("  ")) for line in lines)
    parts = [DEMO / name for name in ("i2v", "student", "t5", "transformer", "vae")]
    files = [path for part in parts for path in part.rglob("*.*") if path.suffix not in (".md", ".png", ".jpg")]
    kept = {path.relative_to(DEMO).as_posix() for path in files}
    assert kept | {"transformer/latest"} == named.keys()
    for name, digest in named.items():
        assert hashlib.sha256((DEMO / name).read_bytes()).hexdigest() == digest, name


@pytest.mark.parametrize("how", [("--steps", 12), (REPO / "configs" / "few_steps.yaml",)], ids=["model", "few steps"])
def test_a_clip_by_either_decoder_has_what_its_prompt_says(tmp_path, how):
    run = [REPO / "configs" / "demo_infer.yaml", "--device", "cpu"]
    sampled = [*run, "--prompt", PROMPT, "--num-frames", 5, "--seed", 1, *how]
    assert main(*sampled, "--output-dir", tmp_path, "--only-save-latents") == 0
    facts = json.loads(next(Path(tmp_path).rglob("*.json")).read_text())
    assert (facts["num_steps"], facts["guidance"]["guider"]) in ((12, "DynamicCFG"), (4, "IdentityGuider"))
    clips = []
    (said,), (pattern, background, _) = parse(PROMPT)
    assert (said.shape, said.colour, said.motion) in read_withheld(REPO / "tools" / "demo" / "withheld.json")
    for decoder in ("full", "small"):
        assert main(*run, "--decode-latents", tmp_path, "--decoder", decoder) == 0
        (file,) = Path(tmp_path).rglob("*.mp4")
        assert probe(file).frames == 17
        clips.append(read_frames(file, range(17)).permute(0, 2, 3, 1).numpy())
        shapes, ground = measure(clips[-1])
        assert [(s.shape, s.colour, s.motion) for s in shapes] == [(said.shape, said.colour, said.motion)]
        assert (ground.pattern, ground.background) == (pattern, background)
    assert psnr(*clips) > 31  # dB
