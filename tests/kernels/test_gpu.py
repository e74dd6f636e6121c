"""The compiled Triton kernel on a CUDA device, against the oracle on the CPU."""

import pytest
import torch

from boldforge.kernels import available_backends, conv_oracle, scan_oracle, shifted_conv, shifted_scan, window_index
from tests.kernels.conftest import SCAN_ARGUMENTS, ragged_index, relative_error, scan_inputs

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here"),
]
TOLERANCE = {torch.float32: 1e-5, torch.float16: 5e-4, torch.bfloat16: 5e-3}


def on_gpu(inputs):
    return {name: value.cuda() for name, value in inputs.items()}


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(("channels", "states"), [(1, 1), (64, 16), (72, 16), (130, 5), (33, 64)])
def test_values(dtype, channels, states):
    index = ragged_index()
    inputs = scan_inputs(index, 2, channels, states, dtype)
    y = shifted_scan(**on_gpu(inputs), index=index, backend="triton")
    assert relative_error(y.cpu(), scan_oracle(**inputs, index=index)) < TOLERANCE[dtype]


def test_a_long_window_and_the_automatic_choice():
    assert available_backends()["triton"] == ""
    index = window_index((1000,), (1000,), (0,))
    inputs = scan_inputs(index, 1, 72, 16, torch.float32)
    y = shifted_scan(**on_gpu(inputs), index=index)
    assert relative_error(y.cpu(), scan_oracle(**inputs, index=index)) < 1e-5


def test_every_gradient():
    index = ragged_index()
    inputs = scan_inputs(index, 2, 72, 16, torch.float32)
    wanted = [inputs[name].double().requires_grad_() for name in SCAN_ARGUMENTS]
    scan_oracle(*wanted, index).square().sum().backward()
    found = [inputs[name].cuda().requires_grad_() for name in SCAN_ARGUMENTS]
    shifted_scan(*found, index).square().sum().backward()
    errors = [relative_error(a.grad.cpu(), b.grad) for a, b in zip(found, wanted, strict=True)]
    assert max(errors) < 1e-5, errors


def test_two_runs_give_the_same_bits():
    index = ragged_index()
    inputs = on_gpu(scan_inputs(index, 4, 72, 16, torch.bfloat16))
    runs = []
    for _ in range(2):
        tensors = [inputs[name].clone().requires_grad_() for name in SCAN_ARGUMENTS]
        y = shifted_scan(*tensors, index)
        y.sum().backward()
        runs.append([y, *(tensor.grad for tensor in tensors)])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_convolution():
    index = ragged_index()
    x, weight, bias = torch.randn(2, index.n_tokens, 72), torch.randn(72, 4), torch.randn(72)
    y = shifted_conv(x.cuda(), weight.cuda(), bias.cuda(), index)
    assert relative_error(y.cpu(), conv_oracle(x, weight, bias, index)) < 1e-6


def test_mamba_ssm_agrees():
    if reason := available_backends()["mamba_ssm"]:
        pytest.skip(reason)
    index = ragged_index()
    inputs = scan_inputs(index, 2, 72, 16, torch.float32)
    y = shifted_scan(**on_gpu(inputs), index=index, backend="mamba_ssm")
    assert relative_error(y.cpu(), scan_oracle(**inputs, index=index)) < 1e-3
