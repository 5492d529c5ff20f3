"""Checkpoints of one process: layout, exact continuation, search, refusals, full disks, keep_last."""

from __future__ import annotations

import dataclasses
import errno
import json
import math
import os
import random
import re
import shutil
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from sgm.training.checkpoints.folder import RunRecord, new_run
from sgm.training.checkpoints.load import find_resume, identity, load_state
from sgm.training.checkpoints.partitions import layout_differences, optimizer_state, repartitioned
from sgm.training.checkpoints.save import save_checkpoint
from sgm.training.checkpoints.state import CheckpointError, capture_rng, restore_rng
from sgm.weights import WeightsError
from sgm.weights.release import locate
from tests.checkpoint_tiny import configuration, leftovers, load_module, put_back, state_of, step, toy_run

CONFIG = configuration()
NETWORK = "model.diffusion_model."


@pytest.fixture
def run():
    run = toy_run()
    step(run)
    return run


def save(folder, run, iteration, **options):
    options = {"config": CONFIG, **options}
    return save_checkpoint(folder, run, state_of(run, iteration), **options)


def test_layout_is_sats_and_files_hold_plain_values_only(tmp_path, run):
    assert save(tmp_path, run, 3) == tmp_path / "3"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["3", "3-ema", "latest", "model_config.json"]
    assert sorted(p.name for p in (tmp_path / "3").iterdir()) == ["mp_rank_00_model_states.pt", "resume", "run.json"]
    assert (tmp_path / "latest").read_text() == "3"
    assert json.loads((tmp_path / "model_config.json").read_text()) == {
        "model_class": "ToyEngine",
        "model_parallel_size": 1,
    }
    content = torch.load(tmp_path / "3" / "mp_rank_00_model_states.pt", weights_only=True)
    assert content["iteration"] == 3 and content["global_samples"] == 12
    assert locate(tmp_path) == ([tmp_path / "3" / "mp_rank_00_model_states.pt"], 3)


def test_a_record_says_who_had_the_same_clips_and_weights(tmp_path, run):
    """Neighbours hold the parts of a weight, then the shares of a clip; what had fewer shares had all in its last."""
    save(tmp_path, run, 1)
    record = RunRecord.read(tmp_path / "1")
    assert record.clip_processes == 1 and [record.rank_of(d, 0, 0) for d in (0, 1)] == [0, None]
    shared = dataclasses.replace(record, world_size=8, model_parallel_size=2, sequence_parallel_size=2)
    assert [shared.rank_of(d, s, p) for d in (0, 1) for s in (0, 1) for p in (0, 1)] == [*range(8)]
    assert shared.rank_of(1, 3, 1) == 7 and shared.rank_of(2, 0, 0) is None


def test_weights_are_the_networks_or_the_whole_engines(tmp_path, run):
    expected = run.module.state_dict()
    save(tmp_path, run, 1)
    network = load_module(tmp_path / "1")
    assert set(network) == {n for n in expected if n.startswith(NETWORK)} and f"{NETWORK}table" in network
    save(tmp_path, run, 2, save_frozen=True)
    whole = load_module(tmp_path)
    assert set(whole) == set(expected) and "conditioner.weight" in whole
    for name, value in whole.items():
        assert torch.equal(value, expected[name])


def test_averaged_weights_are_saved_and_the_models_own_come_back(tmp_path, run):
    before = {n: t.clone() for n, t in run.module.state_dict().items()}
    shadows = [run.optimizer.state[p]["shadow"].clone() for p in run.optimizer.param_groups[0]["params"]]
    save(tmp_path, run, 3)
    averaged = load_module(tmp_path / "3-ema")
    trained = [n for n, p in run.module.named_parameters() if p.requires_grad]
    for name, shadow in zip(trained, shadows, strict=True):
        assert torch.equal(averaged[name], shadow)
        assert not torch.equal(averaged[name], before[name])
    for name, value in run.module.state_dict().items():
        assert torch.equal(value, before[name])
    resumed = load_state(tmp_path / "3")
    assert all(torch.equal(a, b) for a, b in zip(resumed.ema.values(), shadows, strict=True))


def test_continuation_is_bit_for_bit_the_uninterrupted_run(tmp_path, run):
    losses = [step(run) for _ in range(2)]
    save(tmp_path, run, 3)
    uninterrupted = [step(run) for _ in range(4)]

    other = toy_run(seed=5)
    torch.manual_seed(77)
    state = load_state(tmp_path / "3")
    put_back(other, state)
    restore_rng(state.rng)
    assert [step(other) for _ in range(4)] == uninterrupted and losses != uninterrupted[:2]
    assert state.iteration == 3 and state.sampler == {"epoch": 1, "position": 3, "weights": [0.5, 0.5]}


def test_padding_of_zero_3_is_cleared_and_nothing_else():
    """Also with moments in 8 bits, whose block maxima are fewer than the values."""
    module = torch.nn.Module()
    module.small, module.large = torch.nn.Parameter(torch.empty(0)), torch.nn.Parameter(torch.empty(0))
    for p, size, share in ((module.small, 1, 2), (module.large, 600, 600)):
        p.ds_numel, p.partition_numel = size, lambda share=share: share
    master = torch.ones(602).index_fill(0, torch.tensor(1), torch.nan)
    moments = {"m_codes": torch.ones(768, dtype=torch.int8), "m_tops": torch.full((3,), 5), "step": 2}
    wrapper = SimpleNamespace(
        fp32_partitioned_groups_flat=[master], fp16_groups=[[module.small, module.large]], persistent_parameters=[],
        _partition_all_parameters=print, _reassign_or_swap_out_partitioned_parameters=print,
    )  # fmt: skip
    basic = SimpleNamespace(state={master: moments})
    run = SimpleNamespace(
        module=module, optimizer=wrapper, basic_optimizer=basic, zero_optimization_stage=lambda: 3, dp_world_size=1,
        global_steps=0, global_samples=0, micro_steps=0, skipped_steps=0,
    )  # fmt: skip
    state = optimizer_state(run)
    assert state["layout"]["pieces"] == [[0, 0, "small", 0, 1], [0, 2, "large", 0, 600]]
    assert state["masters"][0][:3].tolist() == [1, 0, 1] and state["masters"][0].sum() == 601
    assert state["states"][0]["m_codes"][:3].tolist() == [1, 0, 1]
    assert state["states"][0]["m_tops"].tolist() == [5, 5, 5] and state["states"][0]["step"] == 2


def test_every_generator_goes_on_where_it_was():
    from deepspeed.runtime.activation_checkpointing.checkpointing import get_cuda_rng_tracker

    tracker = get_cuda_rng_tracker()
    tracker.reset()
    tracker.add("model-parallel-rng", 1234)

    def draw():
        with tracker.fork():
            tracked = torch.rand(3).tolist()
        return [
            random.random(),
            random.gauss(0, 1),
            np.random.rand(),
            np.random.randn(),
            torch.randn(3).tolist(),
            tracked,
        ]

    try:
        random.gauss(0, 1), np.random.randn()  # leaves half a pair cached in both
        state = capture_rng()
        expected = [draw(), draw()]
        restore_rng(state)
        assert [draw(), draw()] == expected
        restore_rng(state)
        assert [draw(), draw()] == expected
        with pytest.raises(CheckpointError, match="damaged"):
            restore_rng({**state, "numpy": {"keys": torch.zeros(3)}})
    finally:
        tracker.reset()


# --- choosing what to resume -------------------------------------------------------------------------------------


def test_the_newest_complete_checkpoint_of_the_same_configuration_is_found(tmp_path, run, caplog):
    assert find_resume(tmp_path, "toy", CONFIG) is None
    save(tmp_path / "toy-01-01-00-00", run, 8)
    save(tmp_path / "toy-01-02-00-00", run, 2)
    newest = save(tmp_path / "toy-01-02-00-00", run, 4)
    save(tmp_path / "toy-01-03-00-00", run, 9, config=configuration(seed=2))
    save(tmp_path / "other-01-04-00-00", run, 9, config=configuration(experiment_name="other"))
    save(tmp_path / "toy-big-01-05-00-00", run, 9, config=configuration(experiment_name="toy-big"))
    assert find_resume(tmp_path, "toy", CONFIG) == newest
    (newest / "resume" / "rank_00000.pt").unlink()
    assert find_resume(tmp_path, "toy", CONFIG) == tmp_path / "toy-01-02-00-00" / "2"
    assert "rank_00000.pt is missing" in caplog.text
    (tmp_path / "toy-01-02-00-00" / "2" / "run.json").write_text("{")
    assert find_resume(tmp_path, "toy", CONFIG) == tmp_path / "toy-01-01-00-00" / "8"
    with (tmp_path / "toy-01-01-00-00" / "8" / "mp_rank_00_model_states.pt").open("r+b") as file:
        file.truncate(100)
    with pytest.raises(CheckpointError) as error:  # a search that would start anew beside one that differs
        find_resume(tmp_path, "toy", CONFIG)
    assert "100 bytes long" in caplog.text
    assert str(tmp_path / "toy-01-03-00-00" / "9") in str(error.value) and "args.seed: 2 -> 1" in str(error.value)
    assert "toy-big" not in str(error.value) and "other-01" not in str(error.value)


def test_damaged_checkpoints_alone_are_an_error_not_a_new_run(tmp_path, run):
    (save(tmp_path / "toy-01-01-00-00", run, 8) / "run.json").unlink()
    with pytest.raises(CheckpointError, match=r"(?s)no complete checkpoint .*/toy-.*no run.json.*leave out --resume"):
        find_resume(tmp_path, "toy", CONFIG)


def test_of_several_runs_that_fit_the_one_that_goes_as_far_is_taken(tmp_path, run):
    longer = save(tmp_path / "toy-01-01-00-00", run, 8, config=configuration(train_iters=20))
    newest = save(tmp_path / "toy-01-02-00-00", run, 10)
    assert find_resume(tmp_path, "toy", CONFIG) == newest
    assert find_resume(tmp_path, "toy", configuration(train_iters=20)) == longer
    assert find_resume(tmp_path, "toy", configuration(train_iters=30)) == newest


def test_a_folder_that_was_named_is_taken_or_refused_with_a_reason(tmp_path, run):
    save(tmp_path / "r", run, 2)
    last = save(tmp_path / "r", run, 4)
    assert find_resume(tmp_path / "r", None, CONFIG) == last
    assert find_resume(tmp_path / "r" / "2", None, CONFIG) == tmp_path / "r" / "2"
    with pytest.raises(CheckpointError) as error:
        find_resume(tmp_path / "r", None, configuration(seed=2, save="elsewhere"))
    assert str(error.value).splitlines() == [
        f"--resume: no complete checkpoint of this configuration in {tmp_path / 'r'}",
        f"  {last} (then -> now)",
        "    args.seed: 1 -> 2",
        f"    go on with it: --resume {last} --set args.seed=1",
        f"    a new run from its weights, without --resume: --set args.load={last}",
        "To start a new run, leave out --resume.",
    ]
    with pytest.raises(CheckpointError, match="does not exist"):
        find_resume(tmp_path / "none", None, CONFIG)
    (last / "run.json").unlink()
    with pytest.raises(CheckpointError, match="no run.json"):
        find_resume(last, None, CONFIG)
    assert find_resume(tmp_path / "r", None, CONFIG) == tmp_path / "r" / "2"


def test_what_counts_is_what_is_learnt_wherever_its_files_lie(tmp_path, run, monkeypatch):
    path = save(tmp_path / "r", run, 2, config=CONFIG)
    free = configuration(save="elsewhere", keep_last=3, train_iters=11, lr_decay_iters=5, epochs=3)
    assert find_resume(path, None, free) == path
    clips = tmp_path / "project" / "clips"
    clips.mkdir(parents=True)
    (tmp_path / "link").symlink_to(clips)
    monkeypatch.chdir(clips.parent)
    spelled = ["clips", "./clips", "../project/clips", str(clips), "../link", f"{tmp_path}/project/../link"]
    named = [configuration(train_data=[path], valid_data=[path], load=path) for path in spelled]
    assert all(identity(config) == identity(named[0]) for config in named)
    path = save(tmp_path / "r", run, 2, config=configuration(train_data=["clips"]))
    monkeypatch.chdir("/")
    assert find_resume(path, None, configuration(train_data=[str(tmp_path / "link")])) == path
    with pytest.raises(CheckpointError, match=f"args.train_data: .*{clips}.* -> .*{tmp_path}"):
        find_resume(path, None, configuration(train_data=[str(tmp_path)]))
    clips.rename(tmp_path / "clips")  # moved: same name, and the old place is empty
    assert find_resume(path, None, configuration(train_data=[str(tmp_path / "clips")])) == path


def test_a_run_of_an_earlier_version_is_compared_by_its_folders_configuration(tmp_path, run):
    """Their records held a hash in which each spelling of a path was another run."""
    path = save(tmp_path, run, 2)
    record = json.loads((path / "run.json").read_text())
    for name in ("identity", "clips_per_step"):
        del record[name]
    (path / "run.json").write_text(json.dumps({**record, "config_hash": "of another kind"}))
    with pytest.raises(CheckpointError, match="no configuration file at .*training_config.yaml"):
        find_resume(path, None, CONFIG)
    (tmp_path / "training_config.yaml").write_text(CONFIG.as_yaml())
    assert find_resume(path, None, configuration(train_iters=40)) == path
    with pytest.raises(CheckpointError, match="args.seed: 1 -> 3"):
        find_resume(path, None, configuration(seed=3))


# --- refusals ----------------------------------------------------------------------------------------------------


def test_states_of_an_earlier_version_go_on_in_the_same_set_up_alone(tmp_path, run):
    """They did not say which values of which parameter a rank's partition holds."""
    state = state_of(run, 2)
    del state.optimizer["layout"]["pieces"]
    put_back(toy_run(seed=5), state)
    other = toy_run(seed=5)
    other.dp_world_size = 2
    assert layout_differences(other, state.optimizer) == ["data_parallel_size (stored 1, now 2)"]
    with pytest.raises(CheckpointError, match="by a version whose states cannot be cut up anew"):
        repartitioned(other, iter([state]))
    with pytest.raises(CheckpointError, match="no run.json"):
        load_state(tmp_path)


def _rewrite(path, file, content):
    """Replace a file by a valid archive of something else, its size recorded."""
    torch.save(content, path / file)
    record = json.loads((path / "run.json").read_text())
    record["files"][file] = (path / file).stat().st_size
    (path / "run.json").write_text(json.dumps(record))


def test_a_flipped_byte_in_the_state_is_seen(tmp_path, run):
    file = save(tmp_path, run, 2) / "resume" / "rank_00000.pt"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 0x40
    file.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"cannot be used: .*rank_00000.pt .*another checksum"):
        load_state(file.parent.parent)


class Harmful:
    def __reduce__(self):
        return os.system, ("touch harm-was-done",)


def test_a_file_that_would_run_code_is_refused(tmp_path, run, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = save(tmp_path, run, 2)
    _rewrite(path, "resume/rank_00000.pt", {**state_of(run, 2).as_dict(), "sampler": Harmful()})
    with pytest.raises(CheckpointError, match="system"):
        load_state(path)
    _rewrite(path, "mp_rank_00_model_states.pt", {"module": Harmful()})
    with pytest.raises(WeightsError, match="system"):
        load_module(path)
    assert not (tmp_path / "harm-was-done").exists()


def test_a_state_of_another_shape_is_refused(tmp_path, run):
    path = save(tmp_path, run, 2)
    content = state_of(run, 2).as_dict()
    for wrong in ({**content, "extra": 1}, {**content, "sampler": 3}, {**content, "iteration": 3}):
        _rewrite(path, "resume/rank_00000.pt", wrong)
        with pytest.raises(CheckpointError, match="extra|sampler|iteration 3"):
            load_state(path)


def test_what_cannot_be_stored_plainly_stops_the_save(tmp_path, run):
    state = dataclasses.replace(state_of(run, 2), sampler={"position": np.int64(3)})
    with pytest.raises(CheckpointError, match=r"\['sampler'\]\['position'\] is a numpy.int64"):
        save_checkpoint(tmp_path, run, state, config=CONFIG)
    assert list(tmp_path.iterdir()) == []


def test_an_adapter_that_is_not_there_cannot_be_saved(tmp_path, run):
    with pytest.raises(CheckpointError, match="no LoRA matrices"):
        save(tmp_path, run, 2, lora_only=True)
    with pytest.raises(CheckpointError, match="no LoRA adapter to merge"):
        save(tmp_path, run, 2, full_merged=True)
    assert list(tmp_path.iterdir()) == []


# --- disks -------------------------------------------------------------------------------------------------------


def contents(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_a_disk_without_room_is_noticed_before_anything_is_written(tmp_path, run, monkeypatch):
    save(tmp_path, run, 2)
    before = contents(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: shutil._ntuple_diskusage(100, 100, 0))
    with pytest.raises(CheckpointError, match="not enough room"):
        save(tmp_path, run, 4)
    assert contents(tmp_path) == before and not leftovers(tmp_path)


def test_a_disk_that_fills_up_at_any_point_leaves_the_last_good_checkpoint(tmp_path, run, monkeypatch):
    save(tmp_path, run, 2)
    before = contents(tmp_path)
    sync, calls = os.fsync, 0
    for failing in range(1, 100):
        calls = 0

        def full(handle, failing=failing):
            nonlocal calls
            calls += 1
            if calls == failing:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            sync(handle)

        monkeypatch.setattr(os, "fsync", full)
        if (tmp_path / "4").exists():
            break  # from here on the new checkpoint is in place
        try:
            save(tmp_path, run, 4)
        except CheckpointError as error:
            assert "No space left" in str(error) or "the disk is full" in str(error)
        monkeypatch.setattr(os, "fsync", sync)
        assert not leftovers(tmp_path)
        if not (tmp_path / "4").exists():
            assert contents(tmp_path) == before
            assert find_resume(tmp_path, None, CONFIG) == tmp_path / "2"
    assert failing > 8
    assert find_resume(tmp_path, None, CONFIG) == tmp_path / "4"
    assert torch.equal(load_state(tmp_path / "4").optimizer["masters"][0], state_of(run, 4).optimizer["masters"][0])


def test_keep_last_deletes_old_complete_ones_only_and_after_the_new_is_there(tmp_path, run):
    (tmp_path / "1").mkdir()  # somebody else's, or incomplete
    for iteration in (2, 4, 6):
        save(tmp_path, run, iteration)
    save(tmp_path, run, 8, keep_last=2)
    assert sorted(p.name for p in tmp_path.iterdir() if p.is_dir()) == ["1", "6", "6-ema", "8", "8-ema"]
    save(tmp_path, run, 5, keep_last=1)  # went back: the one just written stays, whatever its number
    assert (tmp_path / "5").is_dir() and (tmp_path / "latest").read_text() == "5"


def poison(run, part):
    """One NaN or infinity in a part of a run; how an error names it."""
    optimizer = run.optimizer
    master = optimizer.param_groups[0]["params"][0]
    tensor, value, name = {
        "weights": (master, math.nan, "optimizer.masters[0]"),
        "moments": (optimizer.state[master]["exp_avg_sq"], math.inf, "optimizer.states[0].exp_avg_sq"),
        "average": (optimizer.state[master]["shadow"], -math.inf, "ema.0"),
        "buffer": (run.module.model.diffusion_model.table, math.nan, f"{NETWORK}table"),
    }[part]
    with torch.no_grad():
        tensor.view(-1)[1] = value
    return name


@pytest.mark.parametrize("part", ["weights", "moments", "average", "buffer"])
def test_what_is_not_finite_is_not_saved_and_deletes_nothing(tmp_path, run, part):
    save(tmp_path, run, 2), save(tmp_path, run, 4)
    before = contents(tmp_path)
    name = poison(run, part)
    with pytest.raises(CheckpointError, match=re.escape(f"{name} is not finite, 1 of ")):
        save(tmp_path, run, 6, keep_last=1)
    assert contents(tmp_path) == before and not leftovers(tmp_path)


def test_a_kill_while_an_old_checkpoint_is_deleted_leaves_nothing_of_it(tmp_path, run, monkeypatch):
    save(tmp_path, run, 2)
    with monkeypatch.context() as patch:
        patch.setattr("sgm.training.checkpoints.folder.remove", lambda path: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            save(tmp_path, run, 4, keep_last=1)
    assert not (tmp_path / "2").exists() and not (tmp_path / "2-ema").exists() and leftovers(tmp_path)
    save(tmp_path, run, 6)
    assert sorted(p.name for p in tmp_path.iterdir() if p.is_dir()) == ["4", "4-ema", "6", "6-ema"]


def test_saving_an_iteration_again_replaces_it(tmp_path, run):
    save(tmp_path, run, 2)
    step(run)
    save(tmp_path, run, 2)
    name = f"{NETWORK}0.weight"
    assert torch.equal(load_module(tmp_path / "2")[name], run.module.state_dict()[name])
    assert not leftovers(tmp_path)


def test_runs_started_together_get_a_folder_each(tmp_path):
    with ThreadPoolExecutor(8) as pool:
        made = list(pool.map(new_run, [tmp_path / "try-01-02-03-04"] * 40))
    assert len(set(made)) == 40 and set(made) == set(tmp_path.iterdir())
    assert {"try-01-02-03-04", "try-01-02-03-04-2", "try-01-02-03-04-40"} <= {run.name for run in made}
