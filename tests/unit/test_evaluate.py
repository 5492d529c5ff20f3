"""Evaluation: the same clips and the same random numbers each time, others in each batch and on each rank."""

from __future__ import annotations

import random
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from torch.utils.data import Dataset

from sgm import distributed
from sgm.training import evaluate
from sgm.training.evaluate import Evaluation, eval_prompts
from sgm.training.watch.run_log import RunLog


class Numbers(Dataset):
    """Clips that hold their own number."""

    def __init__(self, first: int, count: int):
        self.first, self.count = first, count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict:
        return {"mp4": torch.full((1, 1, 1, 1), self.first + index), "txt": "a clip"}


class Engine:
    """Stands for DeepSpeed's: its loss is a random number."""

    module, device = None, torch.device("cpu")

    def __init__(self):
        self.seen: list[tuple[list[int], float]] = []
        self.training = True

    def eval(self) -> None:
        self.training = False

    def train(self) -> None:
        self.training = True

    def __call__(self, z, batch):
        assert not self.training
        loss = torch.rand(()) + random.random()  # whose is the dropout of pictures
        self.seen.append((batch["mp4"].flatten().tolist(), loss.item()))
        return loss, {}


@pytest.fixture
def ranks(monkeypatch) -> SimpleNamespace:
    """One process that says it is `rank` of `size`."""
    place = SimpleNamespace(rank=0, size=1)
    monkeypatch.setattr(evaluate, "data_parallel_rank", lambda: place.rank)
    monkeypatch.setattr(evaluate, "data_parallel_world_size", lambda: place.size)
    monkeypatch.setattr(evaluate.dist, "all_reduce", lambda total: None)
    monkeypatch.setattr(evaluate.dist, "get_world_size", lambda: 1)
    monkeypatch.setattr(evaluate, "engine_inputs", lambda engine, batch, device: (None, batch))
    return place


def evaluation(**changes) -> Evaluation:
    settings = {"batch_size": 2, "batches": 3, "seed": 5, "latents_only": True, "log_video": False, "fps": 8}
    return Evaluation([Numbers(0, 3), Numbers(3, 4)], folder=None, **{**settings, **changes})


def test_clips_are_taken_in_turn_with_the_same_draws_each_time(ranks):
    engine, of_training = Engine(), (torch.get_rng_state(), random.getstate())
    mean, by_timestep = evaluation().run(engine, 1, None)
    assert [clips for clips, _ in engine.seen] == [[0, 1], [2, 3], [4, 5]]
    assert mean == pytest.approx(sum(loss for _, loss in engine.seen) / 3) and not any(by_timestep)
    assert (
        engine.training and torch.equal(torch.get_rng_state(), of_training[0]) and random.getstate() == of_training[1]
    )
    assert len({loss for _, loss in engine.seen}) == 3  # a batch has its own
    torch.rand(7), random.random()
    first, engine.seen = engine.seen, []
    evaluation().run(engine, 2, None)
    assert engine.seen == first
    assert evaluation(seed=6).run(engine, 3, None)[0] != mean


def test_a_picture_that_goes_away_is_still_there_for_later_evaluations(tmp_path):
    file = tmp_path / "red.png"
    Image.new("RGB", (40, 24), "red").save(file)
    (prompt,) = eval_prompts([f"a square@@{file}"], from_picture=True)
    file.unlink()
    assert prompt.text == "a square" and prompt.picture.image().getpixel((8, 8)) == (255, 0, 0)


def test_ranks_share_what_one_would_do(ranks):
    alone = Engine()
    evaluation(batches=4).run(alone, 1, None)
    shared = []
    ranks.size = 2
    for ranks.rank in range(2):
        engine = Engine()
        evaluation(batches=2).run(engine, 1, None)
        shared.append(engine.seen)
    assert [seen for turn in zip(*shared, strict=True) for seen in turn] == alone.seen


def test_of_processes_that_share_a_clip_one_writes_what_people_look_at(tmp_path, monkeypatch):
    monkeypatch.setattr(distributed, "own_rank", lambda: (1, 2))
    monkeypatch.setattr(evaluate, "own_rank", distributed.own_rank)
    distributed.share_clips(distributed.ClipGroup(2))
    try:
        assert distributed.data_parallel_rank() == 0
        evaluate.Files(tmp_path, 1, 8, RunLog(None, 1, None)).text(["a caption"])
    finally:
        distributed.share_clips(distributed.ClipGroup())
    assert not list(tmp_path.iterdir())
