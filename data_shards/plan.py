"""Which runs go into which shard: from headers alone, so that neither workers nor interruptions change it."""

import hashlib
import json
import sys
from collections.abc import Collection, Sequence
from dataclasses import dataclass, fields
from importlib.metadata import version
from pathlib import Path

import numpy as np

from boldforge.data_shards.manifest import SCHEMA_VERSION
from boldforge.data_shards.nifti import HeaderError, open_bold
from boldforge.data_shards.recipe import DataRecipe
from boldforge.data_shards.runs import Run, Skipped

SHARD_BYTES = 2**30
SHARD_RUNS = 64
_LONGEST_KEY = 80  # a classic tar header holds names of 100 bytes
_PACKAGES = ("boldforge", "nibabel", "nilearn", "numpy", "scipy")


@dataclass(frozen=True)
class PlannedRun:
    """A run and its fingerprint, which names everything that its stored bytes depend on."""

    run: Run
    fingerprint: str


@dataclass(frozen=True)
class PlannedShard:
    """The runs that one shard will hold, less those that turn out to be unusable."""

    file: str
    runs: tuple[PlannedRun, ...]


def plan_shards(
    runs: Sequence[Run], recipe: DataRecipe, n_voxels: int, first: int = 0, taken: Collection[str] = ()
) -> tuple[list[PlannedShard], list[Skipped]]:
    """Group runs into shards by their expected size.

    Parameters
    ----------
    runs
        In the order of the dataset.
    n_voxels
        Brain voxels of the recipe's grid.
    first
        Number of the first shard.
    taken
        Keys that the dataset holds already.

    Returns
    -------
    The shards, and the runs that cannot be used, with the reason.
    """
    groups: list[list[PlannedRun]] = []
    rejected = []
    filled = 0
    keys = set(taken)
    about = {"recipe": recipe.model_dump(mode="json"), "software": software(), "schema": SCHEMA_VERSION}
    for run in runs:
        try:
            bold = open_bold(run.path, run.tr)
            if len(run.key) > _LONGEST_KEY:
                raise HeaderError(f"{run.path}: its name in the dataset ({run.key}) is too long; shorten its entities.")
            if run.key in keys:
                raise HeaderError(
                    f"{run.path}: its name in the dataset ({run.key}) is taken by another run; rename it."
                )
        except HeaderError as error:
            rejected.append(Skipped(run.path, str(error)))
            continue
        keys.add(run.key)
        frames = bold.n_frames * bold.tr / recipe.tr
        size = int(frames * n_voxels * np.dtype(recipe.dtype).itemsize)
        if not groups or filled + size > SHARD_BYTES or len(groups[-1]) == SHARD_RUNS:
            groups.append([])
            filled = 0
        groups[-1].append(PlannedRun(run, _fingerprint(run, about)))
        filled += size
    shards = [PlannedShard(f"shard-{first + i:06d}.tar", tuple(group)) for i, group in enumerate(groups)]
    return shards, rejected


def software() -> dict[str, str]:
    """Return the versions of what a run's stored bytes depend on."""
    return {"python": sys.version.split()[0], **{name: version(name) for name in _PACKAGES}}


def _fingerprint(run: Run, about: dict[str, object]) -> str:
    stated = {field.name: _comparable(getattr(run, field.name)) for field in fields(run)}
    content = {**about, "key": run.key, "run": stated}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:32]


def _comparable(value: object) -> object:
    """Return a file's name, size and time for a path, with those of the voxels beside a header; else the value."""
    if not isinstance(value, Path):
        return value
    beside = [value.with_suffix(ending) for ending in (".img", ".img.gz")] if value.suffix == ".hdr" else []
    return [_state(path) for path in (value, *filter(Path.exists, beside))] if beside else _state(value)


def _state(path: Path) -> list[object]:
    try:
        state = path.stat()
    except OSError:  # whoever reads it will say so
        return [str(path.absolute())]
    return [str(path.absolute()), state.st_size, state.st_mtime_ns]
