"""Memory of batches is used again, but never while anything still refers to it."""

import pickle

import numpy as np
import pytest

from boldforge.data_shards import ClipStream
from boldforge.data_shards.buffers import BufferPool


def test_memory_comes_back_only_when_nothing_refers_to_it():
    pool = BufferPool()
    first = pool.tensor((3, 4), "int16")
    address = first.data_ptr()
    first[:] = 7
    part = first[1:, 2]
    array = part.numpy()
    del first
    assert pool.tensor((3, 4), "int16").data_ptr() != address
    del part
    second = pool.tensor((12,), "int16")
    assert second.data_ptr() != address
    assert array.tolist() == [7, 7]
    del array, second
    pointers = {pool.tensor((6, 2), "int16").data_ptr() for _ in range(20)}
    assert address in pointers or len(pointers) == 1  # one after another, each takes what the last gave back


def test_the_pool_keeps_a_bounded_number():
    pool = BufferPool(keep=2)
    held = [pool.tensor((5,), "float32") for _ in range(6)]
    held.clear()
    assert len(pool._free[20]) == 2


@pytest.mark.parametrize("num_workers", [0, 2])
def test_batches_that_are_kept_do_not_change(real_shards, num_workers):
    stream = iter(ClipStream(real_shards, 8, 2, 0, num_workers=num_workers))
    kept = [next(stream) for _ in range(12)][::2]
    for _ in range(12):
        next(stream)
    for batch in kept:
        again = ClipStream(real_shards, 8, 2, 0).batch(batch.step)
        assert (batch.q == again.q).all() and (batch.scale == again.scale).all() and (batch.mean == again.mean).all()


def test_a_pool_travels_empty():
    pool = BufferPool(keep=3)
    pool.tensor((4,), "int8")
    other = pickle.loads(pickle.dumps(pool))
    assert other._free == {} and other._keep == 3
    assert other.tensor((2, 2), "int8").numpy().dtype == np.int8
