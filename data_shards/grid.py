"""Voxel grids in millimetres, and which of their voxels are brain."""

import hashlib
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from boldforge.configs import BoldForgeError

Affine = npt.NDArray[np.float64]


class GridError(BoldForgeError):
    """A grid name or a grid description is not valid."""


@dataclass(frozen=True, eq=False)
class Grid:
    """A voxel grid: shape [X, Y, Z] and the affine [4, 4] from voxel index to RAS+ millimetres."""

    name: str
    shape: tuple[int, int, int]
    affine: Affine

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Grid):
            return NotImplemented
        return self.shape == other.shape and np.array_equal(self.affine, other.affine)

    def __hash__(self) -> int:
        return hash((self.shape, self.affine.tobytes()))

    @property
    def voxel_size(self) -> float:
        """Edge length of a voxel in mm (the grids here are isotropic)."""
        return float(np.linalg.norm(self.affine[:3, 0]))


def _isotropic(name: str, shape: tuple[int, int, int], size: float, origin: tuple[float, float, float]) -> Grid:
    affine = np.diag([size, size, size, 1.0])
    affine[:3, 3] = origin
    affine.setflags(write=False)
    return Grid(name, shape, affine)


def _neurostorm() -> Grid:
    # NeuroSTORM takes arrays as stored and centres them in 96³. Its data are MNI files of 91×109×91 voxels at 2 mm, x
    # from right to left (LAS), first centre (90, -126, -72) mm: x fills 3…93, y 6…101 is kept, z fills 3…93.
    affine = np.diag([-2.0, 2.0, 2.0, 1.0])
    affine[:3, 3] = (90 + 3 * 2, -126 + 6 * 2, -72 - 3 * 2)
    affine.setflags(write=False)
    return Grid("neurostorm", (96, 96, 96), affine)


# The first two span the same cube, so a 12 mm patch covers the same tissue on either.
_GRIDS = {
    grid.name: grid
    for grid in (
        _isotropic("mni2mm", (96, 96, 96), 2.0, (-96.0, -112.0, -90.0)),
        _isotropic("mni4mm", (48, 48, 48), 4.0, (-95.0, -111.0, -89.0)),
        _neurostorm(),
    )
}


def get_grid(name: str) -> Grid:
    """Return a grid by name.

    Raises
    ------
    GridError
        For an unknown name, listing the valid ones.
    """
    try:
        return _GRIDS[name]
    except KeyError:
        raise GridError(f"Unknown grid {name!r}; valid grids are {', '.join(sorted(_GRIDS))}.") from None


@lru_cache(maxsize=8)
def brain_mask(grid: Grid) -> npt.NDArray[np.bool_]:
    """Return which voxels of a grid are stored: its brain, bool [X, Y, Z], read-only.

    The source is nilearn's MNI152 brain mask at 2 mm. A voxel is brain when at least half of the 2 mm lattice points
    that lie inside it are, so on the 2 mm grid this is the template's mask itself (235,375 voxels). The grid
    ``neurostorm`` stores the whole cube, as that model reads background too; what is brain there, each run says itself.
    """
    if grid.name == "neurostorm":
        whole = np.ones(grid.shape, dtype=bool)
        whole.setflags(write=False)
        return whole
    from nilearn.datasets import load_mni152_brain_mask  # takes seconds to import: only when a mask is asked for

    template = load_mni152_brain_mask(resolution=2)
    # The lattice goes on beyond the template's border, and what lies there is not brain.
    border = int(np.ceil(grid.voxel_size / template.header.get_zooms()[0]))
    padded = np.pad(np.asarray(template.dataobj) > 0, border)
    affine = np.array(template.affine)
    affine[:3, 3] -= affine[:3, :3].sum(axis=1) * border
    points, brain = _count_points(grid, padded, affine)
    mask = (points > 0) & (2 * brain >= points)
    mask.setflags(write=False)
    return mask


def _count_points(
    grid: Grid, template: npt.NDArray[np.bool_], template_affine: Affine
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Count the template's lattice points, and its brain points, inside each voxel of the grid."""
    index = np.indices(template.shape).reshape(3, -1)
    to_grid = np.linalg.inv(grid.affine) @ template_affine
    # Rounded at 1e-6 voxel first: a point on a voxel's border must fall on the same side on every machine.
    coordinates = np.round(to_grid[:3, :3] @ index + to_grid[:3, 3:], 6)
    voxel = np.floor(coordinates + 0.5).astype(np.int64)
    inside = ((voxel >= 0) & (voxel < np.array(grid.shape)[:, None])).all(axis=0)
    flat = np.ravel_multi_index(tuple(voxel[:, inside]), grid.shape)
    size = int(np.prod(grid.shape))
    points = np.bincount(flat, minlength=size)
    brain = np.bincount(flat[template.reshape(-1)[inside]], minlength=size)
    return points.reshape(grid.shape), brain.reshape(grid.shape)


def mask_hash(mask: npt.NDArray[np.bool_]) -> str:
    """Return the sha256 (hex) of a mask's bits in C order, so that two machines can compare their masks."""
    return hashlib.sha256(np.packbits(np.ascontiguousarray(mask)).tobytes()).hexdigest()


def mask_centres(grid: Grid, mask: npt.NDArray[np.bool_]) -> npt.NDArray[np.float64]:
    """Return the centres of the mask's voxels in mm, float64 [V, 3], in the order of ``array[mask]``."""
    return np.argwhere(mask) @ grid.affine[:3, :3].T + grid.affine[:3, 3]
