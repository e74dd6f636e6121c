"""What the public functions refuse, and how the backend is chosen."""

import pytest
import torch

from boldforge.configs import BoldForgeError
from boldforge.kernels import BackendError, available_backends, operators, shifted_conv, shifted_scan, window_index
from tests.kernels.conftest import ragged_index, scan_inputs

BACKENDS = ("auto", "torch", "cpu", "triton", "mamba_ssm")


@pytest.fixture
def no_kernel(monkeypatch):
    """Fail if anything is run: a mistake in the arguments must be found before."""

    def run(*_):
        pytest.fail("a kernel was started")

    monkeypatch.setattr(operators, "scan", run)
    monkeypatch.setattr(operators, "conv", run)


def transposed(tensor):
    return tensor.mT.contiguous().mT


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("u", lambda t: t[:, 1:], r"index lists \d+ tokens, so u must have shape \[b, \d+, D\]; found \[2, \d+, 5\]"),
        ("u", lambda t: t[0], r"u must have shape \[b, L, D\], found \[\d+, 5\]"),
        ("u", lambda t: t[:0], r"u must have shape \[b, L, D\] with no empty axis, found \[0, \d+, 5\]"),
        ("dt", lambda t: t[..., 1:], r"dt must have shape \[2, \d+, 5\], found \[2, \d+, 4\]"),
        ("A", lambda t: t.T, r"A must have shape \[5, N\], found \[3, 5\]"),
        ("A", lambda t: t.repeat(1, 22), r"A must have 1 to 64 states \(second axis\), found \[5, 66\]"),
        ("A", lambda t: t[:, :0], r"A must have shape \[5, N\] with no empty axis, found \[5, 0\]"),
        ("B", lambda t: t[:1], r"B must have shape \[2, \d+, 3\], found \[1, \d+, 3\]"),
        ("C", lambda t: t[..., :2], r"C must have shape \[2, \d+, 3\], found \[2, \d+, 2\]"),
        ("D", lambda t: t[:2], r"D must have shape \[5\], found \[2\]"),
        ("z", lambda t: t[..., :2], r"z must have shape \[2, \d+, 5\], found \[2, \d+, 2\]"),
        ("dt_bias", lambda t: t[:, None], r"dt_bias must have shape \[5\], found \[5, 1\]"),
        ("dt", lambda t: t.long(), "dt must be float32, bfloat16, float16 or float64, found torch.int64"),
        ("B", lambda t: t.tolist(), "B must be a tensor, found list"),
        *((name, lambda t: t.to("meta"), f"{name} must be on cpu like the first argument, found meta")
          for name in ("dt", "A", "B", "C", "D", "z", "dt_bias")),
        ("u", lambda t: t.to("meta"), "dt must be on meta like the first argument, found cpu"),
        *((name, transposed, rf"{name} must be contiguous.*found shape \[2, \d+, \d\] with strides \[\d+, 1, \d+\]")
          for name in ("u", "dt", "B", "C", "z")),
        ("u", lambda t: t[:1].expand(2, -1, -1), r"u must be contiguous.*strides \[0, 5, 1\]"),
        ("z", lambda t: t[..., :1].expand(-1, -1, 5), r"z must be contiguous.*strides \[\d+, 5, 0\]"),
        ("u", lambda t: torch.cat([t, t], dim=1)[:, : t.shape[1]], r"u must be contiguous"),
        ("A", lambda t: t.T.contiguous().T, r"A must be contiguous; found shape \[5, 3\] with strides \[1, 5\]"),
        ("D", lambda t: t.repeat_interleave(2)[::2], r"D must be contiguous; found shape \[5\] with strides \[2\]"),
        ("dt_bias", lambda t: t[:1].expand(5), "dt_bias must be contiguous"),
    ],
)  # fmt: skip
def test_a_scan_argument_that_does_not_fit_is_named_on_every_backend(name, change, message, no_kernel):
    inputs = scan_inputs(ragged_index())
    inputs[name] = change(inputs[name])
    for backend in BACKENDS:
        with pytest.raises(ValueError, match=message):
            shifted_scan(**inputs, index=ragged_index(), backend=backend)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("x", torch.zeros(2, 7, 5), r"index lists \d+ tokens, so x must have shape \[b, \d+, D\]; found \[2, 7, 5\]"),
        ("x", torch.zeros(ragged_index().n_tokens, 5), r"x must have shape \[b, L, D\], found \[\d+, 5\]"),
        ("x", transposed(torch.zeros(2, ragged_index().n_tokens, 5)), r"x must be contiguous.*strides \[\d+, 1, \d+\]"),
        ("weight", torch.zeros(4, 4), r"weight must have shape \[5, K\], found \[4, 4\]"),
        ("weight", torch.zeros(5, 17), r"weight must have 1 to 16 taps \(second axis\), found \[5, 17\]"),
        ("weight", torch.zeros(4, 5).T, r"weight must be contiguous; found shape \[5, 4\] with strides \[1, 5\]"),
        ("weight", torch.zeros(5, 4, device="meta"), "weight must be on cpu like the first argument, found meta"),
        ("bias", torch.zeros(4), r"bias must have shape \[5\], found \[4\]"),
        ("bias", torch.zeros(1).expand(5), "bias must be contiguous"),
        ("bias", torch.zeros(5, device="meta"), "bias must be on cpu like the first argument, found meta"),
        ("index", torch.zeros(5), r"index must be a ScanIndex \(see window_index\), found Tensor"),
    ],
)
def test_a_convolution_argument_that_does_not_fit_is_named_on_every_backend(name, value, message, no_kernel):
    index = ragged_index()
    arguments = {"x": torch.zeros(2, index.n_tokens, 5), "weight": torch.zeros(5, 4), "bias": torch.zeros(5)}
    for backend in BACKENDS:
        with pytest.raises(ValueError, match=message):
            shifted_conv(**{**arguments, "index": index, name: value}, backend=backend)


def test_tensors_without_memory_get_a_shape_and_no_kernel():
    """As models do when they are built on the meta device."""
    index = ragged_index()
    inputs = {name: value.to("meta") for name, value in scan_inputs(index, dtype=torch.bfloat16).items()}
    y = shifted_scan(**inputs, index=index)
    assert (y.shape, y.dtype, y.device.type) == (inputs["u"].shape, torch.bfloat16, "meta")


@pytest.mark.parametrize("sizes", [(1, 5, 3), (2, 1, 1), (1, 1, 1)])
def test_strides_of_axes_with_one_entry_do_not_matter(sizes, backend):
    clips, channels, states = sizes
    index = window_index((7,), (3,), (0,))
    inputs = scan_inputs(index, clips, channels, states, torch.float32)
    wanted = shifted_scan(**inputs, index=index, backend=backend)
    for name, value in inputs.items():
        if value.ndim == 3:
            wide = torch.zeros(clips, index.n_tokens, value.shape[2] + 3)
            wide[..., : value.shape[2]] = value
            inputs[name] = wide[..., : value.shape[2]]
    assert torch.equal(shifted_scan(**inputs, index=index, backend=backend), wanted)


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


def test_more_clips_than_a_launch_can_count_are_refused_on_a_device(no_kernel):
    index = window_index((2,), (2,), (0,))
    inputs = {name: value.to("meta") for name, value in scan_inputs(index).items()}
    clips = {name: value.new_empty(65_536, *value.shape[1:]) for name, value in inputs.items() if value.ndim == 3}
    with pytest.raises(ValueError, match=r"u must hold at most 65535 clips .* found \[65536, 2, .*split the batch"):
        shifted_scan(**(inputs | clips), index=index)
    weight = torch.empty(clips["u"].shape[2], 4, device="meta")
    with pytest.raises(ValueError, match="x must hold at most 65535 clips"):
        shifted_conv(clips["u"], weight, None, index, backend="triton")
