"""Checks of what a YAML file says of the network, before anything is built."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, get_type_hints

import torch

from sgm.errors import SgmError
from sgm.modules.ops.recompute_modes import MODES
from sgm.typed import typed

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


class NetworkConfigError(SgmError):
    """The network cannot be built as configured. The message names the parameter, its value and the choices."""


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

    checkpoint_activations: bool | str = False
    model_parallel_size: int = 1
    max_sequence_length: int = 64
    skip_init: bool = False
    vocab_size: int = 1
    layernorm_order: str = "pre"
    is_decoder: bool = False

    @classmethod
    def parse(cls, values: Mapping[str, Any] | Namespace) -> TransformerArgs:
        """From a YAML mapping.

        Raises:
            NetworkConfigError: an unknown name, a wrong type, or a value that the architecture does not allow.
        """
        given = dict(vars(values) if isinstance(values, Namespace) else values)
        known = [field.name for field in fields(cls)]
        for name in given:
            if name not in known:
                raise NetworkConfigError(f"transformer_args takes no {name!r}; it takes {', '.join(known)}.")
        fitting, problems = typed(given, get_type_hints(cls))
        for name, problem in problems.items():
            raise NetworkConfigError(f"transformer_args.{name}: {problem}.")
        args = cls(**fitting)
        if args.checkpoint_activations not in MODES:
            raise NetworkConfigError(
                f"transformer_args.checkpoint_activations is {args.checkpoint_activations!r}; choose true, false, "
                "selective or products."
            )
        for name in ("layernorm_order", "is_decoder"):
            if getattr(args, name) != getattr(cls, name):
                raise NetworkConfigError(
                    f"transformer_args.{name} is {getattr(args, name)!r}; this architecture has {getattr(cls, name)!r}."
                )
        return args


def refuse_unavailable(**values: tuple[Any, Any]) -> None:
    """Each value is (given, available); they must be equal.

    Raises:
        NetworkConfigError: the first that differs.
    """
    for name, (given, available) in values.items():
        if given != available:
            raise NetworkConfigError(
                f"{name}: {given!r} is not available, no published model uses it; leave it out ({available!r})."
            )


def check_sizes(hidden_size: int, heads: int, model_parallel_size: int, dtype: str) -> None:
    """Width, heads and number of parts fit each other, and `dtype` is known.

    Raises:
        NetworkConfigError: which do not.
    """
    if dtype not in DTYPES:
        raise NetworkConfigError(f"dtype {dtype!r} is not one of {', '.join(DTYPES)}.")
    if hidden_size % heads:
        raise NetworkConfigError(f"hidden_size {hidden_size} is no multiple of num_attention_heads {heads}.")
    if heads % model_parallel_size:
        raise NetworkConfigError(
            f"num_attention_heads {heads} cannot be split over model_parallel_size {model_parallel_size} processes."
        )
