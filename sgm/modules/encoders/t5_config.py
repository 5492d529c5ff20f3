"""The sizes of a T5 encoder: what its config.json says."""

from __future__ import annotations

from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path

from sgm.typed import ConfigError, Range, build_args, listing, option
from sgm.weights import WeightsError
from sgm.weights.checksums import read_json

_SIZE = {"rules": [Range(1)]}


@dataclass(frozen=True)
class T5Config:
    """Sizes by their names in config.json; the defaults are that format's."""

    vocab_size: int = field(metadata=_SIZE)
    d_model: int = field(metadata=_SIZE)
    d_kv: int = field(metadata=_SIZE)
    d_ff: int = field(metadata=_SIZE)
    num_layers: int = field(metadata=_SIZE)
    num_heads: int = field(metadata=_SIZE)
    feed_forward_proj: str = option("relu", "T5 1.0 has relu, 1.1 gated-gelu", choices=("relu", "gated-gelu"))
    relative_attention_num_buckets: int = option(32, "kinds of distance", at_least=4)
    relative_attention_max_distance: int = option(128, "tokens from which all distances are of one kind")
    layer_norm_epsilon: float = option(1e-6, "added to the mean square", at_least=0)
    dropout_rate: float = option(0.1, "in training", at_least=0)

    def __post_init__(self) -> None:
        if self.relative_attention_max_distance <= self.relative_attention_num_buckets // 4:
            raise ConfigError("relative_attention_max_distance must exceed relative_attention_num_buckets / 4")

    @property
    def gated(self) -> bool:
        return self.feed_forward_proj == "gated-gelu"


def read_config(path: Path) -> T5Config:
    """The sizes that a config.json gives; what else it holds has no effect.

    Raises:
        WeightsError: no JSON, or fields are missing or wrong; all of them are listed.
    """
    content = read_json(path)
    given = {f.name: content[f.name] for f in fields(T5Config) if f.name in content}
    problems = [f"{f.name} is missing" for f in fields(T5Config) if f.default is MISSING and f.name not in given]
    config = None if problems else build_args(T5Config, given, problems, [], section=path.stem)
    if config is None:
        raise WeightsError(listing(problems, f"the T5 configuration {path}"))
    return config
