"""Cases of the Triton kernel, run by test_triton.py in a process with TRITON_INTERPRET=1."""

import pytest
import torch

from boldforge.kernels import available_backends, scan_oracle, shifted_scan, triton_scan, window_index
from tests.kernels.conftest import SCAN_ARGUMENTS, relative_error, scan_inputs

SMALL = window_index((3, 2, 5), (2, 2, 3), (1, 0, 1), keep=torch.arange(30).view(3, 2, 5) % 4 != 1)


def test_the_interpreter_counts_as_a_backend():
    assert available_backends()["triton"] == ""


@pytest.mark.parametrize(("channels", "states"), [(1, 1), (5, 3), (67, 1)])
def test_values_at_odd_sizes(channels, states):
    inputs = scan_inputs(SMALL, 2, channels, states, torch.float32)
    y = shifted_scan(**inputs, index=SMALL, backend="triton")
    assert relative_error(y, scan_oracle(**inputs, index=SMALL)) < 1e-6


def test_many_states_take_narrow_programs():
    index = window_index((3,), (2,), (0,))
    inputs = scan_inputs(index, 1, 33, 20, torch.float32)
    assert triton_scan.channels_per_program(20) < triton_scan.channels_per_program(16)
    y = shifted_scan(**inputs, index=index, backend="triton")
    assert relative_error(y, scan_oracle(**inputs, index=index)) < 1e-6


@pytest.mark.parametrize("missing", ["D", "z", "dt_bias"])
def test_optional_arguments(missing):
    inputs = scan_inputs(SMALL, dtype=torch.float32) | {missing: None}
    y = shifted_scan(**inputs, index=SMALL, backend="triton")
    assert relative_error(y, scan_oracle(**inputs, index=SMALL)) < 1e-6


def test_bfloat16_inputs_keep_a_float32_state():
    inputs = scan_inputs(SMALL, dtype=torch.bfloat16)
    y = shifted_scan(**inputs, index=SMALL, backend="triton")
    assert y.dtype == torch.bfloat16
    assert relative_error(y, scan_oracle(**inputs, index=SMALL)) < 5e-3


def test_views_and_reverse():
    index = window_index((3, 2, 5), (2, 2, 3), (1, 0, 1), reverse=True)
    inputs = scan_inputs(index, dtype=torch.float32)
    wanted = scan_oracle(**inputs, index=index)
    inputs["u"], inputs["z"] = torch.cat([inputs["u"], inputs["z"]], dim=-1).chunk(2, dim=-1)
    inputs["dt"] = inputs["dt"].mT.contiguous().mT
    assert relative_error(shifted_scan(**inputs, index=index, backend="triton"), wanted) < 1e-6


def test_tiny_and_large_steps():
    inputs = scan_inputs(SMALL, dtype=torch.float32) | {"D": None}
    for dt in (-11.5, -3.0, 0.0, 3.0, 40.0):
        inputs["dt"] = torch.full_like(inputs["u"], dt)
        y = shifted_scan(**inputs, index=SMALL, backend="triton")
        assert relative_error(y, scan_oracle(**inputs, index=SMALL)) < 1e-6


def test_gradients_come_through():
    inputs = scan_inputs(SMALL, dtype=torch.float32)
    gradients = []
    for backend in ("triton", "torch"):
        tensors = [inputs[name].clone().requires_grad_() for name in SCAN_ARGUMENTS]
        shifted_scan(*tensors, SMALL, backend=backend).square().sum().backward()
        gradients.append([tensor.grad for tensor in tensors])
    for triton_gradient, torch_gradient in zip(*gradients, strict=True):
        assert relative_error(triton_gradient, torch_gradient) < 1e-5
