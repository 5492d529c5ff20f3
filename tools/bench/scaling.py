"""What a part should take on several processes, from its time on one, its shapes, and rates that two H200s have shown.

    python tools/bench/scaling.py    a table for 1, 2, 4 and 8 of them, from the times of one

`tools/bench/parallel.py` puts the same beside what it measures. The process with the most heads, tokens or frames has
the arithmetic of its share; what it sends takes time, copies included, for a part of which it waits.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch

from sgm.config import merge_yaml
from sgm.models.autoencoder import chunk_bounds
from sgm.parallel.team import Layout
from sgm.util import instantiate_from_config
from tools.bench import models
from tools.bench.flops import block_flops

CONFIG, WORLDS = "configs/cogvideox_2b_infer.yaml", (1, 2, 4, 8)
STEPS = 50  # of a whole clip
WHOLE = f"{STEPS} steps and decode"
VALUE = 2  # bytes of a bfloat16
EDGE = 2679 * 2**20 / (60 * 90)  # bytes a latent position that decoding sends from chunk to chunk


class Rates(NamedTuple):
    """Bytes a second: at which what is sent adds to a process's time, and at which it waits for it."""

    added: float
    waited: float


# Of CogVideoX-2B at 49x480x720 on two H200s: docs/several_gpus.md has what they come from.
SAMPLING, TRAINING, DECODING = Rates(144e9, 423e9), Rates(94e9, 208e9), Rates(274e9, 610e9)
ALONE_MS = {"guided call": 434.0, "decode": 619.0, "LoRA step": 710.0, "full step": 882.0}


class Memory(NamedTuple):
    """GiB: what every process holds, what a sample's tokens take, their exchange, and what ZeRO 2 divides."""

    held: float
    tokens: float
    exchange: float
    divided: float = 0.0

    def of(self, samples: float, layout: Layout) -> float:
        tokens = self.tokens + self.exchange * (layout.sequence > 1)
        return self.held + self.divided / layout.world + samples * tokens / layout.sequence


MEMORY = {
    "guided call": Memory(3.2, 4.3, 3.4),
    "LoRA step": Memory(3.6, 29.8, 4.2),
    "full step": Memory(6.3, 29.8, 4.2, 25.2),
}


@dataclass(frozen=True)
class Shapes:
    """Of the transformer's work on a clip; `values`: of its weights."""

    layers: int
    heads: int
    width: int
    tokens: int
    values: int
    clip: models.Clip

    @classmethod
    def of(cls, config: str, frames: int | None = None, size: Sequence[int] | None = None) -> Shapes:
        """As `models.Clip.of`."""
        clip = models.Clip.of(config, frames, size)
        with torch.device("meta"):
            network = instantiate_from_config(merge_yaml([config])["model"]["network_config"])
        heads = network.transformer.layers[0].attention.num_attention_heads_per_partition
        values = sum(weight.numel() for weight in network.parameters())
        return cls(network.num_layers, heads, network.hidden_size, models.token_count(network, clip), values, clip)

    def share(self, size: int) -> float:
        """Of the arithmetic, what the busiest of `size` processes has."""
        products, attention = block_flops(self.width, self.tokens, 1)
        own = products * ceil(self.tokens / size) / self.tokens + attention * ceil(self.heads / size) / self.heads
        return own / (products + attention)

    def sent(self, size: int, samples: float, back: bool = False) -> float:
        """Bytes that the first of `size` processes sends in a forward, and on the way back."""
        n, h, width = ceil(self.tokens / size), ceil(self.heads / size), self.width / self.heads
        given, taken = n * (self.heads - h) * width, h * width * (self.tokens - n)
        layer = 3 * given + taken + back * (given + 3 * taken)
        return VALUE * samples * (self.layers * layer + n * self.width * (size - 1))

    def learning(self, rank: int) -> int:
        """Values of an adapter, or with rank 0 all."""
        return 8 * rank * self.layers * self.width if rank else self.values


class Predicted(NamedTuple):
    """As `tools.bench.parallel.together` measures it."""

    ms: float
    sent_mib: float
    waiting: float

    @classmethod
    def of(cls, own_ms: float, sent: float, rates: Rates) -> Predicted:
        ms = own_ms + 1e3 * sent / rates.added
        return cls(ms, sent / 2**20, 1e3 * sent / rates.waited / ms)


def sampling(shapes: Shapes, layout: Layout, branches: int, alone_ms: float) -> Predicted:
    """A call of the transformer for one or both branches."""
    samples = branches / layout.guidance
    result = VALUE * 16 * shapes.clip.frames * shapes.clip.height * shapes.clip.width * (layout.guidance > 1)
    sent = shapes.sent(layout.sequence, samples) + result
    return Predicted.of(alone_ms * shapes.share(layout.sequence) / layout.guidance, sent, SAMPLING)


def training(shapes: Shapes, layout: Layout, rank: int, gathered: bool, alone_ms: float) -> Predicted:
    """A step on `layout.data` clips: gradients are averaged over all processes, and weights `gathered` as by ZeRO 2."""
    exchanged = (2 + gathered) * VALUE * shapes.learning(rank) * (layout.world - 1) / layout.world
    sent = shapes.sent(layout.sequence, 1, back=True) + exchanged
    return Predicted.of(alone_ms * shapes.share(layout.sequence), sent, TRAINING)


def decoding(clip: models.Clip, size: int, alone_ms: float) -> Predicted:
    """The VAE's decoder, chunk by chunk."""
    chunks = [stop - start for start, stop in chunk_bounds(clip.frames)]
    busiest = max(sum(chunks[k::size]) for k in range(size))
    edges = sum(k + 1 < len(chunks) for k in range(0, len(chunks), size)) * (size > 1)
    return Predicted.of(alone_ms * busiest / clip.frames, edges * EDGE * clip.height * clip.width, DECODING)


def whole_clip(call: Predicted, made: Predicted) -> Predicted:
    """Steps and a decode."""
    ms = STEPS * call.ms + made.ms
    waited = STEPS * call.ms * call.waiting + made.ms * made.waiting
    return Predicted(ms, STEPS * call.sent_mib + made.sent_mib, waited / ms)


def layouts(world: int) -> list[Layout]:
    """All ways in which `world` processes make one clip."""
    return [Layout(1, 2, world // 2), Layout(1, 1, world)] if world % 2 == 0 else [Layout(1, 1, world)]


def row(part: str, layout: Layout, alone_ms: float, found: Predicted, **more: Any) -> dict[str, Any]:
    """A line of `table`."""
    facts = {"part": part, "processes": layout.world, "guidance": layout.guidance, "sequence": layout.sequence}
    return {**facts, "clips": layout.data, **found._asdict(), "times_faster": layout.data * alone_ms / found.ms, **more}


def rows() -> list[dict[str, Any]]:
    """Everything for `WORLDS`."""
    shapes, large = Shapes.of(CONFIG), Shapes.of(CONFIG, 21, (768, 1360))
    pair, decode = ALONE_MS["guided call"], ALONE_MS["decode"]
    flops = (shape.layers * sum(block_flops(shape.width, shape.tokens, 1)) for shape in (large, shapes))
    forward = pair / 2 * next(flops) / next(flops)
    found = []
    for world in WORLDS:
        made = decoding(shapes.clip, world, decode)
        for layout in layouts(world):
            call = sampling(shapes, layout, 2, pair)
            peak = MEMORY["guided call"].of(2 / layout.guidance, layout)
            found.append(row("guided call", layout, pair, call, peak_gib=peak))
            found.append(row(WHOLE, layout, STEPS * pair + decode, whole_clip(call, made), peak_gib=18.0))
        tokens, data = Layout(1, 1, world), Layout(world, 1, 1)
        found.append(row("decode", tokens, decode, made, sequence=1, peak_gib=18.0))
        found.append(row("forward, 81 frames of 768x1360", tokens, forward, sampling(large, tokens, 1, forward)))
        for part, rank in (("LoRA step", 128), ("full step", 0)):
            for layout in dict.fromkeys((tokens, data)):
                step, peak = training(shapes, layout, rank, True, ALONE_MS[part]), MEMORY[part].of(1, layout)
                found.append(row(part, layout, ALONE_MS[part], step, peak_gib=peak))
    return sorted(found, key=lambda line: line["part"])


_WAYS = {"guidance": "branches", "sequence": "shares", "clips": "clips"}


def table(found: Sequence[dict[str, Any]]) -> str:
    """Figures as markdown; a time that was predicted stands beside the measured one."""
    beside = any("predicted_ms" in line for line in found)
    names = ["part", "processes", "time", *["predicted"] * beside, "times faster", "sent by each", "waiting", "memory"]
    lines = [f"| {' | '.join(names)} |", "|---" * len(names) + "|"]
    for line in found:
        ways = ", ".join(f"{line[name]} {what}" for name, what in _WAYS.items() if line.get(name, 1) > 1)
        cells = [
            line["part"], f"{line['processes']}{f' ({ways})' if ways else ''}",
            "does not fit" if line["ms"] is None else f"{line['ms']:.1f} ms",
            *[_cell(line.get("predicted_ms"), "{:.1f} ms")] * beside,
            _cell(line.get("times_faster"), "{:.2f}"), _cell(line.get("sent_mib"), "{:.0f} MiB"),
            _cell(line.get("waiting"), "{:.1%}"), _cell(line.get("peak_gib"), "{:.1f} GiB"),
        ]  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _cell(value: float | None, form: str) -> str:
    return "-" if value is None else form.format(value)


if __name__ == "__main__":
    print(table(rows()))
