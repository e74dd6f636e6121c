import numpy as np
import pytest

from boldforge.data_shards import GridError, brain_mask, get_grid, mask_centres, mask_hash


@pytest.mark.parametrize(
    ("name", "first", "last"), [("mni2mm", (-96, -112, -90), (94, 78, 100)), ("mni4mm", (-95, -111, -89), (93, 77, 99))]
)
def test_grid_spans_the_contracts_cube(name, first, last):
    grid = get_grid(name)
    corner = np.array([*grid.shape, 2]) - 1
    np.testing.assert_array_equal(grid.affine[:3, 3], first)
    np.testing.assert_array_equal((grid.affine @ corner)[:3], last)


def test_unknown_grid_lists_the_valid_ones():
    with pytest.raises(GridError, match=r"'mni3mm'.*mni2mm, mni4mm"):
        get_grid("mni3mm")


def test_2mm_mask_is_the_templates_mask():
    mask = brain_mask(get_grid("mni2mm"))
    assert mask.sum() == 235_375
    assert not mask.flags.writeable


def test_4mm_mask_is_half_of_the_2mm_points():
    fine = brain_mask(get_grid("mni2mm"))
    counts = fine.reshape(48, 2, 48, 2, 48, 2).sum(axis=(1, 3, 5))
    np.testing.assert_array_equal(brain_mask(get_grid("mni4mm")), counts >= 4)


def test_mask_centres_follow_the_order_of_boolean_indexing():
    grid = get_grid("mni4mm")
    mask = brain_mask(grid)
    centres = mask_centres(grid, mask)
    x = np.broadcast_to(np.arange(-95, 96, 4)[:, None, None], grid.shape)
    np.testing.assert_array_equal(centres[:, 0], x[mask])
    assert abs(centres[:, 0].mean()) < 2  # the brain straddles the midline


def test_mask_hash_sees_one_voxel():
    mask = brain_mask(get_grid("mni4mm"))
    other = mask.copy()
    other[24, 24, 24] ^= True
    assert mask_hash(mask) != mask_hash(other)
    assert mask_hash(mask) == mask_hash(np.asfortranarray(mask))
