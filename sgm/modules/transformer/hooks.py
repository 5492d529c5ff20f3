"""SAT's extension points: the hooks of a transformer's forward, which further mixins may answer.

As in SAT a mixin's method with the name of a hook takes the place of what stood there, and one that is marked
`non_conflict` is called around it and gets it as `old_impl`; the last mixin's is the outermost. Two things differ. A
hook that would never be called is an error, where SAT warns or says nothing. And an `attention_fn` that takes the place
of attention gets query and key as attention does, normalised and rotated, where SAT allows none beside the network's.
"""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import nn

from sgm.distributed import model_parallel_world_size
from sgm.errors import SgmError
from sgm.modules.transformer.lora_state import OWN_MIXINS
from sgm.modules.transformer.sat_base import HOOKS_DEFAULT, BaseMixin

HOOKS = (
    "word_embedding_forward",
    "position_embedding_forward",
    "layer_forward",
    "attention_forward",
    "attention_fn",
    "mlp_forward",
    "final_forward",
)
ALMOST = 0.85  # likeness of names from which on one is taken for a slip of the pen
Hook = Callable[..., Any]


class HookError(SgmError):
    """A mixin has hooks that cannot be called here, or no effect at all. The message names mixin and hook."""


@dataclass(eq=False)
class Watched:
    """A further mixin's hook, and whether a forward has called it."""

    mixin: str
    hook: str
    call: Hook
    called: bool = False

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.called = True
        return self.call(*args, **kwargs)

    def __str__(self) -> str:
        return f"the hook {self.hook!r} of mixin {self.mixin!r}"


def collect_hooks(
    model: nn.Module, mixins: Mapping[str, nn.Module]
) -> tuple[dict[str, Hook], dict[str, str], list[Watched]]:
    """What answers each hook, the names of the mixins that do (SAT's `hook_origins`), and further mixins' hooks.

    A model's own methods come first, as in SAT.

    Raises:
        HookError: a further mixin that has no effect, or a hook that would not be called; or layers are split over
            processes, each of which holds some of the heads.
    """
    added = {name: mixin for name, mixin in mixins.items() if name not in OWN_MIXINS}
    if added and model_parallel_world_size() > 1:
        raise HookError(f"mixin {next(iter(added))!r} does not go with a model_parallel_size above 1.")
    for name, mixin in added.items():
        _check_effect(name, mixin)
    hooks, origins, watched = dict[str, Hook](), dict[str, str](), list[Watched]()
    for hook in HOOKS:
        found: dict[str, Hook] = {}
        for name, part in {"model": model, **mixins}.items():
            if hasattr(part, hook):
                call = getattr(part, hook)
                found[name] = call if name in OWN_MIXINS else Watched(name, hook, call)
        if found:
            hooks[hook], origins[hook] = _chain(hook, found)
            watched += [call for call in found.values() if isinstance(call, Watched)]
    return hooks, origins, watched


def require_called(watched: Iterable[Watched]) -> None:
    """Raises HookError: a whole forward has passed a hook by."""
    silent = [hook for hook in watched if not hook.called]
    if silent:
        raise HookError(
            f"{' and '.join(map(str, silent))} {'was' if len(silent) == 1 else 'were'} not called: another hook stands "
            "in the way, which does not call its old_impl, or does by itself what the network would do by this one."
        )


def _chain(hook: str, found: Mapping[str, Hook]) -> tuple[Hook, str]:
    """What is called for a hook, and SAT's text on where it comes from."""
    around = [name for name, call in found.items() if _is_marked(call, "non_conflict")]
    instead = [name for name in found if name not in around]
    if len(instead) > 1:  # the network's own ways give room, where they may
        instead = [name for name in instead if name not in OWN_MIXINS or not _is_marked(found[name], "replacable")]
    if len(instead) > 1:
        raise HookError(
            f"{hook!r} of mixin {instead[0]!r} would never be called: mixin {instead[1]!r} takes its place. Mark that "
            "one non_conflict and let it call its old_impl, or leave one of the two out."
        )
    for name in around:
        if "old_impl" not in inspect.signature(_bare(found[name])).parameters:
            raise HookError(f"{hook!r} of mixin {name!r} is marked non_conflict and takes no argument old_impl.")
    call, origin = (found[instead[0]], instead[0]) if instead else (None, "default")
    for name in around:
        call = found[name] if call is None else partial(found[name], old_impl=call)
        origin = f"{name} -> {origin}"
    assert call is not None  # `found` is not empty
    return call, origin


def _check_effect(name: str, mixin: nn.Module) -> None:
    """Raises HookError: nothing of a further mixin would be called, or something that looks like a hook would not."""
    kind = type(mixin)
    methods = [method for method in dir(kind) if callable(getattr(kind, method)) and not hasattr(BaseMixin, method)]
    for method in methods:
        like = [hook for hook in HOOKS if difflib.SequenceMatcher(None, method, hook).ratio() >= ALMOST]
        if method not in HOOKS and (method in HOOKS_DEFAULT or like):
            raise HookError(
                f"mixin {name!r} defines the hook {method!r}, which this network does not call; it calls "
                f"{', '.join(HOOKS)}." + (f" Did you mean {like[0]!r}?" if like else "")
            )
    if not set(methods) & set(HOOKS) and getattr(kind, "reinit", None) is BaseMixin.reinit:
        raise HookError(
            f"mixin {name!r} ({kind.__module__}.{kind.__name__}) would have no effect: it has no reinit and no hook of "
            f"{', '.join(HOOKS)}."
        )


def _bare(call: Hook) -> Hook:
    return call.call if isinstance(call, Watched) else call


def _is_marked(call: Hook, mark: str) -> bool:
    return hasattr(_bare(call), mark)
