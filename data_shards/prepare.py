"""One run, from file to stored integers: read, place on the grid, resample in time, normalise, quantise."""

import hashlib
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import numpy.typing as npt

from boldforge.data_shards.grid import Affine, Grid, brain_mask, get_grid, mask_centres
from boldforge.data_shards.nifti import HeaderError, ReadError, open_bold
from boldforge.data_shards.normalise import Normalisation, NormaliseError, Quantised, normalise, quantise, temporal_snr
from boldforge.data_shards.recipe import DataRecipe
from boldforge.data_shards.resample import ResampleError, to_grid, to_tr
from boldforge.data_shards.runs import Run

# What can be wrong with one run; anything else is a fault of ours and must not be filed under "bad run".
RunProblem = (HeaderError, ReadError, ResampleError, NormaliseError)


@dataclass(frozen=True, eq=False)
class PreparedRun:
    """A run on the grid, before quantisation: values float32 [T, V], covered bool [V], and what was done to it."""

    values_TV: npt.NDArray[np.float32]
    covered: npt.NDArray[np.bool_]
    normalisation: Normalisation
    source_tr: float
    source_frames: int
    simulated: bool


@dataclass(frozen=True, eq=False)
class StoredRun:
    """A run as integers, with its figures."""

    stored: Quantised
    prepared: PreparedRun
    tsnr_db: float
    source_sha256: str


def prepare_run(run: Run, recipe: DataRecipe) -> PreparedRun:
    """Read a run and apply a recipe to it, up to quantisation.

    Raises
    ------
    HeaderError, ReadError, ResampleError, NormaliseError
        With one sentence that names the file.
    """
    bold = open_bold(run.path, run.tr)
    points = _brain_points(get_grid(recipe.grid))
    try:
        values_TV, covered = to_grid(bold.read(), bold.affine, points)
        if run.mask_path is not None:
            covered = covered & _inside_mask(run.mask_path, points)
        values_TV = to_tr(values_TV, bold.tr, recipe.tr)
        # Resampling in time can flatten a voxel that flickered between two frames: it has no deviation to divide by.
        covered = covered & _varies(values_TV)
        values_TV, normalisation = normalise(values_TV, covered, recipe.normalisation)
    except (ResampleError, NormaliseError) as error:
        raise type(error)(f"{run.path}: {error}") from None
    # Subtracting a large mean can round away what little a voxel varied.
    covered = covered & _varies(values_TV)
    simulated = run.simulated or bold.simulated
    return PreparedRun(values_TV, covered, normalisation, bold.tr, bold.n_frames, simulated)


def store_run(run: Run, recipe: DataRecipe) -> StoredRun:
    """Prepare and quantise a run; raises as `prepare_run` does."""
    prepared = prepare_run(run, recipe)
    stored = quantise(prepared.values_TV, prepared.covered, recipe.dtype)
    try:
        with run.path.open("rb") as file:
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:  # of the source, not of the shards that it goes into
        raise ReadError(f"{run.path}: cannot be read any more ({error.strerror}); check it and build again.") from None
    return StoredRun(stored, prepared, round(temporal_snr(prepared.values_TV, stored), 2), sha256)


@lru_cache(maxsize=2)
def _brain_points(grid: Grid) -> npt.NDArray[np.float64]:
    return mask_centres(grid, brain_mask(grid))


def _varies(values_TV: npt.NDArray[np.float32]) -> npt.NDArray[np.bool_]:
    varies: npt.NDArray[np.bool_] = values_TV.max(axis=0) > values_TV.min(axis=0)
    return varies


def _inside_mask(path: Path, points: npt.NDArray[np.float64]) -> npt.NDArray[np.bool_]:
    import nibabel as nib

    try:
        image = nib.load(path)
        mask = np.asarray(image.dataobj) > 0  # type: ignore[attr-defined]
        affine: Affine = np.asarray(image.affine, dtype=np.float64)  # type: ignore[attr-defined]
        to_native = np.linalg.inv(affine)
    except (OSError, EOFError, ValueError, np.linalg.LinAlgError, nib.filebasedimages.ImageFileError) as error:
        raise ReadError(f"{path}: the run's brain mask cannot be read ({error}); mend or remove it.") from None
    if mask.ndim != 3:
        raise ReadError(f"{path}: the run's brain mask has {mask.ndim} dimensions, expected 3; mend or remove it.")
    voxel = np.floor(np.round(points @ to_native[:3, :3].T + to_native[:3, 3], 6) + 0.5).astype(np.int64)
    valid = ((voxel >= 0) & (voxel < np.array(mask.shape))).all(axis=1)
    inside = np.zeros(len(points), dtype=bool)
    inside[valid] = mask[tuple(voxel[valid].T)]
    return inside
