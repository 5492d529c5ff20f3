import json
from collections import Counter
from dataclasses import asdict, replace
from itertools import islice
from pathlib import Path

import numpy as np
import pytest

from sgm.data.dataset import SFTDataset
from sgm.data.video_io import probe, read_frames
from tools.demo.attributes import (
    BACKGROUNDS,
    COLOURS,
    DIRECTIONS,
    MIN_CONTRAST,
    MOTIONS,
    PATTERNS,
    SHAPES,
    STYLES,
    all_combinations,
    choose_withheld,
    digest,
    is_possible,
    read_withheld,
    write_withheld,
)
from tools.demo.captions import caption, parse
from tools.demo.make_dataset import Options, main, make_clip
from tools.demo.shapes import EXTENT, ClipSpec, ObjectSpec, _background, _track, render_clip, sample_spec

LIST = Path(__file__).resolve().parents[2] / "tools" / "demo" / "withheld.json"


def spec_of(motion="still", shape="circle", colour="red", size="medium", speed="medium", **clip) -> ClipSpec:
    return ClipSpec((ObjectSpec(shape, colour, size, motion, speed),), background="black", **clip)


def mask_of(frames: np.ndarray, colour="red") -> np.ndarray:
    """Where the shape is, (f, h, w)."""
    near = np.abs(frames.astype(int) - np.array(COLOURS[colour])).sum(axis=-1)
    return near < 60


def centres(mask: np.ndarray) -> np.ndarray:
    """x and y of a shape in each frame, (f, 2)."""
    return np.array([[xs.mean(), ys.mean()] for ys, xs in (np.nonzero(frame) for frame in mask)])


def test_there_is_enough_to_show():
    assert len(SHAPES) >= 6 and len(COLOURS) >= 8 and len(MOTIONS) >= 8 and len(PATTERNS) >= 5


@pytest.mark.parametrize("frames", [1, 17, 49])
@pytest.mark.parametrize("height, width", [(128, 192), (64, 96), (96, 64)])
def test_any_clip_renders_at_any_size(frames, height, width):
    for i in range(15):
        spec = sample_spec(np.random.default_rng(i), frames, height, width, style=[None, *STYLES][i % 4])
        clip = render_clip(spec)
        assert clip.shape == (frames, height, width, 3) and clip.dtype == np.uint8
        assert clip[0].std(axis=(0, 1)).max() > 5


def test_the_record_is_the_clip():
    for i in range(20):
        spec = sample_spec(np.random.default_rng(i), frames=5)
        again = ClipSpec.from_dict(json.loads(json.dumps(asdict(spec))))
        assert again == spec and np.array_equal(render_clip(again), render_clip(spec))


@pytest.mark.parametrize("motion", DIRECTIONS)
@pytest.mark.parametrize("speed, share", [("slow", 0.15), ("fast", 0.45)])
def test_directions_go_where_they_say(motion, speed, share):
    path = centres(mask_of(render_clip(spec_of(motion, speed=speed))))
    travelled = path[-1] - path[0]
    dx, dy = DIRECTIONS[motion]
    for moved, wanted, room in ((travelled[0], dx, 192), (travelled[1], dy, 128)):
        assert abs(moved) < 0.6 if wanted == 0 else moved * wanted > share * 0.9 * min(room, 128) * 0.6
    steps = np.diff(path, axis=0)
    assert np.abs(steps - steps.mean(axis=0)).max() < 0.5  # evenly, to the fraction of a pixel


def test_growing_shrinking_and_staying():
    for motion, ratio in (("grow", 1.7**2), ("shrink", 1.7**-2), ("still", 1.0)):
        area = mask_of(render_clip(spec_of(motion))).sum(axis=(1, 2))
        assert area[-1] / area[0] == pytest.approx(ratio, rel=0.12)
    assert (np.ptp(render_clip(spec_of("still")), axis=0) == 0).all()


def test_orbit_bounce_and_rotation():
    path = centres(mask_of(render_clip(spec_of("orbit"))))
    radius = np.hypot(*(path - path[:48].mean(axis=0)).T)
    assert radius.min() > 10 and np.ptp(radius) < 3
    before, after = np.diff(path, axis=0)[:-1], np.diff(path, axis=0)[1:]
    turn = before[:, 0] * after[:, 1] - before[:, 1] * after[:, 0]
    assert (turn > 0).all()  # clockwise, y being downwards
    height = centres(mask_of(render_clip(spec_of("bounce", speed="fast"))))
    assert np.ptp(height[:, 0]) < 0.5 and 20 < np.ptp(height[:, 1]) < 30
    assert (np.diff(np.sign(np.diff(height[:, 1]))) != 0).sum() >= 4  # up, down, up, down, up
    turning = mask_of(render_clip(spec_of("rotate", shape="diamond")))
    assert np.ptp(centres(turning), axis=0).max() < 1 and (turning[0] ^ turning[24]).mean() > 0.01


def test_shapes_stay_in_the_frame_and_apart():
    for i in range(60):
        spec = sample_spec(np.random.default_rng(i), two=0.7, frames=17)
        plain = render_clip(ClipSpec.from_dict({**asdict(spec), "pattern": "plain", "second": ""}))
        ground = np.array(BACKGROUNDS[spec.background])
        changed = np.abs(plain.astype(int) - ground).sum(axis=-1) > 30
        edges = (changed[:, 0], changed[:, -1], changed[:, :, 0], changed[:, :, -1])
        assert not any(edge.any() for edge in edges), spec
        if len(spec.objects) == 2:
            assert not changed[:, :, 95:97].any(), spec


def test_whatever_moves_does_so_slowly_enough_for_the_vae():
    for i in range(400):
        spec = sample_spec(np.random.default_rng(i), two=0.4)
        share = spec.width / len(spec.objects)
        for k, item in enumerate(spec.objects):
            x, y, radius, angle, _ = _track(item, spec, k * share, (k + 1) * share)
            edge = EXTENT * (np.abs(np.diff(radius)) + radius[1:] * np.abs(np.diff(angle)))
            assert (np.hypot(np.diff(x), np.diff(y)) + edge).max() < 5, item
            if item.motion in (*DIRECTIONS, "bounce", "orbit"):
                assert max(np.ptp(x), np.ptp(y)) > 15, item


@pytest.mark.parametrize("pattern", ["horizontal stripes", "vertical stripes", "checker", "dots"])
def test_patterns_repeat_on_the_grid_of_the_vae(pattern):
    seen = set()
    for i in range(40):
        spec = replace(sample_spec(np.random.default_rng(i), 1), pattern=pattern, background="black", second="white")
        ground = _background(spec)
        for axis in (0, 1):
            edges = np.flatnonzero((np.diff(ground, axis=axis) != 0).any(axis=(1 - axis, 2))) + 1
            cells = ground.shape[axis] // 32
            if pattern == "dots":
                parts = np.split(ground, cells, axis=axis)
                assert all(np.array_equal(part, parts[0]) for part in parts)
            else:
                assert set(edges % 16) <= {0}
        seen.add(ground.tobytes())
    assert len(seen) == (1 if pattern == "dots" else 4)


def test_edges_are_soft():
    frame = render_clip(spec_of(shape="circle", frames=1))[0, :, :, 0].astype(int)
    red, black = COLOURS["red"][0], BACKGROUNDS["black"][0]
    between = (frame > black + 20) & (frame < red - 20)
    assert 40 < between.sum() < 300


@pytest.mark.parametrize("style", STYLES)
def test_a_style_comes_in_its_sizes(style):
    seen = {item.size for i in range(60) for item in sample_spec(np.random.default_rng(i), style=style).objects}
    assert seen == set(STYLES[style].sizes)


def test_contrast_is_guaranteed():
    from tools.demo.attributes import distance

    for i in range(500):
        spec = sample_spec(np.random.default_rng(i))
        for item in spec.objects:
            assert distance(item.colour, spec.background) >= MIN_CONTRAST
            assert not spec.second or distance(item.colour, spec.second) >= MIN_CONTRAST
        spec = sample_spec(np.random.default_rng(i), style="striped-heart")
        for item in spec.objects:
            for name in filter(None, (spec.background, spec.second)):
                assert min(distance(item.colour, name), distance(item.colour, name, stripes=True)) >= MIN_CONTRAST


@pytest.mark.parametrize("style", [None, *STYLES])
@pytest.mark.parametrize("frames", [1, 49])
def test_captions_say_what_is_there(style, frames):
    texts = set()
    for i in range(400):
        rng = np.random.default_rng(i)
        spec = sample_spec(rng, frames, style=style, two=0.4)
        text = caption(spec, rng)
        texts.add(text)
        said, ground = parse(text)
        assert ground == (spec.pattern, spec.background, spec.second), text
        for words, item in zip(said, spec.objects, strict=True):
            assert (words.shape, words.colour, words.size, words.fill) == (
                item.shape, item.colour, item.size, item.fill
            ), text  # fmt: skip
            assert words.motion == (item.motion if frames > 1 else None), text
            if frames > 1 and item.motion != "still":
                assert words.speed == item.speed, text
    assert len(texts) > 380


def test_one_clip_has_many_captions():
    spec = sample_spec(np.random.default_rng(1))
    assert len({caption(spec, np.random.default_rng(i)) for i in range(200)}) > 80


def test_other_texts_are_not_understood():
    for text in ("a cat walks over a red background", "a red star moves left", ""):
        with pytest.raises(ValueError):
            parse(text)


def test_the_committed_withheld_list_is_the_rule(tmp_path):
    assert read_withheld(LIST) == frozenset(choose_withheld())
    write_withheld(tmp_path / "again.json")
    assert (tmp_path / "again.json").read_bytes() == LIST.read_bytes()


def test_what_is_withheld_leaves_every_value_frequent():
    withheld, every = choose_withheld(), all_combinations()
    assert 0.10 <= len(withheld) / len(every) <= 0.15
    for field in range(3):
        held, total = Counter(c[field] for c in withheld), Counter(c[field] for c in every)
        assert all(0.05 < held[value] / total[value] < 0.2 for value in total)
    pairs, left = Counter((c[0], c[2]) for c in every), Counter((c[0], c[2]) for c in set(every) - set(withheld))
    assert all(left[pair] >= 5 for pair in pairs)


def test_withheld_combinations_are_left_out_or_the_only_ones():
    withheld = read_withheld(LIST)
    for i in range(400):
        spec = sample_spec(np.random.default_rng(i), two=0.5, withheld=withheld)
        assert not any(item.combination in withheld for item in spec.objects)
        spec = sample_spec(np.random.default_rng(i), two=0.5, withheld=withheld, only_withheld=True)
        assert all(item.combination in withheld for item in spec.objects)
    with pytest.raises(ValueError, match="withheld list"):
        sample_spec(np.random.default_rng(0), only_withheld=True)


def test_a_changed_withheld_list_is_refused(tmp_path):
    content = json.loads(LIST.read_text())
    content["combinations"].pop()
    (tmp_path / "changed.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match="own hash"):
        read_withheld(tmp_path / "changed.json")
    content["combinations"] = [["blob", "red", "left"]]
    content["sha256"] = digest([("blob", "red", "left")])
    (tmp_path / "changed.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match="no clip shows"):
        read_withheld(tmp_path / "changed.json")


def test_styles_only_on_request():
    plain = [sample_spec(np.random.default_rng(i)) for i in range(300)]
    for spec in plain:
        for item in spec.objects:
            assert item.shape in SHAPES and item.motion in MOTIONS and item.fill == "plain"
            assert is_possible(item.shape, item.motion)
    heart = sample_spec(np.random.default_rng(0), style="wobbling-striped-heart")
    assert all((o.shape, o.fill, o.motion) == ("heart", "striped", "wobble") for o in heart.objects)
    with pytest.raises(ValueError, match="striped-heart"):
        sample_spec(np.random.default_rng(0), style="watercolour")


def test_motions_may_be_chosen():
    chosen = ("rotate", "orbit")
    seen = {o.motion for i in range(40) for o in sample_spec(np.random.default_rng(i), motions=chosen).objects}
    assert seen == set(chosen)
    for wrong in ((), ("hover",)):
        with pytest.raises(ValueError, match="choose one or more of left"):
            sample_spec(np.random.default_rng(0), motions=wrong)


def run(*arguments) -> None:
    assert main([str(a) for a in arguments]) == 0


def test_the_written_set_is_a_data_set(tmp_path):
    run(tmp_path / "a", "--count", 6, "--frames", 17, "--height", 64, "--width", 96, "--workers", 1, "--seed", 5)
    dataset = SFTDataset(tmp_path / "a", video_size=[64, 96], max_num_frames=17, skip_frms_num=0)
    lines = [json.loads(line) for line in (tmp_path / "a" / "meta.jsonl").read_text().splitlines()]
    assert len(dataset) == len(lines) == 6
    for i, line in enumerate(lines):
        item = dataset[i]
        assert item["txt"] == line["caption"] and item["path"].endswith(line["file"])
        info = probe(item["path"])
        assert (info.frames, info.fps, info.height, info.width) == (17, 8.0, 64, 96)
        shown = read_frames(item["path"], range(17)).permute(0, 2, 3, 1).numpy()
        truth = render_clip(ClipSpec.from_dict(line["spec"]))
        assert np.abs(shown.astype(int) - truth).mean() < 6  # what 4:2:0 colour leaves at this size


def test_clips_depend_on_seed_and_number_only(tmp_path):
    size = ("--frames", 1, "--height", 64, "--width", 96, "--seed", 3)
    run(tmp_path / "short", "--count", 2, "--workers", 1, *size)
    run(tmp_path / "long", "--count", 5, "--workers", 2, *size)
    for name in ("videos/000001.mp4", "labels/000001.txt"):
        assert (tmp_path / "short" / name).read_bytes() == (tmp_path / "long" / name).read_bytes()
    assert make_clip(1, Options(seed=3)) != make_clip(1, Options(seed=4))


def test_labels_in_other_words_keep_their_captions(tmp_path):
    size = ("--count", 12, "--workers", 1, "--frames", 1, "--height", 32, "--width", 32)
    run(tmp_path / "plain", *size)
    run(tmp_path / "other", *size, "--other-words", 0.5)
    run(tmp_path / "held", *size, "--other-words", 1, "--held-out-words")
    lines = {
        name: [json.loads(line) for line in (tmp_path / name / "meta.jsonl").read_text().splitlines()]
        for name in ("plain", "other", "held")
    }
    for plain, other, held in zip(*lines.values()):
        assert plain["caption"] == other["caption"] == held["caption"] and plain["spec"] == other["spec"]
        assert "prompt" not in plain and held["prompt"] not in (held["caption"], other.get("prompt"))
        label = tmp_path / "other" / other["file"].replace("videos", "labels").replace("mp4", "txt")
        assert label.read_text().strip() == other.get("prompt", other["caption"])
    assert 0 < sum("prompt" in line for line in lines["other"]) < 12


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["out", "--other-words", "2"],
        ["out", "--held-out-words"],
        ["out", "--frames", "48"],
        ["out", "--only-withheld"],
        ["out", "--height", "63"],
        ["out", "--style", "oil"],
        ["out", "--count", "0"],
        ["out", "--motion", "hover"],
        ["out", "--motion", "rotate", "--frames", "1"],
        ["out", "--motion", "rotate", "--style", "wobble"],
        ["out", "--motion", "rotate", "--only-withheld", "--withheld", "tools/demo/withheld.json"],
    ],
)
def test_wrong_arguments_stop_with_usage(arguments, capsys):
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2 and "usage" in capsys.readouterr().err


def test_a_wrong_list_is_an_error_without_a_traceback(tmp_path, capsys):
    assert main([str(tmp_path / "o"), "--withheld", str(tmp_path / "absent.json")]) == 2
    assert "absent.json" in capsys.readouterr().err


def test_specs_cover_everything():
    specs = list(islice((sample_spec(np.random.default_rng(i)) for i in range(1500)), 1500))
    objects = [item for spec in specs for item in spec.objects]
    for values, seen in (
        (SHAPES, Counter(o.shape for o in objects)),
        (COLOURS, Counter(o.colour for o in objects)),
        (MOTIONS, Counter(o.motion for o in objects)),
        (PATTERNS, Counter(s.pattern for s in specs)),
        (BACKGROUNDS, Counter(s.background for s in specs)),
    ):
        assert set(seen) == set(values)
        assert min(seen.values()) > 0.4 * sum(seen.values()) / len(seen)
