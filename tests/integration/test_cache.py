"""Training from a cache of encoded clips: same losses as without, no encoder loaded, refusals, continuation."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import torch

from sgm.cache import fill as filling
from sgm.cache.dataset import CachedBatches, CachedClips
from sgm.cache.fill import FillSettings, fill
from sgm.cache.ready import cache_identity, cached_source
from sgm.cache.shards import CacheError
from sgm.cache.stand_ins import CachedFirstStage
from sgm.cache.store import CacheScan, CacheStore, scan_cached
from sgm.config import load_run_config
from sgm.data.clips import load_frames
from sgm.data.decoder import thread_decoder
from sgm.data.sampler import ClipSampler
from sgm.models import loading
from sgm.models.autoencoder import VideoAutoencoder
from sgm.modules.encoders.modules import FrozenT5Embedder
from sgm.training.options import TrainArgs
from sgm.training.run import train
from tests.training_tiny import REPO, configuration, write_clips, write_release, write_yaml


def load_tool(name: str):
    spec = importlib.util.spec_from_file_location(name, REPO / "tools" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


TOOL = load_tool("precompute_cache")


@pytest.fixture(scope="module")
def release(tmp_path_factory) -> Path:
    folder = write_release(tmp_path_factory.mktemp("release"))
    state = torch.load(folder / "vae" / "3d-vae.pt", weights_only=True)
    state["state_dict"]["encoder.conv_out.conv.bias"][16:] = -1  # a wide posterior: its draw matters
    torch.save(state, folder / "vae" / "3d-vae.pt")
    return folder


@pytest.fixture(scope="module")
def clips(tmp_path_factory) -> Path:
    return write_clips(tmp_path_factory.mktemp("clips"), 4)


def losses(folder: Path) -> list[float]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if line["kind"] in ("train", "valid")]


def run(content: dict, folder: Path, *overrides: str) -> Path:
    path = write_yaml(folder / "config.yaml", content)
    before = set((folder / "save").glob("*"))
    assert train(load_run_config([path], TrainArgs, overrides=overrides)) == 0
    (found,) = set((folder / "save").glob("*")) - before
    return found


def content(release: Path, clips: Path, folder: Path, **args) -> dict:
    args = {"valid_data": [str(clips)], "eval_iters": 2, "eval_interval": 3, "log_image": True, **args}
    made = configuration(release, clips, folder / "save", train_iters=6, **args)
    made["deepspeed"]["train_micro_batch_size_per_gpu"] = 2
    made["model"]["conditioner_config"]["params"]["emb_models"][0]["ucg_rate"] = 0.5
    return made


def precompute(path: Path, cache: Path, *more: str) -> int:
    return TOOL.main([str(path), "--cache-dir", str(cache), "--device", "cpu", *more])


@pytest.fixture(scope="module")
def plain(release, clips, tmp_path_factory) -> list[float]:
    """Losses of a run without a cache."""
    folder = tmp_path_factory.mktemp("plain")
    return losses(run(content(release, clips, folder, only_log_video_latents=True), folder))


@pytest.fixture(scope="module")
def cache(release, clips, tmp_path_factory) -> Path:
    """A full cache in float32."""
    folder = tmp_path_factory.mktemp("cache")
    path = write_yaml(folder / "config.yaml", content(release, clips, folder))
    assert precompute(path, folder / "cache", "--storage", "fp32", "--batch-size", "1") == 0
    return folder / "cache"


def refuse(*_, **__):
    raise AssertionError("an encoder was used")


@pytest.fixture
def no_encoders(monkeypatch):
    """Neither VAE nor text encoder can be built, nor a video opened."""
    monkeypatch.setattr(VideoAutoencoder, "__init__", refuse)
    monkeypatch.setattr(FrozenT5Embedder, "__init__", refuse)
    monkeypatch.setattr(loading, "load_first_stage", refuse)
    monkeypatch.setattr("sgm.data.clips.probe", refuse)
    monkeypatch.setattr("sgm.data.clips.read_frames", refuse)


def test_a_cached_run_gives_the_same_losses_and_loads_no_encoder(plain, cache, release, clips, tmp_path, no_encoders):
    made = content(release, clips, tmp_path, cache_dir=str(cache), cache_fill=False)
    folder = run(made, tmp_path)
    assert len(plain) == 8
    assert losses(folder) == pytest.approx(plain, rel=1e-5)
    assert (folder / "video" / "latents" / "latents_gs-000003" / "latent.pt").is_file()
    usable = [line for line in (folder / "train_data_0.jsonl").read_text().splitlines() if "usable" in line]
    assert len(usable) == 5  # the head and four clips


def test_the_posterior_is_drawn_anew_each_time(cache, release, clips, tmp_path):
    """Mean and spread over many draws of one clip are those that the moments say."""
    made = content(release, clips, tmp_path, cache_dir=str(cache))
    config = load_run_config([write_yaml(tmp_path / "config.yaml", made)], TrainArgs)
    item = cached_items(config, str(clips))[0]
    mean, logvar = item["moments"].transpose(0, 1).chunk(2)
    torch.manual_seed(0)
    moments = item["moments"].transpose(0, 1).expand(4000, -1, -1, -1, -1)
    draws = CachedFirstStage().encode(moments)
    assert (logvar.exp() > 0.1).all()  # wide enough for the test to mean something
    error = (draws.mean(0) - mean).abs() / (logvar / 2).exp()
    assert error.max() < 5 / 4000**0.5
    assert torch.allclose(draws.var(0), logvar.exp(), rtol=0.2)


def open_store(config) -> CacheStore:
    return CacheStore(config.args.cache_dir, cache_identity(config.model, cached_source(config.data).settings))


def scan(config, store: CacheStore, folder: Path | str) -> CacheScan:
    return scan_cached(folder, cached_source(config.data), store)


def cached_items(config, folder: str) -> CachedClips:
    store = open_store(config)
    return CachedClips(scan(config, store, folder), store, cached_source(config.data).settings)


@pytest.mark.parametrize("storage, bound", [("fp16", 2**-11), ("bf16", 2**-8)])
def test_storage_types_round_the_values_and_nothing_else(cache, release, clips, tmp_path, storage, bound):
    path = write_yaml(tmp_path / "config.yaml", content(release, clips, tmp_path, cache_dir=str(tmp_path / "cache")))
    assert precompute(path, tmp_path / "cache", "--storage", storage, "--batch-size", "1") == 0
    small = cached_items(load_run_config([path], TrainArgs), str(clips))
    exact = cached_items(load_run_config([path], TrainArgs, flags={"cache_dir": str(cache)}), str(clips))
    assert len(small) == len(exact) == 4
    for k in range(4):
        for name in ("moments", "txt_embedding"):
            wanted = exact[k][name]
            assert ((small[k][name].float() - wanted).abs() <= wanted.abs() * bound + 1e-6).all()


@pytest.mark.parametrize(
    "change, word",
    [
        ("data.params.max_num_frames=1", "max_num_frames (cache: 5; this run: 1)"),
        ("data.params.sampling=timestamps", "sampling (cache: upstream; this run: timestamps)"),
        ("model.conditioner_config.params.emb_models.0.params.max_length=13", "max_length (cache: 12; this run: 13)"),
    ],
)
def test_a_cache_of_another_configuration_is_refused(cache, release, clips, tmp_path, change, word):
    path = write_yaml(tmp_path / "config.yaml", content(release, clips, tmp_path, cache_dir=str(cache)))
    with pytest.raises(CacheError) as error:
        train(load_run_config([path], TrainArgs, overrides=[change]))
    assert word in str(error.value) and "another --cache-dir" in str(error.value)


def test_a_cache_of_other_weights_is_refused(cache, release, clips, tmp_path, capsys):
    other = tmp_path / "other"
    shutil.copytree(release, other)
    state = torch.load(other / "vae" / "3d-vae.pt", weights_only=True)
    state["state_dict"]["encoder.conv_in.conv.bias"] += 1
    torch.save(state, other / "vae" / "3d-vae.pt")
    path = write_yaml(tmp_path / "config.yaml", content(other, clips, tmp_path))
    assert precompute(path, cache) == 2
    assert "vae weights (cache: " in capsys.readouterr().err


def test_missing_encoder_files_do_not_matter_to_a_full_cache(cache, release, clips, tmp_path, capsys):
    moved = tmp_path / "release"
    shutil.copytree(release, moved)
    shutil.rmtree(moved / "vae")
    run(content(moved, clips, tmp_path, cache_dir=str(cache), eval_interval=None), tmp_path, "args.train_iters=1")
    assert "vae weights cannot be compared" in capsys.readouterr().out


def test_changed_and_new_clips_are_refused_or_encoded(cache, release, clips, tmp_path, capsys):
    data, store = tmp_path / "data", tmp_path / "cache"
    shutil.copytree(clips, data)
    shutil.copytree(cache, store)
    made = content(release, data, tmp_path, cache_dir=str(store), eval_interval=None)
    path = write_yaml(tmp_path / "config.yaml", made)
    assert precompute(path, store) == 0  # copied files: looked at again, found in the cache
    said = capsys.readouterr().out
    assert "4 of the clips" in said and "4 videos and 4 captions" in said and "captions in" not in said
    shutil.copy(data / "videos" / "0.mp4", data / "videos" / "3.mp4")
    (data / "labels" / "2.txt").write_text("a new caption\n")
    (data / "videos" / "broken.mp4").write_bytes(b"no video")
    (data / "labels" / "broken.txt").write_text("never seen\n")
    with pytest.raises(CacheError) as error:
        train(load_run_config([path], TrainArgs, overrides=["args.cache_fill=false"]))
    assert "3 of the clips" in str(error.value) and "1 changed since they were cached" in str(error.value)
    run(made, tmp_path, "args.train_iters=1")
    said = capsys.readouterr().out
    assert "4 clips, 1 rejected" in said and "2 captions in" in said
    run(made, tmp_path, "args.train_iters=1", "args.cache_fill=false")
    assert "encoding" not in capsys.readouterr().out


def test_first_frames_join_a_cache_without_encoding(cache, release, clips, tmp_path, capsys, monkeypatch):
    """A cache for text to video becomes one for image to video, and serves both; lost frames come again."""
    folder = shutil.copytree(cache, tmp_path / "cache")
    head = (folder / "cache.json").read_bytes()
    path = write_yaml(tmp_path / "config.yaml", content(release, clips, tmp_path, cache_dir=str(folder)))
    config = load_run_config([path], TrainArgs)
    with monkeypatch.context() as patch:
        patch.setattr(VideoAutoencoder, "__init__", refuse)
        patch.setattr(FrozenT5Embedder, "__init__", refuse)
        for _ in range(2):
            assert precompute(path, folder, "--set", "model.noised_image_input=true") == 0
            assert "4 of the clips" in (said := capsys.readouterr().out) and "4 videos with 4 first frames" in said
            (frames,) = folder.glob("frame-*.safetensors")
            frames.unlink()
        assert precompute(path, folder, "--set", "model.noised_image_input=true") == 0
    settings = cached_source(config.data).settings
    store = CacheStore(folder, cache_identity(config.model, settings), first_frames=True)
    found = CachedClips(scan(config, store, clips), store, settings)
    for k in range(4):
        assert torch.equal(found[k]["first_frame"], load_frames(found[k]["path"], settings)[0])
    batch = next(iter(CachedBatches(found, ClipSampler([4]), 4, 0, 1, False)))
    assert batch["first_frame"].shape == (4, 3, 16, 32) and batch["first_frame"].dtype == torch.uint8
    assert set(cached_items(config, str(clips))[0]) == set(found[0]) - {"first_frame"}
    assert (folder / "cache.json").read_bytes() == head


def test_an_interrupted_filling_goes_on(release, clips, tmp_path, capsys, monkeypatch):
    path = write_yaml(tmp_path / "config.yaml", content(release, clips, tmp_path))
    more = ("--workers", "0", "--batch-size", "1")
    calls = []
    moments = VideoAutoencoder.moments

    def stop_at_the_third(self, *args, **kwargs):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return moments(self, *args, **kwargs)

    monkeypatch.setattr(VideoAutoencoder, "moments", stop_at_the_third)
    assert precompute(path, tmp_path / "cache", *more) == 130
    assert precompute(path, tmp_path / "cache", *more) == 0
    assert "4 videos and 4 captions" in capsys.readouterr().out
    assert 5 <= len(calls) <= 6  # the batch that was under way at the interruption may be lost, no more


def test_a_decoder_that_was_killed_does_not_cost_the_clip(release, clips, tmp_path, capsys):
    path = write_yaml(tmp_path / "config.yaml", content(release, clips, tmp_path))
    decoder = thread_decoder()
    decoder.probe(next(clips.rglob("*.mp4")), 60)
    os.kill(decoder.pid, signal.SIGKILL)  # as the system does when memory runs out
    assert precompute(path, tmp_path / "cache", "--workers", "0") == 0
    said = capsys.readouterr()
    assert "the decoder crashed" in said.out + said.err and "3 clips, 1 rejected" in said.out
    assert precompute(path, tmp_path / "cache", "--workers", "0") == 0
    assert "4 clips, 0 rejected" in capsys.readouterr().out


def test_ranks_share_the_work(release, clips, tmp_path):
    made = content(release, clips, tmp_path, cache_dir=str(tmp_path / "cache"))
    config = load_run_config([write_yaml(tmp_path / "config.yaml", made)], TrainArgs)
    stores = [open_store(config) for _ in range(2)]
    missing = scan(config, stores[0], clips).missing
    for rank, store in enumerate(stores):
        how = FillSettings(torch.device("cpu"), workers=0, rank=rank, ranks=2)
        fill(store, config.model, missing, cached_source(config.data).settings, how, lambda line: None)
        assert len(store.names("video")) == len(store.names("text")) == 2
    stores[0].refresh()
    found = scan(config, stores[0], clips)
    assert len(found.usable) == 4 and not found.missing


@pytest.mark.parametrize("waiting, batches", [(None, [4]), (2, [3, 1]), (0, [1, 1, 1, 1])])
def test_decoded_clips_wait_for_their_batch_up_to_a_number(release, clips, tmp_path, monkeypatch, waiting, batches):
    made = content(release, clips, tmp_path, cache_dir=str(tmp_path / "cache"))
    config = load_run_config([write_yaml(tmp_path / "config.yaml", made)], TrainArgs)
    encoded = []
    encode = filling.Encoder.__call__
    monkeypatch.setattr(
        filling.Encoder,
        "__call__",
        lambda self, clips, writer: encoded.append(len(clips)) or encode(self, clips, writer),
    )
    if waiting is not None:
        monkeypatch.setattr(filling, "CLIPS_WAITING", waiting)
    store = open_store(config)
    how = FillSettings(torch.device("cpu"), workers=0, batch_size=8)
    missing = scan(config, store, clips).missing
    fill(store, config.model, missing, cached_source(config.data).settings, how, lambda line: None)
    assert encoded == batches and len(store.names("video")) == 4


def test_small_clips_share_a_batch_on_a_gpu_only():
    small, large = torch.empty(49, 3, 128, 192, dtype=torch.uint8), torch.empty(49, 3, 480, 720, dtype=torch.uint8)
    assert [FillSettings(torch.device("cuda")).batch_of(frames) for frames in (small, large)] == [14, 1]
    assert [FillSettings(torch.device("cpu")).batch_of(frames) for frames in (small, large)] == [1, 1]
    assert FillSettings(torch.device("cpu"), batch_size=3).batch_of(small) == 3


def test_what_a_cache_cannot_replace_is_named(release, clips, tmp_path):
    made = content(release, clips, tmp_path, cache_dir=str(tmp_path / "cache"))
    made["model"]["conditioner_config"]["params"]["emb_models"][0]["is_trainable"] = True
    path = write_yaml(tmp_path / "config.yaml", made)
    with pytest.raises(ValueError, match="text encoder is trained"):
        train(load_run_config([path], TrainArgs))
    with pytest.raises(ValueError, match="save_frozen"):
        load_run_config([path], TrainArgs, overrides=["args.save_frozen=true"])


MIXED = {"buckets": [[5, 16, 32], [5, 32, 16], [1, 16, 32]], "fps": 8, "skip_frms_num": 0.0, "images": True}


@pytest.fixture(scope="module")
def mixed(clips, tmp_path_factory) -> Path:
    """The clips, the same turned upright (in a manifest's words), and pictures."""
    import imageio.v2 as imageio

    folder = tmp_path_factory.mktemp("mixed")
    lines = []
    for k in range(4):
        frames = np.stack(list(imageio.get_reader(clips / "videos" / f"{k}.mp4", format="FFMPEG").iter_data()))
        with imageio.get_writer(folder / f"tall{k}.mp4", fps=8, codec="libx264", macro_block_size=2) as writer:
            for frame in frames.transpose(0, 2, 1, 3):
                writer.append_data(np.ascontiguousarray(frame))
        imageio.imwrite(folder / f"still{k}.png", frames[0])
        lines += [{"path": str(clips / "videos" / f"{k}.mp4"), "caption": f"wide {k}"}]
        lines += [{"path": f"{kind}{k}.{suffix}", "caption": f"{kind} {k}"} for kind, suffix in
                  (("tall", "mp4"), ("still", "png"))]  # fmt: skip
    (folder / "list.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder / "list.jsonl"


def test_mixed_clips_train_in_buckets_the_same_from_videos_and_from_a_cache(release, mixed, tmp_path):
    """One run with three kinds of clips, batch 2; resumed from its middle it goes on with the same losses."""

    def made(folder: Path, **args) -> dict:
        given = content(release, mixed, folder, eval_interval=6, strict_eval=True, save_interval=3, **args)
        given["data"]["params"] = MIXED
        given["model"]["network_config"]["params"]["modules"]["pos_embed_config"]["params"]["other_sizes"] = (
            "interpolate"
        )
        return given

    for name in ("plain", "cached"):
        (tmp_path / name).mkdir()
    plain = run(made(tmp_path / "plain"), tmp_path / "plain")
    cached = run(made(tmp_path / "cached", cache_dir=str(tmp_path / "cache"), cache_dtype="fp32"), tmp_path / "cached")
    assert len(losses(plain)) == 7
    assert losses(cached) == pytest.approx(losses(plain), rel=1e-4)
    straight = losses(plain)
    shutil.rmtree(plain / "6")
    (plain / "latest").write_text("3")
    (plain / "metrics.jsonl").write_text("")
    path = write_yaml(tmp_path / "again.yaml", made(tmp_path / "plain"))
    assert train(load_run_config([path], TrainArgs, flags={"resume": str(plain)})) == 0
    assert losses(plain) == pytest.approx(straight[3:], rel=1e-5)


def test_buckets_that_the_network_has_no_positions_for_are_named(release, mixed, tmp_path):
    made = content(release, mixed, tmp_path)
    made["data"]["params"] = {**MIXED, "buckets": [[9, 16, 32], [1, 16, 80], [1, 16, 32]]}
    with pytest.raises(ValueError) as error:
        train(load_run_config([write_yaml(tmp_path / "c.yaml", made)], TrainArgs))
    assert "9x16x32: 3 latent frames" in str(error.value) and "1x16x80: a side is 2.5 times" in str(error.value)
    assert "1x16x32" not in str(error.value)
