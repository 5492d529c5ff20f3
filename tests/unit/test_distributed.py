"""Process groups, random state, and tensor parallelism with two real processes."""

from __future__ import annotations

import os
import random
import signal
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from sgm import distributed
from sgm.weights.checksums import WeightsError
from sgm.weights.tensor_parallel import cut_of, merge_partitions, partition_state
from tests.dit_tiny import tiny_network
from tests.tensor_parallel_worker import VARIANTS, build, run

REPO = Path(__file__).resolve().parents[2]


def python(code: str, **env: str) -> subprocess.CompletedProcess[str]:
    clean = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    return subprocess.run(
        [sys.executable, "-c", code], cwd=REPO, env=clean | env, capture_output=True, text=True, timeout=120
    )


def test_importing_is_light_and_trivial_answers_need_no_groups() -> None:
    done = python(
        "import sys; from sgm import distributed as d, modules\n"
        "assert not {'sat', 'deepspeed', 'sat.mpu'} & set(sys.modules), 'heavy import'\n"
        "import torch; t = torch.ones(2)\n"
        "assert d.broadcast_in_model_parallel(t) is t\n"
        "print(d.data_parallel_rank(), d.data_parallel_world_size(), d.model_parallel_rank(),"
        " d.model_parallel_world_size())\n"
        "d.shutdown()\n"
    )
    assert done.stdout.split() == ["0", "1", "0", "1"], done.stderr


def test_one_process_needs_no_launcher_and_leaves_the_environment_alone() -> None:
    done = python(
        "import os; before = dict(os.environ)\n"
        "from sgm.distributed import init_distributed, ensure_groups, shutdown\n"
        "first, second = init_distributed('cpu'), init_distributed('cpu')\n"
        "assert first == second and first.world_size == 1 and str(first.device) == 'cpu'\n"
        "assert dict(os.environ) == before\n"
        "ensure_groups(); ensure_groups(1)\n"
        "import torch; t = torch.ones(2); torch.distributed.all_reduce(t); assert t.tolist() == [1, 1]\n"
        "try: ensure_groups(2)\n"
        "except ValueError as e: print(e)\n"
        "shutdown(); shutdown(); assert not torch.distributed.is_initialized()\n"
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("model_parallel_size 2 does not divide the 1 processes") and not done.stderr


@pytest.mark.parametrize(
    ("env", "message"),
    [
        ({"WORLD_SIZE": "2"}, "RANK or LOCAL_RANK is not set"),
        ({"WORLD_SIZE": "2", "RANK": "2", "LOCAL_RANK": "0"}, "RANK 2 is outside 0..1"),
        ({"WORLD_SIZE": "two"}, "must be whole numbers"),
    ],
)
def test_inconsistent_environment(monkeypatch: pytest.MonkeyPatch, env: dict[str, str], message: str) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(distributed.DistributedError, match=message):
        distributed.init_distributed("cpu")


def test_unknown_device_type() -> None:
    with pytest.raises(distributed.DistributedError, match="'tpu'.*choose"):
        distributed.init_distributed("tpu")


def test_preserve_rng() -> None:
    def draws() -> tuple[float, float, float]:
        return random.random(), float(np.random.rand()), float(torch.rand(()))

    random.seed(3), np.random.seed(3), torch.manual_seed(3)
    expected = draws()
    random.seed(3), np.random.seed(3), torch.manual_seed(3)
    before = torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark
    with pytest.raises(RuntimeError), distributed.preserve_rng():
        draws()
        torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = True, True
        raise RuntimeError
    assert draws() == expected
    assert (torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark) == before


WAITING = """
import os, signal, sys, time, torch
from datetime import timedelta
from sgm.distributed import from_first, wait_for_all
signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where the tests run in the background
rank = int(os.environ["RANK"])
store = torch.distributed.FileStore(sys.argv[1], 2)
store.add("started", 1)
while store.add("started", 0) < 2:  # on a busy machine one imports for longer than the limit below
    time.sleep(0.01)
torch.distributed.init_process_group("gloo", timeout=timedelta(seconds=4), store=store, world_size=2, rank=rank)
found = from_first(lambda: time.sleep(5) or "found")
try:
    print(found, flush=True)
    wait_for_all() if rank == 1 else time.sleep(60)
except KeyboardInterrupt:
    print("stopped", flush=True)
os._exit(0)
"""


def test_waiting_outlasts_the_limit_of_collectives_and_hears_signals(tmp_path: Path) -> None:
    clean = {k: v for k, v in os.environ.items() if k not in ("WORLD_SIZE", "LOCAL_RANK")}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", WAITING, str(tmp_path / "store")], cwd=REPO, env=clean | {"RANK": str(rank)},
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for rank in range(2)
    ]  # fmt: skip
    try:
        for rank in ranks:
            assert rank.stdout.readline() == "found\n", rank.communicate()[1]
        for rank in ranks:
            rank.send_signal(signal.SIGINT)
        assert [rank.communicate(timeout=60)[0] for rank in ranks] == ["stopped\n"] * 2
    finally:
        for rank in ranks:
            rank.kill()


# --- tensor parallelism -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Run the worker on two processes, over gloo; returns the folder with its results."""
    folder = tmp_path_factory.mktemp("parallel")
    for variant in VARIANTS:
        save_file(random_state(variant), folder / f"{variant}.safetensors")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}
    workers = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.tensor_parallel_worker", str(folder)],
            cwd=REPO,
            env=os.environ | shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    logs = [worker.communicate(timeout=150)[0] for worker in workers]
    assert [worker.returncode for worker in workers] == [0, 0], "\n".join(logs)
    return folder


def random_state(variant: str) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(11)
    state = build(variant, 1).state_dict()
    return {
        name: value.clone() if "pos_embed" in name else torch.randn(value.shape, generator=draw) * 0.1
        for name, value in state.items()
    }


@pytest.mark.parametrize("variant", VARIANTS)
def test_two_parts_give_the_outputs_and_gradients_of_one(two_processes: Path, variant: str) -> None:
    network = build(variant, 1)
    network.load_state_dict(random_state(variant))
    out, grads = run(network)
    parts = [load_file(two_processes / f"{variant}.{rank}.safetensors") for rank in range(2)]
    for part in parts:
        torch.testing.assert_close(part["out"], out, rtol=1e-4, atol=1e-4)
    found = [{n.removeprefix("grad "): t for n, t in part.items() if n.startswith("grad ")} for part in parts]
    for name, expected in grads.items():
        pair = [part[name] for part in found]
        if cut_of(name) is None:
            torch.testing.assert_close(pair[0], pair[1], rtol=1e-5, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")
        merged = merge_partitions([{name: t} for t in pair], strict=False)[name]
        # The floor is for gradients that vanish: softmax does not see a bias common to all keys.
        tolerance = 1e-4 * float(expected.abs().max()) + 1e-7
        torch.testing.assert_close(merged, expected, rtol=0, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}")
    assert set(found[0]) == set(grads)


def test_whole_parameters_start_equal_on_all_parts(two_processes: Path) -> None:
    for variant in VARIANTS:
        first, second = (load_file(two_processes / f"{variant}.{rank}.safetensors") for rank in range(2))
        whole = [name for name in first if name.startswith("init ") and cut_of(name.removeprefix("init ")) is None]
        assert len(whole) > 20
        assert all(torch.equal(first[name], second[name]) for name in whole)


@pytest.mark.parametrize("world", [1, 3])
def test_partition_and_merge_are_inverse(world: int) -> None:
    network = tiny_network(lora={"r": 2, "targets": ["mlp", "attention"]})
    state = {n: torch.rand(t.shape) for n, t in network.state_dict().items()}
    parts = [partition_state(state, rank, world) for rank in range(world)]
    if world > 1:
        qkv = "transformer.layers.0.attention.query_key_value.original.weight"
        heads = state[qkv].unflatten(0, (3, 3, 64))  # thirds, heads, width
        assert torch.equal(parts[1][qkv], heads[:, 1].flatten(0, 1))
    merged = merge_partitions(parts)
    assert merged.keys() == state.keys() and all(torch.equal(merged[n], t) for n, t in state.items())


def test_partition_errors() -> None:
    state = {"transformer.layers.0.attention.dense.weight": torch.zeros(4, 6), "time_embed.0.bias": torch.zeros(2)}
    with pytest.raises(WeightsError, match="dense.weight .*cannot be cut into 4"):
        partition_state(state, 0, 4)
    with pytest.raises(WeightsError, match="rank 2 is outside"):
        partition_state(state, 2, 2)
    with pytest.raises(WeightsError, match="time_embed.0.bias is whole.*differs"):
        merge_partitions([state, state | {"time_embed.0.bias": torch.ones(2)}])
    with pytest.raises(WeightsError, match="names: time_embed.0.bias"):
        merge_partitions([state, {"transformer.layers.0.attention.dense.weight": torch.zeros(4, 6)}])


def test_a_program_of_one_process_leaves_its_group_at_its_end():
    """NCCL warns of groups that are left, whatever the program was."""
    code = "import atexit, torch.distributed as d; atexit.register(lambda: print(d.is_initialized()))\n"
    code += "from sgm.distributed import ensure_groups; ensure_groups(); print(d.is_initialized())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=REPO, check=True)
    assert done.stdout.split() == ["True", "False"]
