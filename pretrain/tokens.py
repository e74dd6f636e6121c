"""The token grid: which patches of a clip exist, and how they merge, expand and map to voxels.

Only patches that hold at least one brain voxel are tokens. A dense grid is the case in which the mask is true
everywhere, so there is one code path.

Shape suffixes: B clips · T frames · V brain voxels · S spatial tokens of a stage · P voxels in a patch · C channels.
Tokens of a clip are ordered space first, time fastest: row = s·T + t.
"""

from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise, product

import numpy as np
import torch
from torch import Tensor

from boldforge.configs import ConfigError


@dataclass(frozen=True)
class Stage:
    """The tokens of one stage of the hierarchy.

    Attributes
    ----------
    grid
        Tokens along x, y, z of the enclosing box.
    keep
        bool [x, y, z]; true where the token exists.
    """

    grid: tuple[int, int, int]
    keep: np.ndarray

    @cached_property
    def coordinates(self) -> np.ndarray:
        """int64 [S, 3]: place of every token in the box, in raster order (z fastest)."""
        return np.argwhere(self.keep)

    @property
    def n_tokens(self) -> int:
        """S, the number of spatial tokens."""
        return int(self.keep.sum())

    @cached_property
    def numbers(self) -> np.ndarray:
        """int64 [x, y, z]: the token's number, or S where there is none."""
        numbers = np.full(self.grid, self.n_tokens, dtype=np.int64)
        numbers[self.keep] = np.arange(self.n_tokens)
        return numbers


class TokenGrid:
    """Brain-only tokens of a clip at every stage, with the tables that link stages to each other and to voxels.

    Parameters
    ----------
    mask
        bool [X, Y, Z], the brain mask of the voxel grid; V = mask.sum().
    patch_size
        Voxels per patch along x, y, z.
    frames
        T, frames per clip.
    n_stages
        Stages of the encoder; each merges 2×2×2 tokens of the one before. Frames are not listed here.
    affine
        [4, 4], voxel index to RAS+ mm; needed by what asks for places in mm.

    Attributes
    ----------
    stages : tuple of Stage
    patch_voxels : int64 [S, P]
        Column of `values_BTV` for each place of each patch (x, y, z raster), V where the place is not brain.
    children : tuple of int64 [S_next, 8]
        For each stage but the last: tokens merged into each token of the next, S where the child does not exist.
        The order is the product of strides over (x, y, z), as in NeuroSTORM.
    parent, slot : tuples of int64 [S]
        The inverse: the next stage's token that a token belongs to, and its place (0…7) there.
    """

    def __init__(
        self,
        mask: np.ndarray,
        patch_size: tuple[int, int, int],
        frames: int,
        n_stages: int,
        affine: np.ndarray | None = None,
    ) -> None:
        if mask.ndim != 3 or not mask.any():
            raise ValueError(f"the brain mask must be 3D with at least one voxel, got shape {mask.shape}")
        self.mask = mask.astype(bool)
        self.patch_size = patch_size
        self.frames = frames
        self.affine = affine
        self.patch_voxels = _patch_table(self.mask, patch_size)
        stages = [_first_stage(self.mask, patch_size)]
        while len(stages) < n_stages:
            stages.append(_merge(stages[-1]))
        self.stages = tuple(stages)
        links = [_link(fine, coarse) for fine, coarse in pairwise(stages)]
        self.children = tuple(link[0] for link in links)
        self.parent = tuple(link[1] for link in links)
        self.slot = tuple(link[2] for link in links)

    @property
    def n_voxels(self) -> int:
        """V, the number of brain voxels."""
        return int(self.mask.sum())

    def centres(self, stage: int) -> np.ndarray:
        """Return the centres of a stage's tokens in mm, float64 [S, 3].

        Raises
        ------
        ValueError
            If the grid was made without an affine.
        ConfigError
            If its axes do not run to the right, to the front and up: the scan and the patches would be mirrored.
        """
        if self.affine is None:
            raise ValueError("the token grid has no affine, so its places in mm are unknown; give the voxel grid's")
        edges = np.diag(self.affine)[:3]
        if (edges <= 0).any() or np.any(self.affine[:3, :3] != np.diag(edges)):
            raise ConfigError(
                f"model.position is mm, but the grid's axes run along {self.affine[:3, :3].T.tolist()} mm per voxel, "
                "not to the right, to the front and up; shard on mni2mm or mni4mm, or set model.position to learned."
            )
        edge = np.array(self.patch_size) * 2**stage
        # The centre of the whole patch, also of one that reaches beyond the volume's end.
        voxel_S3 = (self.stages[stage].coordinates + 0.5) * edge - 0.5
        return voxel_S3 @ self.affine[:3, :3].T + self.affine[:3, 3]

    def to_volume(self, values_V: np.ndarray, fill: float = float("nan")) -> np.ndarray:
        """Put a brain-voxel vector [V] into the volume [X, Y, Z], `fill` elsewhere."""
        volume = np.full(self.mask.shape, fill, dtype=np.float32)
        volume[self.mask] = values_V
        return volume


def gather_patches(values_BTV: Tensor, patch_voxels: Tensor) -> Tensor:
    """Cut clips into patches: [B, T, V] and [S, P] give [B, S·T, P], zero where a place is not brain."""
    B, T, _ = values_BTV.shape
    S, P = patch_voxels.shape
    padded = torch.nn.functional.pad(values_BTV, (0, 1))
    patches_BTSP = padded.index_select(2, patch_voxels.reshape(-1)).view(B, T, S, P)
    return patches_BTSP.transpose(1, 2).reshape(B, S * T, P)


def scatter_patches(patches_BLP: Tensor, patch_voxels: Tensor, n_voxels: int) -> Tensor:
    """Undo `gather_patches`: [B, S·T, P] gives [B, T, V]; places that are not brain are dropped."""
    S, P = patch_voxels.shape
    B = patches_BLP.shape[0]
    patches_BTSP = patches_BLP.view(B, S, -1, P).transpose(1, 2)
    flat = patch_voxels.reshape(-1)
    order = torch.empty(n_voxels, dtype=torch.long, device=flat.device)
    brain = flat < n_voxels
    order[flat[brain]] = torch.arange(flat.numel(), device=flat.device)[brain]
    return patches_BTSP.flatten(2).index_select(2, order)


def window_places(token_grid: TokenGrid, window: tuple[int, int, int, int], frames: int | None = None) -> np.ndarray:
    """Say at which place of its (unshifted) window each first-stage token stands: int64 [S·T], raster, t fastest.

    T is the token grid's unless `frames` is given.
    """
    places = token_grid.stages[0].coordinates % window[:3] @ (window[1] * window[2], window[2], 1)
    return (places[:, None] * window[3] + np.arange(frames or token_grid.frames) % window[3]).reshape(-1)


def _first_stage(mask: np.ndarray, patch_size: tuple[int, int, int]) -> Stage:
    blocks = _blocks(mask, patch_size, fill=False)
    return Stage(grid=blocks.shape[:3], keep=np.asarray(blocks.any(axis=-1)))


def _patch_table(mask: np.ndarray, patch_size: tuple[int, int, int]) -> np.ndarray:
    n_voxels = int(mask.sum())
    columns = np.full(mask.shape, n_voxels, dtype=np.int64)
    columns[mask] = np.arange(n_voxels)
    blocks = _blocks(columns, patch_size, fill=n_voxels)
    return blocks[(blocks < n_voxels).any(axis=-1)]


def _blocks(volume: np.ndarray, size: tuple[int, int, int], fill: int | bool) -> np.ndarray:
    """Cut [X, Y, Z] into blocks: [x, y, z, size³], padding at the far end with `fill`."""
    counts = [-(-n // s) for n, s in zip(volume.shape, size, strict=True)]
    far = [(0, c * s - n) for c, s, n in zip(counts, size, volume.shape, strict=True)]
    padded = np.pad(volume, far, constant_values=fill)
    (x, y, z), (i, j, k) = counts, size
    return padded.reshape(x, i, y, j, z, k).transpose(0, 2, 4, 1, 3, 5).reshape(x, y, z, i * j * k)


def _merge(stage: Stage) -> Stage:
    blocks = _blocks(stage.keep, (2, 2, 2), fill=False)
    return Stage(grid=blocks.shape[:3], keep=np.asarray(blocks.any(axis=-1)))


def _link(fine: Stage, coarse: Stage) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    children = _blocks(fine.numbers, (2, 2, 2), fill=fine.n_tokens)[coarse.keep]
    parent = coarse.numbers[tuple((fine.coordinates // 2).T)]
    strides = np.array(list(product((0, 1), repeat=3)))
    places = {tuple(stride): place for place, stride in enumerate(strides)}
    slot = np.array([places[tuple(place)] for place in fine.coordinates % 2], dtype=np.int64)
    return children, parent, slot
