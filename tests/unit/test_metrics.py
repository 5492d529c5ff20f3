"""What a run reports: records, lines or a bar, boards, the picture, losses by timestep."""

from __future__ import annotations

import io
import json
import math
import struct
import sys
from contextlib import suppress
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from sgm.files import SaveError
from sgm.training.step import BINS, StepOutcome, bin_means, bin_sums
from sgm.training.watch import run_log
from sgm.training.watch.curve import draw_losses, read_records
from sgm.training.watch.run_log import AVERAGE_STEPS, RunLog, TensorBoard, WeightsAndBiases, duration
from sgm.typed import ConfigError


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


class Memo:
    """A board that remembers."""

    def __init__(self):
        self.told, self.clips, self.closed = [], [], False

    def scalars(self, values, iteration):
        self.told.append((iteration, dict(values)))

    def video(self, name, path, frames, fps, iteration):
        self.clips.append((name, iteration))

    def close(self):
        self.closed = True


def outcome(loss: float, place: int = 0, applied: bool = True) -> StepOutcome:
    sums, counts = [0.0] * BINS, [0.0] * BINS
    sums[place], counts[place] = loss, 1.0
    return StepOutcome(loss, 2.0 if applied else None, applied, by_timestep=(sums, counts), data_wait=0.25)


def run_of(losses, folder, out, **more) -> RunLog:
    log = RunLog(folder, len(losses), out, **more)
    with log:
        log.begin(0, 0)
        for k, loss in enumerate(losses, 1):
            log.step(outcome(loss, k % BINS), 1e-3)
            if k % 2 == 0:
                log.train(k, 1e-3, 8.0, 3 * k, {"forward": 1.0}, {"peak_bytes": 2**30, "rss_bytes": 2**31})
        log.valid(len(losses), 0.5, [0.5] * BINS)
    return log


def test_record_holds_everything_of_its_interval(tmp_path):
    out, board = io.StringIO(), Memo()
    run_of([4.0, 2.0, 3.0, 1.0], tmp_path, out, boards=[board])
    first, second = read_records(tmp_path / "metrics.jsonl", "train")
    assert first["loss"] == 3.0 and first["loss_average"] == 3.0 and first["grad_norm"] == 2.0
    assert first["loss_by_timestep"][:4] == [None, 4.0, 2.0, None] and first["data_wait"] == 0.25
    assert (first["lr"], first["loss_scale"], first["samples"]) == (1e-3, 8.0, 6)
    assert second["samples_per_second"] == pytest.approx(6 / (2 * second["seconds_per_step"]))
    assert first["phases"] == {"forward": 0.5} and first["peak_bytes"] == 2**30 and first["rss_bytes"] == 2**31
    assert (
        "average" in out.getvalue() and "peak 1.00 GiB" in out.getvalue() and "0.25 s of it waiting" in out.getvalue()
    )
    told = board.told[0][1]
    assert told["train/loss"] == 3.0 and told["memory/peak_gib"] == 1.0 and told["seconds/forward"] == 0.5
    assert told["loss_by_timestep/100-199"] == 4.0 and "loss_by_timestep/000-099" not in told
    assert board.told[-1] == (4, {"valid/loss": 0.5} | {k: v for k, v in board.told[-1][1].items() if "_by_" in k})
    assert board.closed


def test_average_is_a_mean_first_and_forgets_then(tmp_path):
    log = run_of([4.0, 2.0], tmp_path, io.StringIO())
    assert log.average == 3.0
    for _ in range(AVERAGE_STEPS):
        log.step(outcome(1.0), 0.0)
    assert log.average == pytest.approx(1 + 4 / 50 * (1 - 1 / 50) ** 2)
    log.step(outcome(2.0), 0.0)
    assert log.average == pytest.approx(1 + 4 / 50 * (1 - 1 / 50) ** 3 + 1 / 50)


def test_a_terminal_gets_a_bar_a_file_gets_lines(tmp_path):
    shown, plain = Terminal(), io.StringIO()
    run_of([1.0] * 4, tmp_path / "a", shown), run_of([1.0] * 4, tmp_path / "b", plain)
    assert "4/4" in shown.getvalue() and "\r" in shown.getvalue() and "iteration 4/4 | loss 1.0000" in shown.getvalue()
    assert "\r" not in plain.getvalue() and plain.getvalue().count("iteration ") == 3 and "ETA" in plain.getvalue()


def test_other_ranks_write_nothing(tmp_path):
    board = Memo()
    log = run_of([1.0] * 4, tmp_path / "none", None, boards=[board])
    log.video("samples/0", tmp_path, np.zeros((1, 2, 2, 3), np.uint8), 8, 4)
    assert not (tmp_path / "none").exists() and not board.told and not board.clips


def test_resumed_runs_average_goes_on_and_cut_lines_hurt_nobody(tmp_path):
    before = run_of([4.0, 2.0], tmp_path, io.StringIO()).average
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "train", "iter')  # a crash in the middle of a line
    log = RunLog(tmp_path, 4, io.StringIO())
    with log:
        log.begin(2, 6)
        assert log.average == pytest.approx(before)
        log.step(outcome(2.0), 1e-3)
        log.train(3, 1e-3, None, 9, {}, {})
    assert [r["iteration"] for r in read_records(tmp_path / "metrics.jsonl", "train")] == [2, 3]


def test_what_is_not_finite_is_left_out(tmp_path):
    with RunLog(tmp_path, 2, io.StringIO()) as log:
        log.begin(0, 0)
        log.step(outcome(math.nan, applied=False), 0.0)
        log.train(1, 0.0, None, 1, {}, {})
    (line,) = [json.loads(text) for text in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert line["loss"] is None and line["loss_average"] is None and line["skipped"] == 1


def test_the_picture_is_drawn_anew_once_a_minute(tmp_path, monkeypatch):
    now, drawn = [0.0], []
    monkeypatch.setattr(run_log.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(run_log, "draw_losses", lambda metrics, image: drawn.append(now[0]))
    log = RunLog(tmp_path, 9, io.StringIO())
    log.begin(0, 0)
    for k, now[0] in enumerate((30.0, 60.0, 60.5, 120.0, 121.0), 1):
        log.train(k, 1e-3, None, k, {}, {})
    assert drawn == [60.5, 121.0]
    log.valid(5, 0.5, [None] * BINS)
    assert drawn == [60.5, 121.0, 121.0]


def records(folder) -> list[int]:
    return [r["iteration"] for r in read_records(folder / "metrics.jsonl", "train")]


def test_a_folder_that_disappears_and_comes_back(tmp_path):
    """Training is not disturbed, each place is told of once, and written again when it is there again."""
    folder, away, out = tmp_path / "run", tmp_path / "away", io.StringIO()
    with RunLog(folder, 9, out) as log:
        log.boards = [TensorBoard(folder / "tensorboard")]
        log.begin(0, 0)
        for k in range(1, 10):
            log.step(outcome(1.0), 1e-3)
            log.train(k, 1e-3, None, k, {}, {})
            log.draw()
            if k in (3, 6):
                folder.rename(away) if k == 3 else away.rename(folder)
    warnings = [line for line in out.getvalue().splitlines() if line.startswith("warning: ")]
    assert [line.split()[1].split("/")[-1] for line in warnings] == ["metrics.jsonl", "TensorBoard", "loss.png"]
    assert all(f"{folder}" in line and "No such file" in line and "training goes on" in line for line in warnings)
    assert out.getvalue().count("lacks what was to be written 3 times") == 3
    assert records(folder) == [1, 2, 3, 7, 8, 9]
    files = sorted((folder / "tensorboard").iterdir())
    assert [sorted({e.step for e in read_events(f) if e.step}) for f in files] == [[1, 2, 3], [7, 8, 9]]


def test_a_full_disk_cuts_no_line_in_two(tmp_path):
    import resource

    limit, out = resource.getrlimit(resource.RLIMIT_FSIZE), io.StringIO()
    with RunLog(tmp_path, 9, out) as log:
        log.record("train", iteration=1, note="x" * 100)
        size = (tmp_path / "metrics.jsonl").stat().st_size
        resource.setrlimit(resource.RLIMIT_FSIZE, (size + 40, limit[1]))
        try:
            for k in (2, 3):
                log.record("train", iteration=k, note="x" * 100)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        log.record("train", iteration=4)
    assert records(tmp_path) == [1, 4]
    board = TensorBoard(tmp_path / "board")
    board.scalars({"a": 1.0}, 1)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, limit[1]))
    try:
        with pytest.raises(SaveError, match=f"cannot write {tmp_path}/board: the file grew too large"):
            board.scalars({"a": 2.0}, 2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    board.scalars({"a": 3.0}, 3)
    assert [e.step for f in sorted((tmp_path / "board").iterdir()) for e in read_events(f)][-1] == 3
    assert out.getvalue().count("warning: ") == 1 and "metrics.jsonl: the file grew too large" in out.getvalue()


def test_a_board_that_fails_is_told_of_once(tmp_path):
    class Failing(Memo):
        def scalars(self, values, iteration):
            raise RuntimeError("the server has gone")

        def close(self):
            raise ValueError("the file is closed")

    out, well = io.StringIO(), Memo()
    run_of([4.0, 2.0, 3.0, 1.0], tmp_path, out, boards=[Failing(), well])
    assert out.getvalue().count("warning: ") == 1 and "Failing is not written" in out.getvalue()
    assert "the server has gone" in out.getvalue() and len(well.told) == 3 and well.closed


def test_a_log_on_a_full_disk_ends_no_run(tmp_path):
    with suppress(OSError), open("/dev/full", "w") as full:  # which cannot be closed, either
        run_of([1.0] * 4, tmp_path, full)
    assert records(tmp_path) == [2, 4]


def test_time_aside_is_not_a_steps():
    log = RunLog(None, 1, io.StringIO())
    before = log.interval.started
    with log.aside():
        pass
    assert log.interval.started > before


def test_durations_read_as_clocks():
    assert [duration(s) for s in (5, 65.2, 3723)] == ["0:05", "1:05", "1:02:03"]


# --- by timestep --------------------------------------------------------------------------------------------------


def test_losses_are_put_where_their_timesteps_lie():
    logs = {
        "sample_loss": torch.tensor([1.0, 3.0, 5.0, math.inf]),
        "timestep_share": torch.tensor([0.0, 0.099, 0.999, 0.5]),
    }
    sums, counts = bin_sums(logs, torch.device("cpu")).tolist()
    assert bin_means(sums, counts) == [2.0, *[None] * 8, 5.0]
    assert not bin_sums({}, torch.device("cpu")).any()


# --- picture ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [1.0, 1000.0])  # the second range needs a logarithmic axis
def test_picture_shows_all_curves(tmp_path, scale):
    lines = [
        {"kind": "train", "iteration": k, "loss": scale / k, "loss_average": 1.1 * scale / k} for k in range(1, 60)
    ]
    lines += [{"kind": "valid", "iteration": 30, "loss": scale / 25}, {"kind": "saved", "iteration": 30}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert draw_losses(tmp_path / "metrics.jsonl", tmp_path / "loss.png")
    pixels = np.asarray(Image.open(tmp_path / "loss.png")).astype(int)

    def where(color: tuple[int, int, int]) -> np.ndarray:
        return np.argwhere(np.abs(pixels[60:480, 90:930] - color).sum(-1) < 30)

    average, valid = where((31, 78, 140)), where((192, 57, 43))
    assert len(average) > 500 and 20 < len(valid) < 120
    left, right = average[average[:, 1] < 100], average[average[:, 1] > 700]
    assert left[:, 0].mean() < right[:, 0].mean()  # falls: further down on the picture
    assert valid[:, 1].mean() == pytest.approx(0.5 * 860 - 10, abs=15)  # half-way


def test_nothing_to_draw_is_no_picture(tmp_path):
    (tmp_path / "metrics.jsonl").write_text("")
    assert not draw_losses(tmp_path / "metrics.jsonl", tmp_path / "loss.png") and not (tmp_path / "loss.png").exists()


def test_one_point_is_a_picture(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"kind": "train", "iteration": 1, "loss": 0.0, "loss_average": 0.0}\n')
    assert draw_losses(tmp_path / "metrics.jsonl", tmp_path / "loss.png")


# --- boards -------------------------------------------------------------------------------------------------------


def events_in(folder) -> list:
    (file,) = folder.glob("events.out.tfevents.*")
    return read_events(file)


def read_events(file) -> list:
    from tensorboardX.proto.event_pb2 import Event

    data, found = file.read_bytes(), []
    while data:
        (length,) = struct.unpack("<Q", data[:8])
        found.append(Event.FromString(data[12 : 12 + length]))
        data = data[16 + length :]
    return found


def test_tensorboard_gets_numbers_and_strips(tmp_path):
    board = TensorBoard(tmp_path, iteration=3)
    board.scalars({"train/loss": 0.25}, 4)
    board.video("samples/0", tmp_path / "x.mp4", np.zeros((5, 16, 24, 3), np.uint8), 8, 4)
    board.close()
    values = [(e.step, v.tag, v.simple_value, v.image.width) for e in events_in(tmp_path) for v in e.summary.value]
    assert values == [(4, "train/loss", 0.25, 0), (4, "samples/0", 0.0, 5 * 24)]


@pytest.fixture
def wandb(monkeypatch):
    made = SimpleNamespace(Error=type("Error", (Exception,), {}), Video=lambda path, format: (path, format), calls=[])
    made.run = SimpleNamespace(log=lambda *a, **k: made.calls.append((a, k)), finish=lambda: made.calls.append("end"))
    made.init = lambda **given: (made.calls.append(given), made.run)[1]
    monkeypatch.setitem(sys.modules, "wandb", made)
    return made


def test_wandb_gets_the_same_and_a_resumed_run_its_own(tmp_path, wandb):
    for _ in range(2):
        board = WeightsAndBiases(tmp_path / "run-1", "films", {"args": {"seed": 1}})
    first, second = wandb.calls
    assert first == second and first["id"] and first["resume"] == "allow" and first["project"] == "films"
    board.scalars({"train/loss": 1.0}, 7)
    board.video("samples/0", tmp_path / "x.mp4", np.zeros((1, 2, 2, 3), np.uint8), 8, 7)
    board.close()
    assert wandb.calls[2:] == [
        (({"train/loss": 1.0},), {"step": 7}),
        (({"samples/0": (str(tmp_path / "x.mp4"), "mp4")},), {"step": 7}),
        "end",
    ]


def test_wandb_without_a_login_says_what_to_do(tmp_path, wandb):
    def refuse(**_):
        raise wandb.Error("api_key not configured")

    wandb.init = refuse
    with pytest.raises(ConfigError, match="wandb login(.|\n)*WANDB_MODE=offline"):
        WeightsAndBiases(tmp_path, "films", {})
