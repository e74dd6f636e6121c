"""From 4D fMRI files to brain-only shards, and back as clips."""

from boldforge.data_shards.atlas import Atlas, AtlasError, atlas_on_grid, load_atlas
from boldforge.data_shards.grid import Grid, GridError, brain_mask, get_grid, mask_centres, mask_hash

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
]
