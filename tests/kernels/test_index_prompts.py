"""Prompts: the scan through the index is the scan of [prompts, stretch], one stretch at a time."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from boldforge.kernels import (
    conv_oracle,
    expand_prompts,
    scan_oracle,
    shifted_conv,
    shifted_scan,
    strip_prompts,
    window_index,
)
from tests.kernels.conftest import SCAN_ARGUMENTS, ragged_index, relative_error, scan_inputs
from tests.kernels.test_index import kept, layouts

BY_TOKEN = ("u", "dt", "B", "C", "z")


def with_prompts(index, seed=1, dtype=torch.float64):
    """Arguments of the scan for the clip's own tokens, for P prompts, and both expanded along the index."""
    plain = window_index((index.n_clip_tokens,), (index.n_clip_tokens,), (0,))
    own = scan_inputs(plain, dtype=dtype)
    added = scan_inputs(window_index((index.prompts,), (index.prompts,), (0,)), 1, dtype=dtype, seed=seed)
    expanded = {
        name: expand_prompts(value, added[name][0], index) if name in BY_TOKEN else value for name, value in own.items()
    }
    return own, added, expanded


def one_stretch(own, added, tokens):
    """The scan of the prompts followed by these tokens, prompts stripped: what TPT does to a window."""
    inputs = {
        name: torch.cat([added[name].expand(len(value), -1, -1), value[:, tokens]], 1) if name in BY_TOKEN else value
        for name, value in own.items()
    }
    length = inputs["u"].shape[1]
    line = window_index((length,), (length,), (0,))
    return scan_oracle(**inputs, index=line)[:, -len(tokens) :], inputs["u"], line


@settings(max_examples=25, deadline=None)
@given(layouts(), st.integers(0, 999), st.sampled_from(["region", "wrap"]), st.booleans(), st.integers(1, 3))
def test_a_prompted_scan_is_a_scan_of_every_stretch_with_its_prompts(layout, seed, mode, reverse, prompts):
    grid, window, shift = layout
    keep = kept(seed, grid)
    plain = window_index(grid, window, shift, mode, keep, reverse)
    index = window_index(grid, window, shift, mode, keep, reverse, prompts=prompts)
    own, added, expanded = with_prompts(index)
    y = strip_prompts(shifted_scan(**expanded, index=index, backend="torch"), index)
    weight = torch.randn(5, 4, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    x = strip_prompts(shifted_conv(expanded["u"], weight, None, index, backend="torch"), index)
    for tokens in plain.tokens.split(plain.segments[1].tolist()):
        wanted, u, line = one_stretch(own, added, tokens)
        assert relative_error(y[:, tokens], wanted) < 1e-12
        assert relative_error(x[:, tokens], conv_oracle(u, weight, None, line)[:, prompts:]) < 1e-12


def test_every_backend_scans_prompts(backend):
    index = ragged_index(prompts=3)
    _, _, expanded = with_prompts(index, dtype=torch.float32)
    y = shifted_scan(**expanded, index=index, backend=backend)
    assert relative_error(y, scan_oracle(**expanded, index=index)) < 1e-6


def test_the_gradient_of_a_prompt_is_the_sum_over_its_copies():
    index = ragged_index(prompts=2)
    own, added, expanded = with_prompts(index)
    prompts = {name: added[name][0].clone().requires_grad_() for name in BY_TOKEN}
    whole = {name: expanded[name].clone().requires_grad_() for name in SCAN_ARGUMENTS}
    through = {
        name: expand_prompts(own[name], prompts[name], index) if name in prompts else expanded[name] for name in own
    }
    strip_prompts(shifted_scan(**through, index=index), index).square().sum().backward()
    strip_prompts(scan_oracle(**whole, index=index), index).square().sum().backward()
    for name in BY_TOKEN:
        wanted = whole[name].grad[:, index.n_clip_tokens :].unflatten(1, (-1, 2)).sum((0, 1))
        assert relative_error(prompts[name].grad, wanted) < 1e-12
    assert prompts["u"].grad.abs().min() > 0


def test_without_prompts_nothing_is_copied():
    index = ragged_index()
    x = torch.randn(2, index.n_tokens, 3)
    assert expand_prompts(x, torch.empty(0, 3), index) is x
    assert torch.equal(strip_prompts(x, index), x)


def test_a_compiled_model_needs_no_break_to_expand_prompts():
    index = ragged_index(prompts=2)
    x, prompts = torch.randn(2, index.n_clip_tokens, 3), torch.randn(2, 3)

    def there_and_back(x, prompts):
        return strip_prompts(expand_prompts(x, prompts, index) * 2, index)

    compiled = torch.compile(there_and_back, fullgraph=True, backend="eager")
    assert torch.equal(compiled(x, prompts), x * 2)


@pytest.mark.parametrize(
    ("x", "prompts", "message"),
    [
        ((2, 7, 3), (2, 3), r"x must have shape \[any, \d+, any\], found \[2, 7, 3\]"),
        ((2, None, 3), (3, 3), r"prompts must have shape \[2, 3\], found \[3, 3\]"),
        ((2, None, 3), (2, 4), r"prompts must have shape \[2, 3\], found \[2, 4\]"),
    ],
)
def test_shapes_that_do_not_fit_are_named(x, prompts, message):
    index = ragged_index(prompts=2)
    x = torch.zeros([index.n_clip_tokens if size is None else size for size in x])
    with pytest.raises(ValueError, match=message):
        expand_prompts(x, torch.zeros(prompts), index)
    with pytest.raises(ValueError, match=rf"y must have shape \[any, {index.n_tokens}, any\]"):
        strip_prompts(torch.zeros(2, 7, 3), index)
