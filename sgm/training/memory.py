"""How much memory training will take, before it starts: estimated from parameter counts and the clip's size.

Weights, optimizer and gradients are exact; activations are a model of the layers' intermediate tensors, meant to be
right within about a quarter.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import torch

GIB = 2**30
BYTES = {"fp32": 4, "fp16": 2, "bf16": 2}
# Tensors of (tokens, width) that one layer keeps for its backward pass: norms, q k v with their norms, attention
# output, MLP (two of four times the width), modulated copies and residuals.
KEPT_PER_LAYER = 24
# Copies of the widest feature map that are alive together while the first stage encodes; in its low-memory form.
VAE_LIVE_MAPS, VAE_LOW_MEMORY_MAPS = 4.0, 2.5


@dataclass(frozen=True)
class MemoryNeeds:
    """Sizes that decide the memory of one rank.

    Attributes:
        trained, frozen: values of the network that learn, and all others of the three parts.
        tokens: sequence length of one clip, text included.
        width, layers: of the transformer.
        vae_values: values of the widest feature map while one clip is encoded; 0 where no VAE runs.
        micro_batch: clips at a time.
        ranks: data-parallel ranks.
        stage: ZeRO stage; `offload`: masters and optimizer state in CPU memory.
        optimizer_values: float32 values a trained value has in the optimizer (moments, averaged weights).
        checkpointing: activations are recomputed.
    """

    trained: int
    frozen: int
    tokens: int
    width: int
    layers: int
    vae_values: int
    micro_batch: int
    dtype: str
    ranks: int
    stage: int
    offload: bool
    optimizer_values: int
    checkpointing: bool
    vae_low_memory: bool = False

    @property
    def weights(self) -> int:
        share = self.ranks if self.stage >= 3 else 1
        return (self.trained + self.frozen) * BYTES[self.dtype] // share

    @property
    def gradients(self) -> int:
        """Kept gradients, and a float32 copy for the update."""
        share = self.ranks if self.stage >= 2 else 1
        update = 0 if self.offload else self.trained * 4 // (self.ranks if self.stage >= 1 else 1)
        return self.trained * BYTES[self.dtype] // share + update

    @property
    def optimizer_state(self) -> int:
        """Masters and the optimizer's own tensors, wherever they lie."""
        share = self.ranks if self.stage >= 1 else 1
        has_masters = self.stage >= 1 or self.dtype != "fp32"
        return self.trained * 4 * (self.optimizer_values + has_masters) // share

    @property
    def activations(self) -> int:
        """The larger of a network pass and the first stage's encoding, which do not overlap."""
        sequence = self.tokens * self.width * BYTES[self.dtype] * self.micro_batch
        layers_kept = 1 if self.checkpointing else self.layers
        network = sequence * KEPT_PER_LAYER * layers_kept + (sequence * self.layers if self.checkpointing else 0)
        maps = VAE_LOW_MEMORY_MAPS if self.vae_low_memory else VAE_LIVE_MAPS
        encoding = int(maps * self.vae_values) * BYTES[self.dtype] * self.micro_batch
        return max(network, encoding)

    @property
    def total(self) -> int:
        """Bytes on the device."""
        return self.weights + self.gradients + self.activations + (0 if self.offload else self.optimizer_state)

    def switches(self) -> list[tuple[str, int]]:
        """What would lower the need, with the bytes it saves here, largest first."""
        variants = {
            "--set model.network_config.params.transformer_args.checkpoint_activations=true": replace(
                self, checkpointing=True
            ),
            "--set deepspeed.zero_optimization.offload_optimizer.device=cpu": replace(
                self, offload=True, stage=max(1, self.stage)
            ),
            "--set deepspeed.zero_optimization.stage=3": replace(self, stage=3),
            "--set args.vae_low_memory=true": replace(self, vae_low_memory=True),
            "--set deepspeed.train_micro_batch_size_per_gpu=1": replace(self, micro_batch=1),
            "LoRA instead of full fine-tuning (see the comments in configs/cogvideox_2b_sft.yaml)": replace(
                self, trained=min(self.trained, self.trained // 25), frozen=self.frozen + self.trained
            ),
            "half the frames (--set data.params.max_num_frames=25)": replace(
                self, tokens=self.tokens * 25 // 49, vae_values=self.vae_values * 25 // 49
            ),
        }
        if self.trained * 5 < self.frozen:
            variants = {k: v for k, v in variants.items() if not k.startswith("LoRA")}
        return sorted(((name, self.total - v.total) for name, v in variants.items()), key=lambda item: -item[1])

    def report(self, free: int | None) -> list[str]:
        """Lines for the log: the estimate by part, next to what is free."""
        parts = {
            "weights": self.weights,
            "gradients": self.gradients,
            "optimizer" + (" (CPU)" if self.offload else ""): self.optimizer_state,
            "activations": self.activations,
        }
        listed = ", ".join(f"{name} {gib(size)}" for name, size in parts.items())
        lines = [f"memory estimate: {gib(self.total)} a rank ({listed})" + (f"; free: {gib(free)}" if free else "")]
        if free and self.total > free:
            helpful = [f"{name} (about -{gib(saved)})" for name, saved in self.switches() if saved > 0]
            lines.append("warning: that is more than what is free; what helps: " + "; ".join(helpful[:4]))
        return lines


def gib(size: float) -> str:
    """Bytes as "1.23 GiB" (MiB below a tenth of one)."""
    return f"{size / GIB:.2f} GiB" if size >= GIB / 10 else f"{size / 2**20:.1f} MiB"


def free_memory(device: torch.device) -> int | None:
    """Free bytes on a GPU, or those that Linux could give to processes; None where that cannot be told."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")), None)
