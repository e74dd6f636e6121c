"""Carpet plots: a run's voxels over time, by tissue, thinned to what a picture can show (Power 2017).

Shape suffixes: T frames, V brain voxels of the grid.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from boldforge.data_shards.atlas import atlas_on_grid, load_atlas
from boldforge.data_shards.manifest import Manifest
from boldforge.data_shards.quality import RunMoments, run_blocks
from boldforge.data_shards.reader import ShardReader

ROWS = 240
COLUMNS = 600
_FEWEST_ROWS = 24  # of a tissue: fewer could not be seen
_DEEP = (
    "Caudate",
    "Putamen",
    "Pallidum",
    "Thal",
    "N_Acc",
    "Amygdala",
    "Hippocampus",
    "VTA",
    "SN_",
    "Red_N",
    "LC_",
    "Raphe",
)
_CEREBELLUM = ("Cerebellum", "Vermis")
TISSUES = ("cortex", "deep grey", "cerebellum", "rest")
"""By AAL3 labels; the rest is white matter, ventricles, brain stem and whatever else has no label."""


@dataclass(frozen=True, eq=False)
class Carpet:
    """What is drawn of a run: values float32 [rows, columns], each voxel's z-score over time.

    Attributes
    ----------
    frames_per_column
        1, or how many frames are averaged in a column.
    tissues
        Name and number of rows, from the top.
    """

    values: npt.NDArray[np.float32]
    frames_per_column: int
    tissues: tuple[tuple[str, int], ...]


def draw_carpet(reader: ShardReader, number: int, moments: RunMoments, tissue_V: npt.NDArray[np.int64]) -> Carpet:
    """Read a run again and keep at most `ROWS` voxels and `COLUMNS` columns of it.

    Of every tissue voxels at equal distances in the mask's order are taken, as many as its share of the brain.

    Parameters
    ----------
    reader, number
        The run.
    moments
        What `measure_run` found of it.
    tissue_V
        What `tissues_of` says about the dataset.

    Raises
    ------
    ShardError
        If the run is damaged.
    """
    used = moments.covered & (moments.variance > 0)
    chosen, tissues = [], []
    for label, name in enumerate(TISSUES):
        voxels = np.flatnonzero(used & (tissue_V == label))
        wanted = max(_FEWEST_ROWS, round(ROWS * len(voxels) / max(int(used.sum()), 1)))
        if len(voxels):
            places = np.linspace(0, len(voxels) - 1, min(wanted, len(voxels))).round().astype(np.int64)
            chosen.append(voxels[places])
            tissues.append((name, len(places)))
    rows = np.concatenate(chosen) if chosen else np.zeros(0, dtype=np.int64)
    mean, deviation = moments.mean[rows], np.sqrt(moments.variance[rows])
    scales = reader.scales(number)[:, rows].astype(np.float64)
    n_frames = int(reader.manifest.index["n_frames"][number])
    at_once = -(-n_frames // COLUMNS)
    n_columns = -(-n_frames // at_once)
    sums = np.zeros((n_columns, len(rows)))
    start = 0
    for q in run_blocks(reader, number):
        z = (scales[0] + scales[1] * q[:, rows] - mean) / deviation
        np.add.at(sums, np.arange(start, start + len(q)) // at_once, z)
        start += len(q)
    frames = np.bincount(np.arange(n_frames) // at_once, minlength=n_columns)
    return Carpet((sums / frames[:, None]).T.astype(np.float32), at_once, tuple(tissues))


def tissues_of(manifest: Manifest) -> npt.NDArray[np.int64]:
    """Return which of `TISSUES` each brain voxel of the grid is, [V]."""
    atlas = load_atlas("aal3")
    tissue = np.full(max(atlas.labels) + 1, TISSUES.index("rest"))
    for number, name in atlas.labels.items():
        tissue[number] = 1 if name.startswith(_DEEP) else 2 if name.startswith(_CEREBELLUM) else 0
    return tissue[atlas_on_grid(atlas, manifest.grid)[manifest.brain_mask()]]
