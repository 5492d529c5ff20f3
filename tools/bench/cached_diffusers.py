"""diffusers' transformer with our weights under cache-dit, in our network's place: what `quality.py` compares with.

cache-dit (measured with 1.5.3) is needed for this comparison alone, and no requirement:
`python -m pip install --no-deps cache-dit==1.5.3`.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from sgm.errors import SgmError
from sgm.models.network import DiffusionTransformer
from sgm.modules.diffusionmodules.wrappers import OpenAIWrapper
from sgm.typed import build_args
from tools.bench.models import diffusers_network_of


class CacheDitError(SgmError):
    """A comparison that cannot be made."""


@dataclass(frozen=True)
class CacheDit:
    """Settings of DBCache: `first` layers always run, the others not where the first ones' result has changed by less
    than `threshold` (1 and more: always), at most `skips` times in a row, never at the first `warmup` steps. `order` 1
    extrapolates with its TaylorSeer, 0 repeats."""

    threshold: float = 1.0
    warmup: int = 8
    skips: int = 2
    first: int = 1
    order: int = 0

    @classmethod
    def parse(cls, text: str) -> CacheDit:
        """From "warmup=16,skips=1"."""
        problems: list[str] = []
        given = {name: float(v) if "." in v else int(v) for name, _, v in (p.partition("=") for p in text.split(","))}
        found = build_args(cls, given, problems, [], "--cache-dit")
        if found is None:
            raise CacheDitError(f"--cache-dit {text}: {'; '.join(problems)}")
        return found


class CachedDiffusers(OpenAIWrapper[DiffusionTransformer]):
    """Calls diffusers' transformer under cache-dit with what a denoiser gives to ours, which gives it its weights.

    Raises:
        CacheDitError: cache-dit is not there, or the network rotates its queries.
    """

    def __init__(self, ours: DiffusionTransformer, params: dict[str, Any], settings: CacheDit, steps: int) -> None:
        super().__init__(ours, ours.dtype)
        if ours.positions.rotates:
            raise CacheDitError("the comparison with cache-dit is for networks with sine position tables")
        self.theirs = diffusers_network_of(ours, params).to(next(ours.parameters()).device, ours.dtype)
        self.blocks = list(self.theirs.transformer_blocks)
        self._steps = steps
        self._library = _enable(self.theirs, settings, steps)

    def start(self) -> None:
        """Before every run: without it, a second one begins with what the first has left (seen with 1.5.3)."""
        self._library.refresh_context(self.theirs, num_inference_steps=self._steps)

    def forward(self, x: Tensor, t: Tensor, c: Mapping[str, Tensor], **_: Any) -> Tensor:
        return self.theirs(x.to(self.dtype), c["crossattn"].to(self.dtype), t, return_dict=False)[0]


def _enable(model: Any, settings: CacheDit, steps: int) -> Any:
    os.environ.setdefault("CACHE_DIT_LOG_LEVEL", "error")  # it prints to standard output
    try:
        import cache_dit
    except ImportError as error:
        raise CacheDitError(f"{error}: python -m pip install --no-deps cache-dit==1.5.3") from error
    adapter = cache_dit.BlockAdapter(
        transformer=model, blocks=model.transformer_blocks, forward_pattern=cache_dit.ForwardPattern.Pattern_0
    )
    config = cache_dit.DBCacheConfig(
        Fn_compute_blocks=settings.first,
        Bn_compute_blocks=0,
        max_warmup_steps=settings.warmup,
        residual_diff_threshold=settings.threshold,
        max_continuous_cached_steps=settings.skips,
        num_inference_steps=steps,
        enable_separate_cfg=False,
    )
    taylor = cache_dit.TaylorSeerCalibratorConfig(taylorseer_order=1) if settings.order else None
    cache_dit.enable_cache(adapter, cache_config=config, calibrator_config=taylor)
    return cache_dit
