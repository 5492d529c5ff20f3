"""What is this file? A description of weights in any of the layouts around CogVideoX, from headers and names.

Hostile files are safe to look at: nothing is unpickled but tensors and plain values, tensors stay mapped, and values
are read only for the hash.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sgm.convert import vae_keys
from sgm.convert.dit_keys import NETWORK_PREFIX, NOT_IN_HF, POSITIONS, RULES, sat_plan
from sgm.convert.dit_sizes import sizes_of_sat
from sgm.convert.lazy import Deferred, all_deferred, types_of
from sgm.convert.lora_files import LoraSettings, adapter_of, stated_settings
from sgm.convert.lora_keys import factors_of, is_foreign
from sgm.convert.sat_source import FIRST_STAGE, TEXT_ENCODER
from sgm.files import readable
from sgm.modules.encoders.t5 import DECODER, SHARED, TIED
from sgm.modules.transformer.lora_state import LoraSpec, lora_spec_of, replaced_parts, split_further, split_lora
from sgm.weights.assign import compare_keys, some_of
from sgm.weights.checksums import WeightsError, WeightsNotFoundError, read_header
from sgm.weights.files import read_checkpoint, shards_of, tensors_of, while_files_change
from sgm.weights.release import locate, newest_run, weights_entry
from sgm.weights.tensor_parallel import join_partitions

_WEIGHT_SUFFIXES = (".pt", ".bin", ".ckpt", ".pth", ".safetensors")


@dataclass
class Found:
    """One thing in the file: what it is, how large, and what is odd about it."""

    what: str
    tensors: int
    values: int
    dtypes: list[str]
    facts: list[str] = field(default_factory=list)
    foreign: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)

    def lines(self) -> list[str]:
        lines = [f"  {self.what}: {self.tensors} tensors, {self.values:,} values, {', '.join(self.dtypes)}"]
        lines += [f"    {fact}" for fact in self.facts]
        lines += [f"    missing ({len(self.missing)}): {some_of(self.missing)}"] if self.missing else []
        return lines + ([f"    does not belong ({len(self.foreign)}): {some_of(self.foreign)}"] if self.foreign else [])


@dataclass
class Report:
    """Everything about one file or set of parts."""

    files: list[Path]
    iteration: int | None
    found: list[Found]
    others: list[str]
    digest: str | None
    size: int

    def lines(self) -> list[str]:
        lines = [f"{self.files[0]}" + (f" and {len(self.files) - 1} more parts" if len(self.files) > 1 else "")]
        lines.append(f"  {readable(self.size)}" + ("" if self.iteration is None else f", iteration {self.iteration}"))
        lines += [line for part in self.found for line in part.lines()]
        lines += [f"  beside the weights: {', '.join(self.others)}"] if self.others else []
        return lines + ([f"  sha256 {self.digest}"] if self.digest else [])


def inspect(path: str | Path, *, with_hash: bool = True) -> list[Report]:
    """Describe a file, a SAT checkpoint folder, a training run (also without its date), a release or diffusers folder.

    Raises:
        WeightsError: nothing there, no weights in it, or a damaged or unsafe file.
    """
    path = Path(path).expanduser()
    if not path.exists():
        path = newest_run(path) or path
    if not path.exists():
        raise WeightsNotFoundError(f"no file or folder at {path}, nor a training run of that name.")
    return while_files_change(lambda: _reports(path, with_hash))


def _reports(path: Path, with_hash: bool) -> list[Report]:
    groups = [([path], None)] if path.is_file() else _groups(path)
    if not groups:
        raise WeightsError(f"{path} holds no weight files ({', '.join(_WEIGHT_SUFFIXES)}).")
    return [_report(files, iteration, with_hash) for files, iteration in groups]


def _groups(folder: Path, depth: int = 3) -> list[tuple[list[Path], int | None]]:
    """Weight files in a folder that belong together: parts of ranks, shards of an index, or single files."""
    if (folder / "latest").is_file() or any(folder.glob("mp_rank_*")):
        return [locate(folder)]
    groups: list[tuple[list[Path], int | None]] = []
    taken: set[Path] = set()
    for index in sorted(folder.glob("*.index.json")):
        shards = shards_of(index)[1]
        groups.append((shards, None))
        taken |= set(shards)
    files = sorted(p for p in folder.iterdir() if p.is_file() and p.suffix in _WEIGHT_SUFFIXES and p not in taken)
    groups += [([file], None) for file in files]
    inner = [p for p in folder.iterdir() if p.is_dir() and not p.is_symlink() and not p.name.startswith(".")]
    for place in sorted(inner) if depth > 1 else []:
        groups += _groups(place, depth - 1)
    return groups


def _report(files: list[Path], iteration: int | None, with_hash: bool) -> Report:
    contents = [read_checkpoint(file) for file in files]
    entries = [tensors_of(weights_entry(content)) for content in contents]
    parts = files[0].name.startswith("mp_rank_") and len(files) > 1
    state = (
        join_partitions(entries, strict=False)
        if parts
        else all_deferred({n: t for entry in entries for n, t in entry.items()})
    )
    first = contents[0]
    stored = first.get("iteration")
    flat = weights_entry(first) is first
    others = [] if flat else sorted(str(name) for name in first if first[name] is not weights_entry(first))
    facts = first.get("lora") if isinstance(first.get("lora"), Mapping) else _header(files[0])
    return Report(
        files,
        stored if isinstance(stored, int) else iteration,
        describe(state, facts or {}),
        others,
        _digest(files) if with_hash else None,
        sum(file.stat().st_size for file in files),
    )


def _header(file: Path) -> dict[str, Any]:
    if file.suffix != ".safetensors":
        return {}
    facts = read_header(file).metadata
    return {**facts, "settings": stated_settings(file)}


def _digest(files: Iterable[Path]) -> str:
    """SHA-256 over all bytes of the files, in order."""
    digest = hashlib.sha256()
    for file in files:
        with file.open("rb") as opened:
            hashlib.file_digest(opened, lambda: digest)
    return digest.hexdigest()


# --- kinds -----------------------------------------------------------------------------------------------------------


def describe(state: Mapping[str, Deferred], facts: Mapping[str, Any]) -> list[Found]:
    """What a state dict holds, part by part.

    Args:
        facts: what the file says of an adapter ("rank", "alpha").
    """
    parts = {"network": NETWORK_PREFIX, "text": TEXT_ENCODER, "vae": FIRST_STAGE}
    groups: dict[str, dict[str, Deferred]] = {name: {} for name in (*parts, "rest")}
    for name, value in state.items():
        kind = next((k for k, prefix in parts.items() if name.startswith(prefix)), "rest")
        groups[kind][name.removeprefix(parts.get(kind, ""))] = value
    found = _network(groups["network"], facts) if groups["network"] else []
    found += [_vae(groups["vae"], "VAE")] if groups["vae"] else []
    found += [_text(groups["text"])] if groups["text"] else []
    return found + (_bare(groups["rest"], facts, alone=not found) if groups["rest"] else [])


def _bare(state: dict[str, Deferred], facts: Mapping[str, Any], alone: bool) -> list[Found]:
    """A state dict without the engine's prefixes: one of the models in one of the layouts."""
    names = list(state)
    if not alone:
        return [_found("entries of no known part", state, foreign=names)]
    if is_foreign(names):
        return [_foreign_adapter(state, facts)]
    if any(name.startswith("transformer_blocks.") for name in names):
        return [_hf_network(state)]
    if any(name.startswith(("encoder.down_blocks.", "decoder.up_blocks.")) for name in names):
        return [_hf_vae(state)]
    if any(name.startswith(("encoder.down.", "decoder.up.")) for name in names):
        return [_vae(state, "VAE in SAT's layout")]
    if any(name.startswith(("encoder.block.", "shared.")) for name in names):
        return [_text(state)]
    if any(name.startswith(("transformer.layers.", "mixins.")) for name in names):
        return _network(state, facts)
    return [_found("unknown tensors", state, foreign=names)]


def _network(state: Mapping[str, Deferred], facts: Mapping[str, Any]) -> list[Found]:
    release, mixins = split_further(state)
    base, lora = split_lora(release)
    found = []
    if parts := replaced_parts(base, lora):
        found.append(_found("parts of a transformer that were trained whole with the adapter", parts))
    elif base:
        part = _found("transformer in SAT's layout", base)
        _compare(part, base, "SAT's", (*NOT_IN_HF, POSITIONS[0]))
        found.append(part)
    if lora:
        found.append(_found("LoRA adapter in SAT's layout", lora, facts=_lora_facts(lora, facts)))
    found += [_found(f"mixin {name!r} of a run of this framework", entries) for name, entries in mixins.items()]
    return found


def _compare(part: Found, base: Mapping[str, Deferred], layout: str, computed: Collection[str]) -> None:
    """Say of a transformer (SAT's names) which one it is, and what of it is amiss."""
    try:
        sizes = sizes_of_sat(base)
    except ValueError as error:
        part.facts = [str(error)]
        return
    report = compare_keys(sizes.sat_shapes(), base)
    part.what = f"{sizes.name} in {layout} layout"
    channels = f"latent channels {sizes.in_channels} in, {sizes.out_channels} out"
    patch = "x".join(map(str, sizes.patch))
    part.facts = [f"width {sizes.width}, {sizes.layers} layers, {sizes.heads} heads, {channels}, patch {patch}"]
    if sizes.assumed and layout == "SAT's":
        part.facts.append(
            f"assumed: {sizes.assumed}" if sizes.is_published else "not in the file: clip size, text tokens"
        )
    wrong = f"wrong shape ({len(report.shapes)}), as in one part of several: {some_of(report.shapes, 3)}"
    part.facts += [wrong] if report.shapes else []
    part.missing = report.missing
    part.foreign += [name for name in report.unexpected if name not in computed]


def _lora_facts(matrices: Mapping[str, Any], facts: Mapping[str, Any]) -> list[str]:
    try:
        spec = lora_spec_of(matrices, facts)
    except ValueError as error:
        return [str(error)]
    if spec is None:
        return []
    said = "stated in the file" if "alpha" in facts else "SAT's default, the file does not say"
    return [f"rank {spec.rank}, alpha {spec.alpha:g} ({said}), {_places(spec)}"]


def _places(spec: LoraSpec) -> str:
    places = f"on {', '.join(spec.targets)} of {len(spec.layers)} layers" if spec.layers else "on no layer"
    return places + (f" ({spec.only_folded})" if spec.only_folded else "")


def _foreign_adapter(state: dict[str, Deferred], facts: Mapping[str, Any]) -> Found:
    part = _found("LoRA adapter in diffusers' layout", state)
    try:
        modules = factors_of({name: value.make() for name, value in state.items()}, "it")
        adapter = adapter_of(modules, LoraSettings(facts.get("settings") or {}, "it"))
        spec = lora_spec_of(adapter.matrices | adapter.magnitudes)
    except ValueError as error:
        part.facts = [str(error)]
        return part
    part.facts = [f"{adapter}, {_places(spec)}"] if spec else []
    return part


def _hf_network(state: dict[str, Deferred]) -> Found:
    known = {module for rule in RULES for module in rule.hf}
    stems = {name: re.sub(r"(?<=transformer_blocks\.)\d+", "{i}", name.rpartition(".")[0]) for name in state}
    foreign = [name for name, stem in stems.items() if stem not in known and name != POSITIONS[1]]
    kept = {name: t for name, t in state.items() if name not in foreign}
    part = _found("transformer in diffusers' layout", state, foreign=foreign)
    try:
        _compare(part, sat_plan(kept), "diffusers'", POSITIONS[:1])
    except ValueError as error:
        part.facts = [str(error)]
    return part


def _hf_vae(state: dict[str, Deferred]) -> Found:
    try:
        return _vae(vae_keys.hf_to_sat(state), "VAE in diffusers' layout")
    except ValueError as error:
        return _found("VAE in diffusers' layout", state, facts=[str(error)])


def _vae(state: Mapping[str, Deferred], what: str) -> Found:
    try:
        params = vae_keys.params_of(state, "it")
        decoder = vae_keys.decoder_widths(state, params)
        wanted = vae_keys.sat_shapes(params, decoder)
    except ValueError as error:
        return _found(what, state, facts=[str(error)])
    report = compare_keys(wanted, state)
    part = _found(what, state, foreign=report.unexpected, missing=report.missing)
    part.facts = [(f"{params['z_channels']} latent channels, width {params['ch']} x {params['ch_mult']}, "
                  f"{params['num_res_blocks']} blocks a level")]  # fmt: skip
    if decoder != vae_keys.encoder_widths(params):
        part.facts.append(f"its decoder's levels are {decoder} channels wide: diffusers cannot hold it")
    return part


def _text(state: Mapping[str, Deferred]) -> Found:
    part = _found("T5 text encoder", state)
    shared = next((state[n] for n in (SHARED, TIED) if n in state), None)
    layers = {int(m[1]) for name in state if (m := re.match(r"encoder\.block\.(\d+)\.", name))}
    part.facts = [f"{len(layers)} layers" + ("" if shared is None else f", width {shared.shape[1]}, "
                  f"vocabulary {shared.shape[0]}")]  # fmt: skip
    part.facts += ["with its decoder"] if any(name.startswith(DECODER) for name in state) else []
    part.foreign = [name for name in state if not name.startswith(("encoder.", "shared.", *DECODER))]
    return part


def _found(what: str, state: Mapping[str, Any], **more: Any) -> Found:
    return Found(what, len(state), sum(math.prod(t.shape) for t in state.values()), types_of(state.values()), **more)
