"""Rates of readers and of ingest, on one or two processes; two ways are always timed in turns."""

import multiprocessing
import time
from collections.abc import Callable, Iterator
from statistics import median
from typing import Any

import numpy as np

Reader = Callable[[int], Iterator[int]]  # from a seed to an endless iterator over the bytes of each clip
_FORK = multiprocessing.get_context("fork")


def clips_per_second(reader: Reader, n_clips: int, workers: int) -> tuple[float, float]:
    """Return clips and bytes per second of `workers` processes that read `n_clips` each, after one to get ready."""
    ready, go = _FORK.Barrier(workers + 1), _FORK.Barrier(workers + 1)
    results = _FORK.SimpleQueue()

    def work(seed: int) -> None:
        clips = reader(seed)
        next(clips)
        ready.wait()
        go.wait()
        done = sum(next(clips) for _ in range(n_clips))
        results.put((time.perf_counter(), done))

    processes = [_FORK.Process(target=work, args=(seed,)) for seed in range(workers)]
    for process in processes:
        process.start()
    ready.wait()
    start = time.perf_counter()  # the clock is the machine's, the same in every process
    go.wait()
    ends = [results.get() for _ in processes]
    for process in processes:
        process.join()
    seconds = max(end for end, _ in ends) - start
    return workers * n_clips / seconds, sum(done for _, done in ends) / seconds


def compare(ours: Reader, peer: Reader, n_ours: int, n_peer: int, workers: int, rounds: int) -> dict[str, float]:
    """Return both rates and their ratio: the median over rounds in which each reads in turn."""
    found = []
    for _ in range(rounds):
        mine, n_bytes = clips_per_second(ours, n_ours, workers)
        theirs, _ = clips_per_second(peer, n_peer, workers)
        found.append((mine, theirs, mine / theirs, n_bytes))
    mine, theirs, ratio, n_bytes = (median(column) for column in zip(*found, strict=True))
    return {"ours": mine, "peer": theirs, "ratio": ratio, "bytes_per_second": n_bytes}


def memcpy_bytes_per_second(n_bytes: int = 2**28, rounds: int = 9) -> float:
    """Return how many bytes per second one core copies from one large array to another."""
    source, target = np.ones(n_bytes, dtype=np.uint8), np.zeros(n_bytes, dtype=np.uint8)
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        np.copyto(target, source)
        times.append(time.perf_counter() - start)
    return n_bytes / median(times)


def seconds_of(work: Callable[..., Any], *arguments: Any) -> float:
    """Return how long a call takes."""
    start = time.perf_counter()
    work(*arguments)
    return time.perf_counter() - start


def seconds_in_processes(work: Callable[..., Any], arguments: list[tuple[Any, ...]]) -> float:
    """Return how long processes take that each do one call."""
    processes = [_FORK.Process(target=work, args=each) for each in arguments]
    start = time.perf_counter()
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    if any(process.exitcode for process in processes):
        raise RuntimeError("a process that was timed failed")
    return time.perf_counter() - start
