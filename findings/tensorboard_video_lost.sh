#!/usr/bin/env bash
# torch 2.13.0's SummaryWriter.add_video with moviepy 2.2.1 writes no video and ends well; tensorboardX writes it.
#
# Guess before the run: add_video with moviepy installed writes a video, or raises an exception that says what is
# missing.
# Seen on 2026-11-30 (CPython 3.11.7), a clip of 8 frames of 32 x 32:
#   torch 2.13.0: 0 videos, exception none
#   tensorboardX 2.6.5: 1 videos, exception none
# A line is printed that asks for imageio and requests, which are installed; what it wants is a module that moviepy has
# not had since version 2. Sampled videos of a whole run are missing, where a log is read in the end. Exit 0: still so.
# Needs a package index.
set -euo pipefail
folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet \
    torch==2.13.0 numpy==2.4.6 tensorboard==2.21.0 moviepy==2.2.1 tensorboardX==2.6.5 setuptools==80.9.0

"$folder/venv/bin/python" - <<'PY'
import importlib.metadata
import pathlib
import tempfile

import numpy as np
import tensorboardX
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.tensorboard import SummaryWriter

clip = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (1, 8, 3, 32, 32), dtype=np.uint8))
for name, kind in (("torch", SummaryWriter), ("tensorboardX", tensorboardX.SummaryWriter)):
    with tempfile.TemporaryDirectory() as folder:
        raised = "none"
        writer = kind(folder)
        writer.add_scalar("loss", 1.0, 1)
        try:
            writer.add_video("sample", clip, 1, fps=8)
        except Exception as error:
            raised = type(error).__name__
        writer.close()
        assert any(pathlib.Path(folder).iterdir())
        events = EventAccumulator(folder)
        events.Reload()
        videos = sum(len(events.Images(tag)) for tag in events.Tags()["images"])
    print(f"{name} {importlib.metadata.version(name).split('+')[0]}: {videos} videos, exception {raised}")
    assert videos == (name != "torch") and raised == "none" and events.Tags()["scalars"] == ["loss"]
PY
