"""Training from recorded passes: the same gradients as the network itself. Recording needs a GPU, so here a recorder
takes its place that runs the work again."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch

from sgm.config import ConfigError
from sgm.modules.diffusionmodules.wrappers import OpenAIWrapper
from sgm.modules.ops.graphs import NetworkGraphs
from sgm.training.options import TrainArgs
from sgm.training.setup.deepspeed import plan_deepspeed
from sgm.training.setup.model import check_switches
from tests.dit_tiny import random_inputs, tiny_network


class Again:
    """Runs recorded work anew; counts recordings."""

    def __init__(self) -> None:
        self.recordings = 0

    def warm_up(self, work: Callable[[], None]) -> None:
        work()

    def record(self, work: Callable[[], None]) -> Callable[[], None]:
        self.recordings += 1
        work()
        return torch.enable_grad()(work)


@pytest.fixture
def network():
    torch.manual_seed(0)
    network = tiny_network()
    for parameter in network.parameters():  # modulations start at zero, and nothing would reach the blocks
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.1)
    return network.train()


def gradients(call, network, batches) -> dict[str, torch.Tensor | None]:
    """What `batches` add up to."""
    network.zero_grad(set_to_none=True)
    for inputs in batches:
        output = call(**inputs)
        (output * torch.linspace(-1, 1, output.numel()).view_as(output)).sum().backward()
    return {name: p.grad for name, p in network.named_parameters()}


def test_gradients_are_those_of_the_network_over_shapes_and_accumulation(network):
    batches = [random_inputs(seed=1), random_inputs(seed=2), random_inputs(frames=1, seed=3), random_inputs(seed=4)]
    wanted = gradients(network, network, batches)
    recorder = Again()
    found = gradients(NetworkGraphs(network, recorder), network, batches)
    assert recorder.recordings == 4  # two passes, two shapes
    assert {name for name, grad in found.items() if grad is None} == {n for n, grad in wanted.items() if grad is None}
    assert sum(grad is not None for grad in found.values()) > 20
    for name, grad in wanted.items():
        if grad is not None:
            torch.testing.assert_close(found[name], grad, msg=name)


def test_a_parameter_out_of_reach_gets_no_gradient(network):
    network.idle = torch.nn.Parameter(torch.ones(3))
    found = gradients(NetworkGraphs(network, Again()), network, [random_inputs()])
    assert found["idle"] is None and found["time_embed.0.weight"] is not None


def test_the_wrapper_hands_over_to_graphs_in_training_only(network):
    recorder, inputs = Again(), random_inputs()
    wrapper = OpenAIWrapper(network)
    wrapper.graphs = NetworkGraphs(network, recorder)
    condition = {"crossattn": inputs["context"]}
    with torch.no_grad():
        plain = wrapper(inputs["x"], inputs["timesteps"], condition)
    assert not recorder.recordings
    wrapper.eval()
    wrapper(inputs["x"], inputs["timesteps"], condition)
    assert not recorder.recordings
    wrapper.train()
    torch.testing.assert_close(wrapper(inputs["x"], inputs["timesteps"], condition).detach(), plain)
    assert recorder.recordings == 2


def test_pictures_beside_the_noise_and_pairs_of_frames_go_through_graphs():
    """The 1.5 image-to-video model: 32 channels, patches of two frames, `ofs`."""
    torch.manual_seed(0)
    changes = {"in_channels": 32, "ofs_embed_dim": 24, "num_frames": 13}
    network = tiny_network(rotary=True, patch_size=[2, 2, 2], **changes)
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    wrapper, found = OpenAIWrapper(network.train()), []
    inputs = random_inputs(frames=4)
    condition = {"crossattn": inputs["context"], "concat": random_inputs(frames=4, seed=5)["x"]}
    for graphs in (None, NetworkGraphs(network, Again())):
        wrapper.graphs = graphs
        found.append(gradients(lambda **given: wrapper(given["x"], given["timesteps"], condition), network, [inputs]))
    plain, replayed = found
    assert plain["ofs_embed.0.weight"].any() and plain["mixins.patch_embed.proj.weight"].any()
    for name, grad in plain.items():
        if grad is not None:
            torch.testing.assert_close(replayed[name], grad, msg=name)


def test_what_runs_code_between_kernels_is_refused():
    section = {
        "train_micro_batch_size_per_gpu": 1, "bf16": {"enabled": True}, "zero_optimization": {"stage": 3},
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-3}},
    }  # fmt: skip
    plan = plan_deepspeed(section, device_type="cuda")
    network = SimpleNamespace(transformer=SimpleNamespace(checkpoint_activations="selective"))
    engine = SimpleNamespace(network=network, loss_fn=None)
    with pytest.raises(ConfigError, match="checkpoint_activations and deepspeed.zero_optimization.stage: 3"):
        check_switches(TrainArgs(mode="pretrain", train_data=["clips"], cuda_graphs=True), plan, engine)
