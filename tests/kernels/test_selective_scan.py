"""mamba-ssm's signature: its formula in its layout, every form of B and C, steps of any sign, and what is refused."""

import pytest
import torch
from torch.nn.functional import silu, softplus

from boldforge.kernels import selective_scan, selective_scan_fn
from tests.kernels.conftest import relative_error

FORMS = {"constant": "DN", "one group": "BNL", "grouped": "BGNL"}


def inputs(B="one group", C="one group", groups=(3, 3), batch=2, channels=6, length=11, states=3):
    generator = torch.Generator().manual_seed(0)
    sizes = {"B": batch, "D": channels, "L": length, "N": states}
    axes = {
        "u": "BDL",
        "delta": "BDL",
        "A": "DN",
        "B": FORMS[B],
        "C": FORMS[C],
        "D": "D",
        "z": "BDL",
        "delta_bias": "D",
    }
    found = {}
    for name, letters in axes.items():
        shape = [groups[name == "C"] if letter == "G" else sizes[letter] for letter in letters]
        found[name] = torch.randn(shape, generator=generator, dtype=torch.float64)
    return found | {"A": -found["A"].exp()}


def formula(u, delta, A, B, C, D, z, delta_bias, delta_softplus):
    """One token after another, every weight spread out to [batch, channel, state, token]."""
    delta = delta + delta_bias[:, None]
    delta = softplus(delta) if delta_softplus else delta

    def spread(weights):
        if weights.ndim == 2:
            return weights[None, :, :, None].expand(u.shape[0], -1, -1, u.shape[2])
        weights = weights if weights.ndim == 4 else weights[:, None]
        return weights.repeat_interleave(u.shape[1] // weights.shape[1], dim=1)

    B, C = spread(B), spread(C)
    h, outputs = u.new_zeros(*u.shape[:2], A.shape[1]), []
    for t in range(u.shape[2]):
        h = torch.exp(delta[..., t, None] * A) * h + (delta * u)[..., t, None] * B[..., t]
        outputs.append((h * C[..., t]).sum(-1))
    return (torch.stack(outputs, -1) + D[:, None] * u) * silu(z), h


def everything(function, given, **options):
    """The output, the last state, and the gradients through both."""
    leaves = {name: value.clone().requires_grad_() for name, value in given.items()}
    y, state = function(**leaves, **options)
    (y.double().square().sum() + state.double().square().sum()).backward()
    gradients = {f"gradient of {name}": leaf.grad for name, leaf in leaves.items()}
    return {"y": y.detach(), "last state": state.detach()} | gradients


def assert_same(given, delta_softplus, tolerance=1e-5, **options):
    wanted = everything(formula, {k: v.double() for k, v in given.items()}, delta_softplus=delta_softplus)
    found = everything(selective_scan_fn, given, delta_softplus=delta_softplus, return_last_state=True, **options)
    errors = {name: relative_error(found[name], wanted[name]) for name in wanted}
    assert all(error < tolerance for error in errors.values()), errors
    return found


@pytest.mark.parametrize("B", FORMS)
@pytest.mark.parametrize("C", FORMS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_every_form_of_B_and_C(B, C, dtype):
    given = {name: value.to(dtype) for name, value in inputs(B, C).items()}
    found = assert_same(given, True, 1e-12 if dtype == torch.float64 else 1e-5)
    assert {value.dtype for value in found.values()} == {dtype}


def test_B_and_C_may_have_different_groups():
    assert_same(inputs("grouped", "grouped", groups=(2, 3)), True, 1e-12)


@pytest.mark.parametrize("B", FORMS)
@pytest.mark.parametrize("steps", ["positive", "any sign", "zero"])
def test_steps_without_softplus(B, steps):
    given = inputs(B)
    if steps == "positive":
        given |= {"delta": given["delta"].exp(), "delta_bias": given["delta_bias"].abs()}
    if steps == "zero":
        given["delta"] = (given["delta"] - given["delta_bias"][:, None]).clamp_min(0) - given["delta_bias"][:, None]
        assert (given["delta"] + given["delta_bias"][:, None] == 0).any()
    assert_same(given, False, 1e-10)
    assert_same({name: value.float() for name, value in given.items()}, False)


def test_half_precision_inputs_keep_a_float32_state():
    given = {name: value.bfloat16() for name, value in inputs(channels=16, length=64).items()}
    found = assert_same(given, True, 1e-2)
    assert found["y"].dtype == torch.bfloat16
    assert found["last state"].dtype == torch.float32


def test_optional_arguments_may_be_missing_and_the_type_is_that_of_u():
    given = {name: value.bfloat16() for name, value in inputs().items()}
    y = selective_scan_fn(*(given[name] for name in ("u", "delta", "A", "B", "C")), delta_softplus=True)
    assert y.dtype == torch.bfloat16
    assert y.shape == (2, 6, 11)
    nothing = torch.zeros(6, dtype=torch.float64)
    wanted, _ = formula(
        **{name: value.double() for name, value in given.items()} | {"D": nothing, "delta_bias": nothing},
        delta_softplus=True,
    )
    assert relative_error(y, wanted / silu(given["z"].double())) < 5e-3


@pytest.mark.parametrize("delta_softplus", [True, False])
@pytest.mark.parametrize("B", ["constant", "grouped"])
def test_compiling_breaks_no_graph(B, delta_softplus):
    given = {name: value.float() for name, value in inputs(B).items()}
    torch.compiler.reset()
    compiled = torch.compile(selective_scan_fn, backend="aot_eager", fullgraph=True)
    options = {"delta_softplus": delta_softplus, "return_last_state": True}
    found, wanted = (everything(function, given, **options) for function in (compiled, selective_scan_fn))
    assert all(relative_error(found[name], wanted[name]) < 1e-6 for name in wanted)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"u": torch.zeros(6, 11)}, r"u must have shape \[B, D, L\], found \[6, 11\]"),
        ({"delta": torch.zeros(2, 11, 6)}, r"delta must have shape \[2, 6, 11\], found \[2, 11, 6\]"),
        ({"z": torch.zeros(2, 6, 12)}, r"z must have shape \[2, 6, 11\], found \[2, 6, 12\]"),
        ({"B": torch.zeros(6)}, r"B must have shape \[D, N\], \[B, N, L\] or \[B, G, N, L\], found \[6\]"),
        ({"B": torch.zeros(3, 6)}, r"B must have shape \[6, 3\], found \[3, 6\]"),
        ({"C": torch.zeros(2, 4, 3, 11)}, r"divides the 6 channels of u, found \[2, 4, 3, 11\]"),
        ({"C": torch.zeros(2, 3, 12)}, r"C must have shape \[2, 3, 11\]"),
        ({"D": torch.zeros(5)}, r"D must have shape \[6\], found \[5\]"),
        ({"delta_bias": torch.zeros(6, 1)}, r"delta_bias must have shape \[6\]"),
        ({"A": torch.zeros(6, 65)}, "1 to 64 states"),
        ({"A": torch.zeros(6, 3, dtype=torch.complex64)}, "A must be real, found torch.complex64"),
        ({"B": torch.zeros(2, 3, 11, dtype=torch.complex64)}, "B must be real"),
        ({"delta": torch.zeros(2, 6, 11, dtype=torch.int64)}, "delta must be float32"),
        ({"C": torch.zeros(2, 3, 11, device="meta")}, "C must be on cpu like the first argument, found meta"),
    ],
)
def test_what_does_not_fit_is_named(change, message):
    with pytest.raises(ValueError, match=message):
        selective_scan_fn(**inputs() | change)


def test_many_lengths_keep_few_paths():
    whole = inputs(length=25)
    for length in (*range(1, 25), 3):
        short = {name: t[..., :length].contiguous() if t.shape[-1] == 25 else t for name, t in whole.items()}
        torch.testing.assert_close(selective_scan_fn(**short), selective_scan_fn(**whole)[..., :length])
    assert len(selective_scan._paths) <= 16
