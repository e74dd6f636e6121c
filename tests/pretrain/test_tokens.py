import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from boldforge.pretrain import TokenGrid, gather_patches, scatter_patches


def masks() -> st.SearchStrategy[np.ndarray]:
    shapes = st.tuples(*[st.integers(2, 9)] * 3)
    return shapes.flatmap(lambda shape: arrays(bool, shape)).filter(lambda mask: mask.any())


@settings(max_examples=60, deadline=None)
@given(mask=masks(), edge=st.integers(1, 3))
def test_every_brain_voxel_sits_in_exactly_one_patch(mask: np.ndarray, edge: int) -> None:
    grid = TokenGrid(mask, (edge,) * 3, frames=2, n_stages=2)
    columns = grid.patch_voxels[grid.patch_voxels < grid.n_voxels]
    assert sorted(columns) == list(range(grid.n_voxels))
    assert (grid.patch_voxels < grid.n_voxels).any(axis=1).all(), "a token without brain"


@settings(max_examples=60, deadline=None)
@given(mask=masks())
def test_merging_and_expanding_are_inverse(mask: np.ndarray) -> None:
    grid = TokenGrid(mask, (1, 1, 1), frames=1, n_stages=3)
    for level in range(2):
        fine = grid.stages[level].n_tokens
        children, parent, slot = grid.children[level], grid.parent[level], grid.slot[level]
        assert (children[parent, slot] == np.arange(fine)).all()
        assert (children < fine).sum() == fine


def test_patches_hold_the_voxels_of_their_place(small_mask: np.ndarray) -> None:
    grid = TokenGrid(small_mask, (2, 2, 2), frames=1, n_stages=1)
    volume = np.random.default_rng(0).normal(size=small_mask.shape).astype(np.float32)
    patches = gather_patches(torch.from_numpy(volume[small_mask])[None, None], torch.from_numpy(grid.patch_voxels))
    zeroed = np.pad(np.where(small_mask, volume, 0), ((0, 1), (0, 1), (0, 1)))
    for token, (x, y, z) in enumerate(grid.stages[0].coordinates):
        block = zeroed[2 * x : 2 * x + 2, 2 * y : 2 * y + 2, 2 * z : 2 * z + 2]
        assert np.array_equal(patches[0, token].numpy(), block.ravel())


def test_scattering_undoes_gathering_with_time_fastest(small_grid: TokenGrid) -> None:
    table = torch.from_numpy(small_grid.patch_voxels)
    values = torch.randn(2, small_grid.frames, small_grid.n_voxels, generator=torch.Generator().manual_seed(0))
    patches = gather_patches(values, table)
    assert torch.equal(scatter_patches(patches, table, small_grid.n_voxels), values)
    second_token_last_frame = patches[1, 1 * small_grid.frames + small_grid.frames - 1]
    places = table[1] < small_grid.n_voxels
    assert torch.equal(second_token_last_frame[places], values[1, -1, table[1][places]])


def test_a_full_mask_gives_the_dense_grid() -> None:
    grid = TokenGrid(np.ones((8, 8, 8), bool), (2, 2, 2), frames=1, n_stages=2)
    assert [stage.n_tokens for stage in grid.stages] == [64, 8]
