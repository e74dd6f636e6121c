"""Clips of different lengths as one: every clip's result is what it is alone."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from boldforge.kernels import ScanIndex, expand_prompts, pack_indices, shifted_conv, shifted_scan, window_index
from tests.kernels.conftest import SCAN_ARGUMENTS, relative_error, scan_inputs
from tests.kernels.test_index import kept, layouts

BY_TOKEN = ("u", "dt", "B", "C", "z")


@st.composite
def clips(draw, prompts=0):
    """Up to four clips with grids, windows and masks of their own."""
    found = []
    for _ in range(draw(st.integers(1, 4))):
        grid, window, shift = draw(layouts())
        mode, reverse = draw(st.sampled_from(["region", "wrap"])), draw(st.booleans())
        keep = kept(draw(st.integers(0, 999)), grid)
        found.append(window_index(grid, window, shift, mode, keep, reverse, prompts=prompts))
    return found


@given(st.integers(0, 2).flatmap(clips))
def test_a_pack_is_its_clips_side_by_side(indices):
    packed, sizes = pack_indices(indices)
    assert sizes == tuple(index.n_clip_tokens for index in indices)
    assert packed.prompts == indices[0].prompts
    assert packed.n_clip_tokens == sum(sizes)
    assert packed.tokens.sort().values.tolist() == list(range(packed.n_tokens))
    lengths = [length for index in indices for length in index.cu_seqlens.diff().tolist()]
    assert packed.cu_seqlens.diff().tolist() == lengths
    # Numbers that say where each token of the packed axis came from: clip * 1000 + its number there.
    own = [1000 * clip + torch.arange(size) for clip, size in enumerate(sizes)]
    added = [1000 * clip + torch.arange(size, indices[clip].n_tokens) for clip, size in enumerate(sizes)]
    visited = torch.cat(own + added)[packed.tokens]
    wanted = torch.cat([1000 * clip + index.tokens for clip, index in enumerate(indices)])
    assert torch.equal(visited, wanted)
    assert torch.equal(packed.rows < 0, torch.cat([index.rows < 0 for index in indices]))


def gradients(inputs, index, backend, weight):
    tensors = {name: value.clone().requires_grad_() for name, value in inputs.items()}
    y = shifted_scan(**tensors, index=index, backend=backend)
    y = shifted_conv(y, weight, None, index, backend=backend)
    y.square().sum().backward()
    return {"y": y.detach()} | {name: tensor.grad for name, tensor in tensors.items()}


def check_against_each_alone(indices, backend):
    packed, sizes = pack_indices(indices)
    alone = [scan_inputs(index, 2, 5, 3, torch.float32, seed) for seed, index in enumerate(indices)]
    shared = {name: alone[0][name] for name in SCAN_ARGUMENTS if name not in BY_TOKEN}
    alone = [inputs | shared for inputs in alone]
    together = shared | {name: torch.cat([inputs[name] for inputs in alone], dim=1) for name in BY_TOKEN}
    weight = torch.randn(5, 4, generator=torch.Generator().manual_seed(9))
    found = gradients(together, packed, backend, weight)
    wanted = [gradients(inputs, index, backend, weight) for inputs, index in zip(alone, indices, strict=True)]
    for name in ("y", *BY_TOKEN):
        for part, one in zip(found[name].split(sizes, dim=1), wanted, strict=True):
            assert relative_error(part, one[name]) < 2e-6, name
    for name in shared:
        assert relative_error(found[name], sum(one[name] for one in wanted)) < 2e-6, name


@settings(max_examples=15, deadline=None)
@given(indices=clips())
def test_packed_clips_scan_like_each_alone_in_torch(indices):
    check_against_each_alone(indices, "torch")


def test_packed_clips_scan_like_each_alone_on_every_backend(backend):
    keep = torch.arange(40).view(4, 2, 5) % 3 != 1
    short = window_index((4, 2, 5), (2, 2, 3), (1, 1, 1), keep=keep)
    long = window_index((3, 3, 30), (2, 2, 30), (0, 1, 0), reverse=True)
    check_against_each_alone([short, long, short], backend)


def test_the_same_clip_packed_is_a_batch():
    index = window_index((4, 2, 5), (2, 2, 3), (1, 1, 1))
    packed, sizes = pack_indices([index] * 3)
    inputs = scan_inputs(index, 3, dtype=torch.float64)
    flat = {name: value.reshape(1, -1, value.shape[2]) if name in BY_TOKEN else value for name, value in inputs.items()}
    y = torch.stack(shifted_scan(**flat, index=packed)[0].split(sizes))
    assert relative_error(y, shifted_scan(**inputs, index=index)) < 1e-12


def test_prompts_of_a_pack_are_expanded_once_for_all_clips():
    indices = [window_index((4, 3), (2, 3), (1, 0), prompts=2), window_index((5,), (2,), (0,), prompts=2)]
    packed, sizes = pack_indices(indices)
    xs = [torch.randn(1, index.n_clip_tokens, 3) for index in indices]
    prompts, weight = torch.randn(2, 3), torch.randn(3, 4)
    together = shifted_conv(expand_prompts(torch.cat(xs, 1), prompts, packed), weight, None, packed)
    for part, x, index in zip(together[:, : packed.n_clip_tokens].split(sizes, 1), xs, indices, strict=True):
        alone = shifted_conv(expand_prompts(x, prompts, index), weight, None, index)
        assert relative_error(part, alone[:, : index.n_clip_tokens]) < 1e-6


def test_indices_that_do_not_fit_each_other_are_refused():
    with pytest.raises(ValueError, match="at least one ScanIndex, found none"):
        pack_indices([])
    plain, prompted = window_index((4,), (2,), (0,)), window_index((4,), (2,), (0,), prompts=1)
    with pytest.raises(ValueError, match=r"indices\[0\] has cpu and 0, indices\[1\] has cpu and 1"):
        pack_indices([plain, prompted])
    huge = ScanIndex(
        torch.empty(2**30, dtype=torch.int32, device="meta"), torch.empty(2, dtype=torch.int32, device="meta"), 2**30
    )
    with pytest.raises(ValueError, match=f"fewer than {2**31} tokens together, found {2**31}"):
        pack_indices([huge, huge])
