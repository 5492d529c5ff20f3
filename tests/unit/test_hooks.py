"""Further mixins on SAT's hooks: the numbers of SAT's own transformer with the same mixins, and what is refused."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sgm import util
from sgm.errors import SgmError
from sgm.modules.ops import cpu_bf16
from sgm.modules.ops.block_ops import BlockOps, head_norm_rotate, split_modulation
from sgm.modules.transformer.hooks import HookError
from sgm.modules.transformer.lora_state import further_mixin
from sgm.modules.transformer.quantize import quantize_network
from sgm.modules.transformer.sat_base import BaseMixin, BaseModel, BaseTransformer, non_conflict, replacable
from sgm.util import TargetError, instantiate_from_config
from tests.dit_tiny import load_tiny, random_inputs, tiny_config, tiny_network

PREFIX = "sat.model.finetune.prompt_tuning.PTuningV2Mixin"


class SatLayers(BaseMixin):
    """What the original's AdaLN mixin does: it calls SAT's own attention and MLP, and wraps `attention_fn`."""

    def __init__(self, ours: nn.Module):
        super().__init__()
        self.ours = ours

    def layer_forward(self, hidden_states: Tensor, mask: Tensor, *args: Any, **kw: Any) -> Tensor:
        layer, inputs = self.transformer.layers[kw["layer_id"]], kw["inputs"]
        parts = split_modulation(self.ours.adaLN_modulations[kw["layer_id"]](kw["emb"]))

        def joined(text: Tensor, video: Tensor) -> Tensor:
            lengths = kw["text_length"], hidden_states.shape[1] - kw["text_length"]
            return torch.cat([v.expand(-1, n, -1) for v, n in zip((text, video), lengths)], dim=1)

        shift, scale, gate = map(joined, parts.text_attention, parts.video_attention)
        x = layer.input_layernorm(hidden_states) * (1 + scale) + shift
        hidden_states = hidden_states + gate * layer.attention(x, mask, **kw)
        shift, scale, gate = map(joined, parts.text_mlp, parts.video_mlp)
        x = layer.post_attention_layernorm(hidden_states) * (1 + scale) + shift
        assert kw["seq_length"] == inputs.grid.tokens
        return hidden_states + gate * layer.mlp(x, **kw)

    @non_conflict
    def attention_fn(self, q: Tensor, k: Tensor, *args: Any, old_impl: Callable[..., Tensor], **kw: Any) -> Tensor:
        inputs = kw["inputs"]
        norms = self.ours.query_layernorm_list, self.ours.key_layernorm_list
        q, k = (
            head_norm_rotate(x.transpose(1, 2), norm[kw["layer_id"]], inputs.rotary, inputs.text_length).transpose(1, 2)
            for x, norm in zip((q, k), norms)
        )
        return old_impl(q, k, *args, **kw)


def sat_network(ours: nn.Module) -> nn.Module:
    """`ours` with its weights, whose forward is SAT's: its transformer, its way of collecting hooks."""
    network = copy.deepcopy(ours)
    trunk = BaseTransformer(2, 1, 192, 3, 64, layernorm_epsilon=1e-5, layernorm=nn.LayerNorm).eval()
    trunk.load_state_dict(network.transformer.state_dict(), strict=False)
    model = BaseModel(None, transformer=trunk)
    for name in ("pos_embed", "patch_embed", "adaln_layer", "final_layer"):
        mixin = network.mixins[name]
        model.add_mixin(name, SatLayers(mixin) if name == "adaln_layer" else mixin)
    network.mixins, network.transformer = model.mixins, trunk
    network.collect_hooks_ = lambda: BaseModel.collect_hooks_(network)
    forward = trunk.forward
    trunk.forward = lambda *args, inputs: forward(*args, inputs=inputs, **inputs.by_original_names())
    network.collect_hooks_()
    return network


class Everywhere(BaseMixin):
    """Something of its own around every hook."""

    def __init__(self) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.tensor(1.5))

    @non_conflict
    def word_embedding_forward(self, ids: Tensor, output_cross_layer: dict, old_impl: Any = None, **kw: Any) -> Tensor:
        output_cross_layer["handed"] = self.factor * 2
        return old_impl(ids, output_cross_layer=output_cross_layer, **kw) * self.factor

    @non_conflict
    def position_embedding_forward(self, ids: Tensor, old_impl: Any = None, **kw: Any) -> Tensor | None:
        table = old_impl(ids, **kw)
        return None if table is None else table * self.factor

    @non_conflict
    def layer_forward(self, x: Tensor, mask: Tensor, old_impl: Any = None, handed: Any = None, **kw: Any) -> Tensor:
        kw["output_this_layer"]["seen"] = x
        kw["output_cross_layer"]["handed"] = handed * self.factor
        return old_impl(x, mask, **kw) + handed

    @non_conflict
    def attention_forward(self, x: Tensor, mask: Tensor, old_impl: Any = None, **kw: Any) -> Tensor:
        return old_impl(x * self.factor, mask, **kw).sin()

    @non_conflict
    def attention_fn(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor, drop: Any, old_impl: Any = None, **kw: Any):
        return old_impl(q + 1, k, v * self.factor, mask, drop, **kw)

    @non_conflict
    def mlp_forward(self, x: Tensor, old_impl: Any = None, **kw: Any) -> Tensor:
        return old_impl(x + kw["layer_id"], **kw) * self.factor

    @non_conflict
    def final_forward(self, logits: Tensor, old_impl: Any = None, **kw: Any) -> Tensor:
        return old_impl(logits * self.factor, **kw)


class Gated(BaseMixin):
    """An MLP of its own in place of the network's."""

    def __init__(self, hidden_size: int = 192, layer_num: int = 2):
        super().__init__()
        self.gates = nn.ModuleList(nn.Linear(hidden_size, hidden_size) for _ in range(layer_num))

    def mlp_forward(self, hidden_states: Tensor, **kw: Any) -> Tensor:
        return self.gates[kw["layer_id"]](hidden_states).sigmoid() * hidden_states


def prefix_mixin(seed: int = 3) -> nn.Module:
    from sat.model.finetune.prompt_tuning import PTuningV2Mixin

    torch.manual_seed(seed)
    mixin = PTuningV2Mixin(2, 64, 3, 5)
    for parameter in mixin.parameters():
        nn.init.normal_(parameter)
    return mixin


class Around(BaseMixin):
    """Attention with a factor, marked as SAT's hooks are that go with others."""

    @non_conflict
    def attention_fn(self, q: Tensor, k: Tensor, *args: Any, old_impl: Any = None, **kw: Any) -> Tensor:
        return 2 * old_impl(q * 3, k, *args, **kw)


MIXINS = {"without prefix": [Gated, Everywhere, Around], "several": [prefix_mixin, Gated, Everywhere, Around]}


def with_mixins(network: nn.Module, kinds: list[Callable[[], nn.Module]]) -> nn.Module:
    for number, kind in enumerate(kinds):
        torch.manual_seed(number)
        network.add_mixin(f"added{number}", kind())
    return network


@pytest.mark.parametrize(("kinds", "rotary"), [("several", False), ("without prefix", True)])
def test_numbers_are_those_of_sats_own_transformer(kinds: str, rotary: bool) -> None:
    """Output and gradients. SAT's way of the rotation cannot take keys behind the sequence's: the next test has these."""
    base, inputs = load_tiny(tiny_network(rotary=rotary), rotary=rotary), random_inputs()
    ours, theirs = (with_mixins(net, MIXINS[kinds]) for net in (copy.deepcopy(base), sat_network(base)))
    outputs = [net(**inputs) for net in (ours, theirs)]
    torch.testing.assert_close(*outputs, rtol=0, atol=2e-5)
    assert not torch.allclose(outputs[0], base(**inputs), atol=1e-2)
    added = [[p for name, p in net.named_parameters() if "added" in name] for net in (ours, theirs)]
    found = [torch.autograd.grad(out.sin().sum(), params) for out, params in zip(outputs, added)]
    for mine, other in zip(*found):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-4 * float(other.abs().max()))


def test_keys_behind_the_sequences_are_normalised_and_not_rotated() -> None:
    """By hand: a layer's attention with a prefix, in a model that rotates."""
    network, inputs = load_tiny(tiny_network(rotary=True), rotary=True), random_inputs()
    prefix, seen = prefix_mixin(), []

    class Spy(BaseMixin):
        def attention_fn(self, *args: Any, **kw: Any) -> Tensor:
            seen.append(args)
            return args[0]

    network.add_mixin("spy", Spy())
    network(**inputs)
    query, key, value = seen[0][:3]
    network.add_mixin("prefix", prefix)
    network(**inputs)
    own_keys, own_values = prefix.prefix[0]
    expected = network.mixins.adaln_layer.key_layernorm_list[0](own_keys).expand(2, -1, -1, -1)
    torch.testing.assert_close(seen[2][0], query)
    torch.testing.assert_close(seen[2][1], torch.cat((key, expected), dim=2))
    torch.testing.assert_close(seen[2][2], torch.cat((value, own_values.expand(2, -1, -1, -1)), dim=2))
    assert seen[2][3].shape == (1, 1) and seen[2][4] is None


class Halved(BaseMixin):
    """Another attention in place of the network's."""

    def attention_fn(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor, dropout: Any, **kw: Any) -> Tensor:
        return 0.5 * nn.functional.scaled_dot_product_attention(q, k, v)


def test_a_mixin_may_replace_the_attention_product() -> None:
    network, inputs = load_tiny(tiny_network()), random_inputs()
    by_weights = copy.deepcopy(network)
    network.add_mixin("halved", Halved())
    with torch.no_grad():
        for layer in by_weights.transformer.layers:
            layer.attention.dense.weight *= 0.5
        torch.testing.assert_close(network(**inputs), by_weights(**inputs), rtol=0, atol=1e-5)


@pytest.mark.parametrize("mode", [True, "products"])
def test_gradients_under_activation_checkpoints(mode: bool | str) -> None:
    inputs, found = random_inputs(), []
    for checkpointing in (False, mode):
        network = with_mixins(load_tiny(tiny_network()), MIXINS["several"]).train()
        network.transformer.checkpoint_activations = checkpointing
        added = [p for name, p in network.named_parameters() if "added" in name]
        found.append(torch.autograd.grad(network(**inputs).sin().sum(), added))
    for plain, recomputed in zip(*found):
        torch.testing.assert_close(recomputed, plain)


def test_hooks_are_called_beside_other_products() -> None:
    """Products in bfloat16, 8-bit linears: the network's own way is what a hook is handed."""
    base, inputs = load_tiny(tiny_network()), random_inputs()
    network = with_mixins(base, MIXINS["several"])
    with torch.no_grad():
        outputs = [network(**inputs)]
        network.use_ops(BlockOps(linear=cpu_bf16.linear, attention=cpu_bf16.attention))
        outputs.append(network(**inputs))
        quantize_network(network)
        outputs.append(network(**inputs))
    expected, scale = outputs[0], float(outputs[0].abs().max())
    for output, allowed in zip(outputs[1:], (0.03, 0.2)):
        assert 0 < float((output - expected).abs().max()) <= allowed * scale


# --- from YAML ------------------------------------------------------------------------------------------------------


def further(**nodes: Any) -> dict[str, Any]:
    """The tiny network's config with further mixins in its modules."""
    config = tiny_config()
    config["params"]["modules"] |= {f"{name}_config": node for name, node in nodes.items()}
    return config


def test_mixins_by_name_from_sat_and_from_the_users_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Constructors get the network's sizes where YAML does not state them; state-dict keys are SAT's."""
    (tmp_path / "other_mixins.py").write_text(
        "from sat.model.base_model import BaseMixin\nimport torch\n"
        "class Scaled(BaseMixin):\n"
        "    def __init__(self, num_layers, factor: float = 1.0):\n"
        "        super().__init__()\n"
        "        self.factors = torch.nn.Parameter(torch.full((num_layers,), factor))\n"
        "    def mlp_forward(self, hidden_states, layer_id, **kw_args):\n"
        "        return hidden_states * self.factors[layer_id]\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    config = further(
        prefix={"target": PREFIX, "params": {"prefix_len": 5}},
        scaled={"target": "other_mixins.Scaled", "params": {"factor": 0.5}},
    )
    with pytest.raises(TargetError, match="--allow-target other_mixins"):
        instantiate_from_config(config)
    monkeypatch.setattr(util, "ALLOWED_PREFIXES", [*util.ALLOWED_PREFIXES, "other_mixins."])
    network = instantiate_from_config(config, dtype="bf16").eval()
    added = {name: tuple(v.shape) for name, v in network.state_dict().items() if further_mixin(name)}
    assert added == {
        "mixins.prefix.prefix.0": (2, 3, 5, 64), "mixins.prefix.prefix.1": (2, 3, 5, 64),
        "mixins.scaled.factors": (2,),
    }  # fmt: skip
    assert network(**random_inputs()).dtype == torch.bfloat16


class Misspelt(BaseMixin):
    def mlp_foward(self, hidden_states: Tensor, **kw: Any) -> Tensor:
        return hidden_states


class Crossed(BaseMixin):
    def cross_attention_forward(self, hidden_states: Tensor, *args: Any, **kw: Any) -> Tensor:
        return hidden_states


class Idle(BaseMixin):
    pass


class Layered(BaseMixin):
    def layer_forward(self, hidden_states: Tensor, mask: Tensor, **kw: Any) -> Tensor:
        return hidden_states


class Unasked(BaseMixin):
    @non_conflict
    def mlp_forward(self, hidden_states: Tensor, **kw: Any) -> Tensor:
        return hidden_states


class Early(BaseMixin):
    @replacable
    def mlp_forward(self, hidden_states: Tensor, **kw: Any) -> Tensor:
        return hidden_states


@pytest.mark.parametrize(
    ("kinds", "message"),
    [
        ([Misspelt], "'added0' defines the hook 'mlp_foward', which this network does not call.*mean 'mlp_forward'"),
        ([Crossed], "'added0' defines the hook 'cross_attention_forward', which this network does not call; it calls"),
        ([Idle], "'added0'.*Idle.* would have no effect"),
        ([Layered], "'layer_forward' of mixin 'adaln_layer' would never be called: mixin 'added0' takes its place"),
        ([Unasked], "'mlp_forward' of mixin 'added0' is marked non_conflict and takes no argument old_impl"),
        ([Gated, Early], "'mlp_forward' of mixin 'added0' would never be called: mixin 'added1'"),
        ([Early, Gated], "'mlp_forward' of mixin 'added0' would never be called: mixin 'added1'"),
    ],
)
def test_hooks_that_would_not_be_called_are_named(kinds: list[Any], message: str) -> None:
    with pytest.raises(HookError, match=message):
        with_mixins(tiny_network(), kinds)


class Blocking(BaseMixin):
    def attention_forward(self, hidden_states: Tensor, mask: Tensor, **kw: Any) -> Tensor:
        return hidden_states


def test_a_hook_that_another_keeps_from_being_called_is_named() -> None:
    network = with_mixins(load_tiny(tiny_network()), [Blocking, prefix_mixin])
    with pytest.raises(HookError, match="the hook 'attention_fn' of mixin 'added1' was not called"):
        network(**random_inputs())


@pytest.mark.parametrize(
    ("node", "message"),
    [
        ({"target": "os.system"}, "'os.system' is not allowed"),
        ({"target": "sat.model.base_model.BaseModel"}, "is no mixin: it must be derived from sat.model.base_model"),
        ({"target": "sat.helpers.os.system"}, "unknown target"),
        ({"target": "torch.nn.Identity"}, "is no mixin"),
        ({"target": "sat.model.finetune.lora2.LoraMixin", "params": {"r": 4}}, "belongs under lora_config"),
        ({"target": "dit_video_concat.AdaLNMixin"}, "belongs under adaln_layer_config"),
        ({"target": PREFIX, "params": {"prefix_length": 5}}, r"modules.extra_config.params.prefix_length.*prefix_len"),
        ({"target": PREFIX, "params": {"prefix_len": "many"}}, "modules.extra_config: randn.*got str"),
        ({"target": "sat.model.finetune.ffadd.FFADDMixin"}, "modules.extra_config: .*FFADDMixin cannot be built"),
        ({"target": "sat.model.finetune.mlp_head.MLPHeadMixin"}, "'final_forward' of mixin 'final_layer' would never"),
    ],
)
def test_what_a_slot_refuses(node: dict[str, Any], message: str) -> None:
    with pytest.raises(SgmError, match=message):
        instantiate_from_config(further(extra=node))


def test_other_keys_of_modules_are_unknown() -> None:
    config = tiny_config()
    config["params"]["modules"]["prefix"] = {"target": PREFIX}
    with pytest.raises(TargetError, match="unknown key .*modules.prefix"):
        instantiate_from_config(config)
