"""Rooms stand above what they use: no import upwards, no circle, and the product does without `tools/`."""

from __future__ import annotations

import ast
from graphlib import TopologicalSorter

import pytest

from tests.sampling_tiny import REPO

# From the ground up; rooms of one floor do not know each other. What lies beside the packages is below them all.
FLOORS = (
    {"errors", "places", "lean_sat", "files", "typed", "util", "config", "placeholders", "cli", "flags", "secrets"}
    | {"launch", "lock", "distributed", "progress"},
    {"weights"},
    {"modules"},
    {"models"},
    {"data", "convert", "parallel"},
    {"cache", "hub"},
    {"inference"},
    {"training", "publish"},
    {"sample_video", "train_video", "serve"},
    {"__main__"},
)
ENTRIES = {"sample_video.py", "train_video.py"}
MODULES = {
    ".".join(path.relative_to(REPO).with_suffix("").parts).removesuffix(".__init__"): path
    for path in [*sorted((REPO / "sgm").rglob("*.py")), *(REPO / name for name in sorted(ENTRIES))]
}


def imports(name: str) -> set[str]:
    """Modules of this project that module `name` imports, also inside functions.

    The root offers the Python interface, which it imports when that is asked for.
    """
    found: set[str] = set()
    if name == "sgm":
        return {"sgm.lean_sat"}
    for node in ast.walk(ast.parse(MODULES[name].read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            inner = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= (inner & MODULES.keys()) | ({node.module} if inner - MODULES.keys() else set())
    return {
        module for module in found if module.split(".")[0] in {"sgm", "tools", "tests", "sample_video", "train_video"}
    }


def room(module: str) -> str:
    return module.removeprefix("sgm.").split(".")[0]


def floor(module: str) -> int | None:
    return next((k for k, rooms in enumerate(FLOORS) if room(module) in rooms), None)


def test_every_module_has_a_floor():
    assert {name for name in MODULES if name != "sgm" and floor(name) is None} == set()


@pytest.mark.parametrize("name", sorted(MODULES))
def test_imports_point_downwards(name):
    own = floor(name) if name != "sgm" else 0
    for other in imports(name) - {"sgm"}:
        below = floor(other)
        assert below is not None, f"{name} imports {other}, which is no part of the product"
        assert below < own or room(other) == room(name) or own == 0 == below, (
            f"{name} imports {other}, above or beside it"
        )


def test_no_circle():
    graph = {name: imports(name) & MODULES.keys() for name in MODULES}
    list(TopologicalSorter(graph).static_order())  # raises CycleError, which names the circle
