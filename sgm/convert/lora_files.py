"""LoRA files: SAT's matrices as `pytorch_lora_weights.safetensors` with rank and alpha in it, and back.

Scaling, stated once: the adapter adds scaling * B A with scaling = alpha / r (alpha / sqrt(r) if rank-stabilised). SAT
has alpha 1 unless told otherwise. PEFT and diffusers take alpha from the file's metadata; where it is silent they take
alpha = r, that is scaling 1. What a file says of both is PEFT's `LoraConfig`, in its header or beside it, or kohya's.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from sgm.convert.lazy import ConvertError, Deferred, cast, changed, deferred
from sgm.convert.lora_keys import Factors, factors_of, is_foreign, lora_hf_to_sat, lora_sat_to_hf
from sgm.convert.sat_source import SatWeights, open_sat
from sgm.files import refuse_lfs_pointer
from sgm.modules.transformer.lora_state import (
    adapted_weight,
    collect_pairs,
    lora_delta,
    lora_scaling,
    lora_spec_of,
    magnitudes_of,
    replaced_parts,
)
from sgm.weights.checksums import read_header, read_json
from sgm.weights.files import WeightsError, WeightsNotFoundError, read_checkpoint, tensors_of
from sgm.weights.release import newest_run
from sgm.weights.save import save_safetensors

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
        stated = self._in_file(module, factors) if self.given_alpha is None else self.given_alpha
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


# What an adapter is called by those who write it, in order of preference.
USUAL = ("pytorch_lora_weights.safetensors", "adapter_model.safetensors", "lora.safetensors",
         "pytorch_lora_weights.bin", "adapter_model.bin")  # fmt: skip
FILE = USUAL[0]
_PART = re.compile(r"(?:mp_rank_\d+|model-\d+-of-\d+)")  # weights of a whole network


@dataclass(frozen=True)
class StoredAdapter:
    """An adapter under SAT's names (without prefix): matrices, and the factor alpha / r on them.

    Attributes:
        alpha_from: who says it: "file", "you", or nobody ("").
        uniform: one rank and one alpha for all its linears; if not, each one's factor is in its matrices.
        magnitudes: norms of rows (DoRA), see `lora_keys.lora_hf_to_sat`.
        few_steps: of a student: how it is sampled, as JSON.
        parts: of the base, trained whole with it.
    """

    matrices: dict[str, Tensor]
    rank: int
    alpha: float
    rank_stabilised: bool
    source: str
    alpha_from: Literal["file", "you", ""] = "file"
    uniform: bool = True
    magnitudes: dict[str, Tensor] = field(default_factory=dict)
    few_steps: str = ""
    parts: dict[str, Deferred] = field(default_factory=dict)

    def __str__(self) -> str:
        alpha = f"alpha {self.alpha:g}" if self.uniform else "each linear's alpha in its matrices"
        origin = {"file": "stated in the file", "you": "given", "": "assumed, the file does not say"}
        return f"rank {self.rank}, {alpha} ({origin[self.alpha_from]})" + (", DoRA" if self.magnitudes else "")

    @property
    def scaling(self) -> float:
        return lora_scaling(self.rank, self.alpha, self.rank_stabilised)

    @property
    def modules(self) -> list[str]:
        """Those of diffusers that it adapts."""
        names = lora_sat_to_hf(self.matrices, prefix="")
        return sorted(name.removesuffix(".lora_A.weight") for name in names if ".lora_A." in name)


# --- writing ---------------------------------------------------------------------------------------------------------


def write_peft(folder: Path, adapter: StoredAdapter, dtype: torch.dtype | None, fold_scale: bool) -> Path:
    """Write `pytorch_lora_weights.safetensors`; matrices bit for bit unless `dtype` or `fold_scale` change them.

    Args:
        fold_scale: put alpha / r into the matrices and state alpha = r: right also for readers that ignore a file's
            metadata, such as diffusers before 0.34, and `load_lora_adapter` of a state dict.
    Raises:
        ConvertError: a DoRA adapter, or one with parts that PEFT does not know.
    """
    if adapter.magnitudes:
        raise ConvertError(f"{adapter.source} is a DoRA adapter; it is in diffusers' form already.")
    if adapter.parts:
        raise ConvertError(
            f"{adapter.source} holds parts that were trained whole ({', '.join(adapter.parts)}), for which PEFT's "
            "layout has no place: convert the base with this file as --lora."
        )
    named = lora_sat_to_hf(scaled_matrices(adapter.matrices, adapter.scaling if fold_scale else 1.0))
    alpha = float(adapter.rank) if fold_scale else adapter.alpha
    stabilised = adapter.rank_stabilised and not fold_scale
    config = {"r": adapter.rank, "lora_alpha": alpha, "use_rslora": stabilised, "target_modules": adapter.modules}
    metadata = {
        "format": "pt",
        "rank": str(adapter.rank),
        "alpha": str(alpha),
        "rank_stabilised": str(stabilised),
        **({"few_steps": adapter.few_steps} if adapter.few_steps else {}),
        METADATA: json.dumps({f"transformer.{name}": value for name, value in config.items()}),
    }
    return save_safetensors(folder / FILE, {n: cast(n, deferred(t), dtype) for n, t in named.items()}, metadata)


# --- reading ---------------------------------------------------------------------------------------------------------


def open_adapter(path: str | Path, alpha: float | None = None) -> StoredAdapter:
    """An adapter in SAT's layout, or of another trainer.

    Args:
        path: a file, a folder with one (see `foreign_file`), a SAT checkpoint, or a training run (also without its
            date).
        alpha: the training's; counts in place of what the file says.
    Raises:
        WeightsError: no adapter there, or an unreadable one.
        ConvertError: ranks that do not fit each other, settings of another kind of adapter, or in a file of another
            trainer entries that are not of this transformer's LoRA.
    """
    path = Path(path).expanduser()
    foreign = foreign_file(path)
    return _open_sat_adapter(path, alpha) if foreign is None else _open_foreign(foreign, alpha)


def foreign_file(path: Path) -> Path | None:
    """The adapter of another trainer that `path` is or holds; None where it is something else.

    In a folder it is the first of `USUAL`, else the only `.safetensors` that is none of ours.

    Raises:
        WeightsError: an unreadable file, or a folder with several adapters.
    """
    if path.is_file():
        return path if is_foreign(_names(path)) else None
    if not path.is_dir() or (path / "latest").is_file():
        return None
    usual = [path / name for name in USUAL if (path / name).is_file()]
    rest = [] if usual else [file for file in sorted(path.glob("*.safetensors")) if not _PART.search(file.name)]
    found = [file for file in usual or rest if is_foreign(_names(file))]
    if len(found) > 1 and not usual:
        raise WeightsError(f"{path} holds {len(found)} adapters; name one: {', '.join(map(str, found))}.")
    return found[0] if found else None


def _names(file: Path) -> Iterable[str]:
    return read_header(file).tensors if file.suffix == ".safetensors" else read_checkpoint(file)


def _open_sat_adapter(path: Path, alpha: float | None) -> StoredAdapter:
    if not path.exists() and newest_run(path) is None:
        raise WeightsNotFoundError(f"no adapter at {path}: no such file or folder.")
    weights = open_sat(path)
    found = adapter_in(weights, alpha)
    if found is None:
        raise WeightsError(f"{weights.source} holds no LoRA matrices (matrix_A, matrix_B, lora_A, lora_B).")
    return found


def adapter_in(weights: SatWeights, alpha: float | None = None) -> StoredAdapter | None:
    """The adapter that a SAT checkpoint holds, if any; `alpha` overrides the file's, which overrides SAT's 1.

    Raises:
        ConvertError: the file states another rank than its matrices have, or no numbers.
        LoraError: incomplete pairs or several ranks.
    """
    facts = dict(weights.facts) | ({} if alpha is None else {"alpha": alpha})
    odd = {name: facts[name] for name in ("rank", "alpha") if not isinstance(facts.get(name, 1), int | float)}
    if odd:
        raise ConvertError(f"{weights.source} states LoRA settings that are no numbers: {odd}.")
    spec = lora_spec_of(weights.lora, facts)
    if spec is None:
        return None
    stated = facts.get("rank")
    if stated is not None and int(stated) != spec.rank:
        raise ConvertError(f"{weights.source} states LoRA rank {stated}, but its matrices have rank {spec.rank}.")
    few_steps = facts.get("few_steps", "")
    return StoredAdapter(
        weights.lora, spec.rank, spec.alpha, spec.rank_stabilised, weights.source,
        alpha_from="you" if alpha is not None else "file" if "alpha" in facts else "",
        few_steps=few_steps if isinstance(few_steps, str) else json.dumps(few_steps),
        parts=replaced_parts(weights.network, weights.lora),
    )  # fmt: skip


def _open_foreign(file: Path, alpha: float | None) -> StoredAdapter:
    refuse_lfs_pointer(file, WeightsError)
    adapter = adapter_of(factors_of(tensors_of(read_checkpoint(file)), str(file)), read_settings(file, alpha))
    few_steps = read_header(file).metadata.get("few_steps", "") if file.suffix == ".safetensors" else ""
    return replace(adapter, few_steps=few_steps)


def adapter_of(modules: Mapping[str, Factors], settings: LoraSettings) -> StoredAdapter:
    """Adapted linears of diffusers as one adapter of SAT: bit for bit where all have one rank and one alpha, else with
    each one's factor in its matrices, filled up to the largest rank.

    Raises:
        ConvertError: the file states another rank than its matrices have.
    """
    settings.check_ranks(modules)
    ranks = {factors.rank for factors in modules.values()}
    alphas = {settings.alpha(name, factors) for name, factors in modules.items()}
    entries = lora_hf_to_sat(modules)
    uniform = len(alphas) == 1 and ranks == {_rank(entries)}
    if not uniform:
        entries = lora_hf_to_sat({n: _folded(factors, settings.scaling(n, factors)) for n, factors in modules.items()})
    return StoredAdapter(
        matrices={name: t for name, t in entries.items() if ".matrix_" in name},
        rank=_rank(entries),
        alpha=alphas.pop() if uniform else float(_rank(entries)),
        rank_stabilised=settings.rank_stabilised and uniform,
        source=settings.source,
        alpha_from="you" if settings.given_alpha is not None else "file" if settings.says_alpha(modules) else "",
        uniform=uniform,
        magnitudes={name: t for name, t in entries.items() if ".magnitude." in name},
    )


def _rank(entries: Mapping[str, Tensor]) -> int:
    return next(t.shape[0] for name, t in entries.items() if ".matrix_A." in name)


def _folded(factors: Factors, scaling: float) -> Factors:
    """The same with a factor of 1, in float32."""
    for_down, for_up = _shared_out(scaling)
    return replace(factors, down=factors.down.float() * for_down, up=factors.up.float() * for_up)


def _shared_out(factor: float) -> tuple[float, float]:
    """A factor as one for A, a power of two, and one for B: half of it each, for half precision to bear the result."""
    for_a = 2.0 ** round(math.log2(abs(factor)) / 2) if factor else 1.0
    return for_a, factor / for_a


def scaled_matrices(matrices: Mapping[str, Tensor], factor: float) -> dict[str, Tensor]:
    """SAT's matrices with B A times `factor`; bit for bit the same for 1."""
    if factor == 1:
        return dict(matrices)
    for_a, for_b = _shared_out(factor)
    return {name: t * (for_a if ".matrix_A." in name else for_b) for name, t in matrices.items()}


def sat_matrices(adapter: StoredAdapter, alpha: float | None = None) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """(matrices under SAT's names without prefix, facts for the file).

    Args:
        alpha: make the adapter right for this alpha, by a factor in B (upstream's SAT knows alpha 1 unless its YAML
            says otherwise); None keeps the matrices and states the adapter's own alpha.
    """
    if adapter.magnitudes:
        raise ConvertError(
            f"{adapter.source} is a DoRA adapter, for which SAT's layout has no place. It can be sampled with as it is "
            f"(--lora {adapter.source}), and folded into a base: --lora instead of --lora_only."
        )
    target = adapter.alpha if alpha is None else alpha
    stabilised = adapter.rank_stabilised and alpha is None
    factor = 1.0 if alpha is None else adapter.scaling / lora_scaling(adapter.rank, target)
    matrices = scaled_matrices(adapter.matrices, factor)
    spec = lora_spec_of(matrices)
    facts = {"rank": adapter.rank, "alpha": target, "rank_stabilised": stabilised,
             "targets": list(spec.targets) if spec else [], "base_path": "", "base_hash": ""}  # fmt: skip
    if adapter.few_steps:
        facts["few_steps"] = adapter.few_steps
    return matrices, facts


# --- merging ---------------------------------------------------------------------------------------------------------


def merged(
    plan: Mapping[str, Deferred], adapters: Iterable[tuple[StoredAdapter, float]]
) -> tuple[dict[str, Deferred], list[str]]:
    """SAT's weights W with W + scale * scaling * B A in place of each adapted one, in float32; lines for the report.

    Raises:
        ConvertError: an adapted linear that `plan` lacks or that has another shape.
    """
    result, lines = dict(plan), []
    for adapter, scale in adapters:
        if scale:
            _add(result, adapter, scale)
        lines.append(f"merged: {adapter.source}, {adapter}, factor {scale * adapter.scaling:g}")
    return result, lines


def _add(plan: dict[str, Deferred], adapter: StoredAdapter, scale: float) -> None:
    for name, part in adapter.parts.items():
        own = plan.get(name)
        if own is None or tuple(own.shape) != tuple(part.shape):
            raise ConvertError(
                f"{adapter.source} was trained with a {name} of {list(part.shape)}, the base has "
                f"{list(own.shape) if own is not None else 'none'}: convert the merged network, which a run with "
                "args.save_merged: True writes (RUN/merged)."
            )
        plan[name] = part
    for linear, (a, b) in collect_pairs(adapter.matrices).items():
        weight, shape = plan.get(f"{linear}.weight"), (sum(up.shape[0] for up in b), a[0].shape[1])
        if weight is None:
            raise ConvertError(f"{adapter.source} adapts {linear}, which the base lacks; it is for a larger one.")
        if (weight.shape[0], math.prod(weight.shape[1:])) != shape:
            raise ConvertError(
                f"{adapter.source} adapts {linear} as {list(shape)}, the base has {list(weight.shape)}; it belongs to "
                "another model."
            )
        delta = partial(lora_delta, a, b, scale * adapter.scaling)
        norms = magnitudes_of(adapter.magnitudes, linear)
        plan[f"{linear}.weight"] = changed(weight, partial(adapted_weight, delta=delta, magnitudes=norms))
