"""Equal work: how much longer the busiest program or thread works than the mean."""

import heapq

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from boldforge.kernels import ScanIndex, shifted_scan, window_index
from boldforge.kernels.index_balance import even_tasks, long_first
from tests.kernels.conftest import relative_error, scan_inputs

LENGTHS = st.lists(st.integers(1, 300), min_size=1, max_size=300)


def path_of(lengths, seed=0):
    """Sequences of these lengths over shuffled tokens, a restart here and there."""
    generator = torch.Generator().manual_seed(seed)
    n_tokens = sum(lengths)
    tokens = torch.randperm(n_tokens, generator=generator)
    cut = torch.rand(n_tokens, generator=generator) < 0.1
    rows = torch.where(cut, tokens | -(2**31), tokens).to(torch.int32)
    return ScanIndex(rows, torch.tensor([0, *lengths]).cumsum(0).to(torch.int32), n_tokens)


def brain_windows():
    """Shifted windows over a ball in a grid, as over a brain: full ones inside, ragged ones at the edge."""
    axes = torch.meshgrid(*(torch.linspace(-1, 1, 16) for _ in range(3)), indexing="ij")
    ball = sum(axis.square() for axis in axes) < 0.8
    return window_index((16, 16, 16, 20), (4, 4, 4, 4), (2, 2, 2, 2), keep=ball[..., None].expand(-1, -1, -1, 20))


def time_of_a_device(lengths, slots):
    """Steps until the last program ends where each slot takes the next program when it is done."""
    busy = [0] * slots
    for length in lengths:
        heapq.heappush(busy, heapq.heappop(busy) + length)
    return max(busy)


@given(LENGTHS, st.integers(0, 9))
def test_long_first_keeps_every_sequence_and_sorts_them(lengths, seed):
    index = path_of(lengths, seed)
    ordered = long_first(index)
    found = ordered.cu_seqlens.diff().tolist()
    assert found == sorted(lengths, reverse=True)
    assert ordered.longest == index.longest == max(lengths)
    wanted = sorted(index.rows.split(lengths), key=len, reverse=True)  # stable, like ours
    assert all(torch.equal(a, b) for a, b in zip(ordered.rows.split(found), wanted, strict=True))
    assert long_first(index) is ordered
    assert long_first(ordered) is ordered


def test_the_order_of_the_sequences_does_not_change_the_scan(backend):
    index = path_of([3, 50, 1, 17, 50, 2])
    inputs = scan_inputs(index, dtype=torch.float32)
    y, ordered = (shifted_scan(**inputs, index=path, backend=backend) for path in (index, long_first(index)))
    assert relative_error(ordered, y) < 1e-6


@pytest.mark.parametrize(("slots", "limit"), [(64, 1.03), (128, 1.1)])
def test_a_device_is_busy_to_the_end_over_a_brain(slots, limit):
    """Three clips; beyond these many slots a device is limited by its one longest program, in any order."""
    index = brain_windows()
    mean = 3 * index.n_tokens / slots
    raster, ordered = (
        time_of_a_device(path.cu_seqlens.diff().tolist() * 3, slots) / mean for path in (index, long_first(index))
    )
    assert ordered < limit
    assert ordered < raster - 0.05


@given(LENGTHS, st.integers(2, 64))
def test_no_device_waits_longer_than_for_a_short_program(lengths, slots):
    ordered = long_first(path_of(lengths)).cu_seqlens.diff().tolist()
    # What starts after every slot has had one program is no longer than the program number slots + 1.
    late = ordered[slots] if slots < len(ordered) else 0
    assert time_of_a_device(ordered, slots) <= max(max(lengths), sum(lengths) / slots + late)


def test_lanes_that_share_a_program_end_together():
    """Flat lanes of 72 channels: a program of 32 lanes is as long as the longest of its sequences."""
    waste = []
    for path in (brain_windows(), long_first(brain_windows())):
        per_lane = path.cu_seqlens.diff().repeat_interleave(24)
        programs = torch.nn.functional.pad(per_lane, (0, -len(per_lane) % 32)).view(-1, 32)
        waste.append(float(programs.max(1).values.sum() * 32 / programs.sum()))
    assert waste[1] < 1.01 < 1.04 < waste[0]


@given(LENGTHS, st.integers(1, 3), st.integers(1, 128))
def test_tasks_hold_every_sequence_once_and_even_work(lengths, b, most):
    index = path_of(lengths)
    tasks = even_tasks(index, b, most)
    assert tasks.tolist() == sorted(tasks.tolist())
    assert (int(tasks[0]), int(tasks[-1])) == (0, b * index.n_sequences)
    assert len(tasks) - 1 == min(b * len(lengths), most)
    tokens = torch.tensor([0, *lengths * b]).cumsum(0)[tasks].diff()
    assert int(tokens.max()) < b * index.n_tokens / (len(tasks) - 1) + max(lengths)


@given(LENGTHS, st.integers(1, 3), st.integers(2, 8))
def test_threads_that_take_neighbouring_tasks_work_equally_long(lengths, b, threads):
    index = path_of(lengths)
    tasks = even_tasks(index, b, 128)
    n_tasks = len(tasks) - 1
    each = -(-n_tasks // threads)  # how torch shares out a range
    tokens = torch.tensor([0, *lengths * b]).cumsum(0)[tasks].diff()
    busiest = max(int(part.sum()) for part in tokens.split(each))
    assert busiest < b * index.n_tokens * each / n_tasks + max(lengths)
