"""LoRA files: SAT's matrices as `pytorch_lora_weights.safetensors` with rank and alpha in it, and back.

Scaling, stated once: the adapter adds scaling * B A with scaling = alpha / r (alpha / sqrt(r) if rank-stabilised). SAT
has alpha 1 unless told otherwise. PEFT and diffusers take alpha from the file's metadata; where it is silent they take
alpha = r, that is scaling 1.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sgm.convert.lazy import ConvertError, Deferred, added, cast, deferred
from sgm.convert.lora_keys import lora_hf_to_sat, lora_sat_to_hf
from sgm.convert.sat_source import SatWeights, open_sat
from sgm.modules.transformer.lora_state import (
    collect_pairs,
    lora_delta,
    lora_scaling,
    lora_spec_of,
    replaced_parts,
)
from sgm.weights.checksums import read_header, read_json
from sgm.weights.files import WeightsError, WeightsNotFoundError, read_checkpoint, tensors_of
from sgm.weights.release import newest_run
from sgm.weights.save import save_safetensors

FILE = "pytorch_lora_weights.safetensors"
FILES = (FILE, "adapter_model.safetensors", "lora.safetensors", "pytorch_lora_weights.bin", "adapter_model.bin")
_METADATA = "lora_adapter_metadata"  # diffusers' name for LoraConfig's fields in a header


@dataclass(frozen=True)
class StoredAdapter:
    """An adapter under SAT's names (without prefix): matrices, and the factor alpha / r on them."""

    matrices: dict[str, Tensor]
    rank: int
    alpha: float
    rank_stabilised: bool
    source: str
    stated: bool = True  # whether alpha was
    few_steps: str = ""  # of a student: how it is sampled, as JSON
    parts: dict[str, Deferred] = field(default_factory=dict)  # of the base, trained whole with it

    def __str__(self) -> str:
        return f"rank {self.rank}, alpha {self.alpha:g}" + ("" if self.stated else " (assumed, the file does not say)")

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
        fold_scale: put alpha / r into B and state alpha = r, for readers that ignore a file's metadata.
    Raises:
        ConvertError: it has parts that PEFT does not know.
    """
    if adapter.parts:
        raise ConvertError(
            f"{adapter.source} holds parts that were trained whole ({', '.join(adapter.parts)}), for which PEFT's "
            "layout has no place: convert the base with this file as --lora."
        )
    named = lora_sat_to_hf(adapter.matrices, scaling=adapter.scaling if fold_scale else 1.0)
    alpha = float(adapter.rank) if fold_scale else adapter.alpha
    stabilised = adapter.rank_stabilised and not fold_scale
    config = {"r": adapter.rank, "lora_alpha": alpha, "use_rslora": stabilised, "target_modules": adapter.modules}
    metadata = {
        "format": "pt",
        "rank": str(adapter.rank),
        "alpha": str(alpha),
        "rank_stabilised": str(stabilised),
        **({"few_steps": adapter.few_steps} if adapter.few_steps else {}),
        _METADATA: json.dumps({f"transformer.{name}": value for name, value in config.items()}),
    }
    return save_safetensors(folder / FILE, {n: cast(n, deferred(t), dtype) for n, t in named.items()}, metadata)


# --- reading ---------------------------------------------------------------------------------------------------------


def open_adapter(path: str | Path, alpha: float | None = None) -> StoredAdapter:
    """An adapter in SAT's or PEFT's layout.

    Args:
        path: a file, a folder with one of `FILES`, a SAT checkpoint, or a training run (also without its date).
        alpha: overrides what the file says.
    Raises:
        WeightsError: no adapter there, or an unreadable one.
        ConvertError: ranks that do not fit each other.
    """
    path = Path(path).expanduser()
    peft = _peft_file(path)
    return _open_sat_adapter(path, alpha) if peft is None else _open_peft(peft, alpha)


def _peft_file(path: Path) -> Path | None:
    """The PEFT file that `path` is or holds; None where it is something else."""
    found = path if path.is_file() else next((path / name for name in FILES if (path / name).is_file()), None)
    if found is None:
        return None
    names = read_checkpoint(found)
    return found if any(".lora_A." in n or ".lora_B." in n for n in names) else None


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
        weights.lora, spec.rank, spec.alpha, spec.rank_stabilised, weights.source, "alpha" in facts,
        few_steps if isinstance(few_steps, str) else json.dumps(few_steps),
        replaced_parts(weights.network, weights.lora),
    )  # fmt: skip


def _open_peft(file: Path, alpha: float | None) -> StoredAdapter:
    sat = lora_hf_to_sat(tensors_of(read_checkpoint(file)))  # refuses foreign names and lonely matrices
    stated = stated_settings(file)
    ranks = {name: _rank(name, a, b) for name, (a, b) in collect_pairs(sat).items()}
    if len(set(ranks.values())) != 1:
        raise ConvertError(f"{file} mixes LoRA ranks {sorted(set(ranks.values()))}; SAT has one rank for all linears.")
    rank = next(iter(ranks.values()))
    if stated.get("r", rank) != rank:
        raise ConvertError(f"{file} states LoRA rank {stated['r']}, but its matrices have rank {rank}.")
    if stated.get("alpha_pattern") or stated.get("rank_pattern"):
        raise ConvertError(f"{file} has its own alpha or rank for some modules; SAT has one for all.")
    given = stated.get("lora_alpha", rank) if alpha is None else alpha
    if not isinstance(given, int | float):
        raise ConvertError(f"{file} states lora_alpha {given!r}, which is no number.")
    stabilised, is_stated = bool(stated.get("use_rslora")), alpha is not None or "lora_alpha" in stated
    few_steps = read_header(file).metadata.get("few_steps", "") if file.suffix == ".safetensors" else ""
    return StoredAdapter(sat, rank, float(given), stabilised, str(file), is_stated, few_steps)


def _rank(name: str, a: Sequence[Tensor], b: Sequence[Tensor]) -> int:
    ranks = {m.shape[0] for m in a} | {m.shape[1] for m in b}
    if len(ranks) > 1:
        raise ConvertError(f"{name}: A and B have ranks {sorted(ranks)}; they do not belong together.")
    return ranks.pop()


def stated_settings(file: Path) -> dict[str, Any]:
    """PEFT's settings of an adapter (`LoraConfig`): from the header, or from `adapter_config.json` beside the file.

    Raises:
        WeightsError: unreadable ones.
    """
    metadata = read_header(file).metadata if file.suffix == ".safetensors" else {}
    beside = file.with_name("adapter_config.json")
    try:
        if _METADATA in metadata:
            fields = json.loads(metadata[_METADATA])
            return {name.removeprefix("transformer."): value for name, value in fields.items()}
        return read_json(beside) if beside.is_file() else {}
    except (ValueError, AttributeError) as error:
        raise WeightsError(f"{file}: what it says of its LoRA settings is unreadable: {error}") from error


def sat_matrices(adapter: StoredAdapter, alpha: float | None = None) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """(matrices under SAT's names without prefix, facts for the file).

    Args:
        alpha: make the adapter right for this alpha, by a factor in B (upstream's SAT knows alpha 1 unless its YAML
            says otherwise); None keeps the matrices and states the adapter's own alpha.
    """
    target = adapter.alpha if alpha is None else alpha
    stabilised = adapter.rank_stabilised and alpha is None
    factor = lora_scaling(adapter.rank, target, stabilised) / adapter.scaling if alpha is not None else 1.0
    matrices = {n: t / factor if factor != 1.0 and ".matrix_B." in n else t for n, t in adapter.matrices.items()}
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
        if tuple(weight.shape) != shape:
            raise ConvertError(
                f"{adapter.source} adapts {linear} as {list(shape)}, the base has {list(weight.shape)}; it belongs to "
                "another model."
            )
        plan[f"{linear}.weight"] = added(weight, partial(lora_delta, a, b, scale * adapter.scaling))
