"""Which adapters a run samples with: those that `args.lora` names, each once, and the student of `args.few_steps`."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from sgm.config import ConfigError, RunConfig
from sgm.inference.options import SampleArgs
from sgm.places import found_path
from sgm.weights.checksums import WeightsError
from sgm.weights.preflight import adapter_path
from sgm.weights.release import locate


def with_adapters(config: RunConfig[SampleArgs]) -> RunConfig[SampleArgs]:
    """Under `few_steps` the student is the first of the adapters, unless `args.lora` names it: then its scale counts.

    What only decodes latents has no use for a student.

    Raises:
        ConfigError: two entries of `args.lora` are one adapter, which would count twice.
    """
    args = config.args
    if args.decode_latents:
        return replace(config, args=replace(args, few_steps=False))
    named: dict[tuple[Path, ...], str] = {}
    for text in args.lora:
        files = adapter_files(text)
        if first := named.get(files):
            raise ConfigError(
                f"args.lora: {first} and {text} are the same adapter, which would count twice; name it once, with its "
                "whole scale: --lora PATH:SCALE."
            )
        named[files] = text
    if not args.few_steps or args.student is None or adapter_files(args.student) in named:
        return config
    return replace(config, args=replace(args, lora=[args.student, *args.lora]))


def adapter_files(text: str) -> tuple[Path, ...]:
    """The files of the adapter in `PATH[:SCALE]`, however it is spelt; what cannot be read stands for itself."""
    path = Path(found_path(str(adapter_path(text)))).expanduser()
    files = [path]
    with suppress(WeightsError):  # of which its reader speaks
        files = locate(path)[0]
    return tuple(file.resolve() for file in files)
