"""One run, from file to stored integers: read, place on the grid, clean, resample in time, normalise, quantise.

A run is read a few frames at a time and worked on a few voxels at a time; what lies between goes through a `Spool`. So
memory does not grow with the length of a run, but for the integers in the end.

Shape suffixes: T frames, V brain voxels of the grid.
"""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from boldforge.data_shards.confounds import (
    ConfoundError,
    check_band,
    clean,
    consecutive,
    read_confounds,
    regressors,
    still_frames,
)
from boldforge.data_shards.grid import Grid, brain_mask, get_grid, mask_centres
from boldforge.data_shards.nifti import Bold, HeaderError, ReadError, open_bold, read_volume
from boldforge.data_shards.normalise import (
    Moments,
    Normalisation,
    NormaliseError,
    Quantised,
    apply_normalisation,
    background_of,
    decibels,
    fidelity,
    measure,
    normalisation_of,
    quantise,
)
from boldforge.data_shards.recipe import DataRecipe, NormalisationName
from boldforge.data_shards.resample import ResampleError, Series, frames_at, same_tr, to_grid, to_tr
from boldforge.data_shards.runs import Run
from boldforge.data_shards.spool import Spool

# What can be wrong with one run; anything else is a fault of ours and must not be filed under "bad run".
RunProblem = (HeaderError, ReadError, ResampleError, NormaliseError, ConfoundError)

_VOXELS_AT_ONCE = 8192

Bools = npt.NDArray[np.bool_]
Values = npt.NDArray[np.float32]


class Stretch(NamedTuple):
    """Stored frames [start, stop) that follow one another in time, and the source frame at which they start."""

    start: int
    stop: int
    source_start: int


@dataclass(frozen=True, eq=False, kw_only=True)
class Prepared:
    """What was done to a run: covered bool [V]; one stretch, or several where frames between them were removed."""

    covered: Bools
    normalisation: Normalisation
    source_tr: float
    source_frames: int
    simulated: bool
    stretches: tuple[Stretch, ...]


@dataclass(frozen=True, eq=False, kw_only=True)
class PreparedRun(Prepared):
    """A run on the grid, before quantisation: values float32 [T, V]."""

    values_TV: Values


@dataclass(frozen=True, eq=False)
class StoredRun:
    """A run as integers, with its figures."""

    stored: Quantised
    prepared: Prepared
    tsnr_db: float
    source_sha256: str


def prepare_run(run: Run, recipe: DataRecipe, scratch: Path | None = None) -> PreparedRun:
    """Read a run and apply a recipe to it, up to quantisation; the whole result is in memory.

    Raises
    ------
    HeaderError, ReadError, ResampleError, NormaliseError, ConfoundError
        With one sentence that names the file.
    """
    with _placed(run, recipe, scratch) as series:
        values_TV = np.empty(series.values.shape, dtype=np.float32)
        covered = np.empty(len(series.covered), dtype=bool)
        for columns, block_TV, block_covered in series.normalised():
            values_TV[:, columns], covered[columns] = block_TV, block_covered
        return PreparedRun(values_TV=values_TV, **series.about(covered))


def store_run(run: Run, recipe: DataRecipe, scratch: Path | None = None) -> StoredRun:
    """Prepare and quantise a run; raises as `prepare_run` does.

    Memory holds the integers and a few megabytes; `scratch` (None: the system's temporary folder) the values between.
    """
    with _placed(run, recipe, scratch) as series:
        n_frames, n_voxels = series.values.shape
        q = np.empty((n_frames, n_voxels), dtype=np.dtype(recipe.dtype).newbyteorder("<"))
        mean, scale = np.empty(n_voxels, dtype=np.float32), np.empty(n_voxels, dtype=np.float32)
        covered = np.empty(n_voxels, dtype=bool)
        parts = []
        for columns, values_TV, block_covered in series.normalised():
            block = quantise(values_TV, block_covered, recipe.dtype)
            q[:, columns], mean[columns], scale[columns] = block
            covered[columns] = block_covered
            parts.append(fidelity(values_TV, block))
        prepared = Prepared(**series.about(covered))
    try:
        with run.path.open("rb") as file:
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:  # of the source, not of the shards that it goes into
        raise ReadError(f"{run.path}: cannot be read any more ({error.strerror}); check it and build again.") from None
    return StoredRun(Quantised(q, mean, scale), prepared, round(decibels(parts), 2), sha256)


@dataclass(frozen=True, eq=False)
class _Series:
    """A run on the grid and in the recipe's time, not yet normalised: values float32 [T, V] and its figures."""

    values: Series
    covered: Bools
    moments: Moments
    normalisation: Normalisation
    background: float
    stretches: tuple[Stretch, ...]
    bold: Bold
    simulated: bool

    def normalised(self) -> Iterator[tuple[slice, Values, Bools]]:
        """Yield which voxels, their normalised values [T, n] and which of them carry signal."""
        for columns in _voxel_blocks(len(self.covered)):
            moments = self.moments.of(columns)
            covered = self.covered[columns]
            values_TV = self.values.read_columns(columns.start, columns.stop)
            values_TV = apply_normalisation(values_TV, covered, moments, self.normalisation, self.background)
            # Subtracting a large mean can round away what little a voxel varied.
            yield columns, values_TV, covered & (values_TV.max(axis=0) > values_TV.min(axis=0))

    def about(self, covered: Bools) -> dict[str, Any]:
        """Return the fields of `Prepared`."""
        return {
            "covered": covered,
            "normalisation": self.normalisation,
            "source_tr": self.bold.tr,
            "source_frames": self.bold.n_frames,
            "simulated": self.simulated,
            "stretches": self.stretches,
        }


@contextmanager
def _placed(run: Run, recipe: DataRecipe, scratch: Path | None) -> Iterator[_Series]:
    bold = open_bold(run.path, run.tr)
    grid = get_grid(recipe.grid)
    points = _brain_points(grid)
    try:
        plan = _plan_time(run, bold, recipe)
        values, covered = to_grid(bold, points, grid.voxel_size if recipe.antialias else None, scratch)
        if run.mask_path is not None:
            covered = covered & _inside_mask(run.mask_path, points)
        values = plan.apply(values, covered, scratch)
        with values:
            moments = _measure(values, recipe.normalisation)
            # Resampling in time can flatten a voxel that flickered between two frames: nothing is left to divide by.
            covered = covered & (moments.high > moments.low)
            how, covered = normalisation_of(moments, covered, recipe.normalisation)
            simulated = run.simulated or bold.simulated
            background = background_of(moments, covered, how)
            yield _Series(values, covered, moments, how, background, plan.stored_stretches(), bold, simulated)
    except (ResampleError, NormaliseError, ConfoundError) as error:
        raise type(error)(f"{run.path}: {error}") from None


@dataclass(frozen=True, eq=False)
class _TimePlan:
    """What happens along time: clean with confounds, drop frames, resample each stretch between them by itself."""

    recipe: DataRecipe
    tr: float
    confounds: npt.NDArray[np.float64] | None
    kept: Bools
    source_stretches: tuple[tuple[int, int], ...]

    def stored_stretches(self) -> tuple[Stretch, ...]:
        """Return the same stretches in stored frames, one after the other."""
        stretches, stored = [], 0
        for start, stop in self.source_stretches:
            length = frames_at(stop - start, self.tr, self.recipe.tr)
            stretches.append(Stretch(stored, stored + length, start))
            stored += length
        return tuple(stretches)

    def apply(self, values: Series, covered: Bools, scratch: Path | None) -> Series:
        """Return a spool [T', V] and close the one given, unless nothing changes."""
        n_frames = self.stored_stretches()[-1].stop
        if not self.recipe.cleans and self.kept.all() and same_tr(self.tr, self.recipe.tr):
            return values
        with values:
            result = Spool(n_frames, values.shape[1], np.float32, scratch)
            for columns in _voxel_blocks(values.shape[1]):
                block_TV = values.read_columns(columns.start, columns.stop)
                result.write_columns(columns.start, self._block(block_TV, covered[columns]))
            return result

    def _block(self, values_TV: Values, covered: Bools) -> Values:
        if self.recipe.cleans and covered.any():
            cleaned = np.zeros((int(self.kept.sum()), values_TV.shape[1]), dtype=np.float32)
            cleaned[:, covered] = clean(values_TV[:, covered], self.confounds, self.kept, self.tr, self.recipe)
        else:
            cleaned = values_TV[self.kept]
        position: npt.NDArray[np.int64] = np.cumsum(self.kept) - self.kept  # of a source frame among the kept ones
        parts = [cleaned[position[start] : position[start] + stop - start] for start, stop in self.source_stretches]
        return np.concatenate([to_tr(part, self.tr, self.recipe.tr, self.recipe.time_filter) for part in parts])


def _plan_time(run: Run, bold: Bold, recipe: DataRecipe) -> _TimePlan:
    """Check the filters and read the confounds, if the recipe needs any, before a voxel is decoded."""
    check_band(recipe, bold.tr)
    kept = np.ones(bold.n_frames, dtype=bool)
    confounds = None
    if recipe.confounds or recipe.scrub_fd is not None:
        columns = read_confounds(run.confounds_path, bold.n_frames)
        if recipe.confounds:
            confounds = regressors(columns, recipe.confounds)
        if recipe.scrub_fd is not None:
            kept = still_frames(columns, recipe.scrub_fd, recipe.scrub_keep)
    pieces = consecutive(kept)
    if len(pieces) > 1:
        pieces = [piece for piece in pieces if frames_at(piece[1] - piece[0], bold.tr, recipe.tr) >= 2]
        if not pieces:
            raise ConfoundError(
                f"the head never kept still long enough for two frames at a repetition time of {recipe.tr:g} s; raise "
                "scrub_keep or scrub_fd."
            )
    return _TimePlan(recipe, bold.tr, confounds, kept, tuple(pieces))


def _measure(values: Series, method: NormalisationName) -> Moments:
    blocks = _voxel_blocks(values.shape[1])
    parts = [measure(values.read_columns(block.start, block.stop), method) for block in blocks]
    return Moments(*(np.concatenate(part) for part in zip(*parts, strict=True)))


def _voxel_blocks(n_voxels: int) -> list[slice]:
    return [slice(start, min(start + _VOXELS_AT_ONCE, n_voxels)) for start in range(0, n_voxels, _VOXELS_AT_ONCE)]


@lru_cache(maxsize=2)
def _brain_points(grid: Grid) -> npt.NDArray[np.float64]:
    return mask_centres(grid, brain_mask(grid))


def _inside_mask(path: Path, points: npt.NDArray[np.float64]) -> Bools:
    """Say which points lie in voxels of a brain mask: the nearest one, as for all labels."""
    try:
        volume, affine = read_volume(path)
    except HeaderError as error:
        raise HeaderError(f"{error} This is the run's brain mask; mend or remove it.") from None
    to_native = np.linalg.inv(affine)
    voxel = np.floor(np.round(points @ to_native[:3, :3].T + to_native[:3, 3], 6) + 0.5).astype(np.int64)
    valid = ((voxel >= 0) & (voxel < np.array(volume.shape))).all(axis=1)
    inside = np.zeros(len(points), dtype=bool)
    inside[valid] = volume[tuple(voxel[valid].T)] > 0
    return inside
