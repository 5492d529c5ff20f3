"""What a configuration takes from the environment (`${oc.env:NAME}`): used, but neither shown nor saved."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from typing import Any, TextIO, cast

SHORTEST = 4  # characters of a value that is looked for in any text; shorter ones stand in quotes
_written: dict[str, str] = {}  # value -> the text that stands for it


def environment_value(name: str, *default: Any) -> Any:
    """OmegaConf's resolver `oc.env`, which keeps in mind what it gave."""
    if name not in os.environ and not default:
        raise KeyError(f"Environment variable '{name}' not found")
    value = os.environ.get(name, *default)
    if value and name in os.environ:
        _written[value] = f"${{oc.env:{name}}}"
    return value


def hidden(text: str) -> str:
    """`text` with what stands in the configuration in place of values from the environment."""
    for value in sorted(_written, key=len, reverse=True):
        quoted = (repr(value), json.dumps(value, ensure_ascii=False))
        plain = (value, quoted[1][1:-1]) if len(value) >= SHORTEST else ()
        for form in (*quoted, *plain):
            quote = form[0] if form in quoted else ""
            text = text.replace(form, f"{quote}{_written[value]}{quote}")
    return text


def holds_secret(value: Any) -> bool:
    """Whether something from the environment is part of it."""
    return any(secret in str(value) for secret in _written)


def hidden_in(content: dict[str, Any], default: Callable[[Any], str] | None = None) -> dict[str, Any]:
    """A record without such values, as JSON gives it back; `default` makes texts of what JSON does not have."""
    return cast("dict[str, Any]", json.loads(hidden(json.dumps(content, ensure_ascii=False, default=default))))


class _Guarded:
    """A stream that lets no such value through."""

    def __init__(self, stream: TextIO):
        self._stream = stream

    def write(self, text: str) -> int:
        self._stream.write(hidden(text))
        return len(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def guard_output() -> None:
    """From now on nothing that this process prints holds such values."""
    if _written and not isinstance(sys.stdout, _Guarded):
        sys.stdout, sys.stderr = (cast("TextIO", _Guarded(stream)) for stream in (sys.stdout, sys.stderr))
