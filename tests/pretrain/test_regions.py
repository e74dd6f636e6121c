"""Where regions lie and how they are hidden together, against plain loops; any atlas, any table."""

from pathlib import Path
from types import SimpleNamespace

import nibabel as nib
import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from boldforge.configs import BoldForgeError, ConfigError
from boldforge.data_shards import Atlas, AtlasError, Grid, atlas_on_grid, brain_mask, get_grid, load_atlas, load_groups
from boldforge.pretrain import MaskConfig, MaskSampler, RegionTokens, TokenGrid, region_tokens, region_voxels
from boldforge.pretrain.masking import sample_keys
from boldforge.pretrain.regions import grouped, homologous_pairs

ANATOMY = ("region", "pair", "group")


@pytest.fixture(scope="module")
def brain() -> tuple[Grid, TokenGrid]:
    grid = get_grid("mni4mm")
    return grid, TokenGrid(brain_mask(grid), (3, 3, 3), 2, 1)


@pytest.fixture(scope="module")
def aal3(brain: tuple[Grid, TokenGrid]) -> RegionTokens:
    return region_tokens(load_atlas(), *brain)


@pytest.fixture(scope="module")
def groups() -> dict[str, tuple[int, ...]]:
    return load_groups(load_atlas())


def small_case(seed: int, scale: float, n_regions: int = 5) -> tuple[Atlas, Grid, np.ndarray]:
    """A random atlas, each region a blob or one voxel, stored right to left, on a grid no patch size divides."""
    rng = np.random.default_rng(seed)
    shape = tuple(np.maximum(4, np.ceil(np.array((14, 18, 10)) / scale)).astype(int).tolist())
    volume = np.zeros(shape, dtype=np.int32)
    for label in range(1, n_regions + 1):
        centre = [rng.integers(1, n - 1) for n in shape]
        size = rng.integers(1, 4)
        volume[tuple(slice(c, c + size) for c in centre)] = label * 3
    labels = {int(label): f"region{label}" for label in np.unique(volume) if label}
    affine = np.diag([-scale, scale, scale, 1.0])
    affine[:3, 3] = (13.3, -0.4, 0.2)
    grid_affine = np.diag([2.0, 2.0, 2.0, 1.0])
    mask = np.zeros((7, 9, 5), dtype=bool)
    mask[:, 1:] = True
    return Atlas("blobs", volume, affine, labels, ""), Grid("small", (7, 9, 5), grid_affine), mask


def count_points(atlas: Atlas, grid: Grid) -> tuple[dict[tuple[int, int, int, int], int], float]:
    """Points of each region in each voxel, one after the other; and how many fill a voxel."""
    scale = abs(atlas.affine[0, 0])
    parts = max(1, int(np.ceil(2 * scale / 2.0)))
    found: dict[tuple[int, int, int, int], int] = {}
    for index in np.argwhere(atlas.volume):
        for part in np.ndindex(parts, parts, parts):
            place = index + (np.array(part) + 0.5) / parts - 0.5
            mm = atlas.affine @ [*place, 1.0]
            voxel = [int(np.floor(round(c, 6) + 0.5)) for c in (np.linalg.inv(grid.affine) @ mm)[:3]]
            if all(0 <= v < n for v, n in zip(voxel, grid.shape, strict=True)):
                key = (*voxel, int(atlas.volume[tuple(index)]))
                found[key] = found.get(key, 0) + 1
    return found, parts**3 * (2.0 / scale) ** 3


@pytest.mark.parametrize("scale", [0.7, 1.0, 2.0, 3.0])
def test_shares_of_voxels_and_tokens_agree_with_counting_points(scale: float) -> None:
    atlas, grid, mask = small_case(int(10 * scale), scale)
    found, per_voxel = count_points(atlas, grid)
    voxels = region_voxels(atlas, grid, mask)
    columns = {tuple(index): column for column, index in enumerate(np.argwhere(mask).tolist())}
    expected = {(columns[key[:3]], key[3]): count / per_voxel for key, count in found.items() if key[:3] in columns}
    ids = [voxels.ids[region] for region in voxels.region]
    got = dict(zip(zip(voxels.voxel.tolist(), ids, strict=True), voxels.share.tolist(), strict=True))
    assert got.keys() == expected.keys()
    assert all(got[key] == pytest.approx(expected[key]) for key in expected)
    values_V = np.random.default_rng(0).standard_normal(int(mask.sum()))
    for place, label in enumerate(voxels.ids):
        total = sum(share * values_V[v] for (v, region), share in expected.items() if region == label)
        assert voxels.sums(values_V)[place] == pytest.approx(total)

    token_grid = TokenGrid(mask, (2, 2, 2), 3, 1)
    tokens = region_tokens(atlas, grid, token_grid)
    for number, (x, y, z) in enumerate(token_grid.stages[0].coordinates.tolist()):
        for place, label in enumerate(tokens.ids):
            inside = [c for (i, j, k, r), c in found.items() if r == label and (i // 2, j // 2, k // 2) == (x, y, z)]
            assert tokens.share[number, place] == pytest.approx(sum(inside) / (8 * per_voxel), abs=1e-6)


def test_a_region_no_larger_than_a_fraction_of_a_voxel_is_measured_and_hidden(brain: tuple[Grid, TokenGrid]) -> None:
    grid, token_grid = brain
    whole = load_atlas()
    volume = np.zeros_like(whole.volume)
    volume[90, 108, 90] = 7
    voxels = region_voxels(Atlas("point", volume, whole.affine, {7: "point"}, ""), grid, token_grid.mask)
    assert voxels.share.tolist() == pytest.approx([1 / 64])
    all_of_aal3 = region_voxels(whole, grid, token_grid.mask)
    assert len(all_of_aal3.ids) == 166 and not {35, 36, 81, 82} & set(all_of_aal3.ids)
    assert np.bincount(all_of_aal3.voxel, all_of_aal3.share).max() <= 1 + 1e-9


def test_hiding_a_region_hides_at_least_three_quarters_of_it_in_no_more_tokens_than_needed(aal3: RegionTokens) -> None:
    held = np.where(aal3.member, aal3.share, 0)
    assert (held.sum(axis=0) >= 0.7499 * aal3.share.sum(axis=0)).all()
    least = np.where(aal3.member, aal3.share, np.inf).min(axis=0)
    assert (held.sum(axis=0) - least < 0.7501 * aal3.share.sum(axis=0)).all()
    # No token that is left visible holds more of the region than one that is hidden.
    assert (np.where(aal3.member, -np.inf, aal3.share).max(axis=0) <= least).all()


def test_pairs_are_left_and_right_of_one_name_and_the_midline_stands_alone(aal3: RegionTokens) -> None:
    pairs = [tuple(aal3.names[place] for place in pair) for pair in homologous_pairs(aal3)]
    assert sorted(name for pair in pairs for name in pair) == sorted(aal3.names)
    two, one = [pair for pair in pairs if len(pair) == 2], [pair for pair in pairs if len(pair) == 1]
    assert len(two) == 78 and len(one) == 10
    assert all(left[:-2] == right[:-2] and {left[-2:], right[-2:]} == {"_L", "_R"} for left, right in two)
    assert all(name.startswith(("Vermis", "Raphe")) for (name,) in one)


@pytest.mark.parametrize(
    ("left", "right"),
    [("L_V1_ROI", "R_V1_ROI"), ("Left-Caudate", "Right-Caudate"), ("ctx_lh_insula", "ctx_rh_insula"), ("a.l", "a.r")],
)
def test_other_ways_to_name_a_side(left: str, right: str) -> None:
    names = ("Pons", right, "lateral_L_x", left)
    regions = RegionTokens((1, 2, 3, 4), names, np.ones((1, 4), np.float32), np.ones((1, 4), bool))
    assert sorted(homologous_pairs(regions)) == [(0,), (1, 3), (2,)]


def test_the_packaged_groups_hold_every_region_once_and_both_of_a_pair(
    aal3: RegionTokens, groups: dict[str, tuple[int, ...]]
) -> None:
    assert set(groups) == {
        *("frontal", "parietal", "temporal", "occipital", "insula", "limbic"),
        *("basal_ganglia", "thalamus", "cerebellum", "brainstem"),
    }
    members = [number for ids in groups.values() for number in ids]
    assert sorted(members) == sorted(aal3.ids)
    of = {number: name for name, ids in groups.items() for number in ids}
    for pair in homologous_pairs(aal3):
        assert len({of[aal3.ids[place]] for place in pair}) == 1
    names = load_atlas().labels
    assert {names[number] for number in groups["basal_ganglia"]} >= {"Caudate_L", "Putamen_R", "N_Acc_L"}
    assert {of[number] for number, name in names.items() if "Hippocampal" in name or "Cingul" in name} == {"limbic"}


def slow_mask(regions: RegionTokens, units: list[tuple[int, ...]], budget: int, key: tuple[int, ...]) -> set[int]:
    """Hide unit after unit, region after region, token after token, until the budget is full."""
    rng = np.random.default_rng(list(key))
    hidden: list[int] = []
    for unit in rng.permutation(len(units)):
        for region in rng.permutation(units[unit]):
            tokens = [t for t in range(len(regions.share)) if regions.member[t, region]]
            for token in sorted(tokens, key=lambda t: -regions.share[t, region]):
                if token not in hidden and len(hidden) < budget:
                    hidden.append(token)
    for token in rng.permutation(len(regions.share)):
        if token not in hidden and len(hidden) < budget:
            hidden.append(int(token))
    return set(hidden)


@pytest.mark.parametrize("strategy", ANATOMY)
@pytest.mark.parametrize("ratio", [0.07, 0.5, 0.93])
def test_masks_by_anatomy_agree_with_filling_up_one_by_one(
    brain: tuple[Grid, TokenGrid], aal3: RegionTokens, groups: dict[str, tuple[int, ...]], strategy: str, ratio: float
) -> None:
    units = {
        "region": [(place,) for place in range(166)],
        "pair": homologous_pairs(aal3),
        "group": grouped(aal3, groups),
    }[strategy]
    sampler = MaskSampler(brain[1], MaskConfig(strategy=strategy, ratio=ratio), aal3, groups=groups)
    budget = round(ratio * brain[1].stages[0].n_tokens)
    for key in ((0, 3, 1), (5,)):
        mask = sampler.sample([key])[0].view(-1, 2).numpy()
        assert (mask[:, 0] == mask[:, 1]).all()
        assert set(np.flatnonzero(mask[:, 0]).tolist()) == slow_mask(aal3, units, budget, key)


@given(seed=st.integers(0, 2**20), ratio=st.floats(0.02, 0.95), n_regions=st.integers(1, 9))
@settings(max_examples=40, deadline=None)
def test_every_strategy_hides_the_same_number_on_any_brain_with_any_atlas(
    seed: int, ratio: float, n_regions: int
) -> None:
    rng = np.random.default_rng(seed)
    atlas, grid, mask = small_case(seed, 1.0, n_regions)
    mask = mask & (rng.random(mask.shape) < 0.9)
    assume((atlas_on_grid(atlas, grid)[mask] > 0).any())  # an atlas beside the brain is refused, by another test
    token_grid = TokenGrid(mask, (2, 2, 2), 3, 1)
    regions = region_tokens(atlas, grid, token_grid)
    counts = set()
    for strategy in ("random", "tube", "window", "region", "group"):
        table = {"first": regions.ids[:1], "all": regions.ids}
        sampler = MaskSampler(token_grid, MaskConfig(strategy=strategy, ratio=ratio), regions, groups=table)
        counts |= set(sampler.sample(sample_keys(seed, 0, 2)).sum(dim=1).tolist())
    assert counts == {3 * max(1, round(ratio * token_grid.stages[0].n_tokens))}


@given(seed=st.integers(0, 2**20))
@settings(max_examples=15, deadline=None)
def test_every_region_present_has_its_turn_however_small(seed: int) -> None:
    atlas, grid, mask = small_case(seed, 1.0, 6)
    token_grid = TokenGrid(mask, (2, 2, 2), 1, 1)
    regions = region_tokens(atlas, grid, token_grid)
    one = MaskConfig(strategy="region", ratio=1.4 / token_grid.stages[0].n_tokens)
    masks = MaskSampler(token_grid, one, regions).sample(sample_keys(seed, 0, 40 * len(regions.ids)))
    assert (masks.sum(dim=1) == 1).all()
    # With a budget of one token, what is hidden is the token that holds most of the region drawn.
    assert set(masks.int().argmax(dim=1).tolist()) == set(regions.share.argmax(axis=0).tolist())


@pytest.mark.parametrize("strategy", ["random", *ANATOMY])
def test_a_samples_mask_is_the_same_at_any_number_of_ranks_and_any_batch_size(
    brain: tuple[Grid, TokenGrid], aal3: RegionTokens, groups: dict[str, tuple[int, ...]], strategy: str
) -> None:
    from boldforge.pretrain.train import hide

    _, token_grid = brain
    sampler = MaskSampler(token_grid, MaskConfig(strategy=strategy), aal3, groups=groups)
    wanted = sampler.sample([(0, 9, sample) for sample in range(8)])
    values = torch.zeros(8, 2, token_grid.n_voxels)
    for batch_size, world_size in ((8, 1), (8, 4), (4, 2), (2, 1)):
        found = []
        for step in range(8 // batch_size):
            for rank in range(world_size):
                clips = batch_size // world_size
                run = SimpleNamespace(
                    rank=rank,
                    world_size=world_size,
                    sampler=sampler,
                    device=torch.device("cpu"),
                    patch_voxels=torch.from_numpy(token_grid.patch_voxels),
                    config=SimpleNamespace(
                        seed=9, batch_size=batch_size, loss=SimpleNamespace(background=False, targets="values")
                    ),
                )
                batch = SimpleNamespace(
                    run=torch.zeros(clips),
                    signal=lambda n=clips: torch.ones(n, token_grid.n_voxels, dtype=torch.bool),
                    dequantise=lambda *_, n=clips: values[:n],
                )
                found.append(hide(run, batch, step)[2])
        assert torch.equal(torch.cat(found), wanted)


def test_another_atlas_and_its_tables_work_the_same(tmp_path: Path, brain: tuple[Grid, TokenGrid]) -> None:
    data = np.zeros((20, 20, 20), dtype=np.int16)
    data[4:8, 5:12, 8:12], data[12:16, 5:12, 8:12], data[10, 16, 10] = 4, 9, 300
    affine = np.diag([-8.0, 8, 8, 1])
    affine[:3, 3] = (80, -100, -70)
    nib.save(nib.Nifti1Image(data, affine), tmp_path / "mine.nii.gz")
    (tmp_path / "labels.csv").write_text("# id,name\n4,Block_R\n9,Block_L\n300,Dot\n")
    (tmp_path / "groups.tsv").write_text("Block_R\tblocks\nBlock_L\tblocks\nDot\tdots\nBlock_L\tleft\n")
    atlas = load_atlas(tmp_path / "mine.nii.gz", tmp_path / "labels.csv")
    groups = load_groups(atlas, tmp_path / "groups.tsv")
    assert groups == {"blocks": (4, 9), "dots": (300,), "left": (9,)}
    regions = region_tokens(atlas, *brain)
    assert regions.names == ("Block_R", "Block_L", "Dot")
    assert homologous_pairs(regions) == [(0, 1), (2,)]
    x_mm = brain[0].affine[0, 3] + 4 * (3 * brain[1].stages[0].coordinates[:, 0] + 1)
    assert np.average(x_mm, weights=regions.share[:, 1]) < 0 < np.average(x_mm, weights=regions.share[:, 0])
    for strategy in ANATOMY:
        sampler = MaskSampler(brain[1], MaskConfig(strategy=strategy, ratio=0.2), regions, groups=groups)
        assert set(sampler.sample(sample_keys(0, 0, 3)).sum(dim=1).tolist()) == {sampler.n_hidden}


def test_bad_tables_and_atlases_without_pairs_or_groups_are_one_sentence(tmp_path: Path) -> None:
    atlas, grid, mask = small_case(1, 1.0)
    table = tmp_path / "groups.txt"
    table.write_text("# mine\nPrecentral_L motor\nCingulate_Ant_L limbic\n")
    cases = [
        (lambda: load_groups(load_atlas(), table), AtlasError, "line 3 names region Cingulate_Ant_L, which atlas aal3"),
        (lambda: load_groups(atlas), AtlasError, "blobs comes without groups of regions; set mask.groups"),
        (lambda: load_groups(load_atlas(), tmp_path / "no.txt"), AtlasError, r"no\.txt: no such table"),
    ]
    (tmp_path / "empty.txt").write_text("# nothing\n")
    cases.append((lambda: load_groups(load_atlas(), tmp_path / "empty.txt"), AtlasError, "no group in it"))
    (tmp_path / "short.txt").write_text("Precentral_L\n")
    cases.append((lambda: load_groups(load_atlas(), tmp_path / "short.txt"), AtlasError, "line 1 is 'Precentral_L'"))
    (tmp_path / "names.txt").write_text("1 Left Thalamus\n2 Left Caudate\n")
    cases.append((lambda: load_atlas("aal3", tmp_path / "names.txt"), AtlasError, "line 2 gives a second region the"))
    regions = region_tokens(atlas, grid, TokenGrid(mask, (2, 2, 2), 1, 1))
    cases.append((lambda: homologous_pairs(regions), ConfigError, "mask.strategy is pair, but no two of the atlas's"))
    cases.append((lambda: grouped(regions, {"far": (999,)}), ConfigError, "none of its 1 groups has a region"))
    for call, kind, said in cases:
        with pytest.raises(kind, match=said) as caught:
            call()
        assert isinstance(caught.value, BoldForgeError) and "\n" not in str(caught.value)
