"""The trunk's linear layers exchanged for 8-bit ones, see `sgm.modules.ops.fp8`."""

from __future__ import annotations

from sgm.distributed import model_parallel_world_size
from sgm.modules.ops.fp8 import MULTIPLE, Fp8Linear
from sgm.modules.transformer.lora import lora_layers, weight_of
from sgm.modules.transformer.lora_state import TARGETS
from sgm.modules.transformer.sat_base import BaseModel
from sgm.typed import ConfigError

KINDS = ("attention", "mlp")  # modulation layers see one row a sample: nothing to win


def quantize_network(network: BaseModel) -> None:
    """Exchange query_key_value, dense and both MLP layers of every block of a `DiffusionTransformer`, in place.

    Raises:
        ConfigError: adapters are attached, the layers are split over processes, or a width is no multiple of 16.
    """
    if lora_layers(network):
        raise ConfigError(
            "accelerate.fp8 rounds the weights, and a LoRA adapter lies beside them: fold it in with --merge-lora, or "
            "leave accelerate.fp8 out."
        )
    if model_parallel_world_size() > 1:
        raise ConfigError("accelerate.fp8 does not work on layers that are split over processes (model_parallel_size).")
    names = [name for kind in KINDS for name, _ in TARGETS[kind]]
    for layer in range(len(network.transformer.layers)):
        for name in (name.format(i=layer) for name in names):
            linear = network.get_submodule(name)
            weight, bias = weight_of(linear), dict(linear.named_parameters()).get("bias")
            if any(size % MULTIPLE for size in weight.shape):
                shape = tuple(weight.shape)
                raise ConfigError(f"accelerate.fp8: {name} is {shape}; both must be multiples of {MULTIPLE}.")
            network.set_submodule(name, Fp8Linear(weight, bias))
