"""NeuroSTORM's mask modes, each with each time option, on its own grid and on brain-only tokens."""

from itertools import product

import numpy as np
import pytest
import torch

from boldforge.configs import ConfigError
from boldforge.data_shards import Atlas, AtlasError, get_grid, load_atlas
from boldforge.pretrain import MaskConfig, MaskSampler, TokenGrid, region_tokens

STRATEGIES, TIMES = ("random", "tube", "window", "atlas"), ("random", "tube")
FRAMES = 8


@pytest.fixture(scope="module")
def dense() -> TokenGrid:
    return TokenGrid(np.ones((96, 96, 96), dtype=bool), (6, 6, 6), FRAMES, 1)


@pytest.fixture(scope="module")
def regions(dense: TokenGrid):
    return region_tokens(load_atlas("aal3"), get_grid("neurostorm"), dense)


def draw(grid: TokenGrid, regions, strategy: str, time: str, ratio: float = 0.5, key: int = 0) -> np.ndarray:
    """bool [x, y, z, t] on the dense grid."""
    sampler = MaskSampler(grid, MaskConfig(strategy=strategy, time=time, ratio=ratio), regions)
    hidden = sampler.sample([(key,)])[0].numpy()
    assert sampler.n_hidden is None or hidden.sum() == sampler.n_hidden
    return hidden.reshape(*grid.stages[0].grid, grid.frames)


def windows(hidden: np.ndarray) -> np.ndarray:
    """[windows, 256] of a mask on 16³ × T tokens."""
    cut = hidden.reshape(4, 4, 4, 4, 4, 4, -1, 4)
    return cut.transpose(0, 2, 4, 6, 1, 3, 5, 7).reshape(-1, 256)


@pytest.mark.parametrize(("strategy", "time"), list(product(STRATEGIES, TIMES)))
def test_every_mode_with_every_time_option_hides_what_it_says(dense, regions, strategy: str, time: str) -> None:
    hidden = draw(dense, regions, strategy, time)
    assert 0 < hidden.sum() < hidden.size
    if strategy != "atlas":
        assert hidden.mean() == 0.5
    always = (hidden == hidden[..., :1]).all()
    assert always == (time == "tube" or strategy in ("tube", "atlas"))
    if strategy == "window":
        share = windows(hidden).mean(axis=1)
        assert set(share.tolist()) == {0.0, 1.0}
    again = draw(dense, regions, strategy, time)
    other = draw(dense, regions, strategy, time, key=1)
    assert np.array_equal(hidden, again) and not np.array_equal(hidden, other)


def test_windows_hide_the_published_number_at_the_published_ratios() -> None:
    grid = TokenGrid(np.ones((96, 96, 96), dtype=bool), (6, 6, 6), 20, 1)
    for ratio, more in ((0.5, 0), (0.75, 0), (0.8, 4)):  # 80 % of 4,096 patches are rounded up: four tokens more
        count = windows(draw(grid, None, "window", "random", ratio)).sum(axis=1)
        assert (count == 256).sum() == int(320 * ratio)
        assert count[count < 256].sum() == more


def test_atlas_hides_that_share_of_the_regions_and_no_token_without_a_label(dense, regions) -> None:
    hidden = draw(dense, regions, "atlas", "random", ratio=0.4)[..., 0].reshape(-1)
    labelled = regions.share.any(axis=1)
    label = regions.share.argmax(axis=1)
    assert not hidden[~labelled].any()
    for number in np.unique(label[labelled]):
        assert len(set(hidden[labelled & (label == number)].tolist())) == 1
    present = np.unique(label[labelled])
    assert len(np.unique(label[hidden])) == int(0.4 * len(present))


def test_windows_on_brain_only_tokens_keep_the_budget(small_grid: TokenGrid) -> None:
    for time in TIMES:
        sampler = MaskSampler(small_grid, MaskConfig(strategy="window", time=time, ratio=0.3), window=(2, 2, 2, 2))
        masks = sampler.sample([(number,) for number in range(5)])
        assert set(masks.sum(dim=1).tolist()) == {sampler.n_hidden}
        window = small_grid.stages[0].coordinates // 2
        _, of = np.unique(window, axis=0, return_inverse=True)
        hidden = masks[0].view(-1, small_grid.frames)[:, 0].numpy()
        shares = np.bincount(of.reshape(-1), hidden) / np.bincount(of.reshape(-1))
        assert ((shares > 0) & (shares < 1)).sum() <= 1  # the last one drawn is trimmed


def test_a_ratio_that_leaves_nothing_to_see_is_refused_with_the_largest_that_does(small_grid: TokenGrid) -> None:
    patches = small_grid.stages[0].n_tokens
    with pytest.raises(ConfigError, match=rf"mask.ratio is 0.999.*hides all {patches} patches.*use at most 0.99"):
        MaskSampler(small_grid, MaskConfig(strategy="random", ratio=0.999))


def test_regions_of_another_grid_are_refused(small_grid: TokenGrid, regions) -> None:
    for strategy in ("region", "atlas"):
        with pytest.raises(ValueError, match="measured on a grid of 4096 patches, this one has"):
            MaskSampler(small_grid, MaskConfig(strategy=strategy), regions)
        with pytest.raises(ValueError, match="needs the regions' tokens"):
            MaskSampler(small_grid, MaskConfig(strategy=strategy))


def test_an_atlas_in_another_space_is_refused(dense: TokenGrid) -> None:
    affine = np.eye(4)
    affine[:3, 3] = 5000.0
    far = Atlas(name="far", volume=np.ones((4, 4, 4), dtype=np.int32), affine=affine, labels={1: "one"}, sha256="")
    with pytest.raises(AtlasError, match="none of its 1 regions meets the brain of grid neurostorm; check that it is"):
        region_tokens(far, get_grid("neurostorm"), dense)


def test_the_window_token_stands_at_its_place_in_the_window() -> None:
    from boldforge.pretrain.tokens import window_places

    grid = TokenGrid(np.ones((8, 8, 8), dtype=bool), (1, 1, 1), 8, 1)
    places = torch.from_numpy(window_places(grid, (4, 4, 4, 4))).view(8, 8, 8, 8)
    assert torch.equal(places[4:, :4, 4:, 4:].reshape(-1), torch.arange(256))
