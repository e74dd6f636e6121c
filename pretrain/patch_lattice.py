"""Patches of one voxel size, read and written by weights that live on another.

A patch's weights stand on a lattice of Q = points³ equal cells. Voxels of another size are averaged over each cell in
the share that they fill of it, and cells over each voxel, so a weight is a function of the place in the patch in mm.
What a network writes to a cell outside the brain of its training no loss ever saw, so only the others are averaged.

Shape suffixes: B clips · S spatial tokens · L = S·T tokens · P voxels in a patch · Q points of the lattice.
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

# A cell is brain where half of it is, as a voxel of a coarser grid is (`boldforge.data_shards.brain_mask`).
_BRAIN_SHARE = 0.5 - 1e-6
_NOTHING = 1e-6


def overlap(cells: int, parts: int) -> np.ndarray:
    """Cut an edge into `cells` and into `parts` equal pieces: the share of each cell that each part fills.

    Returns
    -------
    float64 [cells, parts]; every row sums to 1.
    """
    ends, others = np.linspace(0, 1, cells + 1), np.linspace(0, 1, parts + 1)
    first = np.maximum(ends[:-1, None], others[None, :-1])
    last = np.minimum(ends[1:, None], others[None, 1:])
    return np.clip(last - first, 0, None) * cells


def cube(edge: np.ndarray) -> np.ndarray:
    """Make a map of an edge a map of a cube, whose places are in (x, y, z) raster order: [n, m] to [n³, m³]."""
    return np.kron(np.kron(edge, edge), edge)


class PatchLattice(nn.Module):
    """Bring patches to the lattice of the weights, and back.

    Parameters
    ----------
    patch_voxels
        int64 [S, P], V (the largest number) where a place is not brain; see `TokenGrid`.
    n_voxels
        V.
    points
        Lattice points along the edge of a patch.

    Attributes
    ----------
    trained_SQ : bool
        The cells that a loss has seen: at first those that hold some of this brain. Part of the state, because a model
        that was moved here was trained elsewhere.
    """

    to_lattice_QP: Tensor
    to_voxels_PQ: Tensor
    scale_SQ: Tensor
    trained_SQ: Tensor

    def __init__(self, patch_voxels: np.ndarray, n_voxels: int, points: int) -> None:
        super().__init__()
        edge = round(patch_voxels.shape[1] ** (1 / 3))
        to_lattice_QP = cube(overlap(points, edge))
        share_SQ = (patch_voxels < n_voxels) @ to_lattice_QP.T
        # What is not brain is zero in a patch, and must not dilute the rest.
        scale_SQ = np.where(share_SQ >= _BRAIN_SHARE, 1 / np.maximum(share_SQ, _BRAIN_SHARE), 0)
        tables = {"to_lattice_QP": to_lattice_QP, "to_voxels_PQ": cube(overlap(edge, points)), "scale_SQ": scale_SQ}
        for name, table in tables.items():
            self.register_buffer(name, torch.from_numpy(table).float(), persistent=False)
        self.register_buffer("trained_SQ", torch.from_numpy(share_SQ > _NOTHING))
        self.register_load_state_dict_pre_hook(_take_own_cells)

    def read(self, patches_BLP: Tensor) -> Tensor:
        """Average voxels, zero where there is no brain, over the cells' brain: [B, L, P] to [B, L, Q]."""
        cells_BLQ = patches_BLP @ self.to_lattice_QP.T.to(patches_BLP.dtype)
        return (
            cells_BLQ.unflatten(1, (len(self.scale_SQ), -1)) * self.scale_SQ.unsqueeze(1).to(cells_BLQ.dtype)
        ).flatten(1, 2)

    def write(self, cells_BLQ: Tensor) -> Tensor:
        """Average trained cells over the voxels: [B, L, Q] to [B, L, P]; 0 where a voxel meets none."""
        trained_SQ, to_voxels_QP = self.trained_SQ, self.to_voxels_PQ.T.to(cells_BLQ.dtype)
        share_SP = trained_SQ.to(self.to_voxels_PQ.dtype) @ self.to_voxels_PQ.T
        scale_SP = torch.where(share_SP > _NOTHING, 1 / share_SP.clamp(min=_NOTHING), 0).to(cells_BLQ.dtype)
        # Not multiplied by 0: whatever an untrained cell holds, NaN too, must not count.
        kept_BSTQ = cells_BLQ.unflatten(1, (len(trained_SQ), -1)).masked_fill(~trained_SQ.unsqueeze(1), 0)
        return ((kept_BSTQ @ to_voxels_QP) * scale_SP.unsqueeze(1)).flatten(1, 2)


def _take_own_cells(lattice: PatchLattice, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """Let a state that does not say which cells were trained (exports before they did) stand for this brain's."""
    state.setdefault(f"{prefix}trained_SQ", lattice.trained_SQ)
