"""shifted_scan against the oracle: values, every gradient, number types, and how it behaves inside torch."""

from functools import partial

import pytest
import torch

from boldforge.kernels import scan_oracle, shifted_conv, shifted_scan, torch_backend, window_index
from tests.kernels.conftest import SCAN_ARGUMENTS, ragged_index, relative_error, scan_inputs, values_and_gradients

INDEXES = {
    "ragged": ragged_index(),
    "ragged reverse": ragged_index(reverse=True),
    "ragged wrap": ragged_index(mode="wrap"),
    "one sequence": window_index((37,), (37,), (0,)),
    "single tokens": window_index((3, 2), (1, 1), (0, 0)),
}


@pytest.fixture
def scan(backend):
    return partial(shifted_scan, backend=backend)


def assert_close(found, wanted, tolerance):
    errors = {name: relative_error(found[name], wanted[name]) for name in wanted}
    assert all(error <= tolerance for error in errors.values()), errors  # a NaN fails too


@pytest.mark.parametrize("name", INDEXES)
def test_matches_the_oracle_in_float64(name):
    inputs = scan_inputs(INDEXES[name])
    wanted = values_and_gradients(scan_oracle, inputs, INDEXES[name])
    assert_close(values_and_gradients(shifted_scan, inputs, INDEXES[name]), wanted, 1e-12)


@pytest.mark.parametrize(("clips", "channels", "states"), [(1, 1, 1), (3, 7, 5), (2, 72, 16), (1, 200, 4), (1, 3, 64)])
def test_matches_the_oracle_at_odd_sizes_in_float32(clips, channels, states, scan):
    index = ragged_index()
    inputs = scan_inputs(index, clips, channels, states, torch.float32)
    wanted = values_and_gradients(scan_oracle, {k: v.double() for k, v in inputs.items()}, index)
    found = values_and_gradients(scan, inputs, index)
    assert_close(found, wanted, 1e-6)
    assert {value.dtype for value in found.values()} == {torch.float32}


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 1e-2), (torch.float16, 2e-3)])
def test_half_precision_inputs_keep_a_float32_state(dtype, tolerance, scan):
    index = window_index((256,), (256,), (0,))
    inputs = {k: v.to(dtype) for k, v in scan_inputs(index, channels=8, states=4).items()}
    wanted = values_and_gradients(scan_oracle, {k: v.double() for k, v in inputs.items()}, index)
    found = values_and_gradients(scan, inputs, index)
    assert_close(found, wanted, tolerance)
    assert {value.dtype for value in found.values()} == {dtype}


@pytest.mark.parametrize("missing", ["D", "z", "dt_bias"])
def test_optional_arguments_may_be_missing(missing, scan):
    index = ragged_index()
    inputs = scan_inputs(index, dtype=torch.float32)
    del inputs[missing]
    wanted = values_and_gradients(scan_oracle, {k: v.double() for k, v in inputs.items()}, index)
    assert_close(values_and_gradients(scan, inputs, index), wanted, 1e-6)


def test_gradcheck():
    index = window_index((3, 2), (2, 2), (1, 0))
    inputs = [scan_inputs(index, 1, 2, 2)[name].requires_grad_() for name in SCAN_ARGUMENTS]
    assert torch.autograd.gradcheck(lambda *tensors: shifted_scan(*tensors, index), inputs)


def test_many_packs_and_blocks_give_the_same_as_one(monkeypatch):
    index = ragged_index()
    inputs = scan_inputs(index)
    whole = values_and_gradients(shifted_scan, inputs, index)
    monkeypatch.setitem(torch_backend._STEP_ELEMENTS, "cpu", 5 * 3 * 4)
    monkeypatch.setitem(torch_backend._BLOCK_ELEMENTS, "cpu", 5 * 3 * 7)
    assert_close(values_and_gradients(shifted_scan, inputs, index), whole, 1e-13)


def test_tiny_steps_keep_their_digits(scan):
    """softplus through log(1 + e^x) is off by nearly a hundredth here; through log1p it is exact."""
    index = window_index((16,), (16,), (0,))
    inputs = scan_inputs(index, dtype=torch.float32) | {"dt": torch.full((2, 16, 5), -11.5), "D": torch.zeros(5)}
    y = scan(**inputs, index=index)
    assert relative_error(y, scan_oracle(**inputs, index=index)) < 1e-6


def test_large_steps_neither_overflow_nor_lose_the_gradient(scan):
    index = window_index((16,), (16,), (0,))
    inputs = scan_inputs(index, dtype=torch.float32)
    inputs["dt"] = inputs["dt"] * 60
    wanted = values_and_gradients(scan_oracle, {k: v.double() for k, v in inputs.items()}, index)
    found = values_and_gradients(scan, inputs, index)
    assert_close(found, wanted, 1e-5)


def test_two_runs_give_the_same_bits(scan):
    index = ragged_index()
    inputs = scan_inputs(index, 3, 72, 16, torch.float32)
    first, second = (values_and_gradients(scan, inputs, index) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("sizes", [(3, 200, 16), (2, 71, 7), (1, 257, 16)])
def test_one_and_two_threads_give_the_same_bits(scan, backend, sizes):
    index = window_index((13, 5, 6), (4, 2, 3), (1, 0, 2))
    inputs = scan_inputs(index, *sizes, torch.float32)
    x, weight = inputs["u"], inputs["A"][:, :3].contiguous()
    results = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        found = values_and_gradients(scan, inputs, index)
        leaves = [x.clone().requires_grad_(), weight.clone().requires_grad_()]
        conv = shifted_conv(*leaves, None, index, backend=backend)
        conv.square().sum().backward()
        results.append([*found.values(), conv.detach(), *(leaf.grad for leaf in leaves)])
    assert all(torch.equal(one, two) for one, two in zip(*results, strict=True))


def test_clips_and_windows_do_not_see_each_other(scan):
    index = window_index((4, 4), (2, 2), (1, 1))
    inputs = scan_inputs(index, clips=2, dtype=torch.float32)
    clean = scan(**inputs, index=index)
    first, length = index.segments
    stained = index.tokens[first[2] : first[2] + length[2]]
    inputs["u"] = inputs["u"].clone()
    inputs["u"][1, stained] = torch.nan
    y = scan(**inputs, index=index)
    others = torch.ones(16, dtype=torch.bool)
    others[stained] = False
    assert torch.equal(y[0], clean[0])
    assert torch.equal(y[1, others], clean[1, others])
    assert y[1, stained].isnan().all()


def test_no_gradient_crosses_a_restart(scan):
    index = ragged_index()
    inputs = {k: v.requires_grad_() for k, v in scan_inputs(index, 1, dtype=torch.float32).items()}
    place = int((index.rows < 0).nonzero()[0])
    first, length = index.segments
    number = int((first == place).nonzero())
    before, after = (index.tokens[first[i] : first[i] + length[i]] for i in (number - 1, number))
    y = scan(**inputs, index=index)
    dout = torch.zeros_like(y)
    dout[:, after] = torch.nan
    y.backward(dout)
    for name in ("u", "dt", "B", "C", "z"):
        assert not inputs[name].grad[:, before].isnan().any(), name
        assert inputs[name].grad[:, after].isnan().any(), name


def test_long_memories_do_not_drift(scan):
    """4096 steps of 1e-4: the state forgets nothing, so an error of the decay would add up."""
    index = window_index((4096,), (4096,), (0,))
    inputs = scan_inputs(index, 1, 3, 16, torch.float32)
    inputs |= {"dt": inputs["dt"] * 0.01 - 9.2, "dt_bias": torch.zeros(3)}
    reference = partial(shifted_scan, backend="torch")
    wanted = values_and_gradients(reference, {k: v.double() for k, v in inputs.items()}, index)
    assert_close(values_and_gradients(scan, inputs, index), wanted, 1e-5)


def test_views_of_one_projection_are_accepted(scan):
    index = ragged_index()
    inputs = scan_inputs(index, dtype=torch.float32)
    wanted = scan(**inputs, index=index)
    both = torch.cat([inputs["u"], inputs["z"]], dim=-1)
    inputs["u"], inputs["z"] = both.chunk(2, dim=-1)
    assert torch.equal(scan(**inputs, index=index), wanted)


def test_autocast_leaves_the_state_alone(scan):
    index = ragged_index()
    inputs = scan_inputs(index, channels=8, states=8, dtype=torch.float32)
    plain = values_and_gradients(scan, inputs, index)
    with torch.autocast("cpu", torch.bfloat16):
        inside = values_and_gradients(scan, inputs, index)
    assert all(torch.equal(plain[name], inside[name]) for name in plain)


def test_mixed_types_as_autocast_makes_them(scan):
    index = ragged_index()
    inputs = scan_inputs(index, dtype=torch.float32)
    for name in ("u", "B", "C", "z"):
        inputs[name] = inputs[name].bfloat16()
    wanted = values_and_gradients(scan_oracle, {k: v.double() for k, v in inputs.items()}, index)
    found = values_and_gradients(scan, inputs, index)
    assert_close(found, wanted, 1e-2)
    assert found["y"].dtype == found["du"].dtype == torch.bfloat16
    assert found["dA"].dtype == found["ddt"].dtype == torch.float32


def test_activation_checkpointing_gives_the_same_bits():
    index = ragged_index()
    inputs = scan_inputs(index, dtype=torch.float32)

    def checkpointed(index, **tensors):
        ordered = [tensors[name] for name in SCAN_ARGUMENTS]
        return torch.utils.checkpoint.checkpoint(
            lambda *args: shifted_scan(*args, index), *ordered, use_reentrant=False
        )

    plain, again = (values_and_gradients(scan, inputs, index) for scan in (shifted_scan, checkpointed))
    assert all(torch.equal(plain[name], again[name]) for name in plain)


def test_frozen_inputs_get_no_gradient(scan):
    inputs = scan_inputs(ragged_index(), dtype=torch.float32)
    inputs["u"].requires_grad_()
    scan(**inputs, index=ragged_index()).sum().backward()
    assert inputs["u"].grad is not None
    assert inputs["A"].grad is None
