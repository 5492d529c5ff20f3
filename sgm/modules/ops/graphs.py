"""The network's forward and backward pass as two CUDA graphs: a step of a small model waits for launches otherwise.

A graph is recorded once for each shape of batch and replayed from then on. All graphs share one pool of memory, since
each is through with its activations before the next begins.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.func import functional_call

Replay = Callable[[], None]
WARM_UP = 3  # runs before the recording: kernels compile, libraries take their workspaces


class CudaRecorder:
    """Records work on the GPU, on a stream of its own and into one pool of memory."""

    def __init__(self) -> None:
        self._stream = torch.cuda.Stream()
        self._pool = torch.cuda.graph_pool_handle()

    def warm_up(self, work: Callable[[], Any]) -> None:
        """Run `work` a few times."""
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            for _ in range(WARM_UP):
                work()
        torch.cuda.current_stream().wait_stream(self._stream)
        torch.cuda.synchronize()

    def record(self, work: Callable[[], None]) -> Replay:
        """Record `work`, which leaves what it makes where it can be found again; calling the result does it anew."""
        graph = torch.cuda.CUDAGraph()
        # Threads that read data go on taking page-locked memory, which the strict mode would not have.
        with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
            work()
        return graph.replay


class TrainingGraph:
    """Forward and backward pass of a network for inputs of one shape.

    Args:
        network: called as `network(x, timesteps=..., context=...)`.
        inputs: x, timesteps and context, which need no gradient.
        recorder: `CudaRecorder`, or what does the same elsewhere.
    """

    _output: Tensor

    def __init__(self, network: nn.Module, inputs: list[Tensor], recorder: CudaRecorder):
        self._network, self._inputs = network, [tensor.detach().clone() for tensor in inputs]
        # Other leaves on the same memory: what autograd holds of the parameters themselves belongs to other streams.
        self._leaves = {name: p.detach().requires_grad_() for name, p in network.named_parameters() if p.requires_grad}
        recorder.warm_up(self._run_and_differentiate)
        del self._output  # with it goes what autograd knew of the warm-up
        self._forward = recorder.record(self._run)
        self._to_output = torch.zeros_like(self._output)
        self._backward = recorder.record(self._differentiate)
        self._output = self._output.detach()

    def _run(self) -> None:
        x, timesteps, context = self._inputs
        named = {"timesteps": timesteps, "context": context}
        self._output = functional_call(self._network, self._leaves, (x,), named)

    def _differentiate(self) -> None:
        grads = torch.autograd.grad(self._output, list(self._leaves.values()), self._to_output, allow_unused=True)
        self._has_gradient = [grad is not None for grad in grads]
        self._sizes = [grad.numel() for grad in grads if grad is not None]
        self._flat = torch.cat([grad.flatten() for grad in grads if grad is not None])

    def _run_and_differentiate(self) -> None:
        self._run()
        self._to_output = torch.zeros_like(self._output)
        self._differentiate()

    def forward(self, inputs: list[Tensor]) -> Tensor:
        """The network's output for new inputs; it lasts until the next call."""
        for place, tensor in zip(self._inputs, inputs, strict=True):
            place.copy_(tensor)
        self._forward()
        return self._output

    def backward(self, to_output: Tensor) -> list[Tensor | None]:
        """Gradients of the trainable parameters for the inputs of the last `forward`; None for those out of reach."""
        self._to_output.copy_(to_output)
        self._backward()
        # A copy, which the caller may keep: the next replay writes over `_flat`.
        parts = iter(self._flat.clone().split(self._sizes))
        leaves = zip(self._leaves.values(), self._has_gradient, strict=True)
        return [next(parts).view_as(leaf) if reached else None for leaf, reached in leaves]


class NetworkGraphs:
    """Called as the network; in training, from graphs.

    What a graph cannot serve (no gradient wanted, more inputs than the three, gradients of the inputs) runs the network
    itself.

    Args:
        network: called as `network(x, timesteps=..., context=...)`; its parameters, all of one type and trainable or
            not from now on, stay where they are.
    """

    def __init__(self, network: nn.Module, recorder: CudaRecorder | None = None):
        self._network, self._recorder = network, recorder
        self._parameters = [p for p in network.parameters() if p.requires_grad]
        self._graphs: dict[tuple[Any, ...], TrainingGraph] = {}

    def __call__(self, x: Tensor, *, timesteps: Tensor, context: Tensor | None, **extras: Any) -> Tensor:
        recordable = torch.is_grad_enabled() and self._network.training and not extras
        inputs = [] if context is None or not recordable else [x, timesteps, context]
        if not inputs or any(tensor.requires_grad for tensor in inputs):
            return self._network(x, timesteps=timesteps, context=context, **extras)
        return _Replayed.apply(self._graph(inputs), inputs, *self._parameters)

    def _graph(self, inputs: list[Tensor]) -> TrainingGraph:
        key = tuple((tensor.shape, tensor.dtype) for tensor in inputs)
        if key not in self._graphs:
            self._recorder = self._recorder or CudaRecorder()
            self._graphs[key] = TrainingGraph(self._network, inputs, self._recorder)
        return self._graphs[key]


class _Replayed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, graph: TrainingGraph, inputs: list[Tensor], *parameters: Tensor) -> Tensor:
        ctx.graph = graph
        return graph.forward(inputs).detach()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, to_output: Tensor) -> tuple[Tensor | None, ...]:
        return None, None, *ctx.graph.backward(to_output)
