"""A path over kept tokens is the one that would have been built for each clip's mask alone."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from boldforge.kernels import keep_tokens, pack_indices, window_index
from tests.kernels.test_index import kept, layouts


@given(
    layout=layouts(),
    mode=st.sampled_from(["region", "wrap"]),
    reverse=st.booleans(),
    prompts=st.integers(0, 2),
    brain=st.integers(0, 99),
    seeds=st.lists(st.integers(0, 99), min_size=1, max_size=4),
)
def test_the_tables_are_those_of_each_clip_packed(layout, mode, reverse, prompts, brain, seeds):
    grid, window, shift = layout
    exists = kept(brain, grid)
    masks = [kept(seed, grid) & exists for seed in seeds]
    masks = [mask if mask.any() else exists for mask in masks]
    alone = [window_index(grid, window, shift, mode, mask, reverse, prompts=prompts) for mask in masks]
    wanted, _ = pack_indices(alone)
    whole = window_index(grid, window, shift, mode, exists, reverse)
    found = keep_tokens(whole, torch.stack([mask[exists] for mask in masks]), prompts)
    assert torch.equal(found.rows, wanted.rows)
    assert torch.equal(found.cu_seqlens, wanted.cu_seqlens)
    assert found.prompts == wanted.prompts and found.n_clip_tokens == wanted.n_clip_tokens


def test_what_does_not_fit_is_refused():
    index = window_index((4, 3), (2, 3), (1, 0))
    with pytest.raises(ValueError, match=r"keep must be bool \[any, 12\], found torch.bool \[2, 11\]"):
        keep_tokens(index, torch.ones(2, 11, dtype=torch.bool))
    with pytest.raises(ValueError, match="at least one must be kept"):
        keep_tokens(index, torch.zeros(2, 12, dtype=torch.bool))
    with pytest.raises(ValueError, match="index must have no prompts, found 2"):
        keep_tokens(window_index((4,), (2,), (0,), prompts=2), torch.ones(1, 4, dtype=torch.bool))
