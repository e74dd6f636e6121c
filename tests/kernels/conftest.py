"""Inputs of the scan at odd sizes, and a path with ragged windows, restarts and holes."""

from collections.abc import Iterator

import pytest
import torch

from boldforge.kernels import ScanIndex, available_backends, window_index

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


def relative_error(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """Norm of the difference over the norm of what is wanted; where that is zero, anything else is far off."""
    return float((found.double() - wanted.double()).norm() / wanted.double().norm().clamp_min(1e-300))
