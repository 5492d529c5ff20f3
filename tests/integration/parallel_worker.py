"""Run by test_parallel.py, once a process: RANK PORTS. Eight processes, then three, make the same clips together in all
ways in which they divide; each compares with what it makes alone. Prints JSON: the largest differences.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from sgm.distributed import shutdown
from sgm.inference.noise import SampleId, StackedNoise
from sgm.models.autoencoder import VideoAutoencoderInferenceWrapper
from sgm.models.diffusion import SATVideoDiffusionEngine
from sgm.parallel.apply import share_encoding, share_network
from sgm.parallel.first_stage import SharedChunks
from sgm.parallel.team import Layout, Team, form_team
from sgm.util import instantiate_from_config
from tests.dit_tiny import TEXT_LENGTH, TEXT_WIDTH, tiny_config
from tests.training_tiny import model_section

LAYOUTS = {
    8: [Layout(2, 1, 4), Layout(2, 2, 2), Layout(1, 2, 4), Layout(1, 1, 8)],
    3: [Layout(1, 1, 3)],
}
# Ten heads over two to eight processes; 12 + 45 tokens, and 12 + 2 x 18 in patches of two frames.
NETWORKS = {
    "sine": tiny_config(num_attention_heads=10, hidden_size=160, latent_width=10, latent_height=6),
    "rotary": tiny_config(
        rotary=True, num_attention_heads=10, hidden_size=160, latent_width=12, latent_height=6, patch_size=[2, 2, 2],
        lora={"r": 2},
    ),
}  # fmt: skip
SHAPES = {"sine": (3, 16, 6, 10), "rotary": (4, 16, 6, 12)}


def engine_of(kind: str) -> SATVideoDiffusionEngine:
    section = model_section(Path("nowhere"))
    parts = {name: section[name] for name in ("denoiser_config", "sampler_config")}
    network = NETWORKS[kind]
    positions = network["params"]["modules"]["pos_embed_config"]["params"]
    if "hidden_size_head" in positions:
        positions["hidden_size_head"] = 16
    engine = SATVideoDiffusionEngine(network_config=network, **parts)
    numbers = torch.Generator().manual_seed(3)
    for name, parameter in sorted(engine.named_parameters()):
        if "pos_embedding" not in name:
            parameter.data.copy_(torch.randn(parameter.shape, generator=numbers) * 0.2 + ("norm" in name))
    return engine.eval()


def text(data: int) -> Tensor:
    return torch.randn(1, TEXT_LENGTH, TEXT_WIDTH, generator=torch.Generator().manual_seed(data))


def sample(engine: SATVideoDiffusionEngine, kind: str, data: int) -> Tensor:
    noise = StackedNoise([SampleId(1, data, 0), SampleId(1, data, 1)])
    cond = {"crossattn": text(data).expand(2, -1, -1)}
    uncond = {"crossattn": torch.zeros_like(cond["crossattn"])}
    return engine.sample(cond, uncond, noise=noise.start(SHAPES[kind]), noise_sampler=noise.like, num_steps=4)


def gradients(engine: SATVideoDiffusionEngine, kind: str, data: int) -> dict[str, Tensor]:
    """In float64: in float32 those of one process alone are 1e-6 of the largest from what they should be."""
    engine.network.transformer.checkpoint_activations = True
    engine.double().train().zero_grad()
    x = torch.randn(1, *SHAPES[kind], generator=torch.Generator().manual_seed(data)).double()
    out = engine.network(x, torch.tensor([500.0]).double(), text(data).double())
    (out * torch.linspace(-1, 1, out.numel()).view_as(out)).sum().backward()
    return {n: p.grad.clone() for n, p in engine.named_parameters() if p.grad is not None}


def largest(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).abs().max() / wanted.abs().max().clamp(min=1e-20))


def of_network(kind: str, team: Team) -> dict[str, float]:
    alone, shared = engine_of(kind), engine_of(kind)
    share_network(shared, team)
    sizes = {"samples": largest(sample(shared, kind, team.data_rank), sample(alone, kind, team.data_rank))}
    if team.layout.guidance == 1:
        wanted, found = gradients(alone, kind, team.data_rank), gradients(shared, kind, team.data_rank)
        assert wanted.keys() == found.keys()
        for gradient in found.values():  # as a mean over all processes, DeepSpeed's
            dist.all_reduce(gradient, group=team.clip)
            gradient /= team.size
        whole = max(float(g.abs().max()) for g in wanted.values())
        sizes["gradients"] = max(float((found[n] - wanted[n]).abs().max()) for n in wanted) / whole
    return sizes


def as_bytes(piece: Tensor) -> Tensor:
    return (piece[0].permute(1, 2, 3, 0) * 127).to(torch.uint8)


def of_stage(team: Team) -> dict[str, Any]:
    torch.manual_seed(0)
    section = model_section(Path("nowhere"))["first_stage_config"]
    del section["params"]["ckpt_path"]
    stage = instantiate_from_config(section)
    assert isinstance(stage, VideoAutoencoderInferenceWrapper)
    found = {}
    for t in (1, 3, 9):
        z = torch.randn(1, 16, t, 2, 3, generator=torch.Generator().manual_seed(t + team.data_rank))
        share, whole = SharedChunks(team), list(stage.decode_chunks(z))
        own = list(stage.decode_chunks(z, share))
        all_of_them = share.collect([as_bytes(piece) for piece in own], stage.piece_shapes(z), z.device)
        found[f"decoded {t}"] = float(not torch.equal(torch.cat(all_of_them), torch.cat([*map(as_bytes, whole)])))
        exact = zip(own, [p for k, p in enumerate(whole) if share.owns(k)], strict=True)
        found[f"exact {t}"] = max([float((a - b).abs().max()) for a, b in exact], default=0.0)
        x = torch.rand(1, 3, 4 * t - 3, 16, 24, generator=torch.Generator().manual_seed(t + team.data_rank)) * 2 - 1
        alone = stage.moments(x)
        share_encoding(stage, team)
        found[f"encoded {t}"] = largest(stage.moments(x), alone)
        stage.share = None
    return found


def main(rank: int, ports: list[int]) -> None:
    torch.set_num_threads(1)
    found: dict[str, dict[str, float]] = {}
    for (world, layouts), port in zip(LAYOUTS.items(), ports, strict=True):
        if rank >= world:
            continue
        dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=world)
        for layout in layouts:
            team, name = form_team(layout), f"{layout.data}x{layout.guidance}x{layout.sequence}"
            for kind in NETWORKS:
                found[f"{name} {kind}"] = of_network(kind, team)
            if layout.guidance == 1:  # decoding and encoding know all processes of a clip alike
                found[f"{name} stage"] = of_stage(team)
        shutdown()
    print("RESULT " + json.dumps(found), flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]), [int(port) for port in sys.argv[2].split(",")])
