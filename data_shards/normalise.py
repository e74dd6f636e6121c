"""Bring a run to a common scale, and to integers with a mean and a scale per voxel.

Shape suffixes: T frames, V brain voxels of the grid.
"""

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from boldforge.configs import BoldForgeError, StrictModel
from boldforge.data_shards.recipe import NormalisationName

Values = npt.NDArray[np.float32]

_FLAT = "its brain voxels do not vary over time, so there is nothing to store."
# Percent of a mean near zero means nothing: a voxel needs this share of the brain's median mean.
_LOWEST_MEAN = 0.01
_NO_ERROR = 1e-30


class NormaliseError(BoldForgeError):
    """A run has no variation to scale by."""


class Normalisation(StrictModel):
    """What was subtracted and divided by: ``stored = (value - mean) / std``.

    ``mean`` is None where each voxel's own temporal mean was subtracted, ``std`` where each voxel's own deviation (for
    ``percent-signal-change``: a hundredth of its mean) was the divisor. For ``min-max`` the two are the lowest value
    and the range, so zero lies at ``-mean / std`` and what was negative lies below that.
    """

    method: NormalisationName
    mean: float | None
    std: float | None


class Moments(NamedTuple):
    """Per voxel over time, all [V]: mean (float64), mean square around float32(mean) (float64), lowest, highest."""

    mean: npt.NDArray[np.float64]
    square: npt.NDArray[np.float64]
    low: Values
    high: Values

    def of(self, voxels: slice) -> "Moments":
        """Return some voxels' moments."""
        return Moments(self.mean[voxels], self.square[voxels], self.low[voxels], self.high[voxels])


class Quantised(NamedTuple):
    """Integers q [T, V] with float32 mean [V] and scale [V]: ``value = mean + q · scale``; scale 0 marks no signal.

    ``mean`` is the value of q = 0, near the middle of the voxel's range; its average over time is close but not it.
    """

    q: npt.NDArray[Any]
    mean: Values
    scale: Values


def measure(values_TV: Values, method: NormalisationName) -> Moments:
    """Return what `normalisation_of` needs; a voxel's figures do not depend on which others are measured with it."""
    values_TV = _without_negatives(values_TV, method)
    mean = values_TV.mean(axis=0, dtype=np.float64)
    square = np.square(values_TV - mean.astype(np.float32), dtype=np.float64).mean(axis=0)
    return Moments(mean, square, values_TV.min(axis=0), values_TV.max(axis=0))


def normalisation_of(
    moments: Moments, covered: npt.NDArray[np.bool_], method: NormalisationName
) -> tuple[Normalisation, npt.NDArray[np.bool_]]:
    """Turn a run's moments into what is subtracted and divided by, and say which covered voxels that is defined for.

    Raises
    ------
    NormaliseError
        If the covered voxels do not vary, or percent signal change is asked of data whose mean was removed.
    """
    mean, square = moments.mean[covered], moments.square[covered]
    if mean.size == 0 or not np.isfinite(square).all() or square.max() <= 0:
        raise NormaliseError(_FLAT)
    if method == "residual-z":
        return Normalisation(method=method, mean=None, std=float(np.sqrt(square.mean()))), covered
    if method == "voxel-z":
        if square.min() <= 0:
            raise NormaliseError(_FLAT)
        return Normalisation(method=method, mean=None, std=None), covered
    if method in ("global-z", "neurostorm"):
        centre = float(mean.mean())
        variance = square - np.square(mean - mean.astype(np.float32)) + np.square(mean - centre)
        return Normalisation(method=method, mean=centre, std=float(np.sqrt(variance.mean()))), covered
    if method == "min-max":
        low, high = float(moments.low[covered].min()), float(moments.high[covered].max())
        return Normalisation(method=method, mean=low, std=high - low), covered
    return Normalisation(method=method, mean=None, std=None), covered & _has_baseline(moments, covered)


def _has_baseline(moments: Moments, covered: npt.NDArray[np.bool_]) -> npt.NDArray[np.bool_]:
    mean = moments.mean[covered]
    if np.median(mean) <= np.median(np.sqrt(moments.square[covered])):
        raise NormaliseError(
            "its voxels' means over time are about zero, as in residual data, so percent signal change is not defined; "
            "choose residual-z."
        )
    enough: npt.NDArray[np.bool_] = moments.mean > _LOWEST_MEAN * np.median(mean)
    return enough


def background_of(moments: Moments, covered: npt.NDArray[np.bool_], how: Normalisation) -> float:
    """Return what a run's voxels without signal hold: 0, or for ``neurostorm`` its lowest normalised value."""
    if how.method != "neurostorm" or how.mean is None or how.std is None:
        return 0.0
    return float((moments.low[covered].min() - np.float32(how.mean)) / np.float32(how.std))


def apply_normalisation(
    values_TV: Values,
    covered: npt.NDArray[np.bool_],
    moments: Moments,
    how: Normalisation,
    background: float = 0.0,
) -> Values:
    """Normalise some voxels, float32 [T, V], by their own moments and the run's; the others get `background`."""
    values_TV = _without_negatives(values_TV, how.method)
    own_mean = moments.mean.astype(np.float32)
    centre: Any = own_mean if how.mean is None else np.float32(how.mean)
    divisor: Any = how.std
    if divisor is None:
        own = moments.mean / 100 if how.method == "percent-signal-change" else np.sqrt(moments.square)
        divisor = np.where(covered, own, 1)
    result: Values = (values_TV - centre) / np.asarray(divisor, dtype=np.float32)
    result[:, ~covered] = background
    return result


def _without_negatives(values_TV: Values, method: NormalisationName) -> Values:
    return np.maximum(values_TV, 0) if method == "neurostorm" else values_TV


def normalise(
    values_TV: Values, covered: npt.NDArray[np.bool_], method: NormalisationName
) -> tuple[Values, Normalisation]:
    """Normalise a run over its covered brain voxels.

    ``residual-z`` subtracts each voxel's mean over time and divides by one standard deviation over all covered voxels
    and frames; ``voxel-z`` divides by each voxel's own; ``global-z`` uses one mean and one standard deviation;
    ``min-max`` maps the lowest value to 0 and the highest to 1; ``percent-signal-change`` is 100 times the change
    from the voxel's mean over that mean. Nothing is clipped, so in all but min-max a value below the mean is negative.
    ``neurostorm`` is that model's: negative values become 0, then ``global-z``, and what carries no signal (background,
    padding) gets the brain's lowest value.

    Parameters
    ----------
    values_TV
        float32 [T, V].
    covered
        bool [V]: voxels that carry signal; the others become 0 (see ``neurostorm``) and do not count in the statistics.

    Raises
    ------
    NormaliseError
        As `normalisation_of` does.
    """
    moments = measure(values_TV.astype(np.float32, copy=False), method)
    how, covered = normalisation_of(moments, covered, method)
    background = background_of(moments, covered, how)
    return apply_normalisation(values_TV, covered, moments, how, background), how


def quantise(values_TV: Values, covered: npt.NDArray[np.bool_], dtype: str) -> Quantised:
    """Quantise each covered voxel to integers that span its own range, from its lowest value to its highest.

    Around the mean instead, the larger excursion would leave integers of the other side unused: 1.0 to 1.5 dB less at
    int8 on real runs. Clipping rare peaks, or refitting the scale to the integers, gained at most 0.1 dB.

    Parameters
    ----------
    values_TV
        float32 [T, V].
    covered
        bool [V]. The others hold one value, which is stored as their mean.
    dtype
        ``int16`` or ``int8``.
    """
    kind = np.dtype(dtype).newbyteorder("<")
    smallest, largest = np.iinfo(kind).min, np.iinfo(kind).max
    low, high = values_TV.min(axis=0), values_TV.max(axis=0)
    scale = np.where(covered, (high - low) / (largest - smallest), 0).astype(np.float32)
    mean = np.where(scale > 0, low - smallest * scale, values_TV[0]).astype(np.float32)
    steps = np.divide(values_TV - mean, scale, out=np.zeros_like(values_TV), where=scale > 0)
    q = np.clip(np.rint(steps, out=steps), smallest, largest).astype(kind)
    return Quantised(q, mean, scale)


def dequantise(stored: Quantised) -> Values:
    """Return float32 [T, V] values: ``mean + q · scale``."""
    values: Values = stored.mean + stored.q.astype(np.float32) * stored.scale
    return values


class Fidelity(NamedTuple):
    """Of some voxels that carry signal: how many, and the sums of their variances and of their mean square errors."""

    n_voxels: int
    variance: float
    error: float


def fidelity(values_TV: Values, stored: Quantised) -> Fidelity:
    """Compare some voxels of a run with what was stored of them; sums over voxels, so parts of a run add up."""
    used = stored.scale > 0
    error = np.square(dequantise(stored) - values_TV, dtype=np.float64).mean(axis=0)[used]
    variance = values_TV.var(axis=0, dtype=np.float64)[used]
    return Fidelity(int(used.sum()), float(variance.sum()), float(error.sum()))


def decibels(parts: list[Fidelity]) -> float:
    """Return the temporal SNR of a run's parts together: variance over time against mean square error, in dB."""
    variance, error = sum(part.variance for part in parts), sum(part.error for part in parts)
    # Of a run without any error, a figure still: JSON has no infinity.
    return float(10 * np.log10(variance / max(error, _NO_ERROR * variance)))


def temporal_snr(values_TV: Values, stored: Quantised) -> float:
    """Return the temporal SNR, in dB, of what was stored: variance over time against the error's mean square."""
    return decibels([fidelity(values_TV, stored)])
