"""Wordings of demo clips, and the training of the text encoder on them."""

import json
import random
from dataclasses import replace

import pytest
import torch

from sgm.modules.encoders.modules import FrozenT5Embedder
from tools.demo import words
from tools.demo.attributes import DIRECTIONS, ClipSpec, ObjectSpec
from tools.demo.captions import parse
from tools.demo.train_text import (
    BY_HAND,
    LENGTH,
    NOT_ASKED,
    QUESTIONS,
    Batches,
    Readers,
    Settings,
    answers,
    by_hand,
    disagreement,
    new_encoder,
    parse_arguments,
    run,
    score,
    sentences,
    train,
)
from tools.demo.wordings import ALL_MOTIONS, HELD_OUT, SHAPES, Chances, random_spec, reword

SMALL = Settings(steps=75, seconds=None, specs=8, lr=1e-2, vocabulary=500, corpus=400, width=64, layers=1, heads=2,
                 hidden=64)  # fmt: skip
PLAIN = Chances(caption=0.0, unknown_verb=0.0, unknown_word=0.0, typo=0.0, default=0.0)


def clip(shape="star", colour="red", size="small", motion="left", speed="fast", **ground) -> ClipSpec:
    return ClipSpec((ObjectSpec(shape, colour, size, motion, speed),), **{"background": "white", **ground})


def texts_of(spec: ClipSpec, count: int = 200, chances: Chances = PLAIN) -> list[str]:
    return [reword(spec, random.Random(i), chances).lower() for i in range(count)]


@pytest.mark.parametrize(
    "phrase, forms",
    [
        ("move left", ("moves left", "moving left", "move left")),
        ("rush", ("rushes", "rushing", "rush")),
        ("spin in place", ("spins in place", "spinning in place", "spin in place")),
        ("fly", ("flies", "flying", "fly")),
        ("hold its position", ("holds its position", "holding its position", "hold their position")),
        ("be at rest", ("is at rest", "at rest", "are at rest")),
        ("go up", ("goes up", "going up", "go up")),
    ],
)
def test_verbs_are_inflected(phrase, forms):
    assert words.inflect(phrase) == forms


def test_directions_never_name_another_one():
    for motion in DIRECTIONS:
        for way in (*words.ways(motion, False), *words.ways(motion, True)):
            assert "{" not in way
            if "from" not in way and "starting" not in way and "across" not in way:
                named = {
                    w for w in ("left", "right", "up", "down") if w in way.replace("upper", "up").replace("low", "down")
                }
                named |= {"up"} if "top" in way or "north" in way else set()
                named |= {"down"} if "bottom" in way or "south" in way else set()
                named |= {"left"} if "west" in way else {"right"} if "east" in way else set()
                assert named == set(motion.split()), way


def test_what_is_held_out_is_not_trained():
    for trained, held in ((words.DO, words.HELD_DO), (words.GROUNDS, words.HELD_GROUNDS)):
        assert all(not set(trained[key]) & set(held[key]) for key in trained)
    assert not set(words.GO) & set(words.HELD_GO)
    for motion in DIRECTIONS:
        assert not set(words.ways(motion, False)) & set(words.ways(motion, True))
    for name in vars(words.TRAINED):
        assert not set(getattr(words.TRAINED, name)) & set(getattr(words.HELD, name)), name


def test_texts_vary_and_say_every_attribute():
    texts = texts_of(clip(colour="green", pattern="dots", second="brown"))
    assert len(set(texts)) > 190
    for group in (words.SHAPES["star"], words.COLOURS["green"], words.SIZES["small"], words.GROUND_COLOURS["brown"]):
        stems = {word.replace("-", " ") for word in group}
        assert all(any(stem in text.replace("-", " ") for stem in stems) for text in texts)


def test_the_right_one_comes_first_only_where_the_text_says_so():
    spec = ClipSpec(
        (ObjectSpec("star", "red", "small", "grow", "slow"), ObjectSpec("ring", "blue", "large", "up", "fast"))
    )
    swapped = 0
    for text in texts_of(spec, 300):
        star = min(text.find(w) for w in words.SHAPES["star"] if w in text)
        ring = min(text.find(w) for w in words.SHAPES["ring"] if w in text)
        if ring < star:
            assert "left" in text and "right" in text
            swapped += 1
    assert swapped > 10


def test_defaults_may_go_without_words():
    spec = clip(colour="red", size="medium", motion="still", speed="medium", background="black")
    texts = texts_of(spec, chances=Chances(caption=0.0, default=1.0))
    assert any("black" not in t and "ebony" not in t for t in texts)
    assert all(any(colour in t for colour in words.COLOURS["blue"]) for t in texts_of(clip(colour="blue")))


def test_random_clips_cover_everything_independently():
    rng = random.Random(0)
    objects = [item for _ in range(1500) for item in random_spec(rng).objects]
    assert {o.shape for o in objects} == set(SHAPES) and {o.motion for o in objects} == set(ALL_MOTIONS)
    assert any(o.combination == ("ring", "red", "rotate") for o in objects) or len(objects) > 1500


def test_answers_are_the_truth():
    row = answers(*parse("A large striped red heart quickly grows over a white background with gray dots"))
    said = {name: choices[i] for (name, choices), i in zip(QUESTIONS.items(), row) if i != NOT_ASKED}
    assert said == {
        "number": 1, "left shape": "heart", "left colour": "red", "left size": "large", "left motion": "grow",
        "left speed": "fast", "left fill": "striped", "pattern": "dots", "background": "white", "second": "gray",
    }  # fmt: skip


def test_sentences_by_hand_have_a_meaning():
    texts, rows = by_hand()
    assert len(texts) == len(set(texts)) >= 40 and rows.shape == (len(texts), len(QUESTIONS))
    assert all(json.loads(line)["prompt"] != json.loads(line)["caption"] for line in BY_HAND.read_text().splitlines())


def test_scores_count_what_was_asked():
    rows = torch.tensor([answers(*parse("a red star moves left over a white background"))])
    wrong = rows.clone()
    wrong[0, list(QUESTIONS).index("left colour")] += 1
    wrong[0, list(QUESTIONS).index("right colour")] = 0  # not asked, so never counted
    result = score(wrong, rows)
    assert result["colour"] == 0 and result["shape"] == 1 and result["all"] == 0 and result["mean"] == 0.9
    assert score(rows, rows)["all"] == 1


def test_two_wordings_disagree_only_where_their_means_differ():
    torch.manual_seed(0)
    apart, same = torch.randn(6, 5, 8), torch.randn(3, 5, 8).repeat_interleave(2, 0)
    same[1] = same[0].flip(0)  # other places, the same mean
    assert disagreement(apart) > 0.5 and disagreement(same) < 1e-9


def test_readers_ask_only_what_has_an_answer():
    torch.manual_seed(0)
    rows = torch.tensor([answers(*parse("a red star moves left over a white background"))] * 4)
    readers, embedding = Readers(8), torch.randn(4, 6, 8)
    loss = readers.loss(embedding, rows)
    loss.backward()
    right = [i for i, name in enumerate(n for n, choices in QUESTIONS.items() for _ in choices) if "right" in name]
    assert torch.isfinite(loss) and readers.place.weight.grad[right].abs().max() == 0
    assert readers.place.weight.grad.abs().max() > 0 and readers.word.weight.grad.abs().max() > 0


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    out = tmp_path_factory.mktemp("text") / "t5"
    return out, run(SMALL, out, test_texts=20)


def test_training_learns_and_writes_a_release_folder(trained):
    out, report = trained
    names = {path.name for path in out.iterdir()}
    assert len(names) == 8 and {"spiece.model", "config.json", "model.safetensors.index.json"} <= names
    assert report["steps"] == 75 and report["loss"][-1][1] < report["loss"][0][1] - 0.03
    assert {"captions", "held_out", "by_hand", "captions, 1 shape", "captions, 2 shapes"} <= set(report["scores"])
    embedding = FrozenT5Embedder(str(out), max_length=LENGTH).encode(["a red star", ""])
    assert embedding.shape == (2, LENGTH, SMALL.width) and embedding.dtype == torch.float16


def test_training_sees_the_ids_that_sampling_gives(trained):
    embedder = FrozenT5Embedder(str(trained[0]), max_length=LENGTH)
    batches = Batches((trained[0] / "spiece.model").read_bytes(), SMALL)
    for text in sentences("ids", 20, HELD_OUT)[0]:
        pieces = batches.pieces.encode(text)
        assert embedder.tokenize(text).ids[0, : len(pieces) + 1].tolist()[: LENGTH - 1] == [*pieces, 1][: LENGTH - 1]
    assert torch.equal(embedder.tokenize("A RED Star").ids, embedder.tokenize("a red star").ids)


def test_batches_depend_on_seed_and_step_only(trained):
    spiece = (trained[0] / "spiece.model").read_bytes()
    first, again = Batches(spiece, SMALL), Batches(spiece, SMALL)
    again[0]
    assert all(torch.equal(a, b) for a, b in zip(first[3], again[3]))
    assert not torch.equal(first[3][0], first[4][0])
    rows = first[3][1]
    assert torch.equal(rows[0::2], rows[1::2])


def test_the_same_seed_gives_the_same_weights(trained, tmp_path):
    spiece = (trained[0] / "spiece.model").read_bytes()
    states = []
    for name in ("a", "b"):
        settings = replace(SMALL, steps=2)
        embedder = new_encoder(tmp_path / name, spiece, settings)
        torch.manual_seed(7)
        train(embedder, Readers(SMALL.width), spiece, settings, workers=0)
        states.append(embedder.state_dict())
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    untrained = FrozenT5Embedder(str(tmp_path / "a"), max_length=LENGTH).state_dict()
    assert any(not torch.equal(states[0][name], untrained[name]) for name in untrained)


@pytest.mark.parametrize("arguments", [["--out", "x", "--steps", "0"], ["--out", "x", "--lr", "-1"], []])
def test_wrong_arguments_stop_with_usage(arguments, capsys):
    with pytest.raises(SystemExit) as stop:
        parse_arguments(arguments)
    assert stop.value.code == 2 and "usage" in capsys.readouterr().err
