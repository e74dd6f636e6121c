"""Cases of the Triton scan's backward pass, run by test_triton.py in a process with TRITON_INTERPRET=1."""

import pytest
import torch

from boldforge.kernels import ScanIndex, triton_scan, triton_scan_backward
from tests.kernels.conftest import SCAN_ARGUMENTS, relative_error, scan_inputs

BY_TOKEN = ("u", "dt", "B", "C", "z")


def two_sequences(length: int, *restarts: tuple[int, int]) -> ScanIndex:
    """Two sequences of this length in token order, with restarts before these (sequence, place)."""
    rows = torch.arange(2 * length, dtype=torch.int32).view(2, length)
    for sequence, place in restarts:
        rows[sequence, place] |= -(2**31)
    return ScanIndex(rows.flatten(), torch.tensor([0, length, 2 * length], dtype=torch.int32), 2 * length)


@pytest.mark.parametrize(("clips", "channels", "states"), [(2, 5, 3), (1, 1, 17)])
def test_gradients_pass_from_the_part_behind_to_the_part_before(clips, channels, states):
    whole = two_sequences(11, (0, 9), (1, 1))
    inputs = scan_inputs(whole, clips, channels, states, torch.float32)
    dout = torch.randn(inputs["u"].shape, generator=torch.Generator().manual_seed(1))
    wanted = triton_scan_backward.scan_backward(dout, *inputs.values(), whole)

    def part(tensor: torch.Tensor, places: slice) -> torch.Tensor:
        return tensor.unflatten(1, (2, 11))[:, :, places].flatten(1, 2)

    places = (slice(0, 4), slice(4, 11))
    indices = (two_sequences(4, (1, 1)), two_sequences(7, (0, 5)))
    cuts = [{name: part(v, p) if name in BY_TOKEN else v for name, v in inputs.items()} for p in places]
    middle, grad_middle, grad_start = torch.full((3, clips, 2, states, channels), torch.nan)
    triton_scan.scan_forward(**cuts[0], index=indices[0], last=middle)
    behind = triton_scan_backward.scan_backward(
        part(dout, places[1]), *cuts[1].values(), indices[1], initial=middle, grad_initial=grad_middle
    )
    before = triton_scan_backward.scan_backward(
        part(dout, places[0]), *cuts[0].values(), indices[0], grad_last=grad_middle, grad_initial=grad_start
    )
    for name, a, b, both in zip(SCAN_ARGUMENTS, before, behind, wanted, strict=True):
        if name in BY_TOKEN:
            found = torch.cat([a.unflatten(1, (2, 4)), b.unflatten(1, (2, 7))], dim=2).flatten(1, 2)
        else:
            found = a + b
        assert relative_error(found, both) < 1e-6, name
    assert grad_start.isfinite().all()


def test_the_gradient_of_the_starting_state_matches_autograd():
    index = two_sequences(5, (1, 3))
    inputs = scan_inputs(index, 1, 3, 4, torch.float32)
    generator = torch.Generator().manual_seed(2)
    dout, initial, grad_last = (
        torch.randn(shape, generator=generator) for shape in (inputs["u"].shape, (1, 2, 4, 3), (1, 2, 4, 3))
    )
    grad_initial = torch.full_like(initial, torch.nan)
    found = triton_scan_backward.scan_backward(dout, *inputs.values(), index, initial, grad_last, grad_initial)

    tensors = {name: value.double().requires_grad_() for name, value in inputs.items()}
    start = initial.double().requires_grad_()
    total = 0.0
    for sequence in range(2):
        h = start[0, sequence]
        for code in index.rows[sequence * 5 : sequence * 5 + 5].tolist():
            row = code & 0x7FFFFFFF
            u, dt, B, C, z = (tensors[name][0, row] for name in BY_TOKEN)
            delta = torch.nn.functional.softplus(dt + tensors["dt_bias"])
            h = torch.exp(delta * tensors["A"].T) * (h if code >= 0 else 0) + delta * u * B[:, None]
            y = ((C[:, None] * h).sum(0) + tensors["D"] * u) * torch.nn.functional.silu(z)
            total = total + (y * dout[0, row]).sum()
        total = total + (h * grad_last[0, sequence]).sum()
    total.backward()
    for name, gradient in zip(SCAN_ARGUMENTS, found, strict=True):
        assert relative_error(gradient, tensors[name].grad) < 2e-6, name
    assert relative_error(grad_initial, start.grad) < 2e-6
