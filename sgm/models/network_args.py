"""Checks of what a YAML file says of the network, before anything is built."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from sgm.modules.ops.recompute_modes import MODES
from sgm.typed import ConfigError, Range, Size, build_args, option
from sgm.weights import DTYPES


@dataclass(frozen=True)
class TransformerArgs:
    """YAML's `transformer_args`.

    Attributes:
        checkpoint_activations: recompute each layer in the backward pass instead of keeping its activations;
            "selective" recomputes all but attention, "products" all but attention and the products with weights.
        model_parallel_size: number of processes that share each layer's weights.
        max_sequence_length: rows of SAT's own position table, which only rotary models keep (unused) in their files.
        skip_init: leave the big linears uninitialised, for weights that are read right afterwards.
        vocab_size: without effect; text comes embedded.
        layernorm_order, is_decoder: fixed by the architecture; other values are refused.
    """

    checkpoint_activations: bool | str = option(False, "see above", choices=MODES)
    model_parallel_size: Annotated[int, Range(1, 1024)] = 1
    max_sequence_length: Size = 64
    skip_init: bool = False
    vocab_size: Size = 1
    layernorm_order: Literal["pre"] = "pre"
    is_decoder: Literal[False] = False

    @classmethod
    def parse(cls, values: Mapping[str, Any] | Namespace) -> TransformerArgs:
        """From a YAML mapping.

        Raises:
            ConfigError: unknown names, and values that the architecture does not allow.
        """
        given, problems = vars(values) if isinstance(values, Namespace) else values, list[str]()
        args = build_args(cls, given, problems, [], "transformer_args")
        if args is None:
            raise ConfigError("; ".join(problems))
        return args


def check_sizes(hidden_size: int, heads: int, model_parallel_size: int, dtype: str) -> None:
    """Width, heads and number of parts fit each other, and `dtype` is known.

    Raises:
        ConfigError: which do not.
    """
    if dtype not in DTYPES:
        raise ConfigError(f"dtype {dtype!r} is not one of {', '.join(DTYPES)}.")
    if hidden_size % heads:
        raise ConfigError(f"hidden_size {hidden_size} is no multiple of num_attention_heads {heads}.")
    if heads % model_parallel_size:
        raise ConfigError(
            f"num_attention_heads {heads} cannot be split over model_parallel_size {model_parallel_size} processes."
        )
