"""Times contenders alternately in one run and compares them pair by pair."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

#: Events of torch's profiler by which an allocator grew (positive) or shrank (negative).
_MEMORY_EVENT = "[memory]"


def alternate(contenders: Mapping[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """Run the contenders in turn, A B B A A B ..., so that what slows the machine down slows both.

    Args:
        contenders: Name -> function that runs once and returns what it measured, such as seconds.
        rounds: Samples of each.

    Returns:
        Name -> samples, of which the i-th were taken next to each other.
    """
    samples: dict[str, list[float]] = {name: [] for name in contenders}
    for index in range(rounds):
        names = list(contenders) if index % 2 == 0 else list(reversed(contenders))
        for name in names:
            gc.collect()
            samples[name].append(contenders[name]())
    return samples


def seconds(function: Callable[[], Any], repeats: int, warm_up: int = 2, device: str = "cpu") -> float:
    """Mean wall-clock seconds of a call."""
    for _ in range(warm_up):
        function()
    _wait_for(device)
    start = time.perf_counter()
    for _ in range(repeats):
        function()
    _wait_for(device)
    return (time.perf_counter() - start) / repeats


def summary(samples: Sequence[float]) -> dict[str, float]:
    """Median and quartiles of samples."""
    low, middle, high = statistics.quantiles(samples, n=4, method="inclusive") if len(samples) > 1 else samples * 3
    return {"median": middle, "lower_quartile": low, "upper_quartile": high, "samples": len(samples)}


def compare(samples: Mapping[str, Sequence[float]], ours: str, peer: str) -> dict[str, float]:
    """Ratio of ours to the peer's: the median over neighbouring pairs of samples, with its quartiles."""
    return summary([mine / theirs for mine, theirs in zip(samples[ours], samples[peer], strict=True)])


def interval(ratio: Mapping[str, float]) -> str:
    """A ratio and its quartiles."""
    return f"{ratio['median']:.3f} [{ratio['lower_quartile']:.3f}, {ratio['upper_quartile']:.3f}]"


def milliseconds(times: Mapping[str, float]) -> str:
    """The median of seconds, in milliseconds."""
    return f"{1e3 * times['median']:.1f}"


def peak_memory(function: Callable[[], Any], device: str = "cpu") -> int:
    """Most bytes of tensors that were allocated at once during a call, beyond those that lived before it.

    On the CPU the allocator's own events are added up, temporaries inside an operation included.
    """
    if device != "cpu":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        function()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        function()
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == _MEMORY_EVENT]
    held, most = 0, 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    return most


def _wait_for(device: str) -> None:
    if device != "cpu":
        torch.cuda.synchronize()
