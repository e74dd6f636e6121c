"""Cases of the Triton kernel, run by test_triton.py in a process with TRITON_INTERPRET=1."""

import pytest
import torch

from boldforge.kernels import (
    available_backends,
    conv_oracle,
    scan_oracle,
    shifted_conv,
    shifted_scan,
    triton_scan,
    triton_scan_chunked,
    window_index,
)
from tests.kernels.conftest import SCAN_ARGUMENTS, relative_error, scan_inputs

SMALL = window_index((3, 2, 5), (2, 2, 3), (1, 0, 1), keep=torch.arange(30).view(3, 2, 5) % 4 != 1)


def test_the_interpreter_counts_as_a_backend():
    assert available_backends()["triton"] == ""


@pytest.mark.parametrize(("channels", "states"), [(1, 1), (5, 3), (67, 1), (64, 2)])
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
    assert relative_error(shifted_scan(**inputs, index=index, backend="triton"), wanted) < 1e-6


def test_tiny_and_large_steps():
    inputs = scan_inputs(SMALL, dtype=torch.float32) | {"D": None}
    for dt in (-11.5, -3.0, 0.0, 3.0, 40.0):
        inputs["dt"] = torch.full_like(inputs["u"], dt)
        y = shifted_scan(**inputs, index=SMALL, backend="triton")
        assert relative_error(y, scan_oracle(**inputs, index=SMALL)) < 1e-6


@pytest.mark.parametrize("channels", [5, 64])
def test_a_sequence_goes_on_from_the_state_another_one_ended_with(channels):
    whole = window_index((2, 11), (1, 11), (0, 0), mode="wrap")
    inputs = scan_inputs(whole, 2, channels, 3, torch.float32)
    wanted = scan_oracle(**inputs, index=whole)
    state = None
    for part in (slice(0, 4), slice(4, 11)):
        length = part.stop - part.start
        index = window_index((2, length), (1, length), (0, 0), mode="wrap")
        cut = {
            name: value.unflatten(1, (2, 11))[:, :, part].flatten(1, 2) if name in ("u", "dt", "B", "C", "z") else value
            for name, value in inputs.items()
        }
        last = torch.full((2, 2, 3, channels), torch.nan)
        y = triton_scan.scan_forward(**cut, index=index, initial=state, last=last)
        assert relative_error(y, wanted.unflatten(1, (2, 11))[:, :, part].flatten(1, 2)) < 1e-6
        state = last


@pytest.mark.parametrize("channels", [5, 64])
def test_the_last_state_of_a_short_sequence_beside_a_longer_one(channels):
    index = window_index((7,), (4,), (0,))
    inputs = scan_inputs(index, 1, channels, 3, torch.float32)
    last = torch.full((1, 2, 3, channels), torch.nan)
    triton_scan.scan_forward(**inputs, index=index, initial=torch.ones_like(last), last=last)
    for sequence, stop in enumerate(index.cu_seqlens[1:].tolist()):
        rows = index.rows[index.cu_seqlens[sequence] : stop].long()
        h = torch.ones(channels, 3)
        for row in rows:
            delta = torch.nn.functional.softplus(inputs["dt"][0, row] + inputs["dt_bias"])[:, None]
            h = torch.exp(delta * inputs["A"]) * h + delta * inputs["u"][0, row, :, None] * inputs["B"][0, row]
        assert relative_error(last[0, sequence].T, h) < 1e-6


# The interpreter computes with numpy, which warns where infinities meet.
@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
@pytest.mark.parametrize("channels", [5, 64])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_bad_value_does_not_cross_a_restart(channels, bad):
    inputs = scan_inputs(SMALL, 1, channels, 3, torch.float32)
    wanted = shifted_scan(**inputs, index=SMALL, backend="triton")
    first, length = (part.tolist() for part in SMALL.segments)
    hit = next(i for i, place in enumerate(first[:-1]) if SMALL.rows[place + length[i]] < 0 and length[i] > 1)
    struck = SMALL.rows[first[hit] : first[hit] + length[hit]].long() & 0x7FFFFFFF
    inputs["u"][0, struck[0]] = bad
    y = shifted_scan(**inputs, index=SMALL, backend="triton")
    assert not y[0, struck].isfinite().any()
    others = torch.ones(SMALL.n_tokens, dtype=torch.bool)
    others[struck] = False
    assert torch.equal(y[0, others], wanted[0, others])


def far_apart(path, values):
    """The same values [1, 3, D] in a file with holes in it: rows 2^30 elements apart."""
    channels = values.shape[2]
    storage = torch.from_file(str(path), shared=True, size=2**31 + channels, dtype=torch.float32)
    return storage.as_strided((1, 3, channels), (3 * 2**30, 2**30, 1)).copy_(values)


def test_offsets_beyond_32_bits_in_a_convolution_and_in_the_passes_of_long_sequences(tmp_path):
    index = window_index((3,), (3,), (0,))
    inputs = scan_inputs(index, 1, 3, 2, torch.float32)
    u = far_apart(tmp_path / "u", inputs["u"])
    y = triton_scan_chunked.scan_forward(**(inputs | {"u": u}), index=index, chunk=2)
    assert relative_error(y, scan_oracle(**inputs, index=index)) < 1e-6
    weight = torch.randn(3, 4, generator=torch.Generator().manual_seed(2))
    for x in (inputs["u"].requires_grad_(), u.requires_grad_()):
        shifted_conv(x, weight, None, index, backend="triton" if x is u else "torch").square().sum().backward()
    assert relative_error(u.grad, inputs["u"].grad) < 2e-6
    with torch.no_grad():
        found = shifted_conv(u, weight, None, index, backend="triton")
        assert relative_error(found, conv_oracle(inputs["u"], weight, None, index)) < 1e-6


@pytest.mark.parametrize("channels", [3, 64])
def test_offsets_beyond_32_bits(tmp_path, channels):
    index = window_index((3,), (3,), (0,))
    inputs = scan_inputs(index, 1, channels, 2, torch.float32)
    wanted = scan_oracle(**inputs, index=index)
    u = far_apart(tmp_path / "u", inputs["u"])
    y = shifted_scan(**(inputs | {"u": u}), index=index, backend="triton")
    assert relative_error(y, wanted) < 1e-6


def test_weights_of_two_types_and_rows_that_start_anywhere():
    inputs = scan_inputs(SMALL, 1, 5, 4, torch.float32)
    inputs["B"], inputs["C"] = inputs["B"].bfloat16(), torch.nn.functional.pad(inputs["C"], (3, 0))[..., 3:]
    for channels in (5, 64):
        some = inputs | scan_inputs(SMALL, 1, channels, 4, torch.float32) | {k: inputs[k] for k in "BC"}
        y = shifted_scan(**some, index=SMALL, backend="triton")
        assert relative_error(y, scan_oracle(**some, index=SMALL)) < 1e-6


def gradients(inputs, backend, index=SMALL):
    tensors = [None if inputs[name] is None else inputs[name].clone().requires_grad_() for name in SCAN_ARGUMENTS]
    y = shifted_scan(*tensors, index, backend=backend)
    dout = torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    y.backward(dout.to(y.dtype))
    return {name: tensor.grad for name, tensor in zip(SCAN_ARGUMENTS, tensors, strict=True) if tensor is not None}


def assert_gradients(inputs, tolerance, index=SMALL):
    wanted = gradients({k: None if v is None else v.double() for k, v in inputs.items()}, "torch", index)
    found = gradients(inputs, "triton", index)
    errors = {name: relative_error(found[name], wanted[name]) for name in wanted}
    assert all(error <= tolerance for error in errors.values()), errors
    assert all(found[name].dtype == inputs[name].dtype for name in found)


@pytest.mark.parametrize(("channels", "states"), [(1, 1), (33, 4), (2, 20)])
def test_gradients_at_odd_sizes(channels, states):
    assert_gradients(scan_inputs(SMALL, 1, channels, states, torch.float32), 2e-6)


@pytest.mark.parametrize("missing", ["D", "z", "dt_bias"])
def test_gradients_without_optional_arguments(missing):
    assert_gradients(scan_inputs(SMALL, 1, dtype=torch.float32) | {missing: None}, 2e-6)


def test_gradients_along_one_long_sequence_and_of_single_tokens():
    for index in (window_index((19,), (19,), (0,)), window_index((3,), (1,), (0,))):
        assert_gradients(scan_inputs(index, 1, 2, 4, torch.float32), 2e-6, index)


def test_gradients_of_bfloat16_inputs():
    assert_gradients(scan_inputs(SMALL, 1, 4, 4, torch.bfloat16), 1e-2)


def test_gradients_are_the_same_bits_twice():
    inputs = scan_inputs(SMALL, 1, dtype=torch.float32)
    first, second = gradients(inputs, "triton"), gradients(inputs, "triton")
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("taps", [1, 4])
@pytest.mark.parametrize("with_bias", [True, False])
def test_convolution_and_its_gradients(taps, with_bias):
    generator = torch.Generator().manual_seed(3)
    shapes = [(2, SMALL.n_tokens, 67), (67, taps), (67,)][: 2 + with_bias]
    inputs = [torch.randn(shape, generator=generator) for shape in shapes]
    results = []
    for backend, dtype in (("triton", torch.float32), ("torch", torch.float64)):
        tensors = [tensor.to(dtype, copy=True).requires_grad_() for tensor in inputs]
        y = shifted_conv(tensors[0], tensors[1], tensors[2] if with_bias else None, SMALL, backend=backend)
        y.square().sum().backward()
        results.append([y.detach(), *(tensor.grad for tensor in tensors)])
    for found, wanted in zip(*results, strict=True):
        assert relative_error(found, wanted) < 1e-6
