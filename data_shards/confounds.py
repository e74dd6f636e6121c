"""Confounds as fMRIPrep writes them: regressors to clean a run with, and the frames in which the head moved."""

from fnmatch import fnmatchcase
from pathlib import Path

import numpy as np
import numpy.typing as npt

from boldforge.configs import BoldForgeError
from boldforge.data_shards.phenotype import LayoutError, read_table
from boldforge.data_shards.recipe import DataRecipe

_MOTION = tuple(f"{kind}_{axis}" for kind in ("trans", "rot") for axis in "xyz")
# The names that nilearn.interfaces.fmriprep.load_confounds gives to the same columns stand behind each.
CONFOUND_SETS = {
    "motion-6": _MOTION,  # motion="basic"
    "motion-24": tuple(  # motion="full", after Friston et al. 1996
        f"{name}{ending}" for name in _MOTION for ending in ("", "_derivative1", "_power2", "_derivative1_power2")
    ),
    "wm-csf": ("csf", "white_matter"),
    "global-signal": ("global_signal",),
    "cosine": ("cosine[0-9]*",),  # strategy high_pass
}
_DISPLACEMENT = "framewise_displacement"
_NOT_STEADY = "non_steady_state_outlier*"

Columns = dict[str, npt.NDArray[np.float64]]


class ConfoundError(BoldForgeError):
    """A run's confounds file is missing, does not fit the run, or lacks what the recipe asks for."""


def read_confounds(path: Path | None, n_frames: int) -> Columns:
    """Read a confounds table, float64 [T] by column.

    A missing first value (derivatives and displacements have none) becomes the second one, as in nilearn; a column with
    other missing values or with text holds NaN there.

    Raises
    ------
    ConfoundError
        If there is none, it cannot be read, or it has another number of rows than the run has frames.
    """
    if path is None:
        raise ConfoundError(
            "the recipe needs confounds (confounds or scrub_fd is set) but none were found; expected fMRIPrep's "
            "*_desc-confounds_timeseries.tsv beside the run, or a column confounds in the table of runs."
        )
    try:
        rows = read_table(path)
    except (LayoutError, OSError) as error:
        raise ConfoundError(f"its confounds cannot be read: {error}") from None
    if len(rows) != n_frames:
        raise ConfoundError(f"its confounds file {path.name} has {len(rows)} rows, the run {n_frames} frames.")
    columns = {name: np.array([_number(row[name]) for row in rows]) for name in rows[0]}
    for values in columns.values():
        if np.isnan(values[0]):
            values[0] = values[1]
    return columns


def regressors(columns: Columns, wanted: tuple[str, ...]) -> npt.NDArray[np.float64]:
    """Return the wanted columns, float64 [T, K], each once.

    Parameters
    ----------
    columns
        From `read_confounds`.
    wanted
        Names of `CONFOUND_SETS`, of columns, or patterns with ``*``, ``?`` and ``[…]``.

    Raises
    ------
    ConfoundError
        If nothing has such a name, or a column misses values after its first.
    """
    names: dict[str, None] = {}
    for item in wanted:
        for pattern in CONFOUND_SETS.get(item, (item,)):
            found = [name for name in columns if fnmatchcase(name, pattern)]
            if not found:
                raise ConfoundError(
                    f"its confounds file has no column {pattern!r}; it has {', '.join(list(columns)[:8])}, …"
                )
            names.update(dict.fromkeys(found))
    for name in names:
        if not np.isfinite(columns[name]).all():
            frame = int(np.flatnonzero(~np.isfinite(columns[name]))[0])
            raise ConfoundError(f"its confounds file has no number for {name} in frame {frame}.")
    return np.stack([columns[name] for name in names], axis=1)


def still_frames(columns: Columns, threshold_mm: float, keep: int) -> npt.NDArray[np.bool_]:
    """Return the frames to keep, bool [T]: displacement up to the threshold, steady state, in stretches of `keep`.

    Raises
    ------
    ConfoundError
        If there is no column of displacements, or nothing is left.
    """
    if _DISPLACEMENT not in columns:
        raise ConfoundError(f"its confounds file has no column {_DISPLACEMENT}, which scrub_fd needs.")
    displacement = columns[_DISPLACEMENT].copy()
    displacement[0] = 0.0  # the first frame has nothing to have moved from
    still = ~(displacement > threshold_mm) & ~np.isnan(displacement)
    for name, values in columns.items():
        if fnmatchcase(name, _NOT_STEADY):
            still &= values == 0
    for start, stop in consecutive(still):
        if stop - start < keep:
            still[start:stop] = False
    if not still.any():
        raise ConfoundError(
            f"the head never moved less than {threshold_mm:g} mm for {keep} frames in a row, so scrubbing leaves "
            "nothing of it."
        )
    return still


def consecutive(kept: npt.NDArray[np.bool_]) -> list[tuple[int, int]]:
    """Return where each row of kept frames starts and stops."""
    edges = np.flatnonzero(np.diff(np.concatenate([[False], kept, [False]]).astype(np.int8)))
    return [(int(start), int(stop)) for start, stop in edges.reshape(-1, 2)]


def check_band(recipe: DataRecipe, tr: float) -> None:
    """Refuse a filter that a run is sampled too slowly for.

    Raises
    ------
    ConfoundError
        If a filter's frequency is not below the run's Nyquist frequency.
    """
    nyquist = 0.5 / tr
    for name, frequency in (("high_pass", recipe.high_pass), ("low_pass", recipe.low_pass)):
        # nilearn warns and filters at the Nyquist frequency instead, which for a high-pass leaves next to nothing.
        if frequency is not None and frequency >= nyquist:
            raise ConfoundError(
                f"{name} is {frequency:g} Hz, expected less than {nyquist:.3g} Hz, half of the sampling rate at its "
                f"repetition time of {tr:g} s; choose a lower frequency or leave {name} out."
            )


def clean(
    values_TV: npt.NDArray[np.float32],
    confounds: npt.NDArray[np.float64] | None,
    kept: npt.NDArray[np.bool_],
    tr: float,
    recipe: DataRecipe,
) -> npt.NDArray[np.float32]:
    """Detrend, filter and regress confounds out of some voxels with `nilearn.signal.clean`, each keeping its mean.

    Parameters
    ----------
    values_TV
        float32 [T, V].
    confounds
        float64 [T, K] or None.
    kept
        bool [T]; the others are interpolated over before a filter and do not count in the regression.
    tr
        Seconds between frames.
    recipe
        Its ``detrend``, ``high_pass`` and ``low_pass``.

    Returns
    -------
    float32 [kept.sum(), V]

    Raises
    ------
    ConfoundError
        If a filter's frequency is not below the run's Nyquist frequency.
    """
    from nilearn.signal import clean as nilearn_clean

    check_band(recipe, tr)
    filtered = recipe.high_pass is not None or recipe.low_pass is not None
    cleaned = nilearn_clean(
        values_TV.astype(np.float64),
        detrend=recipe.detrend,
        standardize=None,
        sample_mask=None if kept.all() else np.flatnonzero(kept),
        confounds=confounds,
        filter="butterworth" if filtered else False,
        high_pass=recipe.high_pass,
        low_pass=recipe.low_pass,
        t_r=tr,
        extrapolate=False,
    )
    # Detrending and high-pass filtering take the mean away, which global-z and percent signal change live by.
    return (cleaned - cleaned.mean(axis=0) + values_TV[kept].mean(axis=0, dtype=np.float64)).astype(np.float32)


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return float("nan")
