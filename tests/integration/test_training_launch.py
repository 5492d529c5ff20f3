"""Training as it is started: command line, several processes, two nodes, no compiler, signals, a dying rank."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import train_video
from sgm.training.checkpoints.state import CheckpointError
from sgm.weights import read_checkpoint
from tests.training_tiny import (
    REPO,
    command,
    configuration,
    environment,
    free_port,
    train,
    write_clips,
    write_release,
    write_yaml,
)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> tuple[Path, Path]:
    """(release folder, data folder)"""
    root = tmp_path_factory.mktemp("tiny")
    return write_release(root / "release"), write_clips(root / "clips", 4)


@pytest.fixture
def config(tiny, tmp_path):
    """Writes a configuration that saves under `tmp_path / "save"`."""

    def write(lora: int | None = None, stage: int = 0, **args) -> Path:
        content = configuration(*tiny, tmp_path / "save", lora=lora, **args)
        content["deepspeed"]["zero_optimization"]["stage"] = stage
        return write_yaml(tmp_path / "config.yaml", content)

    return write


def losses(folder: Path) -> list[float]:
    (found,) = folder.glob("tiny-*")
    lines = [json.loads(line) for line in (found / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if line["kind"] == "train"]


# Both runs on the same processes, which are slow to start.
ON_AND_BACK = """
import sys

sys.path.insert(0, {repo!r})
import train_video

for words in {runs!r}:
    assert train_video.main(words) == 0
"""


def test_two_ranks_resume_exactly_and_other_numbers_go_on(config, tmp_path, capsys):
    path = config(lora=4, stage=2, save_interval=2)
    done = train(path, ranks=2, port=free_port())
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("iteration 4/4") == 1  # one rank speaks
    (folder,) = (tmp_path / "save").iterdir()
    first = losses(tmp_path / "save")
    assert len(list((folder / "tensorboard").iterdir())) == 1 and len(first) == 4  # and writes
    # on one process: as many clips a step, by accumulation
    code = train_video.main([str(path), "--resume", str(folder / "2"), "--set", "args.train_iters=6"])
    shown = capsys.readouterr().out
    assert code == 0 and "2 processes, ZeRO 2, 2 clips a step -> 1 processes, ZeRO 2, 2 clips a step" in shown
    assert "(1 x 2 accumulation x 1 ranks)" in shown
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [row["samples"] for row in rows if row["kind"] == "train"][4:] == [6, 8, 10, 12]
    # on two again: from there, and from where these two were
    runs = [[str(path), "--resume", "--set", "args.train_iters=7"], [str(path), "--resume", str(folder / "2")]]
    (tmp_path / "runs.py").write_text(ON_AND_BACK.format(repo=str(REPO), runs=runs))
    done = train(ranks=2, port=free_port(), script=tmp_path / "runs.py")
    assert done.returncode == 0 and "(1 x 1 accumulation x 2 ranks)" in done.stdout, done.stderr[-3000:]
    assert "at iteration 6 of 7" in done.stdout and "at iteration 2 of 4" in done.stdout
    found = losses(tmp_path / "save")
    assert len(found) == 11 and found[-2:] == first[2:]
    # clips a step that no accumulation gives
    assert train_video.main([str(path), "--resume", "--set", "deepspeed.train_micro_batch_size_per_gpu=3"]) == 2
    said = capsys.readouterr().err
    assert "took 2 clips a step, now it would be 3" in said and "--set deepspeed.train_batch_size=3" in said


def test_a_run_that_learnt_next_to_nothing_says_so_in_its_exit_code(config, tmp_path):
    """At an absurd rate the first step ruins the weights; the others are skipped."""
    done = train(config(save_interval=1), "--set", "deepspeed.optimizer.params.lr=1e30", ranks=2, port=free_port())
    assert done.returncode == 3, done.stderr[-3000:]
    assert "warning: 3 of 4 steps were skipped" in done.stdout and "Traceback" not in done.stderr
    (folder,) = (tmp_path / "save").iterdir()
    assert [p.name for p in folder.iterdir() if p.name.isdigit()] == ["1"]


def test_tensor_parallel_run_equals_one_process(config, tmp_path):
    path = config(train_iters=2)
    assert train_video.main([str(path), "--set", f"args.save={tmp_path}/one"]) == 0
    overrides = ["--set", f"args.save={tmp_path}/two", "--set", "args.model_parallel_size=2"]
    done = train(path, *overrides, ranks=2, port=free_port())
    assert done.returncode == 0, done.stderr[-3000:]
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-5)


def test_two_nodes_without_a_compiler(config, tmp_path):
    """finetune.sh twice with NNODES=2, on a PATH that has no C++ compiler."""
    tools = tmp_path / "bin"
    tools.mkdir()
    for name in ("bash", "dirname", "env", "uname", "cat", "ls", "which"):
        found = next(p for p in (Path("/usr/bin", name), Path("/bin", name)) if p.exists())
        (tools / name).symlink_to(found)
    port = free_port()
    shared = dict(PATH=str(tools), PYTHON=sys.executable, NNODES="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    path = config(lora=4, stage=1, train_iters=2)
    nodes = [
        subprocess.Popen(
            ["/bin/bash", str(REPO / "finetune.sh"), str(path)],
            env=environment(**shared, NODE_RANK=str(node)),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            cwd=tmp_path,
        )
        for node in (0, 1)
    ]
    outputs = [node.communicate(timeout=240)[0] for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], outputs[0][-3000:] + outputs[1][-3000:]
    assert "2 processes" in outputs[0] and len(losses(tmp_path / "save")) == 2


def wait_for(text: str, process: subprocess.Popen, log: Path, seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while text not in log.read_text():
        assert process.poll() is None and time.monotonic() < end, log.read_text()[-3000:]
        time.sleep(0.1)


def children(pid: int) -> list[int]:
    found = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [int(p) for p in found if b"train_video" in Path(f"/proc/{p}/cmdline").read_bytes()]


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="reads /proc for the ranks' process ids")
def test_a_dying_rank_ends_the_job(config, tmp_path):
    log = tmp_path / "log.txt"
    with log.open("w") as out:
        launch = command(config(train_iters=9000), ranks=2, port=free_port())
        job = subprocess.Popen(launch, env=environment(), stdout=out, stderr=out, cwd=REPO)
    try:
        wait_for("   2/9000", job, log)
        victim = children(job.pid)[-1]
        os.kill(victim, signal.SIGKILL)
        assert job.wait(timeout=60) != 0
        assert "was ended by SIGKILL" in log.read_text() and "ChildFailedError" not in log.read_text()
    finally:
        if job.poll() is None:
            job.terminate()
            job.wait(timeout=60)


def test_sigterm_to_the_whole_job_saves_and_leaves(config, tmp_path):
    """Schedulers send it to every process: to the workers and their decoders, too. They give long folders as well."""
    log, scratch = tmp_path / "log.txt", tmp_path / ("scratch" * 14)
    scratch.mkdir()
    path = config(train_iters=9000, num_workers=1, save_interval=2)
    with log.open("w") as out:
        job = subprocess.Popen(
            command(path),
            env=environment(TMPDIR=str(scratch)),
            stdout=out,
            stderr=out,
            cwd=REPO,
            start_new_session=True,
        )
    try:
        wait_for("/2\n", job, log)
        (folder,) = (tmp_path / "save").iterdir()
        with pytest.raises(CheckpointError, match="another command is still training into"):
            train_video.run(train_video.parse([str(path), "--resume", str(folder)]))
        os.killpg(job.pid, signal.SIGTERM)
        assert job.wait(timeout=60) == 128 + signal.SIGTERM
    finally:
        if job.poll() is None:
            job.kill()
    assert "SIGTERM: saving at iteration" in log.read_text() and "left out" not in log.read_text()
    last = int((folder / "latest").read_text())
    assert last >= 2 and (folder / str(last) / "mp_rank_00_model_states.pt").is_file()


@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="reads /proc for the launcher's environment")
def test_sigterm_to_the_launcher_of_two_ranks_saves(config, tmp_path):
    log = tmp_path / "log.txt"
    with log.open("w") as out:
        launch = ["bash", REPO / "finetune.sh", "--nproc", "2", config(train_iters=9000)]
        job = subprocess.Popen(launch, env=environment(PYTHON=sys.executable), stdout=out, stderr=out, cwd=tmp_path)
    try:
        wait_for("   2/9000", job, log)
        known = dict(v.split("=", 1) for v in Path(f"/proc/{job.pid}/environ").read_text().split("\0") if "=" in v)
        assert int(known["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"]) >= 600  # seconds until a rank that saves would be killed
        job.terminate()
        assert job.wait(timeout=60) == 128 + signal.SIGTERM
    finally:
        if job.poll() is None:
            job.kill()
    assert "SIGTERM: saving at iteration" in log.read_text(), log.read_text()[-3000:]
    assert "Traceback" not in log.read_text()
    (folder,) = (tmp_path / "save").iterdir()
    last = int((folder / "latest").read_text())
    assert last >= 2 and (folder / str(last) / "mp_rank_00_model_states.pt").is_file()
    assert train_video.main([str(tmp_path / "config.yaml"), "--resume", str(folder), "--dry-run"]) == 0


def test_a_killed_run_goes_on_as_if_nothing_had_happened(config, tmp_path):
    path = config(lora=4, train_iters=20, save_interval=2, keep_last=2)
    log = tmp_path / "log.txt"
    with log.open("w") as out:
        job = subprocess.Popen(command(path), env=environment(), stdout=out, stderr=out, cwd=REPO)
    try:
        wait_for("/4\n", job, log)  # saved at iteration 4; dies in training, or in the next save
    finally:
        job.kill()
        job.wait(timeout=60)
    (folder,) = (tmp_path / "save").iterdir()
    reached = int((folder / "latest").read_text())
    assert 4 <= reached < 20
    assert train_video.main([str(path), "--resume"]) == 0
    assert train_video.main([str(path), "--set", f"args.save={tmp_path}/whole"]) == 0
    resumed, whole = losses(tmp_path / "save"), losses(tmp_path / "whole")
    assert len(whole) == 20 and resumed[reached - 20 :] == whole[reached:]
    saved = [found / "20" / "mp_rank_00_model_states.pt" for found in (folder, *(tmp_path / "whole").iterdir())]
    first, second = (read_checkpoint(file)["module"] for file in saved)
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--set", "args.trian_iters=3"], "did you mean `train_iters`?"),
        (["--set", "deepspeed.fp16.enabled=true"], "--set deepspeed.bf16.enabled=true"),
        (["--resume", "/nowhere"], "/nowhere"),
    ],
)
def test_errors_are_one_message_and_exit_code_2(config, arguments, message, capsys):
    assert train_video.main([str(config()), *arguments]) == 2
    shown = capsys.readouterr().err
    assert shown.startswith("error: ") and message in shown


def test_bugs_keep_their_traceback(config, monkeypatch):
    def broken(*_, **__):
        raise ValueError("a bug")

    monkeypatch.setattr("sgm.training.run.train", broken)
    with pytest.raises(ValueError, match="a bug"):
        train_video.main([str(config())])


def test_help_is_quick_and_whole():
    done = subprocess.run(command("--help"), capture_output=True, text=True, timeout=30, cwd=REPO)
    assert done.returncode == 0
    assert all(flag in done.stdout for flag in ("--base", "--set", "--dry-run", "--resume", "--device", "--seed"))
