import itertools
from collections import Counter

import pytest

from sgm.data.sampler import ClipSampler, shares


def take(sampler: ClipSampler, count: int) -> list[int]:
    return list(itertools.islice(sampler, count))


def test_each_epoch_has_every_clip_once_in_another_order():
    stream = take(ClipSampler([10], seed=3), 50)
    epochs = [stream[i : i + 10] for i in range(0, 50, 10)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 5


def test_the_seed_decides():
    assert take(ClipSampler([100], seed=1), 300) == take(ClipSampler([100], seed=1), 300)
    assert take(ClipSampler([100], seed=1), 100) != take(ClipSampler([100], seed=2), 100)
    assert len(take(ClipSampler([5], seed=-1), 5)) == 5


@pytest.mark.parametrize("order", ["shuffle", "sequential", "upstream"])
@pytest.mark.parametrize("world", [2, 3])
def test_ranks_share_one_stream_without_overlap(order, world):
    whole = take(ClipSampler([7, 4], seed=5, order=order), 12 * world)
    ranks = [take(ClipSampler([7, 4], seed=5, rank=r, world_size=world, order=order), 12) for r in range(world)]
    assert [index for step in zip(*ranks, strict=True) for index in step] == whole


@pytest.mark.parametrize("settings", [{}, {"order": "sequential"}, {"order": "upstream"}, {"weights": [1, 3]}])
@pytest.mark.parametrize("done", [0, 1, 8, 11, 30])
def test_resuming_goes_on_exactly(settings, done):
    straight = take(ClipSampler([7, 4], seed=5, **settings), 60)
    first = ClipSampler([7, 4], seed=5, **settings)
    take(first, done)
    second = ClipSampler([7, 4], seed=0, **settings)
    second.load_state_dict(first.state_dict())
    assert take(second, 60 - done) == straight[done:]


def test_state_names_epoch_and_position():
    sampler = ClipSampler([10], seed=4, world_size=2)
    take(sampler, 8)
    state = sampler.state_dict()
    assert (state["seed"], state["epoch"], state["position"]) == (4, 1, 6)


def test_resuming_with_another_number_of_ranks():
    ranks = [ClipSampler([9], rank=r, world_size=2) for r in range(2)]
    for sampler in ranks:
        take(sampler, 6)
    assert ranks[0].state_dict() == ranks[1].state_dict()
    alone = ClipSampler([9])
    alone.load_state_dict(ranks[0].state_dict())
    assert take(alone, 20) == take(ClipSampler([9]), 32)[12:]


@pytest.mark.parametrize("other", [ClipSampler([9]), ClipSampler([10], order="sequential")])
def test_a_state_of_other_data_is_refused(other):
    with pytest.raises(ValueError, match="restore the data set"):
        other.load_state_dict(ClipSampler([10]).state_dict())


@pytest.mark.parametrize("order", ["shuffle", "sequential"])
def test_weights_share_out_the_stream(order):
    stream = take(ClipSampler([60, 20, 20], seed=1, order=order, weights=[1, 2, 1]), 4000)
    count = Counter(stream)
    of_source = [sum(count[i] for i in group) for group in (range(60), range(60, 80), range(80, 100))]
    assert of_source == [1000, 2000, 1000]
    for group in (range(60), range(60, 80), range(80, 100)):  # and each source's clips come equally often
        assert max(count[i] for i in group) - min(count[i] for i in group) <= 1


def test_sources_are_mixed_and_not_in_blocks():
    stream = take(ClipSampler([100, 100], seed=1), 200)
    runs = [len(list(group)) for _, group in itertools.groupby(index < 100 for index in stream)]
    assert max(runs) < 20
    turns = take(ClipSampler([4, 4], order="sequential", weights=[1, 1]), 8)
    assert turns == [0, 4, 1, 5, 2, 6, 3, 7]


def test_a_tiny_weight_still_counts():
    assert shares(10, [1000, 0.001]) == [9, 1]
    assert shares(7, [1, 1, 1]) in ([3, 2, 2], [2, 3, 2], [2, 2, 3])
    assert shares(1000, [600, 400]) == [600, 400]


@pytest.mark.parametrize(
    "settings, text",
    [
        ({"sizes": []}, "at least one clip"),
        ({"sizes": [3, 0]}, "at least one clip"),
        ({"rank": 2, "world_size": 2}, "rank 2 of 2"),
        ({"order": "random"}, "shuffle, sequential, upstream"),
        ({"weights": [1]}, "one positive number for each of 2"),
        ({"weights": [1, 0]}, "positive"),
        ({"weights": [1, 1], "order": "upstream"}, "no weights"),
    ],
)
def test_wrong_settings_are_named(settings, text):
    with pytest.raises(ValueError, match=text):
        ClipSampler(**{"sizes": [3, 3], **settings})
