"""Put a run on a grid: one linear interpolation in space through the affines, one in time.

Shape suffixes: T frames, V brain voxels of the grid.
"""

import numpy as np
import numpy.typing as npt
from scipy.ndimage import gaussian_filter1d
from scipy.sparse import csr_array

from boldforge.configs import BoldForgeError
from boldforge.data_shards.grid import Affine

Values = npt.NDArray[np.float32]

# Headers keep affines in float32: a point this near (in voxels) to a lattice point is that point.
_SNAP = 1e-4
# A voxel counts as covered when at least this share of its interpolation weight lies on voxels that hold signal.
_COVERED = 0.5
_FRAMES_AT_ONCE = 32
# Repetition times that differ by less than this are the same: over 300 frames the drift stays below 3 frames.
_SAME_TR = 0.01
# Gaussian whose gain at the new Nyquist frequency is one half: exp(-2 π² σ² f²) = 1/2 at f = 1 / (2 TR) gives σ / TR.
_SIGMA_PER_TR = float(np.sqrt(2 * np.log(2)) / np.pi)


class ResampleError(BoldForgeError):
    """A run does not reach the grid in space or has too few frames in time."""


def sampling_matrix(shape: tuple[int, int, int], affine: Affine, points: npt.NDArray[np.float64]) -> csr_array:
    """Return trilinear interpolation weights as a sparse matrix.

    Parameters
    ----------
    shape, affine
        Of the native image; affine [4, 4] to RAS+ mm.
    points
        Where to sample, in mm, float64 [V, 3].

    Returns
    -------
    csr_array, float32 [V, X·Y·Z] (Fortran order of voxels, first axis fastest, as NIfTI stores them). A row sums to 1
    inside the image, whose field of view reaches half a voxel beyond its outer centres, and is empty outside. A point
    on a voxel's centre has the one weight 1.
    """
    to_native = np.linalg.inv(affine)
    coordinates = points @ to_native[:3, :3].T + to_native[:3, 3]
    nearest = np.rint(coordinates)
    coordinates = np.where(np.abs(coordinates - nearest) < _SNAP, nearest, coordinates)
    size = np.array(shape)
    inside = ((coordinates >= -0.5) & (coordinates <= size - 0.5)).all(axis=1)
    kept = np.flatnonzero(inside)
    clamped = np.clip(coordinates[kept], 0, size - 1)
    low = np.floor(clamped).astype(np.int64)
    share = clamped - low
    strides = np.array([1, shape[0], shape[0] * shape[1]])
    rows, columns, weights = [], [], []
    for corner in np.ndindex(2, 2, 2):
        weight = np.prod(np.where(corner, share, 1 - share), axis=1)
        used = weight > 0  # an unused corner may lie beyond the border
        rows.append(kept[used])
        columns.append(((low + corner) @ strides)[used])
        weights.append(weight[used])
    entries = (np.concatenate(weights).astype(np.float32), (np.concatenate(rows), np.concatenate(columns)))
    return csr_array(entries, shape=(len(points), int(size.prod())))


def to_grid(data: Values, affine: Affine, points: npt.NDArray[np.float64]) -> tuple[Values, npt.NDArray[np.bool_]]:
    """Interpolate a run at points in mm.

    Native voxels without signal (constant in time, or not finite) take no part: their weight goes to the others, so the
    zeros around a masked brain do not dim its edge.

    Parameters
    ----------
    data
        float32 [X, Y, Z, T].
    affine
        [4, 4] to RAS+ mm.
    points
        float64 [V, 3], mm.

    Returns
    -------
    values float32 [T, V], 0 where not covered; covered bool [V].

    Raises
    ------
    ResampleError
        If no point is covered.
    """
    frames = data.reshape(-1, data.shape[3], order="F")
    low, high = frames.min(axis=1), frames.max(axis=1)  # NaN and infinity survive both
    signal = np.isfinite(low) & np.isfinite(high) & (high > low)
    matrix = sampling_matrix(data.shape[:3], affine, points)
    matrix.data = matrix.data * signal[matrix.indices]
    matrix.eliminate_zeros()
    weight = np.asarray(matrix.sum(axis=1), dtype=np.float32)
    covered = weight >= _COVERED
    if not covered.any():
        raise ResampleError(
            "no voxel with signal lies inside the MNI brain; check that the file is in MNI space and that "
            "its affine is right."
        )
    used = np.unique(matrix.indices)  # a native image is mostly head and air
    matrix = matrix[:, used]
    factor = np.where(covered, 1 / np.where(covered, weight, 1), 0).astype(np.float32)
    values = np.empty((frames.shape[1], len(points)), dtype=np.float32)
    for start in range(0, len(values), _FRAMES_AT_ONCE):
        block = np.ascontiguousarray(frames[used, start : start + _FRAMES_AT_ONCE])
        values[start : start + block.shape[1]] = (matrix @ block).T * factor
    return values, covered


def to_tr(values_TV: Values, tr: float, target_tr: float) -> Values:
    """Resample a run in time by linear interpolation.

    When the target is slower by more than a tenth, a Gaussian low-pass (gain one half at the new Nyquist frequency)
    comes first, so that faster signals do not fold into slower ones. Repetition times within 1 % count as equal.

    Parameters
    ----------
    values_TV
        float32 [T, V].
    tr, target_tr
        Seconds between frames, now and wanted.

    Returns
    -------
    float32 [T', V]; frame k lies at k · target_tr after the first frame, none beyond the last one.

    Raises
    ------
    ResampleError
        If fewer than two frames remain.
    """
    if abs(tr - target_tr) <= _SAME_TR * target_tr:
        return values_TV
    duration = (len(values_TV) - 1) * tr
    position = np.arange(int(np.floor(duration / target_tr + 1e-6)) + 1) * target_tr / tr
    if len(position) < 2:
        raise ResampleError(f"lasts {duration:.1f} s, too short for two frames at a repetition time of {target_tr} s.")
    if target_tr > 1.1 * tr:
        values_TV = gaussian_filter1d(values_TV, sigma=_SIGMA_PER_TR * target_tr / tr, axis=0, mode="nearest")
    low = np.minimum(position.astype(np.int64), len(values_TV) - 2)
    share = (position - low).astype(np.float32)[:, None]
    return values_TV[low] * (1 - share) + values_TV[low + 1] * share
