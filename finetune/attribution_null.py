"""Whether a region's attribution goes with the label, among subjects whom the model has not seen.

Every model gives every region some attribution, also one that has learned nothing, and of the same sign in all
subjects: a test against zero (by flipping signs) would find it in noise. What noise cannot do is to go with labels that
the model has not seen. So labels are permuted, among the test subjects of one fold, because they share a model.

Shape suffixes: N subjects · R regions · S strata · D draws.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Figures = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Association:
    """How the attributions of R regions go with the labels.

    Attributes
    ----------
    slope
        [R]: change of the attribution per unit of the label, inside strata; of two classes the difference of means.
    correlation
        [R]: the same without unit, between -1 and 1; 0 where an attribution never varies.
    p
        [R]: family-wise over the R regions: the share of permutations in which the largest |correlation| of any region
        is at least this one's.
    """

    slope: Figures
    correlation: Figures
    p: Figures


def contrast(label_N: npt.ArrayLike, strata_N: Sequence[object]) -> Figures:
    """Return weights [N] whose product with an attribution is its slope on the label inside strata, or zeros."""
    label = _centred(np.asarray(label_N, dtype=np.float64)[:, None], _members(strata_N))[:, 0]
    square = float(label @ label)
    return label / square if square > 0 else label


def associate(
    values_NR: Figures, label_N: npt.ArrayLike, strata_N: Sequence[object], permutations: int, seed: int
) -> Association:
    """Measure how attributions go with labels, with p values from labels permuted inside strata.

    Parameters
    ----------
    values_NR
        Attribution of every subject and region.
    label_N
        0 and 1, or a number.
    strata_N
        Fold of every subject, or fold and site: subjects may exchange their labels inside one.
    permutations
        Draws; the smallest p is 1 / (draws + 1).
    seed
        Decides the draws.
    """
    members = _members(strata_N)
    label_N = np.asarray(label_N, dtype=np.float64)
    weights_N = contrast(label_N, strata_N)
    values_NR = _centred(values_NR, members)
    size_R = np.linalg.norm(values_NR, axis=0)
    # What is left of a constant after centring is rounding.
    size_R[size_R <= 1e-12 * np.abs(values_NR).max(initial=1e-300)] = np.inf
    unit_NR = values_NR / size_R
    label_N = _centred(label_N[:, None], members)[:, 0]
    length = np.linalg.norm(label_N)
    unit_N = label_N / length if length > 0 else label_N
    correlation_R = unit_N @ unit_NR
    generator = np.random.default_rng([seed, permutations])
    permuted_DN = np.tile(unit_N, (permutations, 1))
    for rows in members:
        permuted_DN[:, rows] = generator.permuted(permuted_DN[:, rows], axis=1)
    largest_D = np.abs(permuted_DN @ unit_NR).max(axis=1)
    # A permutation that gives the labels back must count, whatever its rounding.
    reached_R = (largest_D[:, None] >= np.abs(correlation_R) - 1e-9).sum(axis=0)
    return Association(weights_N @ values_NR, correlation_R, (1 + reached_R) / (1 + permutations))


def slope_intervals(
    values_NR: Figures, label_N: npt.ArrayLike, strata_N: Sequence[object], resamples: int, seed: int
) -> Figures:
    """Return 95 % bootstrap intervals of the slopes, [2, R], subjects resampled inside strata; NaN if undefined."""
    label_N = np.asarray(label_N, dtype=np.float64)
    generator = np.random.default_rng([seed, resamples, 1])
    product_DR = np.zeros((resamples, values_NR.shape[1]))
    square_D = np.zeros(resamples)
    for rows in _members(strata_N):
        n = len(rows)
        times_DN = generator.multinomial(n, np.full(n, 1 / n), size=resamples).astype(np.float64)
        # Around the stratum's own mean, where sums of products keep their digits.
        label, values = label_N[rows] - label_N[rows].mean(), values_NR[rows] - values_NR[rows].mean(axis=0)
        label_D = times_DN @ label
        product_DR += (times_DN * label) @ values - label_D[:, None] * (times_DN @ values) / n
        square_D += times_DN @ label**2 - label_D**2 / n
    # A resample may hold one class only.
    defined = square_D > 1e-9 * square_D.max(initial=0)
    if not defined.any():
        return np.full((2, values_NR.shape[1]), np.nan)
    return np.quantile(product_DR[defined] / square_D[defined, None], [0.025, 0.975], axis=0)


def _members(strata_N: Sequence[object]) -> list[npt.NDArray[np.int64]]:
    """Return the rows of every stratum, in the order in which strata appear."""
    found: dict[object, list[int]] = {}
    for row, stratum in enumerate(strata_N):
        found.setdefault(stratum, []).append(row)
    return [np.array(rows) for rows in found.values()]


def _centred(values_NR: Figures, members: Sequence[npt.NDArray[np.int64]]) -> Figures:
    centred = np.array(values_NR, dtype=np.float64)
    for rows in members:
        centred[rows] -= centred[rows].mean(axis=0)
    return centred
