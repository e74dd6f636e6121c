import numpy as np
import pytest
import torch

from boldforge.data_shards import brain_mask, get_grid, load_atlas
from boldforge.pretrain import MaskConfig, MaskSampler, RegionTokens, TokenGrid, region_tokens


@pytest.fixture(scope="module")
def grid_4mm() -> TokenGrid:
    return TokenGrid(brain_mask(get_grid("mni4mm")), (3, 3, 3), frames=2, n_stages=1)


@pytest.fixture(scope="module")
def regions(grid_4mm: TokenGrid) -> RegionTokens:
    return region_tokens(load_atlas("aal3"), get_grid("mni4mm"), grid_4mm)


@pytest.mark.parametrize("ratio", [0.1, 0.5, 0.9])
def test_every_strategy_hides_exactly_the_same_number_of_tokens(
    grid_4mm: TokenGrid, regions: RegionTokens, ratio: float
) -> None:
    budgets = set()
    for strategy in ("random", "tube", "region"):
        sampler = MaskSampler(grid_4mm, MaskConfig(strategy=strategy, ratio=ratio), regions)
        masks = sampler.sample([(7, number) for number in range(3)])
        budgets |= set(masks.sum(dim=1).tolist())
    assert len(budgets) == 1
    assert budgets.pop() == pytest.approx(ratio * 2 * grid_4mm.stages[0].n_tokens, rel=0.01)


def test_a_mask_depends_on_its_key_alone(grid_4mm: TokenGrid, regions: RegionTokens) -> None:
    sampler = MaskSampler(grid_4mm, MaskConfig(strategy="region"), regions)
    together = sampler.sample([(1, 2), (3, 4)])
    assert torch.equal(together[1], sampler.sample([(3, 4)])[0])
    assert not torch.equal(together[0], together[1])


def test_regions_are_hidden_whole_over_all_frames(grid_4mm: TokenGrid, regions: RegionTokens) -> None:
    sampler = MaskSampler(grid_4mm, MaskConfig(strategy="region", ratio=0.3), regions)
    hidden = sampler.sample([(0, 0)])[0].view(-1, grid_4mm.frames).numpy()
    assert (hidden == hidden[:, :1]).all()
    touched = regions.member[hidden[:, 0]].any(axis=0)
    whole = ~regions.member[~hidden[:, 0]].any(axis=0)
    assert whole.sum() > 10
    # Hidden tokens come from whole regions; only the trimmed last one, and neighbours sharing tokens, are in part.
    explained = regions.member[:, whole].any(axis=1)[hidden[:, 0]].mean()
    assert explained > 0.8, f"{touched.sum()} regions touched, {whole.sum()} whole"


def test_no_region_is_too_small_to_be_hidden(regions: RegionTokens) -> None:
    assert len(regions.ids) == 166
    assert not {35, 36, 81, 82} & set(regions.ids)
    assert regions.member.any(axis=0).all()


def test_shares_agree_with_counting_millimetres(grid_4mm: TokenGrid, regions: RegionTokens) -> None:
    atlas, grid = load_atlas("aal3"), get_grid("mni4mm")
    token = 200
    low = grid.affine[:3, 3] + 4.0 * (3 * grid_4mm.stages[0].coordinates[token] - 0.5)
    counts = np.zeros(len(regions.ids))
    for point in np.ndindex(12, 12, 12):
        voxel = np.linalg.inv(atlas.affine) @ [*(low + np.array(point)), 1.0]
        label = atlas.volume[tuple(voxel[:3].round().astype(int))]
        if label:
            counts[regions.ids.index(int(label))] += 1
    # The atlas's 1 mm lattice has points on the token's walls; the lower wall belongs to the token, the upper does not.
    np.testing.assert_allclose(regions.share[token], counts / 12**3, atol=1e-6)
    assert counts.sum() > 500


def test_left_regions_hide_left_tokens(grid_4mm: TokenGrid, regions: RegionTokens) -> None:
    x_mm = get_grid("mni4mm").affine[0, 3] + 4.0 * (3 * grid_4mm.stages[0].coordinates[:, 0] + 1)
    for side, sign in (("_L", -1), ("_R", 1)):
        columns = [number for number, name in enumerate(regions.names) if name.endswith(side)]
        assert len(columns) > 70
        assert all(sign * np.average(x_mm, weights=regions.share[:, column]) > 0 for column in columns)
