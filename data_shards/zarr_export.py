"""Copy a dataset into a plain Zarr v3 store with the sharding codec, for object storage and for other readers."""

import os
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from zarr.codecs import Crc32cCodec
from zarr.storage import LocalStore

from boldforge.configs import folder_lock
from boldforge.configs.durable import sync_folder
from boldforge.data_shards.manifest import Manifest
from boldforge.data_shards.reader import ShardReader
from boldforge.data_shards.tables import ShardError
from boldforge.data_shards.zarr_view import dataset_attributes, run_attributes

CHUNK_FRAMES = 16  # a clip of 20 frames then reads two or three chunks


def export_zarr(manifest: Manifest, out: str | Path, on_progress: Callable[[int, int], None] | None = None) -> Path:
    """Write a dataset as a Zarr v3 store: ``mask``, and per run ``<key>/bold`` [T, V] and ``<key>/scale`` [2, V].

    The layout is that of `open_zarr`. A run's frames are one object (a zarr shard), in chunks of 16 frames that carry a
    crc32c each. The store appears under its name once it is whole, on disk, and read back equal.

    Parameters
    ----------
    manifest
        The dataset.
    out
        The store's folder; must not exist.
    on_progress
        Called with (runs done, runs in all).

    Raises
    ------
    ShardError
        If `out` exists, the dataset is damaged, or what was written does not read back equal.
    OSError
        If the store cannot be written; nothing of it is left.
    """
    out = Path(out)
    if out.exists():
        raise ShardError(f"{out}: exists already; choose another name for the Zarr store, or remove it.")
    partial = out.with_name(f".{out.name}.partial")
    report = on_progress or (lambda done, total: None)
    out.parent.mkdir(parents=True, exist_ok=True)
    lock = out.with_name(f".{out.name}.exporting")
    try:
        with folder_lock(lock, "exporting"):
            if partial.exists():
                shutil.rmtree(partial)  # of an export that was killed
            try:
                _write(manifest, partial, report)
                _sync(partial)
                partial.replace(out)
                sync_folder(out.parent)
            except BaseException:
                shutil.rmtree(partial, ignore_errors=True)
                raise
    finally:
        with suppress(OSError):  # another export may be in it
            lock.rmdir()
    return out


def _write(manifest: Manifest, folder: Path, report: Callable[[int, int], None]) -> None:
    reader = ShardReader(manifest)
    root = zarr.create_group(LocalStore(folder), attributes=dataset_attributes(manifest))
    mask = manifest.brain_mask()
    _store(root, "mask", mask, chunks=mask.shape)
    report(0, manifest.n_runs)
    for number, run in enumerate(manifest.runs):
        q, scales = reader.read(number, 0, run.n_frames).q, reader.scales(number)
        group = root.create_group(run.key, attributes=run_attributes(run, manifest.recipe.tr))
        length = -(-run.n_frames // CHUNK_FRAMES) * CHUNK_FRAMES
        sharded = {"chunks": (CHUNK_FRAMES, q.shape[1]), "shards": (length, q.shape[1])}
        _store(group, "bold", q, dimension_names=("time", "voxel"), **sharded)
        _store(group, "scale", scales, chunks=scales.shape, dimension_names=(None, "voxel"))
        report(number + 1, manifest.n_runs)


def _store(group: zarr.Group, name: str, values: np.ndarray[Any, Any], **layout: Any) -> None:
    # In-mask integers hardly compress (3 to 13 %), and raw chunks are read several times as fast.
    array = group.create_array(
        name, shape=values.shape, dtype=values.dtype, fill_value=0, compressors=[Crc32cCodec()], filters=None, **layout
    )
    array[:] = values
    found = zarr.open_array(array.store_path, mode="r")[:]
    if not np.array_equal(np.asarray(found), values):
        raise ShardError(f"{array.store_path}: does not read back as it was written; check the disk and export again.")


def _sync(folder: Path) -> None:
    for path in folder.rglob("*"):
        if path.is_file():
            number = os.open(path, os.O_RDONLY)
            try:
                os.fsync(number)
            finally:
                os.close(number)
        else:
            sync_folder(path)
    sync_folder(folder)
