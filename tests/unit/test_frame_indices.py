import math

import pytest

from sgm.data.dataset import frame_indices
from sgm.data.frames import ClipError

RATES = [7.5, 8.0, 10.0, 12.0, 23.976, 24.0, 25.0, 29.97, 30.0, 50.0, 59.94, 60.0, 120.0]


@pytest.mark.parametrize("rule", ["upstream", "timestamps"])
@pytest.mark.parametrize("fps", RATES)
def test_every_clip_has_4k_plus_1_frames_inside_the_video(rule, fps):
    made = 0
    for length in range(1, 400, 7):
        for most in (1, 5, 17, 49):
            for skip in (0, 1, 3.0):
                try:
                    indices = frame_indices(length, fps, 8, most, skip, rule)
                except ClipError:
                    continue
                made += 1
                assert len(indices) % 4 == 1 and len(indices) <= most
                assert indices == sorted(indices) and indices[0] >= 0 and indices[-1] < length
                assert indices[0] == int(skip)
    assert made > 400


@pytest.mark.parametrize("fps", RATES)
@pytest.mark.parametrize("wanted", [6, 8, 8.5, 24])
def test_timestamps_are_right_at_any_rate(fps, wanted):
    indices = frame_indices(1000, fps, wanted, 49, 3, "timestamps")
    assert len(indices) == 49
    for i, index in enumerate(indices):
        assert abs((index - 3) / fps - i / wanted) <= 0.5 / fps + 1e-9


def test_timestamps_leave_out_both_ends():
    indices = frame_indices(49, 8, 8, 49, 3, "timestamps")
    assert indices == list(range(3, 44))  # 43 frames are left, 41 = 4 * 10 + 1 of them are taken


def test_timestamps_slow_sources_repeat_frames():
    assert frame_indices(100, 4, 8, 5, 0, "timestamps") == [0, 1, 1, 2, 2]


def test_a_short_video_ignores_the_rate_in_the_original_only():
    assert frame_indices(40, 30, 8, 49, 3, "upstream") == list(range(3, 36))
    assert frame_indices(40, 30, 8, 49, 3, "timestamps") == [3, 7, 11, 14, 18, 22, 26, 29, 33]


@pytest.mark.parametrize("length", [1, 4, 6])
@pytest.mark.parametrize("rule", ["upstream", "timestamps"])
def test_videos_shorter_than_the_skipped_ends_are_refused(length, rule):
    with pytest.raises(ClipError, match="lower the skipped frames"):
        frame_indices(length, 8, 8, 49, 3, rule)


def test_barely_long_enough_is_refused_with_the_remedy():
    with pytest.raises(ClipError, match="frames 3 to 51 .* has 50.*timestamps"):
        frame_indices(50, 8, 8, 49, 3)
    assert len(frame_indices(50, 8, 8, 49, 3, "timestamps")) == 41
    with pytest.raises(ClipError, match="timestamps"):
        frame_indices(75, 50, 8, 25, 3)


@pytest.mark.parametrize(
    "change, text",
    [
        ({"max_num_frames": 48}, "choose 45 or 49"),
        ({"max_num_frames": 0}, "choose 1 or 5"),
        ({"rule": "nearest"}, "timestamps, upstream"),
        ({"fps": 0.0}, "fps is 0"),
        ({"fps": math.nan}, "fps is nan"),
        ({"wanted_fps": -8}, "-8"),
        ({"skip_frames": -1}, "-1 frames to skip"),
    ],
)
def test_wrong_settings_are_named(change, text):
    settings = {"length": 100, "fps": 24.0, "wanted_fps": 8, "max_num_frames": 49, "skip_frames": 3, **change}
    with pytest.raises(ValueError, match=text) as error:
        frame_indices(**settings)
    assert not isinstance(error.value, ClipError)


def test_one_frame_is_a_clip():
    assert frame_indices(1, 25, 8, 49, 0) == [0]
    assert frame_indices(100, 25, 8, 1, 3, "timestamps") == [3]
