"""How much memory training will take, before it starts: estimated from parameter counts and the clip's size.

Weights, gradients and optimizer state are counted exactly; activations from what a layer keeps for its backward pass
(measured in the tests); the first stage from its widest feature map, which is right within about a quarter.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from sgm.training.optimizers.adam8bit import BYTES_A_MOMENT

GIB = 2**30
SMALL_BUCKET = 40_000_000  # elements
EIGHT_BIT_MOMENTS = 2 * BYTES_A_MOMENT
BYTES = {"fp32": 4, "fp16": 2, "bf16": 2}
# Tensors of (tokens, width) that one layer keeps for its backward pass: where all of it learns, and where only an
# adapter does (frozen linears need no inputs); and what a backward pass has in hand besides.
KEPT_PER_LAYER, KEPT_WITH_ADAPTER = 22.2, 14.5
BACKWARD_TENSORS = 9
# Of them those of all tokens behind the last layer, which each process has whole where several share a clip; and what a
# layer keeps more then, of its share (measured: 2B, LoRA, 20.6 GiB on each of two).
WHOLE_TENSORS, KEPT_WITH_SHARES = 4, 2
# Copies of the widest feature map that are alive together while the first stage encodes; in its low-memory form.
VAE_LIVE_MAPS, VAE_LOW_MEMORY_MAPS = 4.0, 2.5


@dataclass(frozen=True)
class MemoryNeeds:
    """Sizes that decide the memory of one rank.

    Attributes:
        trained, frozen: values of the network that learn, and all others of the three parts.
        encoder_values: of `frozen`, those of VAE and text encoder, which a run from a cache does not load, but for the
            `picture_encoder` of a model that starts from a picture, which has `picture_values` in its widest map.
        tokens: sequence length of one clip, text included.
        vae_values: values of the widest feature map while one clip is encoded; 0 where no VAE runs.
        ranks: that hold the same weights. shares: of them, those that share a clip's tokens.
        most_shares: that could; None: any number.
        refused: options that are not advised: the rest of the configuration does not go with them.
        stage: ZeRO stage; `offload`: masters and optimizer state in CPU memory.
        moment_bytes: of a trained value's moments in the optimizer. ema: it also has an average, in float32.
        checkpointing: activations are recomputed: False, True, "selective" (all but attention) or "products" (all but
            attention and the products with weights).
        bucket: values of DeepSpeed's buffers for reducing gradients.
        in_blocks: of `frozen`, those in the transformer's blocks; `in_block`: in the largest of them.
        streams: of the former only two blocks' are on the device.
        offloads_inputs: of what layers keep, all but two of their inputs are in CPU memory until they are needed.
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
    moment_bytes: float
    ema: bool
    checkpointing: bool | str
    vae_low_memory: bool = False
    encoder_values: int = 0
    picture_encoder: int = 0
    picture_values: int = 0
    bucket: int = 0
    shares: int = 1
    most_shares: int | None = None
    in_blocks: int = 0
    in_block: int = 0
    streams: bool = False
    offloads_inputs: bool = False
    refused: frozenset[str] = frozenset()

    # --- what stays ---------------------------------------------------------------------------------------------------

    @property
    def weights(self) -> int:
        share = self.ranks if self.stage >= 3 else 1
        elsewhere = self.in_blocks - 2 * self.in_block if self.streams else 0
        return (self.trained + self.frozen - elsewhere) * BYTES[self.dtype] // share

    @property
    def optimizer_state(self) -> int:
        """Masters and the optimizer's own tensors, wherever they lie."""
        has_masters = self.stage >= 1 or self.dtype != "fp32"
        return int(self.trained * (self.moment_bytes + 4 * self.ema + 4 * has_masters)) // self._update_share

    @property
    def _update_share(self) -> int:
        return self.ranks if self.stage >= 1 else 1

    # --- what comes and goes ------------------------------------------------------------------------------------------

    @property
    def gradients(self) -> int:
        """Kept gradients at the end of a backward pass. Offloaded ones leave the device bucket by bucket."""
        share = self.ranks if self.stage >= 2 else 1
        kept = 0 if self.offload and self.stage >= 2 else self.trained * BYTES[self.dtype] // share
        return kept + self.bucket * BYTES[self.dtype]

    @property
    def update(self) -> int:
        """What an update has beside weights and state: gradients, and their copies as one float32 tensor."""
        if self.offload or (self.stage == 0 and self.dtype == "fp32"):
            return self.gradients
        flat = self.trained * (BYTES[self.dtype] + 4) // self._update_share
        return self.gradients + flat

    @property
    def activations(self) -> int:
        """At the start of the network's backward pass, when all layers' are there."""
        in_layer = KEPT_WITH_ADAPTER if self.trains_adapter else KEPT_PER_LAYER
        in_layer += KEPT_WITH_SHARES * (self.shares > 1)
        between = {False: in_layer, True: 1, "selective": 2, "products": 11}[self.checkpointing] * self.layers
        own = between + in_layer * bool(self.checkpointing) + BACKWARD_TENSORS - WHOLE_TENSORS
        return int(self._sequence * ((own - self._inputs_elsewhere) / self.shares + WHOLE_TENSORS))

    @property
    def _sequence(self) -> int:
        """Bytes of all tokens in the transformer's width."""
        return self.tokens * self.width * BYTES[self.dtype] * self.micro_batch

    @property
    def _inputs_elsewhere(self) -> int:
        return max(self.layers - 2, 0) if self.offloads_inputs and self.checkpointing else 0

    @property
    def encoding(self) -> int:
        """While the first stage encodes."""
        maps = VAE_LOW_MEMORY_MAPS if self.vae_low_memory else VAE_LIVE_MAPS
        values = max(self.vae_values // self.shares, self.picture_values)  # a picture is encoded by each process
        return int(maps * values) * BYTES[self.dtype] * self.micro_batch

    @property
    def trains_adapter(self) -> bool:
        return self.trained * 5 < self.frozen - self.encoder_values

    # --- sums ---------------------------------------------------------------------------------------------------------

    @property
    def total(self) -> int:
        """Most bytes on the device: while encoding, in the backward pass, or in the update, whichever needs most."""
        resident = self.weights + (0 if self.offload else self.optimizer_state)
        return resident + max(self.encoding, self.gradients + self.activations, self.update)

    @property
    def on_cpu(self) -> int:
        """Bytes of CPU memory for streamed weights, layers' inputs, and an offloaded optimizer's state, float32
        gradients, weights on their way.
        """
        kept = self.in_blocks * BYTES[self.dtype] if self.streams else 0
        kept += self._inputs_elsewhere * self._sequence // self.shares
        if not self.offload:
            return kept
        return kept + self.optimizer_state + self.trained * (4 + BYTES[self.dtype]) // self._update_share

    def cached(self) -> MemoryNeeds:
        """The same run on cached latents and embeddings."""
        spared = self.encoder_values - self.picture_encoder
        return replace(
            self, vae_values=self.picture_values, frozen=self.frozen - spared, encoder_values=self.picture_encoder
        )

    def variants(self) -> dict[str, MemoryNeeds]:
        """The same run with one thing changed, by how to change it."""
        buckets = "--set deepspeed.zero_optimization.reduce_bucket_size=20000000"
        offload = "--set deepspeed.zero_optimization.offload_optimizer.device=cpu"
        offload += "" if self.stage else f" --set deepspeed.zero_optimization.stage=1 {buckets}"
        found = {
            "--set args.checkpoint_activations=true": replace(self, checkpointing=True),
            "--set args.checkpoint_activations=selective": replace(self, checkpointing="selective"),
            offload: replace(
                self, offload=True, stage=self.stage or 1, bucket=self.bucket if self.stage else SMALL_BUCKET
            ),
            "--set deepspeed.zero_optimization.stage=3": replace(self, stage=3),
            buckets: replace(self, bucket=min(self.bucket, SMALL_BUCKET)),
            "--set deepspeed.optimizer.params.ema=false": replace(self, ema=False),
            "--set deepspeed.optimizer.type=AdamW8bit": replace(
                self, moment_bytes=min(self.moment_bytes, EIGHT_BIT_MOMENTS), ema=False
            ),
            "--set args.vae_low_memory=true": replace(self, vae_low_memory=True),
            "--set args.cache_dir=FOLDER": self.cached(),
            "--set deepspeed.train_micro_batch_size_per_gpu=1": replace(self, micro_batch=1),
            "LoRA instead of full fine-tuning (configs/lora.yaml behind the configuration)": replace(
                self, trained=self.trained // 25, frozen=self.frozen + self.trained
            ),
            "half the frames (data.params.max_num_frames)": replace(
                self, tokens=self.tokens * 25 // 49, vae_values=max(self.vae_values * 25 // 49, self.picture_values)
            ),
        }
        if self.in_blocks and self.stage < 3:
            recomputed = "" if self.checkpointing else "--set args.checkpoint_activations=true "
            found[f"{recomputed}--set args.stream_frozen=true"] = replace(
                self, streams=True, checkpointing=self.checkpointing or True
            )
        if self.checkpointing:
            found["--set args.offload_activations=true"] = replace(self, offloads_inputs=True)
        more = 2 * self.shares
        if self.stage < 3 and self.ranks % more == 0 and more <= (self.most_shares or self.ranks):
            found[f"--set args.sequence_parallel_size={more}"] = replace(self, shares=more)
        if self.trains_adapter:
            found = {how: needs for how, needs in found.items() if not how.startswith("LoRA")}
        if self.streams or self.shares > 1:
            found = {how: needs for how, needs in found.items() if needs.stage < 3}
        return {how: needs for how, needs in found.items() if not any(option in how for option in self.refused)}

    def switches(self) -> list[tuple[str, int]]:
        """What would lower the need, with the bytes it saves here, largest first."""
        return sorted(((how, self.total - v.total) for how, v in self.variants().items()), key=lambda item: -item[1])

    def report(self, free: int | None) -> list[str]:
        """Lines for the log: the estimate by part, next to what is free."""
        parts = {
            "weights": self.weights,
            "gradients": self.gradients,
            "update": self.update,
            "optimizer" + (" (CPU)" if self.offload else ""): self.optimizer_state,
            "activations": self.activations,
            "VAE": self.encoding,
        }
        listed = ", ".join(f"{name} {gib(size)}" for name, size in parts.items() if size)
        cpu = f" and {gib(self.on_cpu)} of CPU memory" if self.on_cpu else ""
        beside = f"; free: {gib(free)}" if free else ""
        lines = [f"memory estimate: {gib(self.total)}{cpu} a rank ({listed}){beside}"]
        if free and self.total > free:
            helpful = [f"{name} (about -{gib(saved)})" for name, saved in self.switches() if saved > 0]
            lines.append("warning: that is more than what is free; what helps: " + "; ".join(helpful[:4]))
        return lines


def gib(size: float) -> str:
    """Bytes as "1.23 GiB" (MiB below a tenth of one)."""
    return f"{size / GIB:.2f} GiB" if size >= GIB / 10 else f"{size / 2**20:.1f} MiB"


def room_to_pin(tensors: Sequence[Tensor]) -> bool:
    """Whether the host can keep a pinned copy of these for each process of this machine, with half as much to spare."""
    free = free_memory(torch.device("cpu"))
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return free is None or 1.5 * sum(t.nbytes for t in tensors) * processes < free


def free_memory(device: torch.device) -> int | None:
    """Free bytes on a GPU, or those that Linux could give to processes; None where that cannot be told."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return linux_memory("meminfo", "MemAvailable")


def linux_memory(file: str, name: str) -> int | None:
    """Bytes that a line of a file below /proc tells; None where there is no such line or file."""
    try:
        lines = Path("/proc", file).read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:")), None)
