"""Reconstruction error region by region: rows, a table that grows while training, and brain maps.

Shape suffixes: X, Y, Z the grid · V brain voxels · R regions.
"""

import csv
import gzip
from collections.abc import Sequence
from dataclasses import astuple, dataclass
from pathlib import Path

import nibabel as nib
import numpy as np

from boldforge.data_shards import Grid
from boldforge.pretrain.evaluate import HeldoutError
from boldforge.pretrain.regions import RegionVoxels

COLUMNS = ("step", "region", "name", "voxels_measured", "error", "baseline")


@dataclass(frozen=True)
class RegionError:
    """Held-out error of one region.

    Attributes
    ----------
    region, name
        Label and name in the atlas.
    voxels_measured
        Hidden voxels that were measured, over all clips and frames, each in the share that the region fills.
    error, baseline
        Mean squared errors of the model and of the mean frame, every voxel weighed by that share.
    """

    region: int
    name: str
    voxels_measured: float
    error: float
    baseline: float


def region_errors(measured: HeldoutError, regions: RegionVoxels) -> list[RegionError]:
    """Average the held-out errors over each region; regions that no held-out mask hides are left out."""
    error_R, baseline_R, count_R = (
        regions.sums(values_V) for values_V in (measured.error_V, measured.baseline_V, measured.count_V)
    )
    return [
        RegionError(regions.ids[i], regions.names[i], float(count), float(error / count), float(baseline / count))
        for i, (error, baseline, count) in enumerate(zip(error_R, baseline_R, count_R, strict=True))
        if count > 0
    ]


def write_table(path: Path, rows: Sequence[RegionError]) -> None:
    """Write one measurement as comma-separated values, full precision."""
    with path.open("w", newline="") as stream:
        table = csv.writer(stream, lineterminator="\n")
        table.writerow(COLUMNS[1:])
        table.writerows(_cells(row) for row in rows)


def log_table(path: Path, step: int, rows: Sequence[RegionError]) -> None:
    """Add the measurement of a step to a tab-separated table, in the place of what it says of this step and later.

    Those rows come from a run that was killed after its last checkpoint. The table is exchanged whole, so that a kill
    at any moment leaves the old one or the new one.
    """
    kept: list[list[str]] = []
    if path.is_file():
        with path.open(newline="") as stream:
            kept = [
                row for row in csv.reader(stream, delimiter="\t") if row and row[0].isdigit() and int(row[0]) < step
            ]
    partial = path.with_name(f".{path.name}.partial")
    with partial.open("w", newline="") as stream:
        table = csv.writer(stream, delimiter="\t", lineterminator="\n")
        table.writerow(COLUMNS)
        table.writerows(kept)
        table.writerows([str(step), *_cells(row)] for row in rows)
    partial.replace(path)


def write_map(path: Path, values: dict[int, float], regions: RegionVoxels, grid: Grid, mask: np.ndarray) -> None:
    """Write a figure of each region as a brain map.

    Parameters
    ----------
    path
        A ``.nii.gz`` file. It is float32 on the grid, in MNI space, NaN where no region with a figure lies.
    values
        Figure by region's label. A voxel of several regions has their mean, weighed by their shares.
    mask
        bool [X, Y, Z], the grid's brain.
    """
    figure_R = np.array([values.get(label, np.nan) for label in regions.ids])
    known = np.isfinite(figure_R[regions.region])
    voxel, share = regions.voxel[known], regions.share[known]
    n_voxels = int(mask.sum())
    filled_V = np.bincount(voxel, share, minlength=n_voxels)
    total_V = np.bincount(voxel, share * figure_R[regions.region[known]], minlength=n_voxels)
    mean_V = np.divide(total_V, filled_V, out=np.full(n_voxels, np.nan), where=filled_V > 0)
    write_voxels(path, mean_V, grid, mask)


def write_voxels(path: Path, values_V: np.ndarray, grid: Grid, mask: np.ndarray) -> None:
    """Write a figure of each brain voxel as `write_map` does; NaN outside the brain."""
    volume = np.full(grid.shape, np.nan, dtype=np.float32)
    volume[mask] = values_V
    image = nib.Nifti1Image(volume, grid.affine)
    image.header.set_xyzt_units("mm")
    for place in (image.header.set_qform, image.header.set_sform):
        place(grid.affine, code="mni")
    # No time in the gzip: the same figures give the same bytes.
    path.write_bytes(gzip.compress(image.to_bytes(), compresslevel=6, mtime=0))


def _cells(row: RegionError) -> list[str]:
    # repr keeps every bit, so that two runs can be compared exactly.
    return [cell if isinstance(cell, str) else repr(cell) for cell in astuple(row)]
