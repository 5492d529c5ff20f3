"""Buckets: which clip goes where, and batches of one kind in an order that is fixed."""

from __future__ import annotations

import itertools
from collections import Counter

import pytest

from sgm.data.buckets import Bucket, BucketSampler, batches_by_shape, choose_bucket, kept_share, parse_buckets
from sgm.data.frames import ClipError, DatasetError
from sgm.data.sampler import ClipSampler

BUCKETS = parse_buckets(
    [[49, 480, 720], [49, 720, 480], [17, 480, 720], [17, 720, 480], [1, 480, 720], [1, 1024, 1024]]
)


def chosen(height: int, width: int, most: int, max_crop: float = 0.25) -> Bucket:
    return choose_bucket(height, width, BUCKETS, max_crop, lambda frames: frames <= most)


@pytest.mark.parametrize(
    "height, width, most, bucket",
    [
        (480, 720, 49, (49, 480, 720)),
        (1080, 1920, 60, (49, 480, 720)),  # 16:9 loses 16 %
        (1920, 1080, 60, (49, 720, 480)),
        (480, 720, 48, (17, 480, 720)),
        (480, 720, 1, (1, 480, 720)),
        (500, 500, 1, (1, 1024, 1024)),
    ],
)
def test_a_clip_goes_where_most_of_it_is_kept(height, width, most, bucket):
    assert chosen(height, width, most) == bucket


def test_what_no_bucket_can_take_is_refused_with_the_reason():
    with pytest.raises(ClipError, match="would crop 33%, more than max_crop 25%"):
        choose_bucket(600, 600, BUCKETS[:5], 0.25, lambda frames: True)
    assert choose_bucket(600, 600, BUCKETS[:5], 0.34, lambda frames: True).frames == 49
    assert choose_bucket(480, 960, BUCKETS[:1], 0.25, lambda frames: True) == BUCKETS[0]  # just 25 %
    with pytest.raises(ClipError, match="would crop 25%, more than max_crop 24%"):
        choose_bucket(480, 960, BUCKETS[:1], 0.24, lambda frames: True)
    with pytest.raises(ClipError, match="too short.*17 frames"):
        choose_bucket(720, 480, BUCKETS, 0.25, lambda frames: frames < 17)


def test_kept_share_is_the_cropped_area():
    assert kept_share(480, 720, Bucket(1, 480, 720)) == 1
    assert kept_share(480, 960, Bucket(1, 480, 720)) == pytest.approx(0.75)
    assert kept_share(960, 720, Bucket(1, 480, 720)) == pytest.approx(0.5)


@pytest.mark.parametrize(
    "given, word",
    [
        ([[48, 480, 720]], "4k \\+ 1"),
        ([[49, 480, 728]], "multiples of 16"),
        ([[1, 16, 16]] * 2, "twice"),
        ([[1, 2]], "is not"),
    ],
)
def test_wrong_buckets_are_named(given, word):
    with pytest.raises(DatasetError, match=word):
        parse_buckets(given)


SHAPES = [[(5, 16, 32)] * 7 + [(1, 16, 32)] * 4 + [(5, 32, 16)] * 9]


def take(sampler: ClipSampler, count: int) -> list[int]:
    return list(itertools.islice(sampler, count))


@pytest.mark.parametrize("world, batch", [(1, 2), (2, 2), (3, 1)])
def test_every_batch_of_every_rank_at_a_step_has_one_shape(world, batch):
    ranks = [take(BucketSampler(SHAPES, batch, 5, r, world), 40 * batch) for r in range(world)]
    flat = SHAPES[0]
    for step in range(40):
        clips = [clip for rank in ranks for clip in rank[step * batch : (step + 1) * batch]]
        assert len({flat[clip] for clip in clips}) == 1
    kinds = [flat[rank_step] for rank_step in ranks[0][::batch]]
    assert len(set(kinds)) == 3 and kinds != sorted(kinds)


def test_each_clip_comes_as_often_as_any_other_of_its_shape():
    seen = Counter(take(BucketSampler(SHAPES, 2, 1), 2000))
    for shape in set(SHAPES[0]):
        counts = [seen[k] for k, found in enumerate(SHAPES[0]) if found == shape]
        assert min(counts) > 0 and max(counts) - min(counts) <= 1
    shares = [sum(seen[k] for k in range(20) if SHAPES[0][k] == shape) for shape in dict.fromkeys(SHAPES[0])]
    assert shares == pytest.approx([800, 400, 800], abs=30)  # 4, 2 and 4 of an epoch's ten blocks


def test_weights_hold_across_sources():
    shapes = [[(1, 16, 32)] * 10 + [(5, 16, 32)] * 10, [(1, 16, 32)] * 20]
    stream = take(BucketSampler(shapes, 2, 0, weights=[3, 1]), 4000)
    assert sum(clip < 20 for clip in stream) / 4000 == pytest.approx(0.75, abs=0.05)


def test_evaluation_takes_every_clip_in_batches_of_one_shape():
    batches = batches_by_shape(SHAPES[0], 2)
    assert len(batches) == 4 + 2 + 5 and all(len(batch) == 2 for batch in batches)
    assert all(len({SHAPES[0][k] for k in batch}) == 1 for batch in batches)
    assert {k for batch in batches for k in batch} == set(range(20))
    assert len({SHAPES[0][batch[0]] for batch in batches[:3]}) == 3  # the shapes take turns
    assert batches_by_shape([(1, 16, 16)], 3) == [[0, 0, 0]]


@pytest.mark.parametrize("steps", [0, 1, 5, 17])
def test_resuming_keeps_the_order(steps):
    straight = take(BucketSampler(SHAPES, 2, 5, 1, 2), 80)
    first = BucketSampler(SHAPES, 2, 5, 1, 2)
    take(first, steps * 2)
    second = BucketSampler(SHAPES, 2, 0, 1, 2)
    second.load_state_dict(first.state_dict())
    assert take(second, 80 - steps * 2) == straight[steps * 2 :]


def test_with_another_number_of_ranks_each_clip_still_comes_before_any_comes_again():
    """2 ranks, then 1, then 3, and resumed in between with the same: whole batches of one shape, no clip skipped."""
    flat, seen, state = SHAPES[0], [], None
    for ranks, steps in ((2, 7), (1, 9), (1, 4), (3, 6), (2, 20)):
        each = [BucketSampler(SHAPES, 2, 5, rank, ranks) for rank in range(ranks)]
        for sampler in each if state else ():
            sampler.load_state_dict(state)
        before = each[0].consumed
        taken = [take(sampler, 2 * steps) for sampler in each]
        for step in range(steps):
            batches = [stream[2 * step : 2 * step + 2] for stream in taken]
            assert len({flat[clip] for batch in batches for clip in batch}) == 1
            seen += [clip for batch in batches for clip in batch]
        state = each[0].state_dict()
        assert each[0].consumed == before + 2 * steps * ranks == len(seen)
        for shape in set(flat):
            counts = [seen.count(k) for k, found in enumerate(flat) if found == shape]
            assert max(counts) - min(counts) <= 1
    assert min(Counter(seen).values()) > 1 and len(set(seen)) == 20


def test_a_position_in_another_kind_of_stream_is_refused():
    plain, blocks = ClipSampler([20]), BucketSampler(SHAPES, 4, 5)
    with pytest.raises(DatasetError, match=r"groups None, now it is \[.*args.load"):
        blocks.load_state_dict(plain.state_dict())
    with pytest.raises(DatasetError, match="now it is None"):
        plain.load_state_dict(blocks.state_dict())
