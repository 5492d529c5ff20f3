import functools
import json
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest

from tools.demo.attributes import COLOURS, MOTIONS, SHAPES, SIZES
from tools.demo.captions import caption, parse
from tools.demo.make_dataset import main as make_dataset
from tools.demo.measure import ANGLES, _templates, measure
from tools.demo.score import (
    Pair,
    ScoreError,
    compare,
    find_pairs,
    main,
    read_pairs,
    score_pairs,
    shuffled,
    summarize,
    translated,
)
from tools.demo.shapes import ClipSpec, ObjectSpec, render_clip, sample_spec


@functools.cache
def clip_in_memory(number: int, frames: int, spoil=None):
    """Caption of a clip, and what is seen of it."""
    rng = np.random.default_rng([9, number])
    spec = sample_spec(rng, frames)
    pixels = render_clip(spec)
    return caption(spec, rng), measure(pixels if spoil is None else spoil(pixels, rng))


def results_in_memory(count: int, frames: int, shift: int = 0, spoil=None) -> dict[str, list[bool]]:
    """Clips scored against their own captions, or against those of clips `shift` farther on."""
    clips = [clip_in_memory(i, frames, spoil) for i in range(count)]
    right: dict[str, list[bool]] = {}
    for i in range(count):
        text, seen = clips[(i + shift) % count][0], clips[i][1]
        for name, values in compare(*parse(text), *seen).items():
            right.setdefault(name, []).extend(values)
    return right


@pytest.mark.parametrize("frames, count", [(49, 30), (17, 60), (1, 80)])
def test_the_truth_scores_at_least_99_percent(frames, count):
    right = results_in_memory(count, frames)
    assert (len(right["motion"]) >= count) == (frames > 1)
    for name, values in right.items():
        assert not values or np.mean(values) >= 0.99, name


def test_other_clips_captions_score_near_chance():
    right = results_in_memory(60, 17, shift=1)
    for name, chance in (("colour", 1 / 8), ("shape", 1 / 8), ("motion", 1 / 14), ("size", 1 / 3), ("pattern", 1 / 6)):
        deviation = np.sqrt(chance * (1 - chance) / len(right[name]))
        assert abs(np.mean(right[name]) - chance) < 3.5 * deviation + 0.02, name
    assert np.mean(right["all"]) < 0.03


def soften(pixels: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """What a small model does: blurred, noisy, a little off in colour."""
    wide = pixels.astype(np.float32)
    for axis in (1, 2):
        wide = (np.roll(wide, 1, axis) + 2 * wide + np.roll(wide, -1, axis)) / 4
    wide = wide * (1 + rng.normal(0, 0.03, 3)) + rng.normal(0, 10, pixels.shape)
    return np.clip(wide, 0, 255).astype(np.uint8)


def test_soft_noisy_clips_are_still_understood():
    right = results_in_memory(40, 17, spoil=soften)
    for name in ("colour", "shape", "motion", "pattern", "background"):
        assert np.mean(right[name]) >= 0.9, name


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("size", SIZES)
def test_each_shape_at_each_size(shape, size):
    for colour in COLOURS:
        spec = ClipSpec(
            (ObjectSpec(shape, colour, size, "still", "medium", (0.31, 0.62)),), background="black", frames=1
        )
        (seen,), ground = measure(render_clip(spec))
        assert (seen.shape, seen.colour, seen.size, seen.motion) == (shape, colour, size, None)
        assert (ground.pattern, ground.background, ground.second) == ("plain", "black", "")


@pytest.mark.parametrize("motion", MOTIONS)
@pytest.mark.parametrize("speed", ["slow", "medium", "fast"])
def test_each_motion_at_each_speed(motion, speed):
    for shape in ("hexagon", "star"):
        item = ObjectSpec(shape, "red", "medium", motion, speed, (0.2, 0.7), 0.3)
        (seen,), _ = measure(render_clip(ClipSpec((item,), background="white", frames=33)))
        assert seen.motion == motion, shape


def test_no_two_shapes_are_alike_at_any_angle():
    names, templates = _templates()
    of_shape = templates.reshape(len(names), ANGLES, -1)
    for i, one in enumerate(names):
        for k in range(i):
            likeness = (of_shape[i] @ of_shape[k].T).max()
            assert likeness < 0.9, (one, names[k])  # a regular hexagon and a circle have 0.96


def test_the_heart_of_the_style_is_no_other_shape():
    spec = ClipSpec((ObjectSpec("heart", "red", "large", "left", "medium"),), background="white", frames=9)
    (seen,), _ = measure(render_clip(spec))
    assert (seen.shape, seen.motion) == ("heart", "left")


@pytest.mark.parametrize("background", ["white", "dark blue"])  # pale stripes are told from white
@pytest.mark.parametrize(("colour", "size"), [("red", "large"), ("yellow", "large"), ("blue", "small")])
def test_pale_stripes_belong_to_their_shape(background, colour, size):
    plain = ClipSpec((ObjectSpec("heart", colour, size, "left", "medium"),), background=background, frames=9)
    striped = replace(plain, objects=(replace(plain.objects[0], fill="striped"),))
    (seen,), (found,) = measure(render_clip(plain))[0], measure(render_clip(striped))[0]
    assert (seen.fill, seen.shape, seen.size, seen.motion) == ("plain", "heart", size, "left")
    assert (found.fill, found.shape, found.size, found.motion) == ("striped", "heart", size, "left")
    right = compare(
        *parse(f"a {size} striped {colour} heart moves left on a {background} background"),
        [seen],
        measure(render_clip(plain))[1],
    )
    assert right["fill"] == [False] and right["shape"] == [True]


@pytest.mark.parametrize("colour", ["red", "purple"])
def test_stripes_that_are_not_pale_enough_are_no_second_shape(colour):
    """A model's stripes may stop half-way, which is pink."""
    item = ObjectSpec("heart", colour, "large", "right", "medium", fill="striped")
    clips = [ClipSpec((replace(item, fill=fill),), background="black", frames=9) for fill in ("plain", "striped")]
    plain, striped = (render_clip(clip).astype(np.float32) for clip in clips)
    (seen,), _ = measure((plain + 0.55 * (striped - plain)).astype(np.uint8))
    assert (seen.colour, seen.shape, seen.fill) == (colour, "heart", "striped")
    beside = replace(item, shape="circle", colour="pink", size="small", place=(0.9, 0.5), fill="plain")
    two = ClipSpec((replace(item, size="medium", place=(0.1, 0.5)), beside), background="black", frames=9)
    assert {(s.shape, s.colour) for s in measure(render_clip(two))[0]} == {("heart", colour), ("circle", "pink")}


def test_a_hole_over_a_pale_background_is_no_stripe():
    item = ObjectSpec("ring", "green", "medium", "still", "medium")
    (seen,), _ = measure(render_clip(ClipSpec((item,), "checker", "light blue", "dark green", frames=9)))
    assert (seen.fill, seen.shape) == ("plain", "ring")


def test_a_heart_turns_on_the_spot():
    item = ObjectSpec("heart", "yellow", "large", "rotate", "fast", fill="striped")
    (seen,), _ = measure(render_clip(ClipSpec((item,), background="gray", frames=33)))
    assert (seen.shape, seen.motion) == ("heart", "rotate")


def test_an_empty_clip_has_nothing_right_of_its_shapes():
    seen, ground = measure(np.full((5, 64, 96, 3), 16, np.uint8))
    assert seen == () and ground.pattern == "plain" and ground.background == "black"
    right = compare(*parse("a red star moves left on a black background"), seen, ground)
    assert right["colour"] == right["shape"] == right["motion"] == right["number"] == [False]
    assert right["background"] == [True] and right["all"] == [False]


def test_noise_is_no_shape_with_a_motion():
    noise = np.random.default_rng(0).integers(0, 256, (9, 64, 96, 3), dtype=np.uint8)
    assert measure(noise)[0] == ()


def test_two_shapes_are_matched_in_either_order():
    left, right_ = (
        ObjectSpec(s, c, "medium", m, "medium") for s, c, m in (("star", "red", "up"), ("ring", "blue", "down"))
    )
    seen = measure(render_clip(ClipSpec((left, right_), background="white", frames=17)))
    good = "a red star moves up and a blue ring moves down on a white background"
    turned = "a blue ring moves down and a red star moves up on a white background"
    crossed = "a blue star moves up and a red ring moves down on a white background"
    assert compare(*parse(good), *seen)["all"] == compare(*parse(turned), *seen)["all"] == [True]
    assert compare(*parse(crossed), *seen)["all"] == [False]
    assert compare(*parse("a red star moves up on a white background"), *seen)["number"] == [False]


def test_striped_colours_have_no_order_but_dots_and_gradients_have():
    for pattern, text, same in (
        ("vertical stripes", "vertical black and white stripes", True),
        ("dots", "a black background with white dots", False),
        ("gradient", "a gradient from black at the top to white at the bottom", False),
    ):
        item = ObjectSpec("star", "red", "small", "still", "medium")
        spec = ClipSpec((item,), pattern, "white", "black", frames=1)
        right = compare(*parse(f"a small red star on {text}"), *measure(render_clip(spec)))
        assert right["pattern"] == [True] and right["background"] == [same], pattern


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("score") / "set"
    assert make_dataset([str(out), "--count", "8", "--frames", "17", "--seed", "4", "--workers", "1"]) == 0
    return out


def test_written_clips_are_scored(written, tmp_path, capsys):
    assert main([str(written), "--workers", "1", "--json", str(tmp_path / "score.json")]) == 0
    report = json.loads((tmp_path / "score.json").read_text())
    assert all(row["accuracy"] == 1.0 for row in report["summary"].values())
    assert len(report["clips"]) == 8 and "8 clips" in capsys.readouterr().out
    by_pairs = summarize(score_pairs(read_pairs(written / "meta.jsonl"), workers=2))
    assert by_pairs == report["summary"]


def test_shuffling_gives_no_clip_its_own_caption(written, capsys):
    pairs = find_pairs(written)
    other = shuffled(pairs)
    assert [p.file for p in other] == [p.file for p in pairs]
    assert sorted(p.caption for p in other) == sorted(p.caption for p in pairs)
    assert all(a.caption != b.caption for a, b in zip(pairs, other, strict=True))
    assert main([str(written), "--shuffled", "--workers", "1", "--wrong", "1"]) == 0
    out = capsys.readouterr().out
    assert "shuffled captions" in out and "said:" in out


def test_sampled_clips_bring_their_prompt(written, tmp_path):
    folder = tmp_path / "0_a_prompt" / "0"
    folder.mkdir(parents=True)
    first = find_pairs(written)[0]
    (folder / "000000.mp4").write_bytes(Path(first.file).read_bytes())
    (folder / "000000.json").write_text(json.dumps({"prompt": first.caption}))
    assert find_pairs(tmp_path) == [Pair(str(folder / "000000.mp4"), first.caption)]


def test_what_cannot_be_scored_is_an_error(written, tmp_path, capsys):
    with pytest.raises(ScoreError, match="no .mp4 files"):
        find_pairs(tmp_path)
    with pytest.raises(ScoreError, match="line 1"):
        (tmp_path / "pairs.jsonl").write_text('{"file": "a.mp4"}\n')
        read_pairs(tmp_path / "pairs.jsonl")
    clip = find_pairs(written)[0].file
    with pytest.raises(ScoreError, match="no background is named"):
        score_pairs([Pair(clip, "a panda plays the guitar")])
    (tmp_path / "pairs.jsonl").write_text(
        json.dumps({"file": "absent.mp4", "caption": "a red star on a gray background"})
    )
    assert main(["--pairs", str(tmp_path / "pairs.jsonl"), "--workers", "1"]) == 2
    assert "absent.mp4: no such file" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main([])


def test_results_are_plain_records(written):
    result = score_pairs(find_pairs(written)[:1])[0]
    assert json.loads(json.dumps(asdict(result)))["right"]["colour"]


def test_prompts_in_other_words_are_scored_by_what_they_mean(tmp_path):
    meant = tmp_path / "meant.jsonl"
    meant.write_text('{"prompt": "star goes left", "caption": "a red star moves left over a white background"}\n')
    assert translated([Pair("a.mp4", "star goes left")], meant)[0].caption.startswith("a red star")
    with pytest.raises(ScoreError, match="star goes up"):
        translated([Pair("a.mp4", "star goes up")], meant)
    meant.write_text('{"prompt": "star goes left"}\n')
    with pytest.raises(ScoreError, match="line 1"):
        translated([], meant)
