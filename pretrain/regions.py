"""Where an atlas's regions lie: in which tokens, in which voxels, in what share; and what is hidden together.

Everything is measured at the atlas's own resolution in millimetres, so a region of a few cubic millimetres is not lost
on a coarse grid, and a token or voxel on a border belongs to every region in the share that it fills.

Shape suffixes: S spatial tokens of the first stage · V brain voxels · R regions.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from boldforge.configs import ConfigError
from boldforge.data_shards import Atlas, AtlasError, Grid
from boldforge.pretrain.tokens import TokenGrid

# Hiding a region hides at least this share of its volume. All of it would hide three times the region, for most tokens
# on its border lie mostly elsewhere.
_HIDDEN_SHARE = 0.75
# A side's mark stands alone between signs that are no letters: Precuneus_L, Left-Caudate, ctx_lh_insula.
_SIDES = {"L": "R", "LH": "RH", "l": "r", "lh": "rh", "Left": "Right", "left": "right", "LEFT": "RIGHT"}
_MARK = re.compile(rf"(?<![A-Za-z])({'|'.join([*_SIDES, *_SIDES.values()])})(?![A-Za-z])")


@dataclass(frozen=True)
class RegionTokens:
    """Which tokens belong to which atlas region.

    Attributes
    ----------
    ids, names
        Label and name of each region that is present on the grid (R of them).
    share
        float32 [S, R]: the share of the token's volume that the region fills.
    member
        bool [S, R]: true where hiding the region hides the token: the fewest tokens that together hold three quarters
        of the region, so every region has at least one, however small it is.
    """

    ids: tuple[int, ...]
    names: tuple[str, ...]
    share: np.ndarray
    member: np.ndarray


@dataclass(frozen=True, eq=False)
class RegionVoxels:
    """Which brain voxels of a grid belong to which atlas region, as a list of N pairs.

    Attributes
    ----------
    ids, names
        Label and name of each region that holds a part of a brain voxel (R of them).
    voxel, region
        int64 [N]: column of ``values_BTV``, and place in `ids`.
    share
        float64 [N]: the share of the voxel's volume that the region fills.
    """

    ids: tuple[int, ...]
    names: tuple[str, ...]
    voxel: np.ndarray
    region: np.ndarray
    share: np.ndarray

    def sums(self, values_V: np.ndarray) -> np.ndarray:
        """Sum over the voxels of every region, each in its share: [V] to float64 [R]."""
        return np.bincount(self.region, self.share * values_V[self.voxel], minlength=len(self.ids))


def region_tokens(atlas: Atlas, grid: Grid, token_grid: TokenGrid) -> RegionTokens:
    """Measure how much of every first-stage token each region fills.

    Raises
    ------
    AtlasError
        If no region of the atlas holds a token: it lies in another space.
    """
    stage = token_grid.stages[0]
    voxel, region, count, per_voxel = _overlap(atlas, grid)
    patch = np.stack(np.unravel_index(voxel, grid.shape)) // np.array(token_grid.patch_size)[:, None]
    token = stage.numbers[tuple(patch)]
    shape = (stage.n_tokens + 1, len(atlas.labels))
    counts = np.bincount(np.ravel_multi_index((token, region), shape), count, minlength=shape[0] * shape[1])
    counts = counts.astype(np.int64).reshape(shape)[:-1]
    present = counts.sum(axis=0) > 0
    ids, names = _present(atlas, grid, present)
    counts = counts[:, present]
    share = (counts / (per_voxel * np.prod(token_grid.patch_size))).astype(np.float32)
    order = np.argsort(-counts, axis=0, kind="stable")
    held = np.take_along_axis(counts, order, axis=0)
    before = np.cumsum(held, axis=0) - held
    member = np.zeros_like(counts, dtype=bool)
    np.put_along_axis(member, order, before < _HIDDEN_SHARE * counts.sum(axis=0), axis=0)
    return RegionTokens(ids=ids, names=names, share=share, member=member)


def region_voxels(atlas: Atlas, grid: Grid, mask: np.ndarray) -> RegionVoxels:
    """Measure how much of every brain voxel each region fills.

    Parameters
    ----------
    mask
        bool [X, Y, Z], the grid's brain.

    Raises
    ------
    AtlasError
        If no region of the atlas holds a brain voxel: it lies in another space.
    """
    voxel, region, count, per_voxel = _overlap(atlas, grid)
    brain = mask.reshape(-1)[voxel]
    column = np.cumsum(mask.reshape(-1)) - 1
    present = np.bincount(region[brain], minlength=len(atlas.labels)) > 0
    ids, names = _present(atlas, grid, present)
    return RegionVoxels(
        ids=ids,
        names=names,
        voxel=column[voxel[brain]],
        region=(np.cumsum(present) - 1)[region[brain]],
        share=count[brain] / per_voxel,
    )


def homologous_pairs(regions: RegionTokens) -> list[tuple[int, ...]]:
    """Join the regions whose names differ in side only; the others (vermis, raphe) stand alone.

    Returns
    -------
    list of tuples of places in ``regions.ids``; every region is in exactly one.

    Raises
    ------
    ConfigError
        If no two names differ in side only.
    """
    to_left = {right: left for left, right in _SIDES.items()}
    found: dict[str, list[int]] = {}
    for number, name in enumerate(regions.names):
        on_the_left = _MARK.sub(lambda match: to_left.get(match[0], match[0]), name, count=1)
        found.setdefault(on_the_left, []).append(number)
    pairs = [tuple(pair) for pair in found.values()]
    if all(len(pair) == 1 for pair in pairs):
        raise ConfigError(
            f"mask.strategy is pair, but no two of the atlas's {len(regions.names)} regions have names that differ in "
            f"side only, as Caudate_L and Caudate_R do (the first is {regions.names[0]}); give mask.labels, or use "
            "strategy region."
        )
    return pairs


def grouped(regions: RegionTokens, groups: Mapping[str, Sequence[int]]) -> list[tuple[int, ...]]:
    """Return the groups as tuples of places in ``regions.ids``; regions that are not on the grid are left out.

    Parameters
    ----------
    groups
        Ids of each group's regions, as `boldforge.data_shards.load_groups` reads them. They may overlap.

    Raises
    ------
    ConfigError
        If none of the groups has a region on the grid.
    """
    place = {number: index for index, number in enumerate(regions.ids)}
    found = [tuple(place[number] for number in ids if number in place) for ids in groups.values()]
    if not any(found):
        raise ConfigError(
            f"mask.groups: none of its {len(groups)} groups has a region on this grid; check that the table belongs to "
            "mask.atlas."
        )
    return [group for group in found if group]


def _present(atlas: Atlas, grid: Grid, present: np.ndarray) -> tuple[tuple[int, ...], tuple[str, ...]]:
    """Ids and names of the regions that are present."""
    if not present.any():
        raise AtlasError(
            f"Atlas {atlas.name}: none of its {len(atlas.labels)} regions meets the brain of grid {grid.name}; check "
            "that it is in MNI space and that its affine is right."
        )
    ids = [number for number, found in zip(sorted(atlas.labels), present, strict=True) if found]
    return tuple(ids), tuple(atlas.labels[number] for number in ids)


def _overlap(atlas: Atlas, grid: Grid) -> tuple[np.ndarray, np.ndarray, np.ndarray, float]:
    """Count the atlas's points in the grid's voxels.

    An atlas voxel is one point, its centre, or so many that their distance is at most half a voxel of the grid.

    Returns
    -------
    voxel, region, count, per_voxel
        int64 [N] three times: flat voxel of the grid, place among the sorted ids, points there; and the number of
        points that fill a voxel.
    """
    ids = np.array(sorted(atlas.labels))
    to_grid = np.linalg.inv(grid.affine) @ atlas.affine
    step = np.abs(to_grid[:3, :3]).max(axis=0)
    parts = np.maximum(1, np.ceil(2 * step - 1e-6)).astype(int)
    table = np.full(int(atlas.volume.max()) + 1, -1)
    table[ids] = np.arange(len(ids))
    place = table[atlas.volume]
    index = np.argwhere(place >= 0)
    place = place[place >= 0]
    size = int(np.prod(grid.shape))
    counts = np.zeros(0, dtype=np.int64)
    keys = np.zeros(0, dtype=np.int64)
    for part in np.ndindex(*parts.tolist()):
        offset = (np.array(part) + 0.5) / parts - 0.5
        # Rounded first: a point on the border of two voxels must fall on the same side on every machine.
        at = np.round((index + offset) @ to_grid[:3, :3].T + to_grid[:3, 3], 6)
        voxel = np.floor(at + 0.5).astype(np.int64)
        inside = ((voxel >= 0) & (voxel < np.array(grid.shape))).all(axis=1)
        flat = np.ravel_multi_index(tuple(voxel[inside].T), grid.shape)
        new, found = np.unique(place[inside] * size + flat, return_counts=True)
        if not len(keys):
            keys, counts = new, found
            continue
        keys, slot = np.unique(np.concatenate([keys, new]), return_inverse=True)
        counts = np.bincount(slot, np.concatenate([counts, found]), minlength=len(keys)).astype(np.int64)
    per_voxel = float(np.prod(parts) / abs(np.linalg.det(to_grid[:3, :3])))
    return keys % size, keys // size, counts, per_voxel
