"""Values of YAML files and command lines as typed, checked fields of a record; every problem found is reported.

A number may be written as text ("1e-8": YAML 1.1 reads that as text), a list of one without its brackets. Nothing else
is guessed: `yes` is no truth value. What a type says of a value stands in its annotation: bounds of a number as
`Range`, choices as `Literal`, and what else has a `fit` of its own (`sgm.util.Role`).
"""

from __future__ import annotations

import collections.abc
import dataclasses
import difflib
import functools
import inspect
import math
import os
import types
import typing
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal, NoReturn, TypeVar

from sgm.errors import SgmError

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

Args = TypeVar("Args", bound="DataclassInstance")
SHOWN = 60  # characters of a wrong value


class ConfigError(SgmError):
    """The configuration is wrong; the message lists every problem with its place and remedy."""


class Misfit(ValueError):
    """A value, or several below it, are not what is expected; `problems` has a line for each, its place in front."""

    def __init__(self, *problems: str, place: str = ""):
        self.problems = [f"{place}: {problem}" if place else problem for problem in problems]
        super().__init__("; ".join(self.problems))


@dataclass(frozen=True)
class Range:
    """Bounds of a number, of which only `above` is left out itself."""

    least: float = -math.inf
    most: float = math.inf
    above: float = -math.inf

    def fit(self, value: Any, place: str) -> Any:
        """The value. Raises Misfit."""
        if not isinstance(value, int | float) or (self.least <= value <= self.most and value > self.above):
            return value
        bounds = {"above": self.above, "at least": self.least, "at most": self.most}
        words = " and ".join(f"{word} {bound:.10g}" for word, bound in bounds.items() if math.isfinite(bound))
        raise Misfit(f"must be {words}, got {shown(value)}", place=place)


@dataclass(frozen=True)
class OneOf:
    """Choices; true and 1 are two."""

    choices: tuple[Any, ...]

    def fit(self, value: Any, place: str) -> Any:
        """The value. Raises Misfit."""
        if value is None or any(value == c and isinstance(value, bool) == isinstance(c, bool) for c in self.choices):
            return value
        raise Misfit(f"{shown(value)} is not one of {', '.join(map(repr, self.choices))}", place=place)


class FileName:
    """A text that can name a file or folder."""

    def fit(self, value: str, place: str) -> str:
        """The text. Raises Misfit."""
        if len(os.fsencode(value)) > 4000 or any(len(os.fsencode(part)) > 255 for part in value.split(os.sep)):
            raise Misfit(f"too long for the name of a file: {shown(value)}", place=place)
        if value.startswith("~") and os.path.expanduser(value) == value:
            raise Misfit(f"there is no such user: {shown(value)}", place=place)
        return value


@dataclass(frozen=True)
class Record:
    """A mapping that fills an args record."""

    kind: type

    def fit(self, value: Any, place: str) -> Any:
        """The mapping. Raises Misfit."""
        _coerce_record(value, self.kind, place)
        return value


@dataclass(frozen=True)
class Slots:
    """A mapping with the keys of a TypedDict, and others that end in `ending`, whose values are of the type `other`."""

    known: type
    ending: str
    other: Any

    def fit(self, value: Any, place: str) -> Any:
        """The mapping. Raises Misfit."""
        kinds = typing.get_type_hints(self.known, include_extras=True)
        others = [name for name in value if str(name).endswith(self.ending) and name not in kinds]
        return fitted(value, kinds | dict.fromkeys(others, self.other), place, _required(self.known))


Size = Annotated[int, Range(1, 1 << 20)]  # of a tensor's axis
Count = Annotated[int, Range(0, 1 << 20)]
Layers = Annotated[int, Range(1, 1024)]
Positive = Annotated[float, Range(above=0, most=1e9)]
NotNegative = Annotated[float, Range(0, 1e9)]
Share = Annotated[float, Range(0, 1)]
PathText = Annotated[str, FileName()]


def option(
    default: Any,
    help: str,
    *,
    choices: Sequence[Any] = (),
    at_least: float = -math.inf,
    metavar: str | tuple[str, ...] | None = None,
    bare: str | None = None,
) -> Any:
    """A documented, checked field of an args record, which may get a command-line flag (`sgm.flags`).

    Args:
        metavar: what the flag's help calls its value, or its values one by one.
        bare: value of a flag that is given without one.
    """
    rules = [Range(at_least), *([OneOf(tuple(choices))] if choices else ())]
    metadata = {"help": help, "choices": tuple(choices), "rules": rules, "metavar": metavar, "bare": bare}
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
    kinds = typing.get_type_hints(args_type, include_extras=True)
    for field in dataclasses.fields(args_type):
        for rule in field.metadata.get("rules", ()):
            kinds[field.name] = Annotated[kinds[field.name], rule]
    unused = [name for name in given if name in idle and name not in kinds]
    notes += [f"{section}.{name} has no effect here" for name in unused]
    try:
        return args_type(**fitted({n: v for n, v in given.items() if n not in unused}, kinds, section))
    except Misfit as error:
        problems += error.problems
    except ConfigError as error:  # relations between fields, from __post_init__
        problems.append(str(error))
    return None


def fitted(
    given: Mapping[str, Any], kinds: Mapping[str, Any], place: str, required: Iterable[str] = ()
) -> dict[str, Any]:
    """Named values as their types.

    Raises:
        Misfit: names without a type, required ones that are not given, values that do not fit: all of them.
    """
    known = f"; there {'is' if len(kinds) == 1 else 'are'} {', '.join(kinds)}" if 0 < len(kinds) < 15 else ""
    problems = [f"unknown key {place}.{name}{nearest(name, kinds) or known}" for name in given if name not in kinds]
    problems += [f"{place}.{name} is missing" for name in required if name not in given]
    values: dict[str, Any] = {}
    for name in (name for name in given if name in kinds):
        try:
            values[name] = coerce(given[name], kinds[name], f"{place}{'.' * (name[:1] != '[')}{name}")
        except Misfit as error:
            problems += error.problems
    if problems:
        raise Misfit(*problems)
    return values


# --- one value -----------------------------------------------------------------------------------------------------


def coerce(value: Any, kind: Any, place: str = "") -> Any:
    """`value` as the annotated type. Numbers given as text ("1e-8") become numbers.

    Raises:
        Misfit: it is none; `place` is where it stands.
    """
    origin, parts = typing.get_origin(kind), typing.get_args(kind)
    if origin is Annotated:
        value = coerce(value, parts[0], place)
        for rule in (rule for rule in parts[1:] if hasattr(rule, "fit")):
            value = rule.fit(value, place)
        return value
    if origin in (typing.Union, types.UnionType):
        return _coerce_union(value, parts, place)
    if origin is Literal:
        return OneOf(parts).fit(value, place) if value is not None else _refuse("a value", value, place)
    if origin in (list, tuple, collections.abc.Sequence):
        return _coerce_list(value, origin, parts, place)
    if origin in (dict, collections.abc.Mapping) or typing.is_typeddict(kind):
        return _coerce_mapping(value, kind, place)
    if kind in _SCALARS:
        return _SCALARS[kind](value, place)
    if dataclasses.is_dataclass(kind) and isinstance(value, Mapping):
        return _coerce_record(value, kind, place)
    if inspect.isclass(kind) and kind is not Any and not getattr(kind, "_is_protocol", False):
        return value if isinstance(value, kind) else _refuse(f"a {kind.__name__}", value, place)
    return value


def _refuse(noun: str, value: Any, place: str) -> NoReturn:
    raise Misfit(f"expected {noun}, got {shown(value)}", place=place)


def _coerce_union(value: Any, kinds: tuple[Any, ...], place: str) -> Any:
    if value is None and type(None) in kinds:
        return None
    errors = []
    for kind in kinds:
        if kind is not type(None):
            try:
                return coerce(value, kind, place)
            except Misfit as error:
                errors.append(error)
    if len(errors) == 1:
        raise errors[0]
    told = dict.fromkeys(problem.removeprefix(f"{place}: ") for error in errors for problem in error.problems)
    raise Misfit(" or ".join(told), place=place)


def _coerce_list(value: Any, origin: Any, kinds: tuple[Any, ...], place: str) -> Any:
    if isinstance(value, str | int | float):
        found = [coerce(value, kinds[0], place)]
    elif isinstance(value, list | tuple):
        items = {f"[{k}]": item for k, item in enumerate(value)}
        found = list(fitted(items, dict.fromkeys(items, kinds[0]), place).values())
    else:
        _refuse("a list", value, place)
    if origin is tuple and kinds[-1] is not Ellipsis and len(found) != len(kinds):
        _refuse(f"{len(kinds)} values", value, place)
    return tuple(found) if origin is tuple else found


def _coerce_record(value: Mapping[str, Any], kind: Any, place: str) -> Any:
    """A record of `option` fields inside another one."""
    problems: list[str] = []
    record = build_args(kind, value, problems, [], place)
    if problems:
        raise Misfit(*problems)
    return record


def _coerce_mapping(value: Any, kind: Any, place: str) -> dict[str, Any]:
    if not isinstance(value, Mapping):
        _refuse("a mapping", value, place)
    if typing.is_typeddict(kind):
        return fitted(value, typing.get_type_hints(kind, include_extras=True), place, _required(kind))
    return fitted(value, dict.fromkeys(value, typing.get_args(kind)[1]), place)


def _required(kind: Any) -> list[str]:
    return sorted(kind.__required_keys__)


def _truth(value: Any, place: str) -> bool:
    return value if isinstance(value, bool) else _refuse("true or false", value, place)


def _text(value: Any, place: str) -> str:
    if isinstance(value, bool) or not isinstance(value, str | int | float) or "\0" in str(value):
        _refuse("text" + " without a zero byte" * isinstance(value, str), value, place)
    try:
        os.fsencode(str(value))
    except UnicodeEncodeError:
        _refuse("text that can be written as UTF-8", value, place)
    return value if isinstance(value, str) else str(value)


def _whole(value: Any, place: str) -> int:
    number = _number(value, place, "a whole number")
    if not float(number).is_integer() or abs(number) >= 1 << 63:
        _refuse("a whole number" + " below 2^63" * (abs(number) >= 1 << 63), value, place)
    return int(number)


def _number(value: Any, place: str, noun: str = "a number") -> Any:
    """A finite number: one that is none makes every other that it meets so, too."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        _refuse(noun, value, place)
    try:
        number = float(value)
    except (ValueError, OverflowError):
        _refuse(noun, value, place)
    if not math.isfinite(number):
        _refuse(f"a finite {noun.removeprefix('a ')}", value, place)
    return value if isinstance(value, int) else number


_SCALARS = {bool: _truth, int: _whole, float: lambda value, place: float(_number(value, place)), str: _text}


def shown(value: Any) -> str:
    """A wrong value for a message, cut where it is long."""
    text = repr(value)
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}..."


def nearest(name: str, known: Iterable[str]) -> str:
    """What to say behind an unknown name: the known one that it is a slip of the pen for, if there is such a one."""
    cutoff = 0.7 if len(str(name)) > 4 else 0.6  # two letters that changed places are a third of a short name
    close = difflib.get_close_matches(str(name), list(known), n=1, cutoff=cutoff)
    return f"; did you mean `{close[0]}`?" if close else ""


def listing(problems: Sequence[str], place: str) -> str:
    """All problems of a place as one text, a line each."""
    title = f"{len(problems)} problem{'s' if len(problems) > 1 else ''} in {place}:"
    return "\n".join([title, *(f"  - {p}" for p in problems)])


# --- arguments of a constructor ------------------------------------------------------------------------------------


@functools.cache
def argument_types(cls: Any) -> dict[str, Any]:
    """Types that a constructor (or function) states for its arguments; empty where they cannot be read."""
    try:
        return typing.get_type_hints(cls.__init__ if inspect.isclass(cls) else cls, include_extras=True)
    except (NameError, TypeError, AttributeError):  # names that only a type checker imports: nothing is known then
        return {}


def arguments(cls: Any, values: Mapping[str, Any], place: str, given: Collection[str] | None = None) -> dict[str, Any]:
    """`values` as arguments of the constructor `cls`: known by name, all there, and of their types.

    Args:
        given: names that the caller adds; None: what is missing is not asked for.
    Raises:
        Misfit: all that is wrong.
    """
    parameters = inspect.signature(cls).parameters.values()
    named = [p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    any_name = any(p.kind is p.VAR_KEYWORD for p in parameters)
    hints, names = argument_types(cls), [*(p.name for p in named), *(values if any_name else ())]
    kinds = {name: hints.get(name, Any) for name in names}
    needed = [] if given is None else [p.name for p in named if p.default is p.empty and p.name not in given]
    switched = {n: bool(v) if kinds.get(n) is bool and type(v) is int and v in (0, 1) else v for n, v in values.items()}
    found = fitted(switched, kinds, place, needed)
    # What a run records of a whole number stays as it was written.
    return {name: values[name] if type(values[name]) is int and type(v) is float else v for name, v in found.items()}
