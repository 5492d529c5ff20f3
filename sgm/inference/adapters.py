"""Which adapters a run samples with: those that `args.lora` names, each once, and the student of `args.few_steps`."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from sgm.config import ConfigError, RunConfig
from sgm.convert.lora_files import foreign_file, open_adapter
from sgm.hub.adapter import adapter_from_hub, is_hub_name
from sgm.inference.options import SampleArgs
from sgm.places import found_path
from sgm.weights.checksums import WeightsError
from sgm.weights.preflight import adapter_path
from sgm.weights.release import Checkpoint, locate, read_transformer

FEW_STEPS = "few_steps"  # entry of a header


def with_fetched(config: RunConfig[SampleArgs]) -> RunConfig[SampleArgs]:
    """`config` with local files of the adapters that it names as in the hub; they are fetched at first use.

    Raises:
        HubError, SaveError: one is not to be had.
    """
    args = config.args
    return config if args.decode_latents else replace(config, args=replace(args, lora=[*map(_here, args.lora)]))


def with_adapters(config: RunConfig[SampleArgs]) -> RunConfig[SampleArgs]:
    """Under `few_steps` the student is the first of the adapters, unless `args.lora` names it: then its scale counts.

    What only decodes latents has no use for a student.

    Raises:
        ConfigError: an adapter would count twice: it is two entries of `args.lora`, or `args.load` holds it.
    """
    args = config.args
    if args.decode_latents:
        return replace(config, args=replace(args, few_steps=False))
    named: dict[tuple[Path, ...], str] = {}
    base = _located(Path(found_path(args.load)).expanduser()) if args.load else ()
    for text in args.lora:
        files = adapter_files(text)
        if base and (files == base or _holds_merged(base[0], files[0])):
            raise ConfigError(
                f"args.lora names {text}, which args.load ({args.load}) holds already: an adapter would count twice; "
                "leave it out (--set args.lora=[]), or set args.load to the base model."
            )
        if first := named.get(files):
            raise ConfigError(
                f"args.lora: {first} and {text} are the same adapter, which would count twice; name it once, with its "
                "whole scale: --lora PATH:SCALE."
            )
        named[files] = text
    if not args.few_steps or args.student is None or adapter_files(args.student) in named:
        return config
    return replace(config, args=replace(args, lora=[args.student, *args.lora]))


def _here(text: str) -> str:
    """`PATH[:SCALE]` of an adapter that is named as in the hub: its local file, which is fetched at first use."""
    name = str(adapter_path(text))
    return f"{adapter_from_hub(name)}{text[len(name) :]}" if is_hub_name(found_path(name)) else text


def _holds_merged(base: Path, file: Path) -> bool:
    """Whether `base` is one in which a run with the checkpoint RUN/ITERATION/file keeps its adapter folded in."""
    run = file.parent.parent
    return run / "merged" in base.parents and (run / "latest").is_file()


def adapter_files(text: str) -> tuple[Path, ...]:
    """The files of the adapter in `PATH[:SCALE]`, however it is spelt; what cannot be read stands for itself."""
    path = Path(found_path(str(adapter_path(text)))).expanduser()
    with suppress(WeightsError):  # of which its reader speaks
        if foreign := foreign_file(path):
            return (foreign.resolve(),)
    return _located(path)


def _located(path: Path) -> tuple[Path, ...]:
    """The files of weights by their place alone: those of a base are large, and nothing of them is read here."""
    files = [path]
    with suppress(WeightsError):
        files = locate(path)[0]
    return tuple(file.resolve() for file in files)


def read_adapter(path: str) -> Checkpoint:
    """An adapter's file in SAT's layout: one of ours as it is, one of another trainer under SAT's names.

    Raises:
        WeightsError: nothing there, or unreadable.
        ConvertError: no LoRA of this transformer, or one that is more than that.
    """
    if foreign_file(Path(path).expanduser()) is None:
        return read_transformer(path)
    adapter = open_adapter(path)
    facts = {"rank": adapter.rank, "alpha": adapter.alpha, "rank_stabilised": adapter.rank_stabilised}
    few_steps = {FEW_STEPS: adapter.few_steps} if adapter.few_steps else {}
    silent = (
        f"{path} does not say the alpha that it was trained with, so its factor is 1; if that was not its rank, give "
        f"alpha / rank, such as --lora {path}:0.5"
    )
    notes = [] if adapter.alpha_from else [silent]
    return Checkpoint(
        [Path(adapter.source)], adapter.matrices | adapter.magnitudes, {}, lora=facts | few_steps, notes=notes
    )
