"""The configuration files of the original's last version, from what is known of their keys and values."""

from __future__ import annotations

import copy
from typing import Any

from sgm.config import merge_yaml
from tests.training_tiny import REPO

MODELS = ("cogvideox_2b", "cogvideox_2b_lora", "cogvideox_5b", "cogvideox_5b_lora", "cogvideox_5b_i2v",
          "cogvideox_5b_i2v_lora", "cogvideox1.5_5b", "cogvideox1.5_5b_i2v")  # fmt: skip
_RANKS = {"cogvideox_2b_lora": 128, "cogvideox_5b_lora": 128, "cogvideox_5b_i2v_lora": 256}
_SHIFTED = ("denoiser_config", "sampler_config")


def upstream_model(name: str) -> dict[str, Any]:
    """The `model:` section of the original's file of that name."""
    model = copy.deepcopy(merge_yaml([REPO / "configs" / "cogvideox_2b_infer.yaml"])["model"])
    params = model["network_config"]["params"]
    params["transformer_args"]["checkpoint_activations"] = True
    model["first_stage_config"]["params"]["ckpt_path"] = "cogvideox-2b-sat/vae/3d-vae.pt"
    _embedder(model)["model_dir"] = "t5-v1_1-xxl"
    if "5b" in name:
        _as_5b(model)
    if "i2v" in name:
        _as_image_model(model)
    if name.startswith("cogvideox1.5"):
        _as_15(model, "i2v" in name)
    if name in _RANKS:
        model["not_trainable_prefixes"] = ["all"]
        params["modules"]["lora_config"] = {
            "target": "sat.model.finetune.lora2.LoraMixin",
            "params": {"r": _RANKS[name]},
        }
    return model


def _embedder(model: dict[str, Any]) -> dict[str, Any]:
    return model["conditioner_config"]["params"]["emb_models"][0]["params"]


def _schedules(model: dict[str, Any]) -> list[dict[str, Any]]:
    sigma = model["loss_fn_config"]["params"]["sigma_sampler_config"]
    return [
        node["params"]["discretization_config"] for node in (model["denoiser_config"], sigma, model["sampler_config"])
    ]


def _as_5b(model: dict[str, Any]) -> None:
    model["scale_factor"] = 0.7
    for schedule in _schedules(model):
        schedule["params"]["shift_scale"] = 1.0
    params = model["network_config"]["params"]
    params |= {"num_layers": 42, "hidden_size": 3072, "num_attention_heads": 48}
    params["modules"]["pos_embed_config"] = {
        "target": "dit_video_concat.Rotary3DPositionEmbeddingMixin",
        "params": {"hidden_size_head": 64, "text_length": 226},
    }
    model["first_stage_config"]["params"]["ckpt_path"] = "cogvideox-5b-sat/vae/3d-vae.pt"


def _as_image_model(model: dict[str, Any]) -> None:
    model |= {"latent_input": False, "noised_image_input": True, "noised_image_dropout": 0.05}
    params = model["network_config"]["params"]
    params["in_channels"] = 32
    params["modules"]["pos_embed_config"]["params"]["learnable_pos_embed"] = True
    model["loss_fn_config"]["params"]["fixed_frames"] = 0
    model["sampler_config"]["params"]["fixed_frames"] = 0
    model["first_stage_config"]["params"]["decoder_config"]["params"]["gather_norm"] = True


def _as_15(model: dict[str, Any], image: bool) -> None:
    for schedule in _schedules(model):
        schedule.pop("params")
    params = model["network_config"]["params"]
    params |= {"num_frames": 81, "latent_width": 300, "latent_height": 300, "patch_size": [2, 2, 2]}
    params["modules"]["pos_embed_config"]["params"] = {"hidden_size_head": 64, "text_length": 224}
    _embedder(model).update(model_dir="google/t5-v1_1-xxl", max_length=224)
    model["loss_fn_config"]["params"]["sigma_sampler_config"]["params"]["group_num"] = 40
    model["first_stage_config"]["params"]["decoder_config"]["params"]["gather_norm"] = True
    model["latent_input"] = not image
    if image:
        params["ofs_embed_dim"] = 512
        model |= {"noised_image_all_concat": False, "augmentation_dropout": 0.15}


def upstream_inference(version: str, **changes: Any) -> dict[str, Any]:
    """The `args:` of the original's inference.yaml: its last one ("head"), or that of the 1.0 models ("1.0")."""
    last = {"sampling_image_size": [768, 1360], "sampling_num_frames": 22, "sampling_fps": 16}
    first = {"image2video": False, "sampling_image_size": [480, 720], "sampling_num_frames": 13, "sampling_fps": 8}
    return {
        "latent_channels": 16, "mode": "inference", "load": "{your lora folder} such as zRzRzRzRzRzRzR/transformer",
        "batch_size": 1, "input_type": "txt", "input_file": "configs/test.txt", "bf16": True,
        "output_dir": "outputs", "force_inference": True, **(last if version == "head" else first), **changes,
    }  # fmt: skip


def upstream_sft() -> dict[str, Any]:
    """The sections of the original's last sft.yaml."""
    sft = merge_yaml([REPO / "configs" / "cogvideox_2b_sft.yaml"])
    deepspeed = sft["deepspeed"]
    deepspeed |= {name: deepspeed["fp16"][name] for name in deepspeed["fp16"] if name != "enabled"}
    deepspeed |= {"fp16": {"enabled": False}, "bf16": {"enabled": True}, "train_micro_batch_size_per_gpu": 2}
    args = sft["args"] | {"save": "ckpts_5b_lora", "save_interval": 500}
    return {"args": args, "data": sft["data"], "deepspeed": deepspeed}
