"""Weights that move: results stay the same, at most two blocks lie on the device, and all goes back where it was."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from sgm.inference.placement import BlockStreamer, Placement, Resident
from sgm.weights.streaming import StagedCopy, Streams
from tests.dit_tiny import load_tiny, random_inputs, tiny_network

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def network() -> nn.Module:
    network = tiny_network(num_layers=5)
    with torch.no_grad():
        draw = torch.Generator().manual_seed(2)
        for parameter in network.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=draw))
    return network


@torch.no_grad()
def run(network: nn.Module) -> Tensor:
    return network(**random_inputs(batch=1, frames=1))


def places(module: nn.Module) -> dict[str, int]:
    return {name: tensor.data_ptr() for name, tensor in module.state_dict().items()}


class LateStreams(Streams):
    """A copy is carried out at the last moment that its order allows: when it is awaited, or its buffer asked again."""

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        self.queued: dict[int, Callable[[], None]] = {}
        self.busy: set[int] = set()

    def start(self) -> None:
        assert not self.busy

    def copy(self, slot: int, upload: Callable[[], None]) -> None:
        assert slot not in self.busy, "a copy into the buffer that a block computes from"
        self.queued[slot] = upload

    def await_copy(self, slot: int) -> None:
        self.queued.pop(slot, lambda: None)()  # of a block that is still there from before there is none
        self.busy.add(slot)

    def release(self, slot: int) -> None:
        self.busy.remove(slot)


@pytest.mark.parametrize("streams", [Streams, LateStreams])
def test_streamed_blocks_give_the_same_and_return(network, streams):
    expected, before = run(network), places(network)
    streamer = BlockStreamer(network, network.streamable_blocks(), CPU, pin=False)
    streamer.ring.streams = streams(CPU)
    for _ in range(2):
        streamer.enter()
        outputs = [run(network) for _ in range(2)]  # an odd number of blocks: buffers change roles in the second pass
        streamer.leave()
        assert all(torch.equal(out, expected) for out in outputs)
        assert places(network) == before and not streamer.ring.buffers
    assert torch.equal(run(network), expected)


def test_only_the_block_at_work_is_on_the_device(network):
    streamer = BlockStreamer(network, network.streamable_blocks(), CPU, pin=False)
    host = places(network)
    moved: list[set[int]] = []

    def look(*_) -> None:
        now = places(network)
        names = {name for name in now if now[name] != host[name] and "layers." in name}
        moved.append({int(name.split("layers.")[1].split(".")[0]) for name in names})
        assert len(streamer.ring.buffers) == 2

    streamer.enter()
    hooks = [layer.attention.dense.register_forward_hook(look) for layer in network.transformer.layers]
    run(network)
    for hook in hooks:
        hook.remove()
    streamer.leave()
    assert moved == [{k} for k in range(5)]
    assert max(block.size for block in streamer.ring.blocks) < 2 * sum(t.nbytes for t in streamer.ring.blocks[0].host)


def test_blocks_in_any_order_and_a_failing_one(network):
    blocks = network.streamable_blocks()
    expected, before = run(network), places(network)
    streamer = BlockStreamer(network, blocks, CPU, pin=False)
    streamer.ring.streams = LateStreams(CPU)
    streamer.enter()
    broken = blocks[3][0].attention.dense.register_forward_pre_hook(
        lambda *_: (_ for _ in ()).throw(RuntimeError("broken"))
    )
    with pytest.raises(RuntimeError, match="broken"):
        run(network)
    streamer.leave()
    broken.remove()
    assert places(network) == before
    streamer.ring.streams = LateStreams(CPU)
    streamer.enter()  # begins at block 0 again, whatever was copied ahead
    assert torch.equal(run(network), expected)
    streamer.ring.use(0, following=4)  # something else than the next block was copied ahead
    assert torch.equal(run(network), expected)
    streamer.leave()


def test_adapters_move_with_their_layer():
    network = load_tiny(tiny_network(lora={"r": 4}))
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if "matrix_B" in name:
                parameter.normal_(generator=torch.Generator().manual_seed(1))
    expected = run(network)
    streamer = BlockStreamer(network, network.streamable_blocks(), CPU, pin=False)
    assert not any(
        "layers." in n and id(t) in {id(r) for r in streamer.rest.tensors} for n, t in network.named_parameters()
    )
    streamer.enter()
    assert torch.equal(run(network), expected)
    streamer.leave()


def test_text_encoder_with_its_tied_embedding(golden):
    from sgm.modules.encoders.modules import FrozenT5Embedder

    embedder = FrozenT5Embedder(str(golden / "t5_tiny"), max_length=12)
    expected = embedder(["a red ball"])
    streamer = BlockStreamer(embedder, [[block] for block in embedder.blocks()], CPU, pin=False)
    streamer.enter()
    encoder = embedder.transformer
    assert encoder.shared.weight is encoder.encoder.embed_tokens.weight
    assert torch.equal(embedder(["a red ball"]), expected)
    streamer.leave()
    assert torch.equal(embedder(["a red ball"]), expected)


def test_blocks_must_not_share_tensors():
    layer = nn.Linear(2, 2)
    with pytest.raises(ValueError, match="share"):
        BlockStreamer(nn.Sequential(layer, layer), [[layer], [layer]], CPU, pin=False)


@pytest.mark.parametrize("dtype", [torch.float16, torch.uint8, torch.int64])
def test_buffers_hold_any_type_and_shape(dtype):
    class Part(nn.Module):
        def __init__(self, k: int):
            super().__init__()
            self.register_buffer("odd", torch.full((3,), k, dtype=dtype))
            self.register_buffer("scalar", torch.tensor(k, dtype=torch.float64))
            self.register_buffer("turned", torch.arange(6.0).reshape(2, 3).t())

        def forward(self, x: Tensor) -> Tensor:
            return x + self.odd.double().sum() + self.scalar + self.turned[2, 1]

    module = nn.Sequential(Part(1), Part(2))
    expected = module(torch.zeros(1, dtype=torch.float64))
    streamer = BlockStreamer(module, [[part] for part in module], CPU, pin=False)
    streamer.enter()
    assert torch.equal(module(torch.zeros(1, dtype=torch.float64)), expected)
    streamer.leave()


def test_resident_copies_and_drops(network):
    before = places(network)
    resident = Resident([*network.parameters(), *network.buffers()], CPU)
    expected = run(network)
    resident.enter()
    assert not set(places(network).values()) & set(before.values())
    assert torch.equal(run(network), expected)
    resident.leave()
    assert places(network) == before


def test_on_the_cpu_nothing_moves(network):
    before = places(network)
    for kind in ("all", "stages", "lean"):
        placement = Placement(kind, CPU)
        assert placement.load_device == CPU
        with placement.use(network, network.streamable_blocks()):
            assert places(network) == before


def test_weights_are_loaded_to_where_they_stay():
    gpu = torch.device("cuda", 0)
    assert Placement("all", gpu).load_device == gpu
    assert Placement("stages", gpu).load_device == Placement("lean", gpu).load_device == CPU


def test_staged_copy_of_any_size_type_and_layout():
    stage = StagedCopy(CPU, piece=64)
    clip = torch.randn(1, 4, 3, 5, 6).contiguous(memory_format=torch.channels_last_3d)
    sources = [torch.randn(n) for n in (0, 1, 16, 17, 200)]
    sources += [torch.randn(31, 7).half(), torch.tensor(3.0), torch.arange(99), torch.randn(9, 40).t(), clip]
    for source in sources * 2:  # the ring goes round
        target = torch.full_like(source, -1)
        stage.copy(target, source)
        assert torch.equal(target, source) and target.stride() == source.stride()
