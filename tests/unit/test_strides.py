"""The sizes of clips and latents: one record, told by the coders' own parameters."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from sgm.config import merge_yaml
from sgm.modules.autoencoding.strides import STRIDES, Strides

CONFIGS = sorted((Path(__file__).parents[2] / "configs").glob("*_infer.yaml"))


def test_frames_and_sizes_go_there_and_back():
    assert [STRIDES.pixel_frames(t) for t in (1, 2, 3, 13)] == [1, 5, 9, 49]
    assert [STRIDES.latent_frames(f) for f in (1, 5, 9, 49)] == [1, 2, 3, 13]
    assert [f for f in range(-4, 11) if STRIDES.is_whole(f)] == [1, 5, 9]
    assert [STRIDES.longest_clip(f) for f in (-3, 0, 1, 4, 5, 8, 9, 50)] == [0, 0, 1, 1, 5, 5, 9, 49]
    assert STRIDES.latent_size(480, 720) == (60, 90) and STRIDES.pixel_size(60, 90) == (480, 720)
    assert STRIDES.size_step == 16 and STRIDES.clip_lengths == "4k + 1"


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.stem)
@pytest.mark.parametrize("part", ["encoder_config", "decoder_config"])
def test_the_shipped_autoencoders_have_them(config, part):
    coder = merge_yaml([config])["model"]["first_stage_config"]["params"][part]["params"]
    assert Strides.from_coder(coder["ch_mult"], coder.get("temporal_compress_times", 4)) == STRIDES


def test_other_coders_have_others():
    assert Strides.from_coder([1, 2, 2], 2) == Strides(time=2, space=4)


def test_they_are_known_without_torch():
    code = "import sys, sgm.modules.autoencoding.strides; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
