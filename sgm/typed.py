"""Values of YAML files and command lines as typed, checked fields of a record; every problem found is reported.

A number may be written as text ("1e-8": YAML 1.1 reads that as text), a list of one without its brackets. Nothing else
is guessed: `yes` is no truth value.
"""

from __future__ import annotations

import dataclasses
import difflib
import inspect
import types
import typing
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from sgm.errors import SgmError

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

Args = TypeVar("Args", bound="DataclassInstance")


class ConfigError(SgmError):
    """The configuration is wrong; the message lists every problem with its place and remedy."""


def option(
    default: Any,
    help: str,
    *,
    choices: Sequence[Any] = (),
    at_least: float | None = None,
    metavar: str | tuple[str, ...] | None = None,
    bare: str | None = None,
) -> Any:
    """A documented, checked field of an args record, which may get a command-line flag (`sgm.flags`).

    Args:
        metavar: what the flag's help calls its value, or its values one by one.
        bare: value of a flag that is given without one.
    """
    metadata = {"help": help, "choices": tuple(choices), "at_least": at_least, "metavar": metavar, "bare": bare}
    if isinstance(default, list):
        return dataclasses.field(default_factory=lambda: list(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def build_args(
    args_type: type[Args],
    given: Mapping[str, Any],
    problems: list[str],
    notes: list[str],
    section: str = "args",
    idle: Collection[str] = (),
) -> Args | None:
    """Fill the record `args_type` of a `section`; problems and notes are appended. None where there are problems.

    Args:
        idle: further names that are accepted, and noted to have no effect.
    """
    fields = {f.name: f for f in dataclasses.fields(args_type)}
    hints = typing.get_type_hints(args_type)
    values: dict[str, Any] = {}
    before = len(problems)
    for name, raw in given.items():
        if name not in fields:
            if name in idle:
                notes.append(f"{section}.{name} has no effect here")
            else:
                problems.append(f"unknown key {section}.{name}{nearest(name, fields)}")
            continue
        try:
            values[name] = _checked(coerce(raw, hints[name]), fields[name].metadata)
        except ValueError as error:
            problems.append(f"{section}.{name}: {error}")
    if len(problems) > before:
        return None
    try:
        return args_type(**values)
    except ConfigError as error:  # relations between fields, from __post_init__
        problems.append(str(error))
        return None


def coerce(value: Any, kind: Any) -> Any:
    """`value` as the annotated type, or ValueError. Numbers given as text ("1e-8") become numbers."""
    origin = typing.get_origin(kind)
    if origin in (typing.Union, types.UnionType):
        return _coerce_union(value, typing.get_args(kind))
    if origin in (list, tuple):
        items = [value] if isinstance(value, str | int | float) else value
        if not isinstance(items, list | tuple):
            raise ValueError(f"expected a list, got {value!r}")
        return [coerce(item, typing.get_args(kind)[0]) for item in items]
    if kind is bool:
        if not isinstance(value, bool):
            raise ValueError(f"expected true or false, got {value!r}")
        return value
    if kind in (int, float):
        return _number(value, kind)
    if kind is str:
        if isinstance(value, bool | list | dict) or value is None:
            raise ValueError(f"expected text, got {value!r}")
        return str(value)
    return value


def _coerce_union(value: Any, kinds: tuple[Any, ...]) -> Any:
    if value is None and type(None) in kinds:
        return None
    errors = []
    for kind in kinds:
        if kind is type(None):
            continue
        try:
            return coerce(value, kind)
        except ValueError as error:
            errors.append(str(error))
    raise ValueError(" or ".join(errors) or f"got {value!r}")


def _number(value: Any, kind: type) -> Any:
    noun = "a whole number" if kind is int else "a number"
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise ValueError(f"expected {noun}, got {value!r}")
    try:
        number = float(value)
    except ValueError as error:
        raise ValueError(f"expected {noun}, got {value!r}") from error
    if kind is float:
        return number
    if not number.is_integer():
        raise ValueError(f"expected {noun}, got {value!r}")
    return int(value) if isinstance(value, int) else int(number)


def _checked(value: Any, metadata: Mapping[str, Any]) -> Any:
    if value is None:
        return value
    if metadata.get("choices") and value not in metadata["choices"]:
        raise ValueError(f"{value!r} is not one of {', '.join(map(repr, metadata['choices']))}")
    if metadata.get("at_least") is not None and not value >= metadata["at_least"]:  # nan is not, either
        raise ValueError(f"must be at least {metadata['at_least']}, got {value!r}")
    return value


def nearest(name: str, known: Iterable[str]) -> str:
    """What to say behind an unknown name: the known one that it is a slip of the pen for, if there is such a one."""
    close = difflib.get_close_matches(str(name), list(known), n=1, cutoff=0.7)
    return f"; did you mean `{close[0]}`?" if close else ""


def listing(problems: Sequence[str], place: str) -> str:
    """All problems of a place as one text, a line each."""
    title = f"{len(problems)} problem{'s' if len(problems) > 1 else ''} in {place}:"
    return "\n".join([title, *(f"  - {p}" for p in problems)])


# --- arguments of a constructor ------------------------------------------------------------------------------------


def argument_types(cls: Any) -> dict[str, Any]:
    """Types that a constructor (or function) states for its arguments; empty where they cannot be read."""
    try:
        return typing.get_type_hints(cls.__init__ if inspect.isclass(cls) else cls)
    except (NameError, TypeError, AttributeError):  # names that only a type checker imports: nothing is known then
        return {}


def typed(values: Mapping[str, Any], kinds: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, str]]:
    """(`values` as their annotated types, what is wrong with the others by name); see `_scalar`."""
    fitting: dict[str, Any] = {}
    problems: dict[str, str] = {}
    for name, value in values.items():
        try:
            fitting[name] = _scalar(value, kinds.get(name, Any))
        except ValueError as error:
            problems[name] = str(error)
    return fitting, problems


_SCALARS = (bool, int, float, str)


def _scalar(value: Any, kind: Any) -> Any:
    """`value` as int, float, bool or str where that is what `kind` asks for; what is more complex is left alone.

    Raises:
        ValueError: what is expected, and what was given.
    """
    kinds = typing.get_args(kind) if typing.get_origin(kind) in (typing.Union, types.UnionType) else (kind,)
    wanted = [k for k in kinds if k in _SCALARS]
    others = [k for k in kinds if k not in _SCALARS and k is not type(None)]
    if not wanted or (value is None and type(None) in kinds) or (others and not isinstance(value, _SCALARS)):
        return value
    if bool in wanted and not isinstance(value, bool) and value in (0, 1):
        return bool(value)
    if float in wanted and isinstance(value, int) and not isinstance(value, bool):
        return value  # stays as written in what a run records
    read = coerce(value, typing.Union[tuple(wanted)])  # noqa: UP007
    if read != read:  # nan: every number that it meets becomes nan, too
        raise ValueError(f"expected a number, got {value!r}")
    return read
