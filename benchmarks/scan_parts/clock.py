"""How long a piece of work takes, and how much memory."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable

os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # the profiler, which counts memory here, would print a line a run

import torch


def seconds(work: Callable[[], object], device: str, budget: float) -> float:
    """Return the time of a run after one to warm up, of as many as fit into ``budget`` seconds (1 to 20).

    On the CPU the shortest processor time, which other work on the machine disturbs least; on a GPU the median.
    """
    began = time.perf_counter()
    work()
    if device == "cuda":
        torch.cuda.synchronize()
    runs = max(1, min(20, int(budget / max(time.perf_counter() - began, 1e-9))))
    times = []
    for _ in range(runs):
        if device == "cuda":
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            work()
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end) / 1e3)
        else:
            began = time.process_time()
            work()
            times.append(time.process_time() - began)
    return statistics.median(times) if device == "cuda" else min(times)


def peak_bytes(work: Callable[[], object], device: str) -> int:
    """Return the most memory that torch held at once during a run, over what it held before."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work()
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        work()
    held = most = 0
    kineto = profile.profiler
    assert kineto is not None and kineto.kineto_results is not None
    events = [event for event in kineto.kineto_results.events() if event.name() == "[memory]"]
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    return most
