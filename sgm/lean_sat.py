"""SwissArmyTransformer without what its packages import at their start.

`import sat` takes 3 s: it brings transformers' models, datasets, pandas, wandb and Triton for language models and a
training loop that nothing here uses, and `sat.mpu` or `sat.model.base_model` cannot be had without it. So SAT's own
`__init__` of `sat` and `sat.model` runs only when somebody asks for a name that it defines (`sat.AutoModel`, `from
sat.model import BaseModel`). Modules and classes are the same ones whichever way they are reached. Where SAT was
imported before this project, nothing changes.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Sequence
from functools import partial
from importlib import import_module
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from types import ModuleType
from typing import Any

_DEFINED = ("__version__", "__all__")  # of names in this form, those that an `__init__` may define


class NamesOnDemand:
    """The `__getattr__` of a package whose `__init__` has not run: it does for the first name that needs it."""

    def __init__(self, package: ModuleType, run_init: Callable[[ModuleType], None]):
        self.package, self.run_init = package, run_init
        self._lock = threading.RLock()  # other threads wait until all names are there
        self._running = False

    def __call__(self, name: str) -> Any:
        if not name.startswith("__") or name in _DEFINED:
            full = f"{self.package.__name__}.{name}"
            if full in sys.modules or PathFinder.find_spec(full, self.package.__path__):
                return import_module(full)
            with self._lock:
                self._complete(name)
            if name in vars(self.package):
                return vars(self.package)[name]
        raise AttributeError(f"module {self.package.__name__!r} has no attribute {name!r}", name=name, obj=self.package)

    def _complete(self, name: str) -> None:
        """Run `__init__`, unless it did or does: what it imports may ask for names that are still to come."""
        if self._running or vars(self.package).get("__getattr__") is not self:
            return
        self._running = True
        try:
            self.run_init(self.package)
            del self.package.__getattr__
        except ModuleNotFoundError as error:
            if error.name is None:  # said already, of a package below
                raise
            raise ModuleNotFoundError(
                f"{self.package.__name__}.{name} comes with all of SwissArmyTransformer, which needs the package "
                f"{error.name!r}: install that, or import from the module that defines it (as sat.model.base_model)"
            ) from error
        finally:
            self._running = False


class DeferredInit(SourceFileLoader):
    """Loads a package without running its `__init__`."""

    def exec_module(self, module: ModuleType) -> None:
        module.__getattr__ = NamesOnDemand(module, super().exec_module)  # type: ignore[method-assign]


class DeferredDownload(SourceFileLoader):
    """Loads `sat.resources`, whose one function fetches models of SAT, without what that takes."""

    def exec_module(self, module: ModuleType) -> None:
        def auto_create(*args: Any, **kwargs: Any) -> Any:
            return import_module("sat.resources.download").auto_create(*args, **kwargs)

        module.auto_create = auto_create  # type: ignore[attr-defined]


class WholeRegistry(SourceFileLoader):
    """Loads SAT's table of models, and adds its own to it once one is asked for that is not there."""

    def exec_module(self, module: ModuleType) -> None:
        super().exec_module(module)
        registry = module.model_registry
        registered = registry.get

        def get(name: str) -> type:
            if name not in registry.member:
                import_module("sat.model.official")
            return registered(name)

        registry.get = get


class WithoutDeepSpeed(SourceFileLoader):
    """Loads `sat.mpu`, which takes three functions for activation checkpoints from DeepSpeed where there is a GPU.

    They import it when they are called: it takes longer than all of SAT that is used here.
    """

    HOME = "deepspeed.runtime.activation_checkpointing.checkpointing"
    TAKEN = ("checkpoint", "get_cuda_rng_tracker", "model_parallel_cuda_manual_seed")

    def exec_module(self, module: ModuleType) -> None:
        if self.HOME in sys.modules:
            super().exec_module(module)
            return
        stand_in = ModuleType(self.HOME)
        for name in self.TAKEN:
            setattr(stand_in, name, partial(self._call, name))
        sys.modules[self.HOME] = stand_in
        try:
            super().exec_module(module)
        finally:
            del sys.modules[self.HOME]

    @classmethod
    def _call(cls, name: str, *args: Any, **kwargs: Any) -> Any:
        return getattr(import_module(cls.HOME), name)(*args, **kwargs)


_LOADERS: dict[str, type[SourceFileLoader]] = {
    "sat": DeferredInit,
    "sat.model": DeferredInit,
    "sat.mpu": WithoutDeepSpeed,
    "sat.resources": DeferredDownload,
    "sat.model.registry": WholeRegistry,
}


class LeanSat:
    """Finds these modules of SAT before Python's own finders do, and leaves all else to them."""

    @staticmethod
    def find_spec(name: str, path: Sequence[str] | None = None, target: ModuleType | None = None) -> ModuleSpec | None:
        loader = _LOADERS.get(name)
        spec = PathFinder.find_spec(name, path, target) if loader else None
        if loader is None or spec is None or type(spec.loader) is not SourceFileLoader:
            return None
        spec.loader = loader(spec.loader.name, spec.loader.path)
        return spec


def install() -> None:
    """Import SAT in this way from now on, in this process."""
    if not any(isinstance(finder, LeanSat) for finder in sys.meta_path):
        sys.meta_path.insert(0, LeanSat())
