"""Frozen weights and layers' inputs on the host while a network is trained: the same gradients to the bit, and at most
two blocks' or layers' on the device.
"""

from __future__ import annotations

import copy
import weakref
from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn

from sgm.modules.ops.recompute import ActivationOffload, Stored
from sgm.weights.streaming import FrozenStream, Streams, frozen_parameters, next_block, set_aside
from tests.dit_tiny import random_inputs, tiny_network
from tests.unit.test_placement import LateStreams, places

CPU = torch.device("cpu")
LAYERS = 5


@pytest.fixture
def network(request) -> nn.Module:
    """Rotary, if the parameter says so, with an adapter on all its linears that changes something."""
    torch.manual_seed(0)
    lora = {"r": 4, "targets": ["attention", "mlp", "adaln"]}
    network = tiny_network(num_layers=LAYERS, lora=lora, rotary=getattr(request, "param", False)).train()
    for name, parameter in network.named_parameters():
        nn.init.normal_(parameter, std=0.1)
        parameter.requires_grad_("matrix_" in name)
    network.transformer.checkpoint_activations = True
    return network


def step(network: nn.Module, *seeds: int) -> list[Tensor]:
    """Loss and gradients of a step of several clips, one after the other, and a look without gradients in between."""
    network.zero_grad(set_to_none=True)
    total = torch.zeros(())
    for seed in seeds:
        output = network(**random_inputs(1, 1, seed=seed))
        with torch.no_grad():
            total += network(**random_inputs(1, 1, seed=seed + 1)).square().sum()
        loss = output.square().mean()
        loss.backward()
        total += loss.detach()
    return [total, *(p.grad for p in network.parameters() if p.grad is not None)]


@pytest.mark.parametrize(
    ("network", "mode", "streams"),
    [
        (False, True, LateStreams),
        (False, "selective", Streams),
        (True, True, Streams),
        (True, "products", LateStreams),
    ],
    indirect=["network"],
)
def test_losses_and_gradients_are_the_same_to_the_bit(network, streams, mode):
    network.transformer.checkpoint_activations = mode
    expected = step(network, 0, 1)
    stream = FrozenStream(network.streamable_blocks(), CPU, pin=False)
    stream.ring.streams = streams(CPU)
    network.transformer.offload = ActivationOffload(CPU)
    found = step(network, 0, 1)
    assert len(found) == len(expected) > 10 * LAYERS
    assert all(torch.equal(a, b) for a, b in zip(found, expected))


def test_one_block_is_at_work_and_two_are_on_the_device(network):
    stream = FrozenStream(network.streamable_blocks(), CPU, pin=False)
    frozen = {name for name, p in network.named_parameters() if not p.requires_grad and ".layers." in name}
    host, seen = places(network), list[set[int]]()

    def look(*_) -> None:
        now = places(network)
        seen.append({int(n.split("layers.")[1].split(".")[0]) for n in frozen if now[n] != host[n]})
        buffers = [(b.data_ptr(), b.data_ptr() + b.nbytes) for b in stream.ring.buffers]
        assert all(now[n] == host[n] or any(a <= now[n] < z for a, z in buffers) for n in frozen)

    for layer in network.transformer.layers:
        layer.attention.dense.register_forward_hook(look)
    uploads = count_uploads(stream)
    network(**random_inputs(1, 1)).sum().backward()
    assert seen == [{k} for k in [*range(LAYERS), *range(LAYERS)[::-1]]]
    del uploads[:]
    network(**random_inputs(1, 1)).sum().backward()
    assert uploads == [2, 3, 4, 2, 1, 0]  # at each turn two blocks are still there
    assert len(stream.ring.buffers) == 2 and stream.device_bytes < 3 * stream.host_bytes / LAYERS
    learning = sum(p.nbytes for block in network.streamable_blocks() for part in block for p in part.parameters())
    assert sum(t.nbytes for block in stream.ring.blocks for t in block.tensors) < learning


def count_uploads(stream: FrozenStream) -> list[int]:
    """Grows by the number of each block that is copied to the device."""
    uploads, copy_block = list[int](), stream.ring._copy
    stream.ring._copy = lambda k, slot: uploads.append(k) or copy_block(k, slot)
    return uploads


def test_what_is_needed_next_is_known_in_all_kinds_of_passes():
    passes = [(True, [0, 1, 2, 3, 3, 2, 1, 0, 0, 1, 2, 3, 3, 2, 1, 0]), (False, [0, 1, 2, 3, 0, 1, 2, 3])]
    for recorded, order in passes:
        before = 0
        for k, following in pairwise(order):
            if k != following:
                expected = {following} | ({1} if k == 0 else set())  # block 1 is as good at a turn: 0 is there
                assert next_block(k, before, 4, recorded) in expected
            before = k
    assert [next_block(0, 0, 1, recorded) for recorded in (True, False)] == [0, 0]


def test_a_second_network_on_the_same_weights_streams_them_too(network):
    """As a distillation's critic has them."""
    shared = {id(p): p for p in network.parameters() if not p.requires_grad}

    def both(second: nn.Module) -> list[Tensor]:
        outputs = [net(**random_inputs(1, 1)) for net in (network, second)]
        network.zero_grad(set_to_none=True)
        (outputs[0] * outputs[1]).sum().backward()
        return [p.grad.clone() for net in (network, second) for p in net.parameters() if p.requires_grad]

    expected = both(copy.deepcopy(network, dict(shared)))
    FrozenStream(network.streamable_blocks(), CPU, pin=False)
    found = both(copy.deepcopy(network, dict(shared)))
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_stand_ins_take_no_memory_and_leave(network):
    block = frozen_parameters(network.streamable_blocks()[0])
    before = [(p.data_ptr(), p.shape) for p in block]
    for empty, shapes in ((False, [p.shape for p in block]), (True, [(0,)] * len(block))):
        with pytest.raises(RuntimeError, match="broken"), set_aside(block, CPU, empty=empty):
            assert [p.shape for p in block] == shapes and all(p.untyped_storage().nbytes() <= 4 for p in block)
            network.to(CPU, torch.float32)
            raise RuntimeError("broken")
        assert [(p.data_ptr(), p.shape) for p in block] == before


# --- inputs of layers -------------------------------------------------------------------------------------------------


class Watching(ActivationOffload):
    """Notes which of the stored inputs are on the device whenever one is stored or fetched."""

    def __init__(self) -> None:
        super().__init__(CPU)
        self.stored = list[Stored]()
        self.present = list[list[int]]()

    def _look(self) -> None:
        self.present.append([k for k, stored in enumerate(self.stored) if stored.value is not None])

    def _store(self, x: Tensor) -> Tensor | Stored:
        found = super()._store(x)
        if isinstance(found, Stored):
            self.stored.append(found)
            self._look()
        return found

    def _on_device(self, stored: Stored) -> Tensor:
        value = super()._on_device(stored)
        self._look()
        return value


def test_inputs_wait_on_the_host_and_come_back_one_ahead(network):
    network.transformer.offload = offload = Watching()
    with torch.no_grad():
        network(**random_inputs(1, 1))
    network.eval()(**random_inputs(1, 1))
    assert not offload.stored
    output = network.train()(**random_inputs(1, 1))
    assert offload.present == [[k] for k in range(LAYERS)] and len(offload.stored) == LAYERS  # masks stay
    del offload.present[:]
    output.sum().backward()
    assert offload.present[0] == [4] and offload.present[-1] == [0]
    assert all(len(present) <= 2 for present in offload.present) and [3, 4] in offload.present
    assert all(stored.value is None for stored in offload.stored) and offload._last is None
    kept = weakref.ref(offload.stored[2].host)
    del output, offload.stored[:]
    assert kept() is None  # with the graph they are gone


@pytest.mark.parametrize("mode", [True, "selective"])
def test_gradients_of_two_passes_that_are_differentiated_together(network, mode):
    """As in a distillation, and for what learns as a whole."""
    network.requires_grad_(True)
    network.transformer.checkpoint_activations = mode

    def gradients() -> list[Tensor | None]:
        network.zero_grad(set_to_none=True)
        outputs = [network(**random_inputs(1, 1, seed=seed)) for seed in (0, 1)]
        (outputs[0] * outputs[1]).sum().backward()
        return [p.grad for p in network.parameters() if p.grad is not None]

    expected = gradients()
    network.transformer.offload = ActivationOffload(CPU)
    assert all(torch.equal(a, b) for a, b in zip(gradients(), expected, strict=True))
