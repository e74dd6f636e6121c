"""Put a run on a grid: one linear interpolation in space through the affines, one in time.

Shape suffixes: T frames, V brain voxels of the grid.
"""

from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
from scipy.ndimage import gaussian_filter, gaussian_filter1d
from scipy.sparse import csr_array

from boldforge.configs import BoldForgeError
from boldforge.data_shards.grid import Affine
from boldforge.data_shards.recipe import TimeFilterName
from boldforge.data_shards.spool import Spool

Values = npt.NDArray[np.float32]

# Headers keep affines in float32: a point this near (in voxels) to a lattice point is that point.
_SNAP = 1e-4
# A voxel counts as covered when at least this share of its interpolation weight lies on voxels that hold signal.
_COVERED = 0.5
_FRAMES_AT_ONCE = 32
_TURNED_AT_ONCE = 2048
_POINTS_AT_ONCE = 4096
# Repetition times that differ by less than this are the same: over 300 frames the drift stays below 3 frames.
_SAME_TR = 0.01
# Gaussian whose gain at the Nyquist frequency is one half: exp(-2 π² σ² f²) = 1/2 at f = 1 / (2 step) gives σ / step.
_SIGMA_PER_STEP = float(np.sqrt(2 * np.log(2)) / np.pi)
# As scipy.signal.resample_poly: ten periods of the slower rate to either side, Kaiser window of β = 5.
_SINC_PERIODS = 10
_KAISER_BETA = 5.0
_ELSEWHERE = (
    "no voxel with signal lies inside the MNI brain; check that the file is in MNI space and that its affine is right."
)


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
    per_axis = [(1 - part, part) for part in share.T]
    rows, columns, weights = [], [], []
    for corner in np.ndindex(2, 2, 2):
        x, y, z = (parts[high] for parts, high in zip(per_axis, corner, strict=True))
        weight = x * y * z
        used = weight > 0  # an unused corner may lie beyond the border
        if corner != (0, 0, 0) and not used.any():
            continue
        rows.append(kept[used])
        columns.append(((low + corner) @ strides)[used])
        weights.append(weight[used])
    entries = (np.concatenate(weights).astype(np.float32), (np.concatenate(rows), np.concatenate(columns)))
    return csr_array(entries, shape=(len(points), int(size.prod())))


class Frames(Protocol):
    """A recording that is decoded a few frames at a time; `boldforge.data_shards.Bold` is one."""

    @property
    def shape(self) -> tuple[int, int, int]:
        """Voxels along the three axes of space."""

    @property
    def affine(self) -> Affine:
        """From voxel index to RAS+ mm, [4, 4]."""

    @property
    def n_frames(self) -> int:
        """Frames in all."""

    def blocks(self) -> Iterator[npt.NDArray[Any]]:
        """Yield [X·Y·Z, n], first axis of space fastest."""


def to_grid(
    run: Frames, points: npt.NDArray[np.float64], antialias_mm: float | None = None, scratch: Path | None = None
) -> "tuple[Series, npt.NDArray[np.bool_]]":
    """Interpolate a run at points in mm, reading it once and holding a few frames of it at a time.

    Native voxels without signal (constant in time, or not finite) take no part: their weight goes to the others, so the
    zeros around a masked brain do not dim its edge. Which those are is known after the last frame, so the voxels that
    any point needs are laid by until then.

    Parameters
    ----------
    run
        The recording.
    points
        float64 [V, 3], mm.
    antialias_mm
        Edge of the points' voxels. Given, the run is smoothed first along every axis on which it is sampled more than
        a tenth finer, by a Gaussian whose variance is the difference of two that have a gain of one half at either
        Nyquist frequency.
    scratch
        Folder for what does not fit into memory.

    Returns
    -------
    values, a spool or `Copied`, float32 [T, V], 0 where not covered; covered bool [V].

    Raises
    ------
    ResampleError
        If no point is covered.
    """
    matrix = sampling_matrix(run.shape, run.affine, points)
    sigma = _antialias_sigma(run.affine, antialias_mm)
    if matrix.nnz == 0:
        raise ResampleError(_ELSEWHERE)
    if sigma is None and (matrix.data == 1).all():
        return _copy(run, matrix, scratch)
    needed = _used_columns(matrix) if sigma is None else _box_around(matrix, run.shape, sigma)
    native, signal = _lay_by(run, needed, scratch)
    with native:
        matrix = matrix[:, needed]
        masked = matrix.copy()
        masked.data = masked.data * signal[masked.indices]
        masked.eliminate_zeros()
        weight = np.asarray(masked.sum(axis=1), dtype=np.float32)
        covered = weight >= _COVERED
        if not covered.any():
            raise _nothing_covered(native)
        if sigma is None:
            used = np.flatnonzero(signal)
            sample: _Linear | _Smoothed = _Linear(masked[:, used], used, _inverse(weight, covered))
        else:
            sample = _Smoothed(matrix, signal, covered, needed, run.shape, sigma)
        values = Spool(run.n_frames, len(points), np.float32, scratch)
        for start in range(0, run.n_frames, _FRAMES_AT_ONCE):
            rows = native.read_rows(start, min(start + _FRAMES_AT_ONCE, run.n_frames))
            with values.rows_to_fill(start, len(rows)) as place:
                sample(rows, place)
    return values, covered


def _copy(run: Frames, matrix: csr_array, scratch: Path | None) -> tuple["Copied", npt.NDArray[np.bool_]]:
    """Do what `to_grid` does where every point lies on a voxel's centre: each value is one native value as it is."""
    on_image = np.flatnonzero(np.diff(matrix.indptr))
    native, signal = _lay_by(run, matrix.indices, scratch)
    covered = np.zeros(matrix.shape[0], dtype=bool)
    covered[on_image] = signal
    if not covered.any():
        with native:
            raise _nothing_covered(native)
    return Copied(native, on_image, covered), covered


class Copied:
    """Read like a `Spool` of float32 [T, V], but kept in the file's own type, which takes half the room or less.

    Parameters
    ----------
    native
        [T, n], taken over: closed with this.
    on_image
        Which of the V points its columns are, ascending.
    covered
        bool [V]; the other points read as 0.
    """

    def __init__(self, native: Spool, on_image: npt.NDArray[np.int64], covered: npt.NDArray[np.bool_]) -> None:
        self.shape = (native.shape[0], len(covered))
        self._native, self._on_image, self._covered = native, on_image, covered.copy()

    def __enter__(self) -> "Copied":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Give the memory or the disk space back."""
        self._native.close()

    def read_rows(self, start: int, stop: int) -> Values:
        """Return frames `start` to `stop`, [n, V]."""
        return self._placed(self._native.read_rows(start, stop), slice(0, self.shape[1]), self._on_image)

    def read_columns(self, start: int, stop: int) -> Values:
        """Return points `start` to `stop`, [T, n], in C order."""
        first, last = np.searchsorted(self._on_image, (start, stop))
        native = self._native.read_columns(int(first), int(last))
        return self._placed(native, slice(start, stop), self._on_image[first:last] - start)

    def _placed(self, native: npt.NDArray[Any], points: slice, where: npt.NDArray[np.int64]) -> Values:
        covered = self._covered[points]
        if len(where) == len(covered):
            values = native.astype(np.float32, order="C")
        else:
            values = np.zeros((len(native), len(covered)), dtype=np.float32)
            values[:, where] = native
        if not covered.all():
            values[:, ~covered] = 0
        return values


Series = Spool | Copied


def _used_columns(matrix: csr_array) -> npt.NDArray[np.int64]:
    used = np.zeros(matrix.shape[1], dtype=bool)
    used[matrix.indices] = True
    return np.flatnonzero(used)


def _lay_by(run: Frames, needed: npt.NDArray[np.int64], scratch: Path | None) -> tuple[Spool, npt.NDArray[np.bool_]]:
    """Decode a run once: keep the needed voxels as [T, n], and tell which of them carry signal."""
    spool: Spool | None = None
    start = 0
    for block in run.blocks():
        rows = np.take(block.T, needed, axis=1)
        if rows.dtype.kind == "f" or rows.dtype.itemsize > 2:
            with np.errstate(over="ignore"):  # becomes infinite, which is not signal
                rows = rows.astype(np.float32)
        if spool is None:
            spool = Spool(run.n_frames, len(needed), rows.dtype.newbyteorder("="), scratch)
            low, high = rows.min(axis=0), rows.max(axis=0)
        else:
            low, high = np.minimum(low, rows.min(axis=0)), np.maximum(high, rows.max(axis=0))
        spool.write_rows(start, rows)
        start += len(rows)
    assert spool is not None and start == run.n_frames, "a checked header promises at least two frames"
    return spool, np.isfinite(low) & np.isfinite(high) & (high > low)  # NaN and infinity survive both


def _nothing_covered(native: Spool) -> ResampleError:
    """Tell a file that holds NaN from one that lies elsewhere."""
    finite = [np.isfinite(native.read_rows(frame, frame + 1)) for frame in range(native.shape[0])]
    empty = [frame for frame, values in enumerate(finite) if not values.any()]
    if empty:
        return ResampleError(
            f"frame {empty[0]} (the first is 0) holds NaN or infinity in every voxel of the brain, so no voxel has a "
            "signal over all frames; remove that frame, or mend the file."
        )
    if not all(values.all() for values in finite):
        return ResampleError(
            "no voxel of the brain has a signal over all frames: where values vary, some are NaN or infinity; mend the "
            "file."
        )
    return ResampleError(_ELSEWHERE)


def _inverse(weight: Values, covered: npt.NDArray[np.bool_]) -> Values:
    return np.where(covered, 1 / np.where(covered, weight, 1), 0).astype(np.float32)


class _Linear:
    """Sampling of frames [n, needed] by a matrix [V, used], divided by the weight that lies on signal.

    A cache's worth of voxels and of points at a time: all at once, what one step writes would have left the cache
    before the next step reads it.
    """

    def __init__(self, matrix: csr_array, used: npt.NDArray[np.int64], factor_V: Values) -> None:
        self._used, self._factor_V = used, factor_V
        self._parts = [matrix[start : start + _POINTS_AT_ONCE] for start in range(0, len(factor_V), _POINTS_AT_ONCE)]
        self._turned = np.empty((len(used), _FRAMES_AT_ONCE), dtype=np.float32)

    def __call__(self, rows: npt.NDArray[Any], out: Values) -> None:
        turned = (
            self._turned if len(rows) == _FRAMES_AT_ONCE else np.empty_like(self._turned[:, : len(rows)], order="C")
        )
        for start in range(0, len(turned), _TURNED_AT_ONCE):
            part = self._used[start : start + _TURNED_AT_ONCE]
            turned[start : start + len(part)] = np.take(rows, part, axis=1).T
        for number, matrix in enumerate(self._parts):
            points = slice(number * _POINTS_AT_ONCE, (number + 1) * _POINTS_AT_ONCE)
            np.multiply((matrix @ turned).T, self._factor_V[points], out=out[:, points])


class _Smoothed:
    """Sampling of frames after a Gaussian over the voxels that carry signal."""

    def __init__(
        self,
        matrix: csr_array,
        signal: npt.NDArray[np.bool_],
        covered: npt.NDArray[np.bool_],
        needed: npt.NDArray[np.int64],
        shape: tuple[int, int, int],
        sigma: npt.NDArray[np.float64],
    ) -> None:
        corners = [np.unravel_index(needed[i], shape, order="F") for i in (0, -1)]
        self._box = tuple(int(last - first) + 1 for first, last in zip(*corners, strict=True))
        self._matrix, self._signal, self._sigma = matrix, signal, sigma
        weight = matrix @ self._smooth(signal.astype(np.float32))
        self._factor_V = _inverse(weight, covered & (weight > 0))

    def _smooth(self, frame: Values) -> Values:
        volume = frame.reshape(self._box, order="F")
        smooth: Values = gaussian_filter(volume, self._sigma, mode="constant").reshape(-1, order="F")
        return smooth

    def __call__(self, rows: npt.NDArray[Any], out: Values) -> None:
        frames = [self._smooth(np.where(self._signal, row, 0).astype(np.float32)) for row in rows]
        np.multiply((self._matrix @ np.stack(frames, axis=1)).T, self._factor_V, out=out)


def _antialias_sigma(affine: Affine, target_mm: float | None) -> npt.NDArray[np.float64] | None:
    """Return the Gaussian's standard deviation per native axis in voxels, None where nothing is to be smoothed."""
    if target_mm is None:
        return None
    size = np.linalg.norm(affine[:3, :3], axis=0)
    ratio = np.where(target_mm > 1.1 * size, target_mm / size, 1.0)
    sigma: npt.NDArray[np.float64] = _SIGMA_PER_STEP * np.sqrt(ratio**2 - 1)
    return sigma if sigma.any() else None


def _box_around(
    matrix: csr_array, shape: tuple[int, int, int], sigma: npt.NDArray[np.float64]
) -> npt.NDArray[np.int64]:
    """Return the voxels of the box that holds every sampled voxel and the Gaussian around it."""
    used = _used_columns(matrix)
    index = np.array(np.unravel_index(used, shape, order="F"))
    reach = np.ceil(4 * sigma).astype(int)  # where scipy cuts the Gaussian
    low = np.maximum(index.min(axis=1) - reach, 0)
    high = np.minimum(index.max(axis=1) + reach, np.array(shape) - 1)
    x, y, z = (np.arange(first, last + 1) for first, last in zip(low, high, strict=True))
    box: npt.NDArray[np.int64] = (x + shape[0] * (y[:, None] + shape[1] * z[:, None, None])).reshape(-1)
    return box


def same_tr(tr: float, target_tr: float) -> bool:
    """Say whether two repetition times count as equal."""
    return abs(tr - target_tr) <= _SAME_TR * target_tr


def frames_at(n_frames: int, tr: float, target_tr: float) -> int:
    """Return how many frames a stretch has after `to_tr`; fewer than two are too few."""
    return n_frames if same_tr(tr, target_tr) else int(np.floor((n_frames - 1) * tr / target_tr + 1e-6)) + 1


def to_tr(values_TV: Values, tr: float, target_tr: float, time_filter: TimeFilterName = "gaussian") -> Values:
    """Resample a run in time. Repetition times within 1 % count as equal.

    ``gaussian`` interpolates linearly; when the target is slower by more than a tenth, a Gaussian low-pass with a gain
    of one half at the new Nyquist frequency comes first. ``sinc`` interpolates with a windowed sinc that is cut at the
    lower of the two Nyquist frequencies: nearly flat below, nothing from a fifth above, but each value depends on ten
    periods of the slower rate to either side.

    Parameters
    ----------
    values_TV
        float32 [T, V].
    tr, target_tr
        Seconds between frames, now and wanted.
    time_filter
        ``gaussian`` or ``sinc``.

    Returns
    -------
    float32 [T', V]; frame k lies at k · target_tr after the first frame, none beyond the last one.

    Raises
    ------
    ResampleError
        If fewer than two frames remain.
    """
    if same_tr(tr, target_tr):
        return values_TV
    n_frames = frames_at(len(values_TV), tr, target_tr)
    if n_frames < 2:
        duration = (len(values_TV) - 1) * tr
        raise ResampleError(f"lasts {duration:.1f} s, too short for two frames at a repetition time of {target_tr} s.")
    position = np.arange(n_frames, dtype=np.float64) * target_tr / tr
    if time_filter == "sinc":
        resampled: Values = sinc_matrix(len(values_TV), position, max(target_tr / tr, 1.0)) @ values_TV
        return resampled
    if target_tr > 1.1 * tr:
        values_TV = gaussian_filter1d(values_TV, sigma=_SIGMA_PER_STEP * target_tr / tr, axis=0, mode="nearest")
    low = np.minimum(position.astype(np.int64), len(values_TV) - 2)
    share = (position - low).astype(np.float32)[:, None]
    return values_TV[low] * (1 - share) + values_TV[low + 1] * share


def sinc_matrix(n_frames: int, position: npt.NDArray[np.floating[Any]], step: float) -> csr_array:
    """Return the weights of a Kaiser-windowed sinc, float32 [len(position), n_frames]; each row sums to 1.

    Length and window are those of `scipy.signal.resample_poly`. Beyond its ends a run goes on as its mirror image,
    turned by 180 degrees about its last value, so that constants and straight lines pass unchanged there too.

    Parameters
    ----------
    n_frames
        Of the run.
    position
        Where to interpolate, in frames of the run.
    step
        Frames of the run per period of the slower of the two rates, at least 1.
    """
    reach = _SINC_PERIODS * step
    offsets = np.arange(-int(np.ceil(reach)), int(np.ceil(reach)) + 2)
    index = np.floor(position).astype(np.int64)[:, None] + offsets
    apart = (position[:, None] - index) / step
    weight = np.sinc(apart) * np.i0(_KAISER_BETA * np.sqrt(np.clip(1 - (apart / _SINC_PERIODS) ** 2, 0, None)))
    weight = np.where(np.abs(apart) < _SINC_PERIODS, weight, 0)
    weight /= weight.sum(axis=1, keepdims=True)
    last = n_frames - 1
    edge = np.clip(index, 0, last)
    mirrored = np.clip(2 * edge - index, 0, last)  # of a short run the mirror image ends, too
    rows = np.broadcast_to(np.arange(len(position))[:, None], index.shape)
    beyond = edge != index
    entries = np.concatenate([np.where(beyond, 2 * weight, weight).ravel(), -weight[beyond]])
    columns = np.concatenate([edge.ravel(), mirrored[beyond]])
    shape = (len(position), n_frames)
    matrix = csr_array((entries, (np.concatenate([rows.ravel(), rows[beyond]]), columns)), shape=shape)
    return matrix.astype(np.float32)
