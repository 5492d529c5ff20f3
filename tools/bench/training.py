"""A training step of the transformer: forward, backward, optimizer; all weights (rank 0) or a LoRA adapter.

Batch 1, mean squared error on the network's result, torch's fused AdamW on the weights themselves: the same for ours
and for diffusers. What the trainer has besides (VAE, T5, masters in float32, averages) is not in it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sgm.modules.ops.choice import Kernels, attention_by
from sgm.modules.ops.recompute import ActivationOffload
from sgm.weights.streaming import FrozenStream
from tools.bench import models
from tools.bench.flops import block_flops
from tools.bench.measure import Ceilings, emit, largest_error, time_runs

CHECKPOINTING = (True, "selective", "products", False)
PUBLISHED_LIMIT_MS = {0: 860.0, 128: 800.0}  # 2B at 49x480x720 on an H200, by LoRA rank
_COMPARED = ("transformer.layers.0.attention.", "final_layer.", "adaLN_modulations.1.", "query_layernorm_list.0.")


@dataclass(frozen=True)
class TrainingBench:
    """What to time. `limit_ms` is found by `training_limit`."""

    part: str
    rank: int
    config: str
    dtype: str
    device: torch.device
    clip: models.Clip
    seconds: float
    flops: float
    limit_ms: float
    latent_channels: int = 16

    def report(self, variant: str, step: Callable[[], Tensor], **facts: Any) -> None:
        """Time one variant and print its line; one that does not fit in memory says so."""
        try:
            timing = time_runs(step, self.device, self.seconds)
        except torch.OutOfMemoryError as error:
            emit(part=self.part, variant=variant, skipped=str(error).splitlines()[0][:120], **facts)
            return
        emit(
            part=self.part,
            variant=variant,
            dtype=self.dtype,
            ms=timing.ms,
            runs=timing.runs,
            tflops=self.flops / timing.ms / 1e9,
            limit_ms=self.limit_ms,
            share_of_limit=self.limit_ms / timing.ms,
            published_limit_ms=PUBLISHED_LIMIT_MS.get(self.rank),
            peak_gib=timing.peak_bytes / 2**30 if timing.peak_bytes else None,
            finite=bool(timing.result.isfinite().all()),
            **facts,
        )


def training_flops(width: int, tokens: int, layers: int, rank: int) -> tuple[float, float]:
    """(products with weights, attention) of a step without recomputation, batch 1.

    Backward, a product with weights costs two more, or one where the weight is frozen; attention, which calculates its
    scores again, 2.5 times the forward's. The adapter's own products are below two percent and not counted.
    """
    products, attention = block_flops(width, tokens, 1)
    return layers * products * (2 if rank else 3), layers * attention * 3.5


def training_limit(network: nn.Module, tokens: int, rank: int, attention: str, ceilings: Ceilings) -> float:
    """Milliseconds: products with weights at the rate of a large one, and attention both ways as measured here."""
    products, _ = training_flops(network.hidden_size, tokens, network.num_layers, rank)
    width = network.transformer.layers[0].attention.hidden_size_per_attention_head
    place = next(network.parameters())
    shape = (1, network.hidden_size // width, tokens, width)
    heads = [torch.randn(shape, device=place.device, dtype=place.dtype, requires_grad=True) for _ in range(3)]
    attend, slope = attention_by(attention, place.device), torch.randn(shape, device=place.device, dtype=place.dtype)

    def both_ways() -> Tensor:
        with torch.enable_grad():
            return torch.autograd.grad(attend(*heads), heads, slope)[0]

    timing = time_runs(both_ways, place.device, 0.3, least=3)
    return ceilings.limit_ms(products) + network.num_layers * timing.ms


def bench_ours(bench: TrainingBench, network: nn.Module, kernels: dict[str, Kernels]) -> None:
    """A line for each set of kernels (the first is the measure of the others' gradients) and way of checkpointing.

    Where an adapter learns, another one for the last set with the frozen weights streamed.
    """
    inputs = tuple(part[:1] for part in models.network_inputs(network, bench.clip, bench.device))
    like = inputs[0][:, :, : bench.latent_channels]
    expected = grads = None
    for name, choice in kernels.items():
        network.use_ops(choice.block)
        network.transformer.checkpoint_activations = True
        grads = _gradients(network, lambda: network(*inputs), like)
        error = None if expected is None else largest_error(grads, expected)
        expected = expected or grads
        for mode in CHECKPOINTING:
            network.transformer.checkpoint_activations = mode
            step = training_step(network, lambda: network(*inputs), like)
            bench.report(name, step, checkpointing=str(mode).lower(), gradient_error_to_plain=error)
            _free(network)
    if bench.rank and expected and grads:
        _bench_streamed(bench, network, list(kernels)[-1], inputs, expected, grads)


def _bench_streamed(
    bench: TrainingBench,
    network: nn.Module,
    name: str,
    inputs: tuple[Tensor, ...],
    expected: dict[str, Tensor],
    resident: dict[str, Tensor],
) -> None:
    """`args.stream_frozen`, without and with `offload_activations`, and the kernels that `network` has by now.

    Its frozen blocks go to the host for good.

    `expected` are the plain path's gradients, `resident` those of the same kernels without streaming.
    """
    network.transformer.checkpoint_activations = True
    stream = FrozenStream(network.streamable_blocks(), bench.device, pin=bench.device.type == "cuda")
    _free(network)
    like = inputs[0][:, :, : bench.latent_channels]
    for offload in (None, ActivationOffload(bench.device)):
        network.transformer.offload = offload
        grads = _gradients(network, lambda: network(*inputs), like)
        bench.report(
            f"{name}, streamed" + (", inputs offloaded" if offload else ""),
            training_step(network, lambda: network(*inputs), like),
            checkpointing="true",
            gradient_error_to_plain=largest_error(grads, expected),
            gradient_error_to_resident=largest_error(grads, resident),
            host_weights_gib=stream.host_bytes / 2**30,
        )
        _free(network)


def bench_theirs(bench: TrainingBench, model: nn.Module, given: dict[str, Any]) -> None:
    """diffusers' transformer, prepared for training."""
    like = given["hidden_states"][:, :, : bench.latent_channels]
    bench.report("diffusers", training_step(model, lambda: model(**given)[0], like), checkpointing="true")


def training_step(
    network: nn.Module,
    forward: Callable[[], Tensor],
    like: Tensor,
    average: Callable[[Sequence[Tensor]], None] | None = None,
) -> Callable[[], Tensor]:
    """One step on a fixed random target; gives the loss. `average` makes gradients those of all processes."""
    learning = [p for p in network.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(learning, lr=0.0, fused=True)  # weights stay: the same work on the same numbers

    def step() -> Tensor:
        loss = _backward(forward, like)
        if average is not None:
            average([p.grad for p in learning if p.grad is not None])
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss

    return step


def loss_of(result: Tensor, like: Tensor) -> Tensor:
    """Its mean squared distance from a fixed target."""
    target = torch.sin(torch.arange(like.numel(), device=like.device, dtype=torch.float32)).view(like.shape)
    return (result.float() - target).square().mean()


def _backward(forward: Callable[[], Tensor], like: Tensor) -> Tensor:
    with torch.enable_grad():
        loss = loss_of(forward(), like)
        loss.backward()
    return loss.detach()


def _gradients(network: nn.Module, forward: Callable[[], Tensor], like: Tensor) -> dict[str, Tensor]:
    """Gradients of the first block's attention, a modulation, a head norm and the final layer, as far as they learn."""
    _backward(forward, like)
    found = {
        name: p.grad.clone()
        for name, p in network.named_parameters()
        if p.grad is not None and any(part in name for part in _COMPARED)
    }
    _free(network)
    return found


def _free(network: nn.Module) -> None:
    network.zero_grad(set_to_none=True)
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
