import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from sgm.config import merge_yaml
from sgm.modules.ops.vae import (
    AffineField,
    LeanField,
    LeanMoments,
    apply_field,
    double_frames,
    group_moments,
)
from tools.demo import clip_feed, eval_vae, train_vae
from tools.demo.attributes import read_withheld
from tools.demo.clip_feed import BatchShape, ClipFeed, FeedError, held_out_specs, make_batch
from tools.demo.eval_vae import batches_of, border_ratio, evaluate, latent_statistics
from tools.demo.vae_phases import learning_rate, parse_phases, phase_at
from tools.demo.vae_training import Averages, LossWeights, quieten_last_level, rescale_latents, trainable_vae, vae_loss

REPO = Path(__file__).resolve().parents[2]
SHAPE = BatchShape(3, 9, 32, 48)
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def withheld():
    return read_withheld(REPO / "tools/demo/withheld.json")


@pytest.fixture(scope="module")
def small_yaml(tmp_path_factory):
    """The demo's configuration with an autoencoder of one small width."""
    lines = (REPO / "configs/demo_infer.yaml").read_text().replace("ch: 64", "ch: 32").splitlines()
    kept = [line.split("ch_mult")[0] + "ch_mult: [ 1, 1, 1, 1 ]" if "ch_mult" in line else line for line in lines]
    path = tmp_path_factory.mktemp("vae") / "small.yaml"
    path.write_text("\n".join(kept) + "\n")
    return path


def small_vae(path):
    torch.manual_seed(0)
    return trainable_vae(merge_yaml([path])["model"]["first_stage_config"])


# ---- gradients in half precision ----


@pytest.mark.parametrize(("last", "frames"), [(False, 1), (True, 2)])
def test_lean_operations_have_the_values_and_gradients_of_the_plain_ones(last, frames):
    torch.manual_seed(1)
    x = torch.randn(1, 4, 2, 4, 2, dtype=torch.float64)
    x = (x.to(memory_format=torch.channels_last_3d) if last else x).requires_grad_()
    scale, shift = (torch.randn(1, 4, frames, 2, 1, dtype=torch.float64, requires_grad=True) for _ in range(2))
    for swish in (True, False):
        field = AffineField(scale, shift)
        assert torch.equal(LeanField.apply(x, scale, shift, swish), apply_field(x, field, swish=swish))
        assert torch.autograd.gradcheck(lambda a, b, c, s=swish: LeanField.apply(a, b, c, s), (x, scale, shift))
    for mine, plain in zip(LeanMoments.apply(x, 2), group_moments(x, 2, 1 << 30), strict=True):
        torch.testing.assert_close(mine, plain)
    assert torch.autograd.gradcheck(lambda a: LeanMoments.apply(a, 2), (x,))


@pytest.mark.parametrize("frames", [1, 2, 5])
def test_doubled_frames_come_in_order_and_keep_the_layout(frames):
    x = torch.randn(2, 3, frames, 2, 2)
    order = [k for k in range(frames) for _ in range(1 if frames % 2 and k == 0 else 2)]
    assert torch.equal(double_frames(x), x[:, :, order])
    last = double_frames(x.to(memory_format=torch.channels_last_3d))
    assert torch.equal(last, x[:, :, order])
    assert last.is_contiguous(memory_format=torch.channels_last_3d)


def test_gradients_pass_chunk_borders(small_yaml):
    vae = small_vae(small_yaml)
    z = torch.randn(1, 16, 5, 2, 2, requires_grad=True)
    (gradient,) = torch.autograd.grad(vae.decode(z)[:, :, 9:].square().sum(), z)
    assert gradient[:, :, :3].abs().max() > 0
    # along one direction, against finite differences in double precision
    vae.double()
    start, way = torch.randn(2, 1, 16, 5, 2, 2, dtype=torch.float64)
    start.requires_grad_()
    (slope,) = torch.autograd.grad(vae.decode(start).sum(), start)
    with torch.no_grad():
        ahead, behind = (vae.decode(start + step * way).sum() for step in (1e-6, -1e-6))
    torch.testing.assert_close((slope * way).sum(), (ahead - behind) / 2e-6, rtol=1e-4, atol=1e-6)


# ---- the feed ----


def test_batches_depend_on_seed_and_number_only(withheld):
    with ClipFeed(1, 4, SHAPE.nbytes, 3, withheld) as feed:
        for _ in range(4):
            feed.ask(SHAPE)
        with pytest.raises(FeedError, match="take one first"):
            feed.ask(SHAPE)
        taken = [feed.take() for _ in range(3)]
        feed.ask(replace(SHAPE, pieces=1))
        assert len(feed.take()) == 3
        assert np.array_equal(feed.take(), make_batch(4, replace(SHAPE, pieces=1), 3, withheld))
        with pytest.raises(FeedError, match="a slot has"):
            feed.ask(replace(SHAPE, pieces=9))
    for index, batch in enumerate(taken):
        assert batch.shape == (3, 9, 32, 48, 3)
        assert np.array_equal(batch, make_batch(index, SHAPE, 3, withheld))
    assert not np.array_equal(taken[0], make_batch(0, SHAPE, 4, withheld))


def test_a_worker_that_fails_says_why():
    with ClipFeed(1, 1, SHAPE.nbytes, 0, None) as feed:  # no list of combinations
        feed.ask(SHAPE)
        with pytest.raises(FeedError, match="could not be rendered:\n(.|\n)*TypeError"):
            feed.take()


def test_training_and_test_clips_share_no_combination(withheld):
    for spec in held_out_specs(20, 5, withheld):
        assert all(item.combination in withheld for item in spec.objects)


# ---- the course of a run ----


def test_phases_follow_the_run():
    phases = parse_phases("3:4x17x64x96,1:2x49x128x192")
    assert [phase_at(part, phases).batch.frames for part in (0, 0.74, 0.76, 1)] == [17, 17, 49, 49]
    rates = [learning_rate(part, 1.0) for part in np.linspace(0.02, 1, 50)]
    assert rates[0] == 1.0 and rates == sorted(rates, reverse=True) and rates[-1] == pytest.approx(0.01)
    assert 0 < learning_rate(0, 1.0) < 0.1


@pytest.mark.parametrize("text", ["", "1:2x3", "1:2x16x64x96", "0:2x17x64x96", "1:2x17x64x99", "1:2x57x64x96"])
def test_wrong_phases_are_refused(text):
    with pytest.raises(FeedError, match="phase|does not fit"):
        parse_phases(text)


# ---- loss, export, measures ----


def test_the_loss_counts_each_kind_of_error():
    x = torch.zeros(1, 3, 4, 8, 8)
    mean, logvar = torch.zeros(1, 2, 1, 1, 1), torch.zeros(1, 2, 1, 1, 1)
    none = vae_loss(x, x, mean, logvar, LossWeights())
    assert all(float(value) == pytest.approx(0, abs=1e-6) for value in none.values())
    even = vae_loss(x, x + 0.5, mean, logvar, LossWeights())
    assert even["pixel"] > 0.4 and max(abs(even["edge"]), abs(even["motion"])) < 1e-6
    blink = x.clone()
    blink[:, :, ::2] = 0.5
    assert vae_loss(x, blink, mean, logvar, LossWeights())["motion"] > 0.4
    stripes = x.clone()
    stripes[..., ::2] = 0.5
    assert vae_loss(x, stripes, mean, logvar, LossWeights())["edge"] > 0.4
    kl = vae_loss(x, x, mean + 2, logvar, LossWeights())
    assert float(kl["kl"]) == pytest.approx(2.0) and float(kl["centre"]) == pytest.approx(4.0)


def test_rescaling_gives_unit_latents_and_the_same_pictures(small_yaml, withheld):
    vae = small_vae(small_yaml).requires_grad_(False)
    specs = [replace(spec, frames=17, height=16, width=24) for spec in held_out_specs(2, 1, withheld)]
    (x,) = batches_of(specs, CPU)
    before = vae.moments(x)
    made = vae.decode(before[:, :16])
    factors = 1 / 1.15258426 / latent_statistics(vae, specs, CPU).deviation
    rescale_latents(vae, factors)
    after = vae.moments(x)
    torch.testing.assert_close(after[:, :16], before[:, :16] * factors[:, None, None, None], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(vae.decode(after[:, :16]), made, rtol=1e-4, atol=1e-5)
    figures = evaluate(vae, specs, 1.15258426, CPU)
    np.testing.assert_allclose(figures["latents"]["deviation"], 1, rtol=1e-3)
    with pytest.raises(ValueError, match="16 positive factors"):
        rescale_latents(vae, -factors)


@pytest.mark.parametrize("widths", ["[ 1, 1, 1, 1 ]", "[ 1, 2, 2, 2 ]"])  # the second with a shortcut between widths
def test_a_loud_last_level_is_quietened_and_the_pictures_stay(tmp_path, widths):
    lines = (REPO / "configs/demo_infer.yaml").read_text().replace("ch: 64", "ch: 32").splitlines()
    kept = [line.split("ch_mult")[0] + f"ch_mult: {widths}" if "ch_mult" in line else line for line in lines]
    (tmp_path / "demo.yaml").write_text("\n".join(kept))
    torch.manual_seed(0)
    vae = trainable_vae(merge_yaml([tmp_path / "demo.yaml"])["model"]["first_stage_config"]).eval()
    z = torch.randn(1, 16, 3, 2, 2)
    with torch.no_grad():
        assert quieten_last_level(vae, z) == 1
        vae.decoder.up[1].upsample.conv.weight *= 1e6
        wanted = vae.decode(z)
        assert quieten_last_level(vae, z) < 1e-2
        torch.testing.assert_close(vae.decode(z), wanted, rtol=1e-3, atol=1e-3)
        assert quieten_last_level(vae, z) == 1
        assert torch.isfinite(vae.half().decode(z.half())).all()


def test_border_ratio_looks_between_the_chunks():
    steps = np.ones((2, 16))
    steps[:, 8] = 3.0  # frames 0..8 are the first chunk's
    assert border_ratio(steps, 5) == pytest.approx(3.0)
    assert border_ratio(np.roll(steps, 1, axis=1), 5) == pytest.approx(1.0)


def test_averages_follow_the_weights():
    layer = torch.nn.Linear(1, 1)
    averages = Averages(layer, 0.5)
    with torch.no_grad():
        layer.weight.fill_(10.0)
    for _ in range(30):
        averages.update()
    averages.copy_to(layer)
    torch.testing.assert_close(averages.values[0], torch.tensor([[10.0]]))


# ---- the commands ----


def test_a_run_from_nothing_and_its_evaluation(small_yaml, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(clip_feed, "CLIP", (17, 32, 32))
    options = ["--config", str(small_yaml), "--steps", "6", "--phases", "1:2x9x16x16,1:1x9x16x24", "--workers", "0"]
    assert train_vae.main([str(tmp_path), *options, "--test-clips", "2"]) == 0
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["training"]["steps"] == 6 and report["training"]["samples"] == 3 * 2 + 3
    curve = report["training"]["curve"]
    assert curve[-1]["step"] == 6 and {"psnr", "total", "edge", "motion", "kl"} <= set(curve[-1])
    state = torch.load(tmp_path / "vae" / "3d-vae.pt", weights_only=True)["state_dict"]
    assert {value.dtype for value in state.values()} == {torch.float16}
    weights = [str(tmp_path / "vae" / "3d-vae.pt"), "--config", str(small_yaml), "--clips", "2", "--device", "cpu"]
    more = ["--json", str(tmp_path / "again.json"), "--picture", str(tmp_path / "look.png")]
    assert eval_vae.main([*weights, *more]) == 0
    again = json.loads((tmp_path / "again.json").read_text())
    assert again["psnr"] == pytest.approx(report["held_out"]["psnr"], abs=0.05)
    assert (tmp_path / "look.png").stat().st_size > 1000
    assert eval_vae.main(["nowhere.pt", *weights[1:]]) == 2
    assert "nowhere.pt" in capsys.readouterr().err
