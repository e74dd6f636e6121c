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


class NormaliseError(BoldForgeError):
    """A run has no variation to scale by."""


class Normalisation(StrictModel):
    """What was subtracted and divided by: ``stored = (value - mean) / std``.

    ``mean`` is None where each voxel's own temporal mean was subtracted, ``std`` where each voxel's own deviation was
    the divisor.
    """

    method: NormalisationName
    mean: float | None
    std: float | None


class Quantised(NamedTuple):
    """Integers q [T, V] with float32 mean [V] and scale [V]: ``value = mean + q · scale``; scale 0 marks no signal."""

    q: npt.NDArray[Any]
    mean: Values
    scale: Values


def normalise(
    values_TV: Values, covered: npt.NDArray[np.bool_], method: NormalisationName
) -> tuple[Values, Normalisation]:
    """Normalise a run over its covered brain voxels.

    ``residual-z`` subtracts each voxel's mean over time and divides by one standard deviation over all covered voxels
    and frames; ``voxel-z`` divides by each voxel's own; ``global-z`` uses one mean and one standard deviation.

    Parameters
    ----------
    values_TV
        float32 [T, V].
    covered
        bool [V]: voxels that carry signal; the others become 0 and do not count in the statistics.

    Raises
    ------
    NormaliseError
        If the covered voxels do not vary.
    """
    inside = values_TV[:, covered].astype(np.float32, copy=False)
    if inside.size == 0:
        raise NormaliseError(_FLAT)
    if method == "global-z":
        mean: float | None = float(inside.mean(dtype=np.float64))
        centred = inside - np.float32(mean)
    else:
        mean = None
        centred = inside - inside.mean(axis=0, dtype=np.float64).astype(np.float32)
    if method == "voxel-z":
        std = None
        divisor: Any = np.sqrt(np.square(centred, dtype=np.float64).mean(axis=0))
    else:
        std = divisor = float(np.sqrt(np.square(centred, dtype=np.float64).mean()))
    if not np.isfinite(divisor).all() or np.min(divisor) <= 0:
        raise NormaliseError(_FLAT)
    result = np.zeros(values_TV.shape, dtype=np.float32)
    result[:, covered] = centred / np.asarray(divisor, dtype=np.float32)
    return result, Normalisation(method=method, mean=mean, std=std)


def quantise(values_TV: Values, covered: npt.NDArray[np.bool_], dtype: str) -> Quantised:
    """Quantise each covered voxel to integers that span its own range around its own mean.

    Parameters
    ----------
    values_TV
        float32 [T, V].
    covered
        bool [V].
    dtype
        ``int16`` or ``int8``.
    """
    kind = np.dtype(dtype).newbyteorder("<")
    largest = np.iinfo(kind).max
    mean = np.where(covered, values_TV.mean(axis=0, dtype=np.float64), 0).astype(np.float32)
    reach = np.abs(values_TV - mean).max(axis=0)
    scale = np.where(covered, reach / largest, 0).astype(np.float32)
    steps = np.divide(values_TV - mean, scale, out=np.zeros_like(values_TV), where=scale > 0)
    q = np.clip(np.rint(steps), -largest, largest).astype(kind)
    return Quantised(q, mean * (scale > 0), scale)


def dequantise(stored: Quantised) -> Values:
    """Return float32 [T, V] values: ``mean + q · scale``."""
    values: Values = stored.mean + stored.q.astype(np.float32) * stored.scale
    return values


def temporal_snr(values_TV: Values, stored: Quantised) -> float:
    """Return the temporal SNR, in dB, of what was stored: variance over time against the error's mean square."""
    used = stored.scale > 0
    wanted = values_TV[:, used]
    error = np.square(dequantise(stored)[:, used] - wanted, dtype=np.float64).mean()
    variance = wanted.var(axis=0, dtype=np.float64).mean()
    return float(10 * np.log10(variance / max(error, np.finfo(np.float64).tiny)))
