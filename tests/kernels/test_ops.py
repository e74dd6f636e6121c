"""What the public functions refuse, and how the backend is chosen."""

import pytest
import torch

from boldforge.configs import BoldForgeError
from boldforge.kernels import BackendError, available_backends, shifted_conv, shifted_scan
from tests.kernels.conftest import ragged_index, scan_inputs


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("u", lambda t: t[:, 1:], r"u must have shape \[any, \d+, any\], found \[2, \d+, 5\]"),
        ("u", lambda t: t[0], "u must have shape"),
        ("u", lambda t: t[:0], "u must have shape"),
        ("dt", lambda t: t[..., 1:], "dt must have shape"),
        ("A", lambda t: t.T, "A must have shape"),
        ("A", lambda t: t.expand(5, 3).repeat(1, 22), "1 to 64 states"),
        ("B", lambda t: t[:1], "B must have shape"),
        ("C", lambda t: t[..., :2], "C must have shape"),
        ("D", lambda t: t[:2], "D must have shape"),
        ("z", lambda t: t[..., :2], "z must have shape"),
        ("dt_bias", lambda t: t[:, None], "dt_bias must have shape"),
        ("dt", lambda t: t.long(), "dt must be a floating-point tensor, found torch.int64"),
        ("C", lambda t: t.to("meta"), "C must be on cpu like the first argument, found meta"),
    ],
)
def test_a_scan_argument_that_does_not_fit_is_named(name, change, message):
    inputs = scan_inputs(ragged_index())
    inputs[name] = change(inputs[name])
    with pytest.raises(ValueError, match=message):
        shifted_scan(**inputs, index=ragged_index())


@pytest.mark.parametrize(
    ("weight", "bias", "message"),
    [((4, 4), (5,), "weight must have shape"), ((5, 17), (5,), "1 to 16 taps"), ((5, 4), (4,), "bias must have shape")],
)
def test_a_convolution_argument_that_does_not_fit_is_named(weight, bias, message):
    index = ragged_index()
    with pytest.raises(ValueError, match=message):
        shifted_conv(torch.zeros(2, index.n_tokens, 5), torch.zeros(weight), torch.zeros(bias), index)


def test_auto_on_the_cpu_is_torch():
    inputs = scan_inputs(ragged_index())
    y = shifted_scan(**inputs, index=ragged_index())
    assert torch.equal(y, shifted_scan(**inputs, index=ragged_index(), backend="torch"))
    assert available_backends()["torch"] == ""


def test_an_unknown_backend_says_which_there_are():
    with pytest.raises(BackendError, match=r'no scan backend named "cudnn".*torch') as caught:
        shifted_scan(**scan_inputs(ragged_index()), index=ragged_index(), backend="cudnn")
    assert isinstance(caught.value, BoldForgeError)


def test_a_backend_that_cannot_run_says_why_and_what_can(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert available_backends()["triton"] == "no CUDA device was found"
    inputs = scan_inputs(ragged_index(), dtype=torch.float32)
    with pytest.raises(BackendError, match=r'"triton" cannot run here: no CUDA device was found.*torch'):
        shifted_scan(**inputs, index=ragged_index(), backend="triton")


def test_triton_is_not_given_tensors_it_cannot_take(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(BackendError, match="on cpu, not on a CUDA device"):
        shifted_scan(**scan_inputs(ragged_index(), dtype=torch.float32), index=ragged_index(), backend="triton")
    with pytest.raises(BackendError, match="no float64"):
        shifted_scan(**scan_inputs(ragged_index()), index=ragged_index(), backend="triton")
