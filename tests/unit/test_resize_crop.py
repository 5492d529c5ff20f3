import numpy as np
import pytest
import torch

from sgm.data.video_io import resize_crop, resized_size


def noise(*shape: int) -> torch.Tensor:
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("source", [(60, 110), (90, 50), (64, 96), (32, 48), (20, 25), (33, 49), (1, 1), (7, 500)])
def test_any_size_becomes_the_wanted_size(source):
    out = resize_crop(noise(2, 3, *source), (32, 48))
    assert out.shape == (2, 3, 32, 48) and out.dtype == torch.uint8 and out.is_contiguous()


@pytest.mark.parametrize("source", [(60, 110), (90, 50), (64, 96), (20, 25), (1080, 1920), (481, 720), (719, 1279)])
@pytest.mark.parametrize("target", [(32, 48), (480, 720), (48, 32)])
def test_the_scaled_size_just_covers_the_target(source, target):
    height, width = resized_size(*source, *target)
    assert height >= target[0] and width >= target[1]
    assert height == target[0] or width == target[1]


def test_nothing_changes_at_the_right_size():
    frames = noise(3, 3, 32, 48)
    assert torch.equal(resize_crop(frames, (32, 48)), frames)


def test_crop_without_scaling_is_the_middle():
    frames = noise(2, 3, 32, 53)
    assert torch.equal(resize_crop(frames, (32, 48)), frames[..., 2:50])  # 5 spare columns: 2 before, 3 after


def test_one_frame_keeps_its_time_axis_and_no_frame_is_possible():
    assert resize_crop(noise(1, 3, 60, 110), (32, 48)).shape == (1, 3, 32, 48)
    assert resize_crop(noise(0, 3, 60, 110), (32, 48)).shape == (0, 3, 32, 48)


def test_frames_do_not_influence_each_other():
    frames = noise(5, 3, 61, 97)
    together = resize_crop(frames, (30, 45))
    assert all(torch.equal(resize_crop(frames[i : i + 1], (30, 45))[0], together[i]) for i in range(5))


def test_downscaling_averages():
    checker = (torch.arange(128)[:, None] + torch.arange(192)) % 2 * 255
    out = resize_crop(checker.to(torch.uint8).expand(1, 3, 128, 192), (32, 48))
    assert (out.float() - 127.5).abs().max() < 20  # without antialiasing these would be 0 or 255


def test_random_crop_follows_the_generator_and_stays_inside():
    frames = noise(1, 3, 32, 60)
    offsets = set()
    for seed in range(30):
        out = resize_crop(frames, (32, 48), "random", np.random.default_rng(seed))
        assert torch.equal(out, resize_crop(frames, (32, 48), "random", np.random.default_rng(seed)))
        offsets.add(next(left for left in range(13) if torch.equal(out, frames[..., left : left + 48])))
    assert len(offsets) > 5


@pytest.mark.parametrize(
    "frames, size, mode, text",
    [
        (torch.zeros(1, 3, 8, 8), (4, 4), "center", "float32"),
        (torch.zeros(3, 8, 8, dtype=torch.uint8), (4, 4), "center", "expected uint8"),
        (torch.zeros(1, 3, 8, 8, dtype=torch.uint8), (0, 4), "center", "0x4"),
        (torch.zeros(1, 3, 8, 8, dtype=torch.uint8), (4, 4), "middle", "center, random"),
    ],
)
def test_wrong_input_is_named(frames, size, mode, text):
    with pytest.raises(ValueError, match=text):
        resize_crop(frames, size, mode)
