"""What DeepSpeed itself says of a `deepspeed:` section, before anything is started.

Part of its configuration are pydantic models; the rest it looks up name by name. So it is let read a mapping that
remembers what was looked up, with which default: a name that nobody looks up has no effect, and counts as misspelled.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, get_args

from pydantic import BaseModel, ValidationError

from sgm.distributed import quiet_libraries
from sgm.typed import Misfit, coerce, nearest

Lookups = dict[str, Any]  # "checkpoint.load_universal" -> DeepSpeed's default; the last lookup at the end
_WHETHER = object()  # in place of a default: it was asked whether there is such a key


class _Observed(dict[str, Any]):
    """A section that writes what is looked up in it into `lookups`."""

    def __init__(self, content: Mapping[str, Any], lookups: Lookups, place: str = ""):
        self._lookups, self._place = lookups, place
        super().__init__(
            {k: _Observed(v, lookups, f"{place}{k}.") if isinstance(v, Mapping) else v for k, v in content.items()}
        )

    def get(self, name: str, default: Any = None) -> Any:
        self._note(name, default)
        return super().get(name, default)

    def __getitem__(self, name: str) -> Any:
        self._note(name)
        return super().__getitem__(name)

    def __contains__(self, name: object) -> bool:
        self._note(name, _WHETHER)
        return super().__contains__(name)

    def __copy__(self) -> _Observed:
        return _Observed(self, self._lookups, self._place)

    def _note(self, name: object, default: Any = None) -> None:
        path = f"{self._place}{name}"
        before = self._lookups.pop(path, _WHETHER)
        tells_more = default is not _WHETHER and (before is None or before is _WHETHER)
        self._lookups[path] = default if tells_more else before


def deepspeed_verdict(section: Mapping[str, Any]) -> tuple[dict[str, str], list[str]]:
    """(What DeepSpeed refuses in a section, by place; removed features, switched off, that it refuses all the same)."""
    with quiet_libraries():
        from deepspeed import __version__ as version
        from deepspeed.runtime.config import DeepSpeedConfig, DeepSpeedConfigError

        problems: dict[str, str] = {}
        idle: list[str] = []
        while True:
            lookups: Lookups = {}
            try:
                DeepSpeedConfig(_Observed(section, lookups))
                break
            except ValidationError as error:
                refused = _refused_by_model(error, section, [*lookups][-1])
            except Exception as error:  # noqa: BLE001  # assertions, attribute errors, its own: what it stumbles over
                place = _deepest(section, [*lookups][-1])
                value = value_at(section, place)
                reason = f"{value!r} is refused by DeepSpeed {version}: {error}"
                refused = {place: _mismatch(value, [*lookups.values()][-1]) or reason}
                if not place:  # several together
                    problems[""] = f"refused by DeepSpeed {version}: {error}"
                    break
                if isinstance(error, DeepSpeedConfigError) and not switched_on(value):
                    idle.append(place)
                    section, refused = without(section, place), {}
            problems |= refused
            for place in refused:
                section = without(section, place)
        return problems | _stray(section, lookups), idle


# --- places ------------------------------------------------------------------------------------------------------


def value_at(section: Any, place: str) -> Any:
    """The value at "zero_optimization.offload_param.device"; None where there is none."""
    for name in place.split("."):
        section = section.get(name) if isinstance(section, Mapping) else None
    return section


def without(section: Mapping[str, Any], place: str) -> dict[str, Any]:
    """A copy that lacks what lies at `place`."""
    name, _, rest = place.partition(".")
    if rest and isinstance(section.get(name), Mapping):
        return {**section, name: without(section[name], rest)}
    return {k: v for k, v in section.items() if k != name}


def switched_on(value: Any) -> bool:
    """Does a section ask for its feature, or a value for something?"""
    if isinstance(value, Mapping):
        return bool(value["enabled"] if "enabled" in value else any(map(switched_on, value.values())))
    return bool(value) and value != -1


def _deepest(section: Mapping[str, Any], place: str) -> str:
    """As much of `place` as there is."""
    while place and value_at(section, place) is None:
        place = place.rpartition(".")[0]
    return place


# --- what is wrong -----------------------------------------------------------------------------------------------


def _refused_by_model(error: ValidationError, section: Mapping[str, Any], looked_up: str) -> dict[str, str]:
    found = {}
    for item in error.errors():
        inner = [str(part) for part in item["loc"]]
        path = inner if inner and inner[0] in section else [*looked_up.split("."), *inner]
        if item["type"] == "extra_forbidden":
            text = f"unknown key{nearest(path[-1], _fields(error.title, inner[:-1]))}"
        else:
            got = f", got {item['input']!r}" if inner else ""
            text = item["msg"].removeprefix("Value error, ").removeprefix("Assertion failed, ") + got
        found[_deepest(section, ".".join(path))] = text
    return found


def _fields(title: str, inner: Iterable[str]) -> list[str]:
    """Names that a model, or the model in its field `inner`, knows."""
    from deepspeed.runtime.config_utils import DeepSpeedConfigModel

    model = next((m for m in DeepSpeedConfigModel.__subclasses__() if m.__name__ == title), None)
    for name in inner:
        field = next((f for n, f in model.model_fields.items() if name in (n, f.alias)), None) if model else None
        kinds = (field.annotation, *get_args(field.annotation)) if field else ()
        model = next((kind for kind in kinds if isinstance(kind, type) and issubclass(kind, BaseModel)), None)
    return [f.alias or n for n, f in model.model_fields.items()] if model else []


def _stray(section: Mapping[str, Any], lookups: Lookups, place: str = "") -> dict[str, str]:
    """Names below `place` that nobody looked up, and values of another type than DeepSpeed's own."""
    inner = {path.removeprefix(place): default for path, default in lookups.items() if path.startswith(place)}
    known = {name: default for name, default in inner.items() if "." not in name}
    if place and all(default is _WHETHER for default in known.values()):  # taken as a whole, by a model
        return {}
    found = {}
    for name, value in section.items():
        if name not in known:
            found[f"{place}{name}"] = f"unknown key{nearest(name, known)}"
        elif wrong := _mismatch(value, known[name]):
            found[f"{place}{name}"] = wrong
        elif isinstance(value, Mapping):
            found |= _stray(value, lookups, f"{place}{name}.")
    return found


def _mismatch(value: Any, default: Any) -> str | None:
    """In what a value's type differs from that of DeepSpeed's default."""
    if isinstance(default, Mapping):
        return None if isinstance(value, Mapping) else f"expected a mapping, got {value!r}"
    if not isinstance(default, bool | int | float | str) or (isinstance(default, bool) and value in (0, 1)):
        return None
    try:
        coerce(value, type(default))
    except Misfit as error:
        return str(error)
    return None
