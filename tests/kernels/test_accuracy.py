"""The accuracy every backend owes: against float64, steps from 1e-4 to 3, 1 to 4096 tokens, memory full of NaN."""

import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from boldforge.kernels import conv_oracle, shifted_conv, shifted_scan, window_index
from tests.kernels.conftest import (
    BACKWARD,
    FORWARD,
    accuracy_inputs,
    assert_accurate,
    poisoned_memory,
    ragged_index,
    relative_error,
    values_and_gradients,
)


@pytest.fixture
def scan(backend):
    return partial(shifted_scan, backend=backend)


@pytest.mark.parametrize("dtype", FORWARD)
@pytest.mark.parametrize("length", [1, 2, 7, 8, 9, 63, 256, 1000])
def test_one_sequence(scan, length, dtype):
    index = window_index((length,), (length,), (0,))
    assert_accurate(scan, accuracy_inputs(index, dtype=dtype), index)


@pytest.mark.parametrize(
    "dtype",
    [torch.float32, *(pytest.param(kind, marks=pytest.mark.slow) for kind in (torch.float16, torch.bfloat16))],
)
def test_the_longest_sequence(scan, dtype):
    """Slow is the oracle."""
    index = window_index((4096,), (4096,), (0,))
    assert_accurate(scan, accuracy_inputs(index, dtype=dtype), index)


@pytest.mark.parametrize("dtype", FORWARD)
@pytest.mark.parametrize("options", [{}, {"reverse": True}, {"mode": "wrap"}], ids=["region", "reverse", "wrap"])
@pytest.mark.parametrize(("channels", "states"), [(1, 1), (5, 3), (72, 16), (130, 9), (3, 64)])
def test_ragged_windows(scan, channels, states, options, dtype):
    index = ragged_index(**options)
    assert_accurate(scan, accuracy_inputs(index, 2, channels, states, dtype), index)


@pytest.mark.parametrize("dtype", FORWARD)
@pytest.mark.parametrize("steps", [(1e-4, 1e-4), (1e-4, 1e-3), (3.0, 3.0)])
def test_steps_that_are_all_tiny_or_all_large(scan, steps, dtype):
    """Where all steps are the same, so is the rounding of the decay, and its error grows with the length."""
    index = window_index((512,), (512,), (0,))
    assert_accurate(scan, accuracy_inputs(index, channels=8, dtype=dtype, steps=steps), index)


@pytest.mark.parametrize("dtype", FORWARD)
@pytest.mark.parametrize("taps", [1, 4, 16])
def test_convolution(backend, taps, dtype):
    index = ragged_index()
    generator = torch.Generator().manual_seed(3)
    shapes = ((2, index.n_tokens, 73), (73, taps), (73,), (2, index.n_tokens, 73))
    *given, dout = (torch.randn(shape, generator=generator).to(dtype) for shape in shapes)
    results = []
    for conv, kind in ((partial(shifted_conv, backend=backend), dtype), (conv_oracle, torch.float64)):
        leaves = [value.to(kind, copy=True).requires_grad_() for value in given]
        with poisoned_memory():
            y = conv(*leaves, index=index)
            y.backward(dout.to(kind))
        results.append([y.detach(), *(leaf.grad for leaf in leaves)])
    y, *gradients = (relative_error(found, wanted) for found, wanted in zip(*results, strict=True))
    assert y <= FORWARD[dtype]
    assert max(gradients) <= BACKWARD[dtype]


def test_an_element_that_nobody_writes_is_found(monkeypatch, backend):
    """The poison itself: a backend that leaves one row of its output as it was must fail the comparison."""
    index = ragged_index()
    inputs = accuracy_inputs(index)

    def forgetful(**arguments):
        y = shifted_scan(**arguments, backend=backend)
        keep = torch.arange(index.n_tokens)[:, None] != 7
        return torch.where(keep, y, torch.empty(y.shape))

    with pytest.raises(AssertionError, match="nan"):
        assert_accurate(forgetful, inputs, index)
    plain = values_and_gradients(partial(shifted_scan, backend=backend), inputs, index)
    with poisoned_memory():
        again = values_and_gradients(partial(shifted_scan, backend=backend), inputs, index)
    assert all(torch.equal(plain[name], again[name]) for name in plain)


@pytest.mark.slow
@pytest.mark.timeout(1000)
def test_triton_in_its_interpreter():
    """In a process of its own: whether a kernel is interpreted is decided when triton is imported."""
    triton = pytest.importorskip("triton", reason="triton is not installed here")
    if triton.__version__.startswith("3.6.") and np.lib.NumpyVersion(np.__version__) >= "2.4.0":
        pytest.skip("the interpreter of Triton 3.6 cannot loop up to a tensor with numpy 2.4 or newer")
    cases = str(Path(__file__).with_name("triton_accuracy_cases.py"))
    done = subprocess.run(
        [sys.executable, "-m", "pytest", cases],
        env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True, timeout=900,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "passed" in done.stdout
    assert "skipped" not in done.stdout
