"""Cases of the Triton scan's backward pass, run by test_triton.py in a process with TRITON_INTERPRET=1."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from boldforge.kernels import ScanIndex, shifted_scan, triton_scan, triton_scan_backward, triton_scan_keep
from boldforge.kernels.triton_scan_spans import spans_of
from tests.kernels.conftest import SCAN_ARGUMENTS, relative_error, scan_inputs

BY_TOKEN = ("u", "dt", "B", "C", "z")


def two_sequences(length: int, *restarts: tuple[int, int]) -> ScanIndex:
    """Two sequences of this length in token order, with restarts before these (sequence, place)."""
    rows = torch.arange(2 * length, dtype=torch.int32).view(2, length)
    for sequence, place in restarts:
        rows[sequence, place] |= -(2**31)
    return ScanIndex(rows.flatten(), torch.tensor([0, length, 2 * length], dtype=torch.int32), 2 * length)


@pytest.mark.parametrize(("clips", "channels", "states"), [(2, 2, 3), (1, 1, 17)])
def test_gradients_pass_from_the_part_behind_to_the_part_before(clips, channels, states):
    whole = two_sequences(7, (0, 5), (1, 1))
    inputs = scan_inputs(whole, clips, channels, states, torch.float32)
    dout = torch.randn(inputs["u"].shape, generator=torch.Generator().manual_seed(1))
    wanted = triton_scan_backward.scan_backward(dout, *inputs.values(), whole)

    def part(tensor: torch.Tensor, places: slice) -> torch.Tensor:
        return tensor.unflatten(1, (2, 7))[:, :, places].flatten(1, 2)

    places = (slice(0, 2), slice(2, 7))
    indices = (two_sequences(2, (1, 1)), two_sequences(5, (0, 3)))
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
            found = torch.cat([a.unflatten(1, (2, 2)), b.unflatten(1, (2, 5))], dim=2).flatten(1, 2)
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


def gradients(inputs, index, **options):
    tensors = [inputs[name].clone().requires_grad_() for name in SCAN_ARGUMENTS]
    y = shifted_scan(*tensors, index, backend="triton", **options)
    y.backward(torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(y.dtype))
    return [y.detach(), *(tensor.grad for tensor in tensors)]


@pytest.mark.parametrize(("channels", "states", "dtype"), [(33, 2, torch.float32), (2, 9, torch.bfloat16)])
def test_kept_states_give_the_same_bits(channels, states, dtype, monkeypatch):
    index = two_sequences(5, (1, 3))
    inputs = scan_inputs(index, 1, channels, states, dtype)
    computed = gradients(inputs, index)
    monkeypatch.setattr(triton_scan_backward, "keep_states", None)  # must not be needed
    kept = gradients(inputs, index, keep_states=True)
    assert relative_error(kept[0], computed[0]) < (1e-6 if dtype == torch.float32 else 5e-3)
    for name, a, b in zip(SCAN_ARGUMENTS, kept[1:], computed[1:], strict=True):
        assert torch.equal(a, b), name


def test_more_states_than_a_program_holds_are_computed_again():
    index = two_sequences(3)
    inputs = scan_inputs(index, 1, 2, 17, torch.float32)
    for a, b in zip(gradients(inputs, index, keep_states=True), gradients(inputs, index), strict=True):
        assert torch.equal(a, b)


# On the CPU numpy warns where a GPU does not.
@pytest.mark.filterwarnings("ignore:(invalid value|overflow) encountered:RuntimeWarning")
@pytest.mark.parametrize(("name", "keep_states"), [("u", True), ("dt", False), ("B", False), ("C", True), ("z", True)])
def test_a_broken_token_stays_in_its_stretch(name, keep_states):
    index = two_sequences(5, (0, 2), (1, 2))
    inputs = scan_inputs(index, 1, 2, 2, torch.float32)
    whole = gradients(inputs, index, keep_states=keep_states)
    inputs[name][0, [3, 6]] = torch.inf if name in ("u", "B") else torch.nan
    broken = gradients(inputs, index, keep_states=keep_states)
    for a, b, argument in zip(broken, whole, ("y", *SCAN_ARGUMENTS), strict=True):
        if argument in ("y", *BY_TOKEN):
            assert torch.equal(a[:, [0, 1, 7, 8, 9]], b[:, [0, 1, 7, 8, 9]]), argument
    assert not broken[0][:, [3, 6]].isfinite().any()


def test_addresses_of_64_bits_give_the_same_bits(monkeypatch):
    index = two_sequences(3, (1, 2))
    inputs = scan_inputs(index, 2, 3, 2, torch.float32)
    narrow = gradients(inputs, index, keep_states=True)
    for module in (triton_scan_backward, triton_scan_keep):
        monkeypatch.setattr(module, "MOST_IN_32_BITS", 0)
    for a, b in zip(gradients(inputs, index, keep_states=True), narrow, strict=True):
        assert torch.equal(a, b)


@given(st.lists(st.lists(st.integers(1, 9), min_size=1, max_size=4), min_size=1, max_size=4), st.integers(1, 5))
def test_spans_hold_every_token_once_and_cross_no_restart(stretches, steps):
    lengths = [sum(sequence) for sequence in stretches]
    starts = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    rows = torch.randperm(int(starts[-1]), generator=torch.Generator().manual_seed(0)).to(torch.int32)
    for sequence, first in zip(stretches, starts.tolist(), strict=False):
        for place in torch.tensor(sequence).cumsum(0).tolist()[:-1]:
            rows[first + place] |= -(2**31)
    spans = spans_of(ScanIndex(rows, starts, len(rows)), steps)
    found = []
    for first, stop in zip(spans.cu_spans[:-1].tolist(), spans.cu_spans[1:].tolist(), strict=True):
        codes = [span[:1].tolist() + span[1:][span[1:] >= 0].tolist() for span in spans.rows[first:stop]]
        found.append([code for span in codes for code in span])
    for span in spans.rows & 0x7FFFFFFF:
        assert set(span.tolist()) <= set((rows & 0x7FFFFFFF).tolist())
    assert [code for sequence in found for code in sequence] == rows.tolist()
    assert [len(sequence) for sequence in found] == lengths
