"""What an adapter's file says of its rank and alpha: PEFT's `LoraConfig`, in a header or a file beside, or kohya's."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sgm.convert.lazy import ConvertError
from sgm.convert.lora_keys import Factors
from sgm.modules.transformer.lora_state import lora_scaling
from sgm.weights.checksums import read_header, read_json
from sgm.weights.files import WeightsError

METADATA = "lora_adapter_metadata"  # diffusers' name for LoraConfig's fields in a header
_FINETRAINERS, _KOHYA = "lora_config", "ss_network_alpha"
_BESIDE = "adapter_config.json"
# Settings that make the forward another one than W + factor * B A, or W another one.
_OTHER_FORWARD = ("lora_bias", "layer_replication", "use_qalora", "alora_invocation_tokens", "use_bdlora",
                  "arrow_config", "kasa_config", "velora_config", "monteclora_config")  # fmt: skip
_CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga", "milora")


@dataclass(frozen=True)
class LoraSettings:
    """Fields of `LoraConfig` that a file states.

    Attributes:
        fields: those fields; `r`, `lora_alpha`, `rank_pattern`, `alpha_pattern`, `use_rslora` and others.
        given_alpha: an alpha that counts in place of everything the file says.
    """

    fields: Mapping[str, Any]
    source: str
    given_alpha: float | None = None

    def __post_init__(self) -> None:
        """Raises ConvertError: settings that are not LoRA's as it is computed here, each by its name."""
        kind = str(self.fields.get("peft_type") or "LORA").removeprefix("PeftType.")
        odd = [] if kind == "LORA" else [f"peft_type {kind}"]
        odd += [name for name in _OTHER_FORWARD if self.fields.get(name)]
        start = str(self.fields.get("init_lora_weights", "")).lower()
        odd += [f"init_lora_weights {start}"] if start.startswith(_CHANGES_BASE) else []
        if odd:
            raise ConvertError(
                f"{self.source} states {', '.join(odd)}: such an adapter is more than a sum with the base weights, and "
                "is not read here. Where PEFT can, save it as plain LoRA (save_pretrained with "
                "path_initial_model_for_weight_conversion), or merge it there."
            )
        for name in ("r", "lora_alpha"):
            self._number(name, self.fields.get(name, 1))
        for name in ("rank_pattern", "alpha_pattern"):
            if not isinstance(self.fields.get(name) or {}, dict):
                raise ConvertError(f"{self.source} states {name} {self.fields[name]!r}, which is no mapping.")

    @property
    def rank_stabilised(self) -> bool:
        return bool(self.fields.get("use_rslora"))

    def alpha(self, module: str, factors: Factors) -> float:
        """Of one module: the given one, its own entry's, the stated one; where nothing says it the rank."""
        stated = self._stated_alpha(module, factors)
        return float(factors.rank) if stated is None else stated

    def says_alpha(self, modules: Mapping[str, Factors]) -> bool:
        """Whether the file states the alpha of each module."""
        return all(self._in_file(name, factors) is not None for name, factors in modules.items())

    def scaling(self, module: str, factors: Factors) -> float:
        """The factor on B A of one module."""
        return lora_scaling(factors.rank, self.alpha(module, factors), self.rank_stabilised)

    def check_ranks(self, modules: Mapping[str, Factors]) -> None:
        """Raises ConvertError: matrices of another rank than the file states."""
        for name, factors in modules.items():
            stated = self._of("rank_pattern", "r", name)
            if stated is not None and stated != factors.rank:
                raise ConvertError(
                    f"{self.source} states LoRA rank {stated:g}, but its matrices have rank {factors.rank} ({name})."
                )

    def _stated_alpha(self, module: str, factors: Factors) -> float | None:
        return self._in_file(module, factors) if self.given_alpha is None else self.given_alpha

    def _in_file(self, module: str, factors: Factors) -> float | None:
        return self._of("alpha_pattern", "lora_alpha", module) if factors.alpha is None else factors.alpha

    def _of(self, pattern: str, name: str, module: str) -> float | None:
        """A module's entry of a pattern (PEFT: the first whose expression its name, or the end of it, matches)."""
        for expression, value in (self.fields.get(pattern) or {}).items():
            if _matches(expression, module):
                return self._number(f"{pattern} {expression}", value)
        return self._number(name, self.fields[name]) if name in self.fields else None

    def _number(self, name: str, value: object) -> float:
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise ConvertError(f"{self.source} states {name} {value!r}, which is no number.")
        return float(value)


def _matches(expression: str, module: str) -> bool:
    try:
        return re.match(rf"(.*\.)?({expression})$", module) is not None
    except re.error:
        return False


def read_settings(file: Path, alpha: float | None = None) -> LoraSettings:
    """What the header of an adapter's file or `adapter_config.json` beside it states.

    Args:
        alpha: counts in place of what the file says.
    Raises:
        WeightsError: unreadable settings.
        ConvertError: settings of another kind of adapter.
    """
    return LoraSettings(stated_settings(file), str(file), alpha)


def stated_settings(file: Path) -> dict[str, Any]:
    """Fields of PEFT's `LoraConfig` as the file, or the one beside it, states them; empty where nothing does.

    Raises:
        WeightsError: unreadable ones.
    """
    metadata = read_header(file).metadata if file.suffix == ".safetensors" else {}
    beside = file.with_name(_BESIDE)
    try:
        for name in (METADATA, _FINETRAINERS):
            if name in metadata:
                fields = json.loads(metadata[name])
                return {key.removeprefix("transformer."): value for key, value in fields.items()}
        if beside.is_file():
            return read_json(beside)
        return {"lora_alpha": float(metadata[_KOHYA])} if _KOHYA in metadata else {}
    except (ValueError, AttributeError) as error:
        raise WeightsError(f"{file}: what it says of its LoRA settings is unreadable: {error}") from error
