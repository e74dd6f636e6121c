"""Inputs of the scan at odd sizes, and a path with ragged windows, restarts and holes."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

from boldforge.kernels import ScanIndex, available_backends, scan_oracle, window_index

SCAN_ARGUMENTS = ("u", "dt", "A", "B", "C", "D", "z", "dt_bias")


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(params=["torch", "cpu"])
def backend(request) -> str:
    """Every backend that takes CPU tensors as they come."""
    if reason := available_backends()[request.param]:
        pytest.skip(f"{request.param}: {reason}")
    return request.param


def ragged_index(**options) -> ScanIndex:
    """A grid that is no multiple of its windows, shifted, with a third of the tokens missing."""
    keep = torch.rand(5, 3, 2, 7, generator=torch.Generator().manual_seed(5)) < 0.65
    return window_index((5, 3, 2, 7), (2, 2, 2, 4), (1, 1, 0, 2), keep=keep, **options)


def scan_inputs(
    index: ScanIndex, clips=2, channels=5, states=3, dtype=torch.float64, seed=0
) -> dict[str, torch.Tensor]:
    """Random arguments of the scan; the step sizes after softplus run from about 1e-4 to 3."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    rows = (clips, index.n_tokens)
    inputs = {
        "u": normal(*rows, channels),
        "dt": normal(*rows, channels) * 3 - 3,
        "A": -torch.rand(channels, states, generator=generator, dtype=torch.float64) * states - 0.1,
        "B": normal(*rows, states),
        "C": normal(*rows, states),
        "D": normal(channels),
        "z": normal(*rows, channels),
        "dt_bias": normal(channels) * 0.1,
    }
    return {name: value.to(dtype) for name, value in inputs.items()}


def accuracy_inputs(index: ScanIndex, clips=1, channels=24, states=16, dtype=torch.float32, steps=(1e-4, 3.0), seed=0):
    """Arguments whose step sizes after softplus are spread evenly in the logarithm between the two given."""
    inputs = scan_inputs(index, clips, channels, states, seed=seed)
    generator = torch.Generator().manual_seed(seed + 1)
    spread = torch.rand(inputs["dt"].shape, generator=generator, dtype=torch.float64)
    step = steps[0] * (steps[1] / steps[0]) ** spread
    inputs["dt"] = step + torch.log(-torch.expm1(-step)) - inputs["dt_bias"]
    return {name: value.to(dtype) for name, value in inputs.items()}


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """Fill with NaN what torch.empty and its kin hand out, so that an element no kernel writes cannot pass."""
    with pytest.MonkeyPatch.context() as patch:
        for owner, name in ((torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")):
            patch.setattr(owner, name, _filled_with_nan(getattr(owner, name)))
        assert torch.empty(3).isnan().all() and torch.zeros(1).new_empty(2).isnan().all()
        yield


def _filled_with_nan(allocate):
    def poisoned(*arguments, **options):
        found = allocate(*arguments, **options)
        return found.fill_(torch.nan) if found.is_floating_point() else found

    return poisoned


def values_and_gradients(scan, inputs, index, dout=None) -> dict[str, torch.Tensor]:
    """The output and the gradient of every argument; arguments that are missing are None."""
    tensors = {name: value.detach().clone().requires_grad_() for name, value in inputs.items()}
    y = scan(**dict.fromkeys(SCAN_ARGUMENTS) | tensors, index=index)
    if dout is None:
        dout = torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    y.backward(dout.to(y))
    return {"y": y.detach()} | {f"d{name}": tensor.grad for name, tensor in tensors.items()}


FORWARD = {torch.float32: 1e-5, torch.float16: 5e-4, torch.bfloat16: 5e-3}
BACKWARD = {torch.float32: 1e-5, torch.float16: float("inf"), torch.bfloat16: 1e-2}
"""Norm-relative errors against float64 that every backend must stay below; small gradients have no place in float16."""


def assert_accurate(scan, inputs, index) -> dict[str, float]:
    """Run on poisoned memory, compare with the float64 oracle of the same rounded inputs, return the errors."""
    dtype = inputs["u"].dtype
    dout = torch.randn(inputs["u"].shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    exact = {name: value.cpu().double() for name, value in inputs.items()}
    wanted = values_and_gradients(scan_oracle, exact, index, dout)
    with poisoned_memory():
        found = values_and_gradients(scan, inputs, index, dout)
    errors = {name: relative_error(found[name].cpu(), wanted[name]) for name in wanted}
    limits = {name: (FORWARD if name == "y" else BACKWARD)[dtype] for name in errors}
    assert all(errors[name] <= limits[name] for name in errors), errors  # a NaN fails too
    assert {value.dtype for value in found.values()} == {dtype}
    return errors


def relative_error(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """Norm of the difference over the norm of what is wanted; where that is zero, anything else is far off."""
    return float((found.double() - wanted.double()).norm() / wanted.double().norm().clamp_min(1e-300))
