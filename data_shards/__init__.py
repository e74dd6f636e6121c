"""From 4D fMRI files to brain-only shards, and back as clips."""

from boldforge.data_shards.atlas import Atlas, AtlasError, atlas_on_grid, load_atlas
from boldforge.data_shards.grid import Grid, GridError, brain_mask, get_grid, mask_centres, mask_hash
from boldforge.data_shards.nifti import Bold, HeaderError, ReadError, open_bold
from boldforge.data_shards.phenotype import LayoutError
from boldforge.data_shards.runs import Run, RunList, Skipped, check_headers, detect_layout, find_runs

__all__ = [
    "Grid",
    "GridError",
    "get_grid",
    "brain_mask",
    "mask_centres",
    "mask_hash",
    "Atlas",
    "AtlasError",
    "load_atlas",
    "atlas_on_grid",
    "Bold",
    "HeaderError",
    "ReadError",
    "open_bold",
    "Run",
    "RunList",
    "Skipped",
    "LayoutError",
    "find_runs",
    "check_headers",
    "detect_layout",
]
