"""The oracle itself: hand-computed values and numerical gradients."""

import math

import torch

from boldforge.kernels import ScanIndex, conv_oracle, scan_oracle, shifted_scan, window_index
from tests.kernels.conftest import SCAN_ARGUMENTS, scan_inputs


def test_two_tokens_by_hand():
    index = ScanIndex(torch.tensor([1, 0], dtype=torch.int32), torch.tensor([0, 2], dtype=torch.int32), 2)
    u = torch.tensor([[[5.0], [2.0]]])
    zero_step = torch.zeros(1, 2, 1)  # softplus(0) = log 2
    ones = torch.ones(1, 2, 1)
    y = scan_oracle(u, zero_step, torch.tensor([[-1.0]]), ones, 3 * ones, torch.tensor([10.0]), None, None, index)
    first = math.log(2) * 2
    second = 0.5 * first + math.log(2) * 5
    assert torch.allclose(y.flatten(), torch.tensor([3 * second + 50, 3 * first + 20], dtype=torch.float64))


def test_convolution_by_hand():
    rows = torch.tensor([2, 0, 1 | -(2**31)], dtype=torch.int32)
    index = ScanIndex(rows, torch.tensor([0, 3], dtype=torch.int32), 3)
    x, weight = torch.tensor([[[1.0], [10.0], [100.0]]]), torch.tensor([[7.0, 2.0]])
    total = torch.tensor([2 * 1 + 7 * 100 + 1, 2 * 10 + 1, 2 * 100 + 1], dtype=torch.float64)
    y = conv_oracle(x, weight, torch.tensor([1.0]), index)
    assert torch.allclose(y.flatten(), torch.nn.functional.silu(total))


def test_the_gradient_of_a_step_that_is_exactly_zero_is_a_half():
    """Half precision meets it: dt and its bias cancel to the last bit."""
    index = window_index((1,), (1,), (0,))
    step = torch.zeros(1, 1, 1, dtype=torch.float64, requires_grad=True)
    one = torch.ones(1, 1, 1)
    y = scan_oracle(one, step, -torch.ones(1, 1), one, one, None, None, None, index)
    y.sum().backward()
    assert step.grad.item() == 0.5
    found = step.detach().float().requires_grad_()
    shifted_scan(one, found, -torch.ones(1, 1), one, one, None, None, None, index).sum().backward()
    assert abs(found.grad.item() - 0.5) < 1e-6


def test_gradients_of_the_oracle_are_numerical_gradients():
    index = window_index((3, 2), (2, 2), (1, 0))
    inputs = [scan_inputs(index, 1, 2, 2)[name].requires_grad_() for name in SCAN_ARGUMENTS]
    assert torch.autograd.gradcheck(lambda *tensors: scan_oracle(*tensors, index), inputs)
    conv = [torch.randn(s, dtype=torch.float64, requires_grad=True) for s in ((1, 6, 2), (2, 3), (2,))]
    assert torch.autograd.gradcheck(lambda *tensors: conv_oracle(*tensors, index), conv)
