"""Walking a path backwards, beside the path that is laid out backwards from the start."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from boldforge.kernels import pack_indices, reverse_index, window_index

AXIS = st.tuples(st.integers(1, 6), st.integers(1, 4), st.integers(0, 3))


@settings(max_examples=60, deadline=None)
@given(
    axes=st.tuples(AXIS, AXIS, AXIS),
    mode=st.sampled_from(["region", "wrap"]),
    prompts=st.integers(0, 3),
    seed=st.integers(0, 100),
)
def test_it_is_the_path_laid_out_backwards(axes, mode, prompts, seed):
    grid, window, shift = zip(*axes, strict=True)
    shift = [s % w for s, w in zip(shift, window, strict=True)]
    keep = torch.rand(grid, generator=torch.Generator().manual_seed(seed)) < 0.6
    keep[0, 0, 0] = True
    forward, backward = (
        window_index(grid, window, shift, mode, keep, reverse=reverse, prompts=prompts) for reverse in (False, True)
    )
    found = reverse_index(forward)
    assert torch.equal(found.rows, backward.rows) and torch.equal(found.cu_seqlens, backward.cu_seqlens)
    assert found.prompts == prompts
    again = reverse_index(found)
    assert torch.equal(again.rows, forward.rows) and torch.equal(again.cu_seqlens, forward.cu_seqlens)


def test_packed_clips_are_turned_round_one_by_one():
    indices = [window_index((5, 4), (2, 2), (1, 1)), window_index((3, 3), (2, 2), (0, 0))]
    packed, _ = pack_indices(indices)
    wanted, _ = pack_indices([reverse_index(index) for index in indices])
    found = reverse_index(packed)
    assert torch.equal(found.rows, wanted.rows) and torch.equal(found.cu_seqlens, wanted.cu_seqlens)


def test_it_is_made_once():
    index = window_index((5, 4), (2, 2), (1, 1))
    assert reverse_index(index) is reverse_index(index)


@pytest.mark.parametrize("prompts", [0, 2])
def test_an_index_without_content_keeps_its_shape(prompts):
    index = window_index((5, 4), (2, 2), (1, 1), prompts=prompts).to("meta")
    assert reverse_index(index).rows.shape == index.rows.shape
