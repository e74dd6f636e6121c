"""The cases of test_accuracy.py at sizes for Triton's interpreter; run by it with TRITON_INTERPRET=1."""

from functools import partial

import pytest

from boldforge.kernels import shifted_scan, window_index
from tests.kernels.conftest import FORWARD, accuracy_inputs, assert_accurate, ragged_index

triton_scan = partial(shifted_scan, backend="triton")


@pytest.mark.parametrize("dtype", FORWARD)
@pytest.mark.parametrize("length", [1, 3, 17])
def test_one_sequence(length, dtype):
    index = window_index((length,), (length,), (0,))
    assert_accurate(triton_scan, accuracy_inputs(index, 1, 5, 4, dtype), index)


@pytest.mark.parametrize("dtype", FORWARD)
def test_ragged_windows(dtype):
    index = ragged_index()
    assert_accurate(triton_scan, accuracy_inputs(index, 1, 3, 2, dtype), index)


@pytest.mark.parametrize("dtype", FORWARD)
@pytest.mark.parametrize("steps", [(1e-4, 1e-4), (3.0, 3.0)])
def test_steps_that_are_all_tiny_or_all_large(steps, dtype):
    index = window_index((12,), (12,), (0,))
    assert_accurate(triton_scan, accuracy_inputs(index, 1, 2, 4, dtype, steps), index)
