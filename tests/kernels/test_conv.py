"""shifted_conv against the oracle: values, every gradient, restarts, number types."""

from functools import partial

import pytest
import torch

from boldforge.kernels import conv_oracle, shifted_conv, window_index
from tests.kernels.conftest import ragged_index, relative_error


def conv_inputs(index, clips=2, channels=5, taps=4, dtype=torch.float64):
    generator = torch.Generator().manual_seed(3)
    shapes = {"x": (clips, index.n_tokens, channels), "weight": (channels, taps), "bias": (channels,)}
    return {k: torch.randn(s, generator=generator, dtype=torch.float64).to(dtype) for k, s in shapes.items()}


def values_and_gradients(conv, inputs, index):
    tensors = {name: value.detach().clone().requires_grad_() for name, value in inputs.items()}
    y = conv(**{"bias": None} | tensors, index=index)
    y.backward(torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(y.dtype))
    return {"y": y.detach()} | {f"d{name}": value.grad for name, value in tensors.items()}


@pytest.fixture
def conv(backend):
    return partial(shifted_conv, backend=backend)


@pytest.mark.parametrize("taps", [1, 2, 4, 7])
@pytest.mark.parametrize("options", [{}, {"reverse": True}, {"mode": "wrap"}], ids=["region", "reverse", "wrap"])
def test_matches_the_oracle_in_float64(taps, options):
    index = ragged_index(**options)
    inputs = conv_inputs(index, taps=taps)
    wanted = values_and_gradients(conv_oracle, inputs, index)
    found = values_and_gradients(shifted_conv, inputs, index)
    assert all(relative_error(found[name], wanted[name]) < 1e-12 for name in wanted)


def test_bias_may_be_missing(conv):
    index = ragged_index()
    inputs = conv_inputs(index, dtype=torch.float32)
    del inputs["bias"]
    wanted = values_and_gradients(conv_oracle, {k: v.double() for k, v in inputs.items()}, index)
    found = values_and_gradients(conv, inputs, index)
    assert all(relative_error(found[name], wanted[name]) < 1e-6 for name in wanted)


@pytest.mark.parametrize("taps", [1, 4, 16])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 1e-2), (torch.float16, 1e-3)])
def test_single_and_half_precision(dtype, tolerance, taps, conv):
    index = ragged_index()
    inputs = conv_inputs(index, channels=73, taps=taps, dtype=dtype)
    wanted = values_and_gradients(conv_oracle, {k: v.double() for k, v in inputs.items()}, index)
    found = values_and_gradients(conv, inputs, index)
    assert all(relative_error(found[name], wanted[name]) < tolerance for name in wanted)
    assert {value.dtype for value in found.values()} == {dtype}


def test_gradcheck():
    index = window_index((3, 2), (2, 2), (1, 0))
    inputs = [value.requires_grad_() for value in conv_inputs(index, 1, 2, 3).values()]
    assert torch.autograd.gradcheck(lambda *tensors: shifted_conv(*tensors, index), inputs)


def test_a_dense_unshifted_window_is_torchs_own_convolution():
    index = window_index((32,), (32,), (0,))
    inputs = conv_inputs(index)
    padded = torch.nn.functional.pad(inputs["x"].mT, (3, 0))
    wanted = torch.nn.functional.conv1d(padded, inputs["weight"].unsqueeze(1), inputs["bias"], groups=5).mT
    assert torch.allclose(shifted_conv(**inputs, index=index), torch.nn.functional.silu(wanted))


def test_two_runs_give_the_same_bits_and_autocast_changes_none(conv):
    index = ragged_index()
    inputs = conv_inputs(index, channels=72, dtype=torch.float32)
    first = values_and_gradients(conv, inputs, index)
    with torch.autocast("cpu", torch.bfloat16):
        second = values_and_gradients(conv, inputs, index)
    assert all(torch.equal(first[name], second[name]) for name in first)
