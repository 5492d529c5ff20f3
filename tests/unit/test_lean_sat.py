"""SAT without its packages' start: what is not loaded, and that all of it can be had, the same whichever way.

Each case is a process of its own: what has been imported stays.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from sgm.lean_sat import LeanSat, PathFinder
from tests.conftest import REPO

OURS = """
import sys, sgm
from sat.model.base_model import AutoModel, BaseMixin, BaseModel
from sat.model.finetune.lora2 import LoraMixin
from sat.training.model_io import load_checkpoint
from sat.transformer_defaults import HOOKS_DEFAULT
from sat import mpu
"""
HEAVY = "{'transformers', 'datasets', 'pandas', 'wandb', 'triton', 'requests', 'deepspeed', 'sat.model.official'}"


def run(code: str) -> str:
    """The last line that the code prints; DeepSpeed logs to standard output."""
    done = subprocess.run([sys.executable, "-c", code], cwd=REPO, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()[-1] if done.stdout else ""


def test_what_is_used_here_brings_nothing_else():
    assert run(OURS + f"print({HEAVY} & set(sys.modules))") == "set()"


def test_all_names_are_there_when_asked_for():
    """The same ones as where SAT came first, and the same objects whichever way they are reached."""
    names = (
        "print(*sorted(n for m in (sat, sat.model) for n in vars(m) if not n.startswith('__') or n == '__version__'))"
    )
    asked = (
        "import sat, sat.model.mixins\n"
        "assert sat.model.BaseModel is BaseModel and sat.AutoModel is AutoModel\n"
        "from sat import get_args, get_tokenizer, training_main\n"
        "from sat.model import BaseMixin as again, GLMModel\n"
        "assert again is BaseMixin and issubclass(GLMModel, BaseModel)\n"
        "assert sat.__version__ == '0.4.12' and sat.mpu is mpu and sat.training.model_io.load_checkpoint is load_checkpoint\n"
    )
    usual = OURS.replace("sgm", "sat").replace("AutoModel, ", "") + "import sat.model.mixins\n"
    assert run(OURS + asked + names) == run(usual + names)


def test_nothing_changes_where_sat_came_first():
    code = (
        "import sat, sgm, importlib.machinery as m\n"
        "assert type(sat.__spec__.loader) is type(sat.model.__spec__.loader) is m.SourceFileLoader\n"
        "from sgm.modules.transformer.sat_base import BaseModel\n"
        "assert BaseModel is sat.model.BaseModel and '__getattr__' not in vars(sat)\n"
    )
    run(code)


@pytest.mark.parametrize(
    "line",
    [
        "from sat import *; get_args, get_tokenizer, AutoModel",
        "import sat.model; sat.model.T5Model",
        "from sat.model.registry import model_registry; model_registry.get('BertModel')",
        "from sat.resources import auto_create; import sat; sat.AutoModel",
        "from sat.helpers import list_avail_models; assert 'GLMModel' in list_avail_models()",
    ],
)
def test_ways_to_what_is_deferred(line):
    run(f"import sgm\n{line}")


def test_threads_get_the_same():
    code = (
        "import sgm, sat, threading\nfound = []\n"
        "threads = [threading.Thread(target=lambda: found.append(sat.training_main)) for _ in range(4)]\n"
        "for t in threads: t.start()\n"
        "for t in threads: t.join()\n"
        "assert len(found) == 4 and len(set(found)) == 1\n"
    )
    run(code)


@pytest.mark.parametrize("line", ["from sat.model import BaseModel", "sat.training_main"])
def test_what_is_missing_is_named_where_it_is_asked_for(line):
    """Triton, which has no release for a Mac: SAT's own models need it, what this project takes does not."""
    code = OURS + (
        "sys.modules['triton'] = None\nimport sat.model\n"
        "assert not hasattr(sat, '__wrapped__')\n"  # as inspect asks every module
        f"try: {line}\n"
        "except ModuleNotFoundError as error: print(error)\n"
    )
    said = run(code)
    assert "sat.model." in said and "'triton'" in said and "(as sat.model.base_model)" in said


def test_unknown_names_are_errors():
    code = (
        "import sgm, sat\nfrom sat.model.registry import model_registry\nsaid = []\n"
        "for ask in (lambda: sat.nothing, lambda: model_registry.get('Nothing')):\n"
        "    try: ask()\n"
        "    except (AttributeError, ValueError) as error: said.append(str(error))\n"
        "print(*said, sep='; ')"
    )
    assert run(code) == "module 'sat' has no attribute 'nothing'; model_class Nothing not found."


def test_sat_is_not_installed(monkeypatch):
    monkeypatch.setattr(PathFinder, "find_spec", lambda *_: None)
    assert LeanSat.find_spec("sat") is None


def test_downloads_are_handed_on(monkeypatch):
    from sat.resources import auto_create

    taken = SimpleNamespace(auto_create=lambda *args, **kwargs: (args, kwargs))
    monkeypatch.setitem(sys.modules, "sat.resources.download", taken)
    assert auto_create("bert-base-uncased", path=Path("there")) == (("bert-base-uncased",), {"path": Path("there")})


def test_deepspeeds_checkpoints_come_when_they_are_called():
    """What `sat.mpu` takes from DeepSpeed where PyTorch sees a GPU."""
    code = (
        "import sys, torch, sgm\n"
        "torch.cuda.is_available = lambda: True\n"
        "from sat import mpu\n"
        "early = {'deepspeed'} & set(sys.modules)\n"
        "import deepspeed.runtime.activation_checkpointing.checkpointing as true\n"
        "print(early, mpu.get_cuda_rng_tracker() is true.get_cuda_rng_tracker(), mpu.checkpoint(abs, torch.tensor(-2.0)))"
    )
    assert run(code) == "set() True tensor(2.)"
