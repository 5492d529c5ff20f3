"""A tiny model in the release's file layout, tiny clips, and a configuration for them, for the training tests."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml

REPO = Path(__file__).resolve().parents[1]
TRAIN = REPO / "train_video.py"
T5 = REPO / "tests" / "golden" / "t5_tiny"
HEIGHT, WIDTH, FRAMES = 16, 32, 5
DISCRETIZATION = {
    "target": "sgm.modules.diffusionmodules.discretizer.ZeroSNRDDPMDiscretization",
    "params": {"shift_scale": 3.0},
}
MODULES = "sgm.modules.diffusionmodules"


def network_section(lora: int | None = None) -> dict[str, Any]:
    modules: dict[str, Any] = {
        "pos_embed_config": {
            "target": "dit_video_concat.Basic3DPositionEmbeddingMixin",
            "params": {"text_length": 12, "height_interpolation": 1.875, "width_interpolation": 1.875},
        },
        "patch_embed_config": {
            "target": "dit_video_concat.ImagePatchEmbeddingMixin",
            "params": {"text_hidden_size": 32},
        },
        "adaln_layer_config": {"target": "dit_video_concat.AdaLNMixin", "params": {"qk_ln": True}},
        "final_layer_config": {"target": "dit_video_concat.FinalLayerMixin"},
    }
    if lora:
        modules["lora_config"] = {"target": "sat.model.finetune.lora2.LoraMixin", "params": {"r": lora}}
    return {
        "target": "dit_video_concat.DiffusionTransformer",
        "params": {
            "time_embed_dim": 32, "elementwise_affine": True, "num_frames": FRAMES, "time_compressed_rate": 4,
            "latent_width": WIDTH // 8, "latent_height": HEIGHT // 8, "num_layers": 2, "patch_size": 2,
            "in_channels": 16, "out_channels": 16, "hidden_size": 64, "num_attention_heads": 2,
            "transformer_args": {"checkpoint_activations": False, "vocab_size": 1, "max_sequence_length": 64,
                                 "layernorm_order": "pre", "model_parallel_size": 1, "is_decoder": False},
            "modules": modules,
        },
    }  # fmt: skip


def model_section(release: Path, lora: int | None = None) -> dict[str, Any]:
    coder = {
        "double_z": True, "z_channels": 16, "resolution": 32, "in_channels": 3, "out_ch": 3, "ch": 32,
        "ch_mult": [1, 1, 1, 1], "attn_resolutions": [], "num_res_blocks": 1, "dropout": 0.0, "gather_norm": False,
    }  # fmt: skip
    return {
        "scale_factor": 1.15258426,
        **({"not_trainable_prefixes": ["all"]} if lora else {}),
        "log_keys": ["txt"],
        "denoiser_config": {
            "target": f"{MODULES}.denoiser.DiscreteDenoiser",
            "params": {
                "num_idx": 1000, "quantize_c_noise": False,
                "weighting_config": {"target": f"{MODULES}.denoiser_weighting.EpsWeighting"},
                "scaling_config": {"target": f"{MODULES}.denoiser_scaling.VideoScaling"},
                "discretization_config": DISCRETIZATION,
            },
        },
        "network_config": network_section(lora),
        "conditioner_config": {
            "target": "sgm.modules.GeneralConditioner",
            "params": {"emb_models": [{
                "is_trainable": False, "input_key": "txt", "ucg_rate": 0.1,
                "target": "sgm.modules.encoders.modules.FrozenT5Embedder",
                "params": {"model_dir": str(T5), "max_length": 12},
            }]},
        },
        "first_stage_config": {
            "target": "vae_modules.autoencoder.VideoAutoencoderInferenceWrapper",
            "params": {
                "cp_size": 1, "ckpt_path": str(release / "vae" / "3d-vae.pt"), "ignore_keys": ["loss"],
                "loss_config": {"target": "torch.nn.Identity"},
                "regularizer_config": {"target": "vae_modules.regularizers.DiagonalGaussianRegularizer"},
                "encoder_config": {"target": "vae_modules.cp_enc_dec.ContextParallelEncoder3D", "params": coder},
                "decoder_config": {"target": "vae_modules.cp_enc_dec.ContextParallelDecoder3D", "params": coder},
            },
        },
        "loss_fn_config": {
            "target": f"{MODULES}.loss.VideoDiffusionLoss",
            "params": {
                "offset_noise_level": 0,
                "sigma_sampler_config": {
                    "target": f"{MODULES}.sigma_sampling.DiscreteSampling",
                    "params": {"uniform_sampling": True, "num_idx": 1000, "discretization_config": DISCRETIZATION},
                },
            },
        },
        "sampler_config": {
            "target": f"{MODULES}.sampling.VPSDEDPMPP2MSampler",
            "params": {
                "num_steps": 4, "verbose": False, "device": "cpu", "discretization_config": DISCRETIZATION,
                "guider_config": {"target": f"{MODULES}.guiders.DynamicCFG",
                                  "params": {"scale": 6, "exp": 5, "num_steps": 4}},
            },
        },
    }  # fmt: skip


def configuration(
    release: Path, clips: Path, save: Path | None, *, lora: int | None = None, **args: Any
) -> dict[str, Any]:
    """A training configuration in float32 for the CPU; `args` go into its `args:` section."""
    return {
        "args": {
            "mode": "finetune", "load": str(release / "transformer"), "force_train": True, "no_load_rng": True,
            "train_iters": 4, "save": str(save) if save else None, "save_interval": None, "log_interval": 1,
            "train_data": [str(clips)], "num_workers": 0, "experiment_name": "tiny", "auto_warmup_steps": 0,
            "device": "cpu", "log_image": False, **args,
        },
        "data": {
            "target": "data_video.SFTDataset",
            "params": {"video_size": [HEIGHT, WIDTH], "fps": 8, "max_num_frames": FRAMES, "skip_frms_num": 0.0},
        },
        "deepspeed": {
            "train_micro_batch_size_per_gpu": 1,
            "gradient_accumulation_steps": 1,
            "gradient_clipping": 0.1,
            "zero_optimization": {"stage": 0, "contiguous_gradients": False, "overlap_comm": True},
            "fp16": {"enabled": False},
            "optimizer": {
                "type": "sat.ops.FusedEmaAdam",
                "params": {"lr": 1e-3, "betas": [0.9, 0.95], "eps": "1e-8", "weight_decay": 1e-4},
            },
        },
        "model": model_section(release, lora),
    }  # fmt: skip


def write_release(folder: Path, network_config: dict[str, Any] | None = None) -> Path:
    """Random weights for `model_section` in the release's layout (the transformer alone, as published)."""
    from sgm.util import instantiate_from_config

    torch.manual_seed(0)
    network = instantiate_from_config(network_config or network_section(), dtype="fp32")
    computed = network.computed_state()
    state = {f"model.diffusion_model.{k}": v for k, v in network.state_dict().items() if k not in computed}
    for name, value in state.items():  # zero-initialised layers would hide errors
        if value.ndim > 1 and not value.any():
            state[name] = torch.randn_like(value) * 0.02
    target = folder / "transformer" / "1000"
    target.mkdir(parents=True)
    torch.save({"module": state}, target / "mp_rank_00_model_states.pt")
    (folder / "transformer" / "latest").write_text("1000")
    stage = model_section(folder)["first_stage_config"]
    stage = {**stage, "params": {k: v for k, v in stage["params"].items() if k != "ckpt_path"}}
    state = instantiate_from_config(stage).state_dict()
    state["encoder.conv_out.conv.weight"][:16] *= 5  # latents of about unit size
    state["encoder.conv_out.conv.bias"][16:] = -20  # a narrow posterior: the same latents at every draw
    (folder / "vae").mkdir()
    torch.save({"state_dict": state}, folder / "vae" / "3d-vae.pt")
    return folder


def write_clips(folder: Path, count: int = 4, length: int = FRAMES) -> Path:
    """Moving gradients of `length` frames and one more, each with a caption of its own."""
    import imageio.v2 as imageio

    (folder / "videos").mkdir(parents=True)
    (folder / "labels").mkdir()
    y, x = np.mgrid[0:HEIGHT, 0:WIDTH]
    for k in range(count):
        frames = [np.stack([(x * 4 + 20 * t + 40 * k) % 256, (y * 8 + 9 * t) % 256, (x + y + 30 * k) % 256], -1)
                  for t in range(length + 1)]  # fmt: skip
        with imageio.get_writer(folder / "videos" / f"{k}.mp4", fps=8, codec="libx264", macro_block_size=2) as writer:
            for frame in frames:
                writer.append_data(frame.astype(np.uint8))
        (folder / "labels" / f"{k}.txt").write_text(f"clip number {k} of a moving gradient\n")
    return folder


def write_yaml(path: Path, content: dict[str, Any]) -> Path:
    path.write_text(yaml.safe_dump(content))
    return path


def command(
    *arguments: Any, ranks: int = 1, nodes: int = 1, node: int = 0, port: int = 29510, script: Path = TRAIN
) -> list[str]:
    """How finetune.sh starts `train_video.py`, or another `script`."""
    words = [str(script), *map(str, arguments)]
    if ranks * nodes == 1:
        return [sys.executable, *words]
    launch = [sys.executable, str(REPO / "sgm" / "launch.py"), f"--nproc_per_node={ranks}", f"--nnodes={nodes}"]
    return [*launch, f"--node_rank={node}", "--master_addr=127.0.0.1", f"--master_port={port}", *words]


def environment(**changes: str) -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "COGVIDEOX_THREADS": "1", "PYTHONWARNINGS": "ignore", **changes}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def run_ranks(worker: Path, *arguments: Any, ranks: int, groups: int = 1) -> list[Any]:
    """Run `worker` RANK PORTS ARGUMENTS... in processes without a launcher; what each prints as JSON behind RESULT.

    PORTS: one for each of the process groups that they make, one after the other.
    """
    ports = ",".join(str(free_port()) for _ in range(groups))
    with tempfile.TemporaryDirectory() as folder:
        words = (str(REPO / "tests" / "forked_ranks.py"), folder, str(ranks), str(worker), ports, *map(str, arguments))
        started = subprocess.Popen(
            [sys.executable, *words], env=environment(MASTER_ADDR="127.0.0.1"), start_new_session=True
        )
        try:
            started.wait(timeout=240)
        finally:
            with suppress(ProcessLookupError):
                os.killpg(started.pid, signal.SIGKILL)
        said = [[(Path(folder) / f"{rank}.{name}").read_text() for name in ("out", "err")] for rank in range(ranks)]
    lines = [[line for line in out.splitlines() if line.startswith("RESULT ")] for out, _ in said]
    assert all(lines), "\n".join(err[-3000:] for _, err in said)
    return [json.loads(line[0].removeprefix("RESULT ")) for line in lines]


def train(*arguments: Any, timeout: float = 240, env: dict[str, str] | None = None, **launch: Any):
    """Run a training process to its end."""
    line = command(*arguments, **launch)
    return subprocess.run(line, env=env or environment(), capture_output=True, text=True, timeout=timeout, cwd=REPO)
