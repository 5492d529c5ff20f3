"""Tensors without values: shapes and layouts as PyTorch finds them, and none of the libraries that it takes for that."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from sgm.inference.rehearsal import SHAPES
from sgm.weights.assign import MetaRules
from tests.conftest import REPO

LAST = torch.channels_last_3d
CASES = {
    "add": lambda x, y: x[0, :, 0, 0, 0] + y[0, :, 0, 0, 0].to(torch.float64),
    "new_empty": lambda x, y: x.new_empty((2, 3), dtype=torch.float64),
    "new_empty of sizes": lambda x, y: x.new_empty(2, 3),
    "contiguous": lambda x, y: x.transpose(1, 2).contiguous(memory_format=LAST),
    "contiguous already": lambda x, y: x.contiguous(memory_format=LAST),
    "einsum": lambda x, y: torch.einsum("apk,bql,oikl->aboipq", y[:, 0, 0], y[:, 1, 0], y[:, :, 0]),
    "pad": lambda x, y: F.pad(x[0, 0], (0, 1, 2, 3)),
    "conv3d": lambda x, y: F.conv3d(x, y, None, (1, 2, 2), (0, 1, 1)).contiguous(memory_format=LAST),
    "conv2d": lambda x, y: F.conv2d(x[:, :, 0], y[:, :, 0], padding=1).contiguous(memory_format=torch.channels_last),
    "empty_like": lambda x, y: torch.empty_like(x[0, 0]),
}


@pytest.mark.parametrize("name", CASES)
def test_a_rule_gives_what_pytorch_gives(name):
    def run(device: str) -> Tensor:
        x = torch.zeros(2, 4, 5, 6, 8, device=device).contiguous(memory_format=LAST)
        return CASES[name](x, torch.zeros(3, 4, 3, 3, 3, device=device))

    expected = run("cpu")
    with MetaRules(SHAPES):
        got = run("meta")
    assert (got.shape, got.dtype) == (expected.shape, expected.dtype)
    assert got.stride() == expected.stride() or name == "einsum"  # the order of a product's axes in memory varies


def test_a_rehearsal_brings_neither_compiler_nor_sympy():
    """As many modules after it as before: PyTorch's own ways to these shapes take seconds to import."""
    script = """
        import sys, torch
        from sgm.config import load_run_config
        from sgm.inference.options import SampleArgs
        from sgm.inference.pipeline import Pipeline
        from sgm.inference.rehearsal import run_block, run_decoder
        from sgm.modules.ops import triton_block, triton_vae
        from sgm.modules.ops.choice import choose_kernels
        config = load_run_config(["configs/cogvideox_2b_infer.yaml"], SampleArgs, overrides=["args.fp16=false"])
        pipeline = Pipeline(config, torch.device("cpu"), with_text_encoder=False)
        pipeline.engine.use_kernels(choose_kernels("triton", "default", torch.device("cpu")))
        launched = []
        for module in (triton_block, triton_vae):
            module.launch = lambda kernel, *_, **__: launched.append(kernel)
        shape = pipeline.latent_shape
        run_block(pipeline.engine, shape)
        run_decoder(pipeline.engine.autoencoder, shape, pipeline.engine.dtype)
        print(len(set(map(id, launched))), {"sympy", "torch._dynamo"} & set(sys.modules))
    """
    line = [sys.executable, "-c", "\n".join(part[8:] for part in script.splitlines())]
    done = subprocess.run(line, cwd=REPO, env={"TRITON_INTERPRET": "1"}, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split("\n")[-2] == "8 set()"
