"""From 4D fMRI files to brain-only shards, and back as clips."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from boldforge.data_shards.append import AppendReport, append_shards
from boldforge.data_shards.atlas import Atlas, AtlasError, atlas_on_grid, load_atlas, load_groups
from boldforge.data_shards.batch import ClipBatch, SkippedClip
from boldforge.data_shards.build import BuildReport, build_shards
from boldforge.data_shards.dataset import CacheConfig, ShardsPlace, open_dataset
from boldforge.data_shards.find import check_headers, detect_layout, find_runs
from boldforge.data_shards.grid import Grid, GridError, brain_mask, get_grid, mask_centres, mask_hash
from boldforge.data_shards.manifest import Manifest, load_manifest
from boldforge.data_shards.mixture import Source
from boldforge.data_shards.nifti import Bold, HeaderError, ReadError, open_bold
from boldforge.data_shards.phenotype import LayoutError
from boldforge.data_shards.prepare import PreparedRun, prepare_run
from boldforge.data_shards.reader import QuantisedClip, ShardReader
from boldforge.data_shards.recipe import DataRecipe
from boldforge.data_shards.remote import RemoteError, open_remote
from boldforge.data_shards.runs import Run, RunList, Skipped
from boldforge.data_shards.simulate import SimulationConfig, SimulationError, simulate_cohort
from boldforge.data_shards.split_plan import SplitPlan
from boldforge.data_shards.splits import (
    Holdout,
    Segment,
    Segments,
    split_runs,
    split_segments,
    store_splits,
    whole_runs,
)
from boldforge.data_shards.stream import ClipStream
from boldforge.data_shards.tables import RunEntry, ShardEntry, ShardError
from boldforge.data_shards.tasks import BuildError
from boldforge.data_shards.verify import Damage, verify_shards

if TYPE_CHECKING:
    from boldforge.data_shards.zarr_export import export_zarr
    from boldforge.data_shards.zarr_view import open_zarr

_FROM_ZARR = {"open_zarr": "zarr_view", "export_zarr": "zarr_export"}


def __getattr__(name: str) -> Any:
    # zarr takes half a second to import, which only those should wait for who use it.
    if name not in _FROM_ZARR:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_FROM_ZARR[name]}"), name)


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
    "load_groups",
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
    "DataRecipe",
    "PreparedRun",
    "prepare_run",
    "BuildError",
    "BuildReport",
    "build_shards",
    "AppendReport",
    "append_shards",
    "Damage",
    "verify_shards",
    "open_zarr",
    "export_zarr",
    "Manifest",
    "RunEntry",
    "ShardEntry",
    "ShardError",
    "load_manifest",
    "QuantisedClip",
    "ShardReader",
    "Holdout",
    "Segment",
    "Segments",
    "SplitPlan",
    "split_runs",
    "store_splits",
    "split_segments",
    "whole_runs",
    "ClipBatch",
    "SkippedClip",
    "Source",
    "CacheConfig",
    "ShardsPlace",
    "open_dataset",
    "open_remote",
    "RemoteError",
    "ClipStream",
    "SimulationConfig",
    "SimulationError",
    "simulate_cohort",
]
