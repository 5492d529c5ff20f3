"""Decoding in little memory: what lies on the device, frames that wait in host memory, and the same pixels."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from sgm.models import autoencoder
from sgm.models.autoencoder import VideoAutoencoderInferenceWrapper
from sgm.modules.autoencoding.blocks import Upsample3D
from sgm.modules.autoencoding.causal_conv import CausalCache, ClipPass, HostCache, HostLink, Transfer, cache_on
from sgm.modules.ops.vae import LazyFrames, frame_spans
from tests.live_bytes import LiveBytes
from tests.unit.test_autoencoder import RELEASE, TINY, configs, latents

SMALL = {**TINY, "ch_mult": [1, 2, 2, 4]}  # widths change where the release's do


class LateLink(HostLink):
    """Copies take place when they are waited for, or before a later one that needs them, as on a slow bus."""

    def __init__(self) -> None:
        self.queue: list[tuple[Tensor, Tensor]] = []
        self.on_the_way = 0

    def host_like(self, frames: Tensor) -> Tensor:
        return torch.empty_like(frames)

    def download(self, frames: Tensor, host: Tensor) -> Transfer:
        return self._copy(frames, host)

    def upload(self, host: Tensor) -> Transfer:
        return self._copy(host, torch.full_like(host, float("nan")))

    def wait(self, transfer: Transfer) -> None:
        while any(target is transfer.result for _, target in self.queue):
            source, target = self.queue.pop(0)
            target.copy_(source)

    def _copy(self, source: Tensor, target: Tensor) -> Transfer:
        self.queue.append((source, target))
        self.on_the_way = max(self.on_the_way, len(self.queue))
        return Transfer(target, source)


class UnwrittenLink(HostLink):
    """Moves nothing: for tensors without values."""

    def __init__(self) -> None:
        pass

    def host_like(self, frames: Tensor) -> Tensor:
        return torch.empty_like(frames, device="cpu")  # memory that is never touched

    def download(self, frames: Tensor, host: Tensor) -> Transfer:
        return Transfer(host, frames)

    def upload(self, host: Tensor) -> Transfer:
        return Transfer(torch.empty_like(host, device="meta"), host)


def host_cache(link: Callable[[], HostLink], monkeypatch: pytest.MonkeyPatch) -> list[HostLink]:
    """Let the autoencoder keep frames through links of this kind; gives those it made."""
    made: list[HostLink] = []

    def make(host: bool, device: torch.device) -> CausalCache:
        made.append(link())
        return HostCache(made[-1]) if host else CausalCache()

    monkeypatch.setattr(autoencoder, "cache_on", make)
    return made


@pytest.mark.parametrize("slice_bytes", [1, 30_000, 1 << 30])
@pytest.mark.parametrize("size", [(3, 2), (2, 5)])
def test_frames_that_wait_in_host_memory_change_nothing(slice_bytes, size, monkeypatch):
    torch.manual_seed(0)
    vae = VideoAutoencoderInferenceWrapper(*configs(SMALL))
    z = latents(7, *size)
    expected = vae.decode(z)
    links = host_cache(LateLink, monkeypatch)
    vae.set_low_memory(slice_bytes=slice_bytes, cache_on_cpu=True)
    torch.testing.assert_close(vae.decode(z), expected, rtol=0, atol=2e-5)
    assert links[0].on_the_way >= 2  # out and in at once: nobody waited for a copy before its result was needed


def test_host_cache_takes_in_any_order():
    convs = [nn.Identity() for _ in range(4)]
    cache = HostCache(LateLink())
    for turn in range(3):
        for k, conv in enumerate(convs):
            cache.keep(conv, torch.full((1, 1, 2, 1, 1), 10.0 * turn + k))
        order = [(0, 1, 2, 3), (2, 0, 3, 1), (3, 2, 1, 0)][turn]
        assert [cache.take(convs[k])[0, 0, 0, 0, 0].item() for k in order] == [10.0 * turn + k for k in order]
        assert len(cache) == 0 and cache.take(convs[0]) is None


def test_a_clip_that_is_broken_off_waits_for_its_copies(monkeypatch):
    vae = VideoAutoencoderInferenceWrapper(*configs(TINY))
    links = host_cache(LateLink, monkeypatch)
    vae.set_low_memory(cache_on_cpu=True)
    pieces = vae.decode_chunks(latents(5))
    next(pieces)
    assert links[0].queue  # the last frames of the first chunk are on their way out
    pieces.close()
    assert not links[0].queue


def test_host_memory_only_where_it_is_another():
    assert type(cache_on(True, torch.device("cpu"))) is CausalCache
    assert type(cache_on(False, torch.device("cuda", 0))) is CausalCache


def test_lazy_frames_are_those_of_the_upsampling():
    block, x = Upsample3D(32, time=False), torch.randn(1, 32, 5, 3, 4)
    run = ClipPass(recompute=True)
    assert isinstance(block.lazily(x, run), Tensor)  # with gradients
    with torch.no_grad():
        lazy = block.lazily(x, run)
        assert isinstance(lazy, LazyFrames) and isinstance(block.lazily(x, ClipPass()), Tensor)
        torch.testing.assert_close(lazy.frames(1, 4), block(x)[:, :, 1:4])
        assert lazy.shape == block(x).shape
        assert isinstance(Upsample3D(32, time=True).lazily(x, run), Tensor)


def test_the_releases_decoder_at_full_size_holds_less_than_two_and_a_half_gigabytes(monkeypatch):
    """13 x 60 x 90 latents give chunks as these two: counted on tensors without values, in half precision."""
    with torch.device("meta"):
        vae = VideoAutoencoderInferenceWrapper(*configs(RELEASE)).half()
    vae.set_channels_last()
    host_cache(UnwrittenLink, monkeypatch)
    vae.set_low_memory(cache_on_cpu=True)
    z = torch.empty(1, 16, 5, 60, 90, dtype=torch.float16, device="meta")
    with torch.no_grad(), LiveBytes("meta") as live:
        frames = sum(piece.shape[2] for piece in vae.decode_chunks(z))
    assert frames == 17
    level = 128 * 480 * 720 * 2  # one frame of the first level
    assert live.at_peak[0] == 8 * level
    assert 20 * level < live.peak < 2.5e9


def test_runs_stay_within_the_budget():
    assert frame_spans(9, 10, 25) == [(0, 1), (1, 3), (3, 5), (5, 7), (7, 9)]
    assert frame_spans(9, 10, 5) == [(k, k + 1) for k in range(9)]
    assert frame_spans(9, 10, 90) == [(0, 9)]


def test_live_bytes_counts_what_is_alive():
    with LiveBytes("cpu") as live:
        a = torch.zeros(1000)
        b = a + 1
        del a
        c = b * 2
        b += c[:1]
        del b, c
        torch.zeros(1500)
    assert live.peak == 8000 and live.at_peak == [4000, 4000]
