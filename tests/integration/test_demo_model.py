"""The bundled model is whole, loads, and follows a prompt."""

from __future__ import annotations

import hashlib
from pathlib import Path

from sgm.data.video_io import probe, read_frames
from tests.sampling_tiny import REPO, main
from tools.demo.captions import parse
from tools.demo.measure import measure

DEMO = REPO / "demo"
PROMPT = "A large orange triangle moves to the right over a plain dark blue background."


def test_files_are_those_of_the_hashes():
    lines = (DEMO / "SHA256SUMS").read_text(encoding="utf-8").splitlines()
    named = dict(reversed(line.split("  ")) for line in lines)
    kept = {p.relative_to(DEMO).as_posix() for part in ("t5", "transformer", "vae") for p in (DEMO / part).rglob("*.*")}
    assert kept | {"transformer/latest"} == named.keys()
    for name, digest in named.items():
        assert hashlib.sha256((DEMO / name).read_bytes()).hexdigest() == digest, name


def test_a_clip_has_what_its_prompt_says(tmp_path):
    code = main(REPO / "configs" / "demo_infer.yaml", "--device", "cpu", "--output-dir", tmp_path, "--prompt", PROMPT,
                "--num-frames", 5, "--steps", 12, "--seed", 1)  # fmt: skip
    assert code == 0
    (file,) = Path(tmp_path).rglob("*.mp4")
    assert probe(file).frames == 17
    shapes, ground = measure(read_frames(file, range(17)).permute(0, 2, 3, 1).numpy())
    (said,), (pattern, background, _) = parse(PROMPT)
    assert [(shape.shape, shape.colour, shape.motion) for shape in shapes] == [(said.shape, said.colour, said.motion)]
    assert (ground.pattern, ground.background) == (pattern, background)
