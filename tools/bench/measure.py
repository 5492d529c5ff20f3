"""What the benchmarks share: timing on CPU and GPU, errors, ceilings, and JSON lines."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

_HEAD_START = 1_500_000  # GPU cycles, almost a millisecond


@dataclass(frozen=True)
class Timing:
    """Median milliseconds of `runs` runs after a warm-up, the most memory one of them took, and the last result."""

    ms: float
    runs: int
    peak_bytes: int | None
    result: Any


@dataclass(frozen=True)
class Ceilings:
    """What the device reaches at best, as measured: matrix products in FLOP/s, copies in bytes/s (read and written)."""

    flops: float
    bandwidth: float

    def limit_ms(self, flops: float = 0.0, moved: float = 0.0) -> float:
        """The least time for this much arithmetic or memory traffic, whichever takes longer."""
        return 1e3 * max(flops / self.flops, moved / self.bandwidth)


def emit(**facts: Any) -> None:
    """One JSON line on standard output; numbers with four significant digits."""
    print(json.dumps({k: float(f"{v:.4g}") if isinstance(v, float) else v for k, v in facts.items()}), flush=True)


@torch.no_grad()
def time_runs(
    run: Callable[[], Any],
    device: torch.device,
    seconds: float,
    least: int = 2,
    warm_up: Callable[[], Any] | None = None,
) -> Timing:
    """Warm up once, by `warm_up` if given, then run until `seconds` are spent, `least` times at least."""
    result = (warm_up or run)()
    _finish(device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    times: list[float] = []
    start = time.perf_counter()
    while len(times) < least or time.perf_counter() - start < seconds:
        del result  # so that two results never lie in memory together
        ms, result = _time_once(run, device)
        times.append(ms)
    peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
    return Timing(statistics.median(times), len(times), peak, result)


def _time_once(run: Callable[[], Any], device: torch.device) -> tuple[float, Any]:
    if device.type != "cuda":
        start = time.perf_counter()
        result = run()
        return 1e3 * (time.perf_counter() - start), result
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda._sleep(_HEAD_START)  # while the GPU waits, Python queues what is to be timed
    begin.record()
    result = run()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end), result


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def relative_error(got: Tensor, expected: Tensor) -> float:
    """||got - expected|| / ||expected||, frame by frame in float64 to save memory; NaN stays NaN."""
    apart = whole = 0.0
    for a, b in zip(got.flatten(0, -3), expected.flatten(0, -3)):
        b = b.double()
        apart += (a.double() - b).square().sum().item()
        whole += b.square().sum().item()
    return (apart / whole) ** 0.5 if whole else float("nan")


def largest_error(got: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """The largest ||got - expected|| / ||expected|| over tensors of the same names."""
    apart = (
        ((got[name].float() - value.float()).norm() / value.float().norm()).item() for name, value in expected.items()
    )
    return max(apart)


def measure_ceilings(device: torch.device, dtype: torch.dtype, size: int = 8192) -> Ceilings:
    """One large matrix product and one large copy, on random values."""
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    product = time_runs(lambda: a @ b, device, 0.2, least=5)
    source = torch.randn(32 * size, size // 2, device=device, dtype=dtype)
    target = torch.empty_like(source)
    copy = time_runs(lambda: target.copy_(source), device, 0.2, least=5)
    return Ceilings(2e3 * size**3 / product.ms, 2e3 * source.nbytes / copy.ms)


def top_kernels(run: Callable[[], Any], count: int = 15) -> list[list[Any]]:
    """[name, milliseconds, calls] of the GPU kernels that took longest in one run."""
    from torch.profiler import ProfilerActivity, profile

    with torch.no_grad(), profile(activities=[ProfilerActivity.CUDA]) as seen:
        run()
        torch.cuda.synchronize()
    events = sorted(seen.key_averages(), key=lambda e: -e.self_device_time_total)[:count]
    return [[e.key[:90], round(e.self_device_time_total / 1e3, 3), e.count] for e in events]
