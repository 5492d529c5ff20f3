"""Command lines of the two entries: configuration files, overrides, and flags made from the options' own descriptions.

Kept light: `--help` is to be there at once, so nothing here imports PyTorch or OmegaConf before a command is run.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import shlex
import types
import typing
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from sgm.cli import Parser

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

    from sgm.config import RunConfig

    Args = TypeVar("Args", bound=DataclassInstance)

NO_FLAGS: Mapping[str, str] = types.MappingProxyType({})


def run_parser(prog: str | None, description: str | None, default: Path) -> Parser:
    """A parser of what both entries take.

    Args:
        prog: how the command is called; by default as the script is.
        default: the configuration that runs when none is named.
    """
    parser = Parser(prog, description=description)
    add = parser.add_argument
    add("configs", nargs="*", metavar="CONFIG.yaml", help=f"later files win; default {default.name}")
    add("--base", nargs="+", default=[], metavar="CONFIG.yaml", help="the same, in the original's form")
    add("--set", action="append", default=[], metavar="KEY=VALUE", help="override a key, as args.seed=7")
    add("--dry-run", action="store_true", help="print the resolved configuration and the plan, then stop")
    add("--allow-target", action="append", default=[], metavar="PREFIX",
        help="also accept classes of your own package as YAML targets")  # fmt: skip
    add("--local_rank", "--local-rank", type=int, help=argparse.SUPPRESS)  # DeepSpeed's launcher
    return parser


def add_flags(
    parser: Parser,
    record: type[DataclassInstance],
    names: Iterable[str],
    called: Mapping[str, str] = NO_FLAGS,
) -> None:
    """Give fields of an options record a flag each; its value is None where the flag is not given.

    Args:
        names: the fields, in the order of the help.
        called: fields whose flag is not the field's name, with hyphens, but this.
    """
    fields = {field.name: field for field in dataclasses.fields(record)}
    kinds = typing.get_type_hints(record)
    parser.instead |= {name: f"--set args.{name}=VALUE" for name in fields}
    for name in names:
        flag = called.get(name, f"--{name.replace('_', '-')}")
        parser.instead[name] = flag
        parser.add_argument(flag, dest=name, **_settings(kinds[name], fields[name].metadata))


def _settings(kind: Any, metadata: Mapping[str, Any]) -> dict[str, Any]:
    """What argparse is told of a field."""
    (kind,) = (
        {*typing.get_args(kind)} - {type(None)}
        if typing.get_origin(kind) in (typing.Union, types.UnionType)
        else {kind}
    )
    settings: dict[str, Any] = {"help": metadata["help"].replace("%", "%%"), "default": None}
    if kind is bool:
        return settings | {"action": "store_true"}
    settings["metavar"] = metadata["metavar"]
    if metadata["bare"] is not None:
        settings |= {"nargs": "?", "const": metadata["bare"]}
    if typing.get_origin(kind) is list:
        (kind,) = typing.get_args(kind)
        if isinstance(metadata["metavar"], tuple):
            settings["nargs"] = len(metadata["metavar"])
        else:
            settings |= {"action": "append", "help": f"{settings['help']}; may be repeated"}
    return settings | {"type": kind, "choices": metadata["choices"] or None}


def _refuse_prompts(named: Iterable[str], options: argparse.Namespace) -> None:
    """Raises ConfigError where what should be configuration files is a text."""
    from sgm.typed import ConfigError

    absent = [name for name in named if not os.path.exists(name) and not name.endswith((".yaml", ".yml"))]
    words = [name for name in absent if " " in name or "/" not in name]
    if words and hasattr(options, "prompts"):
        text = " ".join(words)
        raise ConfigError(f"{text!r} is no configuration file; a prompt is given as --prompt {shlex.quote(text)}")


def run_config(options: argparse.Namespace, record: type[Args], default: Path, fallback: Path) -> RunConfig[Args]:
    """The run that a command line asks for, and its effects on this process: allowed targets, and the local rank.

    Args:
        record: the record of the `args:` section, whose flags `options` holds.
        default, fallback: what runs when no file is named, see `choose_config`.
    Raises:
        ConfigError: listing every problem.
    """
    from sgm.config import load_run_config
    from sgm.placeholders import config_files
    from sgm.secrets import guard_output
    from sgm.util import allow_target

    if options.local_rank is not None:
        os.environ.setdefault("LOCAL_RANK", str(options.local_rank))
    for prefix in options.allow_target:
        allow_target(prefix)
    named = [*options.base, *options.configs]
    _refuse_prompts(named, options)
    files = config_files(named, default, fallback)
    flags = {field.name: getattr(options, field.name, None) for field in dataclasses.fields(record)}
    config = load_run_config(files, record, overrides=options.set, flags=flags)
    guard_output()
    return config
