"""Pictures of image-to-video training: their noise, when a batch goes without, what is equal over processes."""

from __future__ import annotations

import random
from types import SimpleNamespace

import pytest
import torch

from sgm.cache.dataset import FIRST_FRAME
from sgm.modules.diffusionmodules.loss import VideoDiffusionLoss
from sgm.training import step as first_frame
from sgm.training.checkpoints.state import capture_rng, restore_rng
from sgm.training.step import kept_or_zeros, noised
from tests.training_tiny import model_section

CPU = torch.device("cpu")


def test_the_noise_is_as_strong_as_the_original_s():
    torch.manual_seed(0)
    levels = noised(torch.zeros(5000, 3, 1, 8, 8)).flatten(1).std(1).log()  # one a picture
    assert levels.mean() == pytest.approx(-3, abs=0.03) and levels.std() == pytest.approx(0.5, abs=0.03)


def test_a_batch_keeps_its_pictures_or_goes_without_as_a_whole():
    random.seed(0)
    images = torch.full((3, 1, 2, 2, 2), torch.inf)
    kept = [float(kept_or_zeros(images, 0.25).isinf().float().mean()) for _ in range(400)]
    assert set(kept) == {0.0, 1.0} and 0.68 < sum(kept) / 400 < 0.82
    assert kept_or_zeros(images, 0.0).isinf().all() and not kept_or_zeros(images, 1.0).any()


def test_all_draws_come_with_the_random_state_that_checkpoints_keep():
    image, state = torch.ones(2, 3, 1, 4, 4), capture_rng()

    def drawn() -> list[torch.Tensor]:
        return [noised(image), *(kept_or_zeros(image, 0.5) for _ in range(20))]

    first = drawn()
    restore_rng(state)
    assert all(map(torch.equal, first, drawn())) and not all(map(torch.equal, first, drawn()))


def test_the_dropout_leaves_torch_s_numbers_alone():
    """What comes after it, captions' dropout and timesteps, is as in the original at the same seed."""
    images, state = torch.ones(2, 1, 1, 1, 1), torch.get_rng_state()
    random.seed(5)
    kept = [bool(kept_or_zeros(images, 0.5).all()) for _ in range(8)]
    assert torch.equal(torch.get_rng_state(), state)
    random.seed(5)
    assert kept == [random.random() >= 0.5 for _ in range(8)]


def test_a_model_parallel_group_shares_pictures_and_dropout(monkeypatch):
    sent = []

    def broadcast(tensor: torch.Tensor) -> torch.Tensor:
        sent.append(tensor.clone())
        return tensor.copy_(sent[0])

    monkeypatch.setattr(first_frame, "same_for_clip", broadcast)
    shares = iter((0.01, 0.9))
    monkeypatch.setattr(random, "random", lambda: next(shares))
    got = [kept_or_zeros(torch.full((2, 1, 1, 1, 1), float(k + 1)), 0.05) for k in range(2)]
    assert torch.equal(got[0], got[1]) and not got[0].any() and sent[1].any()


def test_frames_of_clips_and_of_cached_clips_are_the_same():
    frames = torch.randint(0, 256, (2, 5, 3, 4, 6), dtype=torch.uint8)
    engine = SimpleNamespace(input_key="mp4", dtype=torch.bfloat16)
    clips = first_frame.first_frame(engine, {"mp4": (frames.float() - 127.5) / 127.5}, CPU)
    cached = first_frame.first_frame(engine, {FIRST_FRAME: frames[:, 0]}, CPU)
    assert clips.shape == (2, 3, 1, 4, 6) and clips.dtype == torch.bfloat16 and torch.equal(clips, cached)


def test_known_clips_get_their_own_pictures(tmp_path):
    """The base network of `prior_data` sees the rows of the clips that are there to keep what it knows."""
    sampling = model_section(tmp_path)["loss_fn_config"]["params"]["sigma_sampler_config"]
    seen = []

    def denoiser(network, x, sigma, cond, idx=None, **extras):
        seen.append((network, cond["concat"].flatten().tolist(), extras))
        return x

    batch = {"concat_images": torch.tensor([1.0, 2.0]).view(2, 1, 1, 1, 1), "prior": torch.tensor([False, True])}
    loss = VideoDiffusionLoss(sampling)
    z = torch.randn(2, 1, 1, 2, 2)
    loss.detailed("new", denoiser, lambda batch: {"crossattn": torch.zeros(2, 1, 1)}, z, batch, base="base")
    assert seen == [("new", [1.0, 2.0], {}), ("base", [2.0], {})]
