"""95 % intervals of figures that a bootstrap gets wrong where few subjects were tested: AUC, shares, and rows of few.

Of subjects who were all told right every resampling is all right, too, so a bootstrap gives an AUC of 1 the interval 1
to 1. Of blocks of a few people it resamples those few, and its intervals are far too narrow.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.stats import t as student

FEWEST_CLUSTERS = 5
_WITHIN_ONE = ("accuracy", "balanced_accuracy", "auc", "sensitivity", "specificity", "top1", "top5", "brier")
_Z95, _BISECTIONS = 1.959964, 60
_SHARES = ("accuracy", "top1", "top5")


def cluster_intervals(
    figures: Callable[[npt.NDArray[np.int64]], Mapping[str, Any]], clusters: Sequence[str]
) -> dict[str, list[float]]:
    """Return 95 % intervals where rows hang together: Student's t over leaving out one cluster at a time (jackknife).

    Of a mean over equally large clusters it is the t interval of the clusters' own means.

    Parameters
    ----------
    figures
        Computes the figures of some rows, given by position.
    clusters
        One per row, such as its person.

    Returns
    -------
    dict
        Figure to [low, high]; empty below `FEWEST_CLUSTERS`, where any interval would be a guess. A figure that is
        undefined without one of the clusters has none. Counts have none.
    """
    names, place = np.unique(np.array(clusters), return_inverse=True)
    if len(names) < FEWEST_CLUSTERS:
        return {}
    left = [figures(np.flatnonzero(place != out)) for out in range(len(names))]
    found = {}
    for name, value in figures(np.arange(len(place))).items():
        without = [row[name] for row in left]
        if not isinstance(value, float) or name.startswith("n_") or any(one is None for one in without):
            continue
        error = math.sqrt((len(names) - 1) / len(names) * float(np.square(np.array(without) - np.mean(without)).sum()))
        half = float(student.ppf(0.975, len(names) - 1)) * error
        low, high = value - half, value + half
        found[name] = [max(0.0, low), min(1.0, high)] if name in _WITHIN_ONE else [low, high]
    return found


def score_intervals(
    resampled: Mapping[str, list[float]],
    figures: Mapping[str, Any],
    labels: npt.ArrayLike,
    clusters: Sequence[str] | None = None,
) -> dict[str, list[float]]:
    """Replace the bootstrap's intervals where a closed form does better.

    Parameters
    ----------
    resampled
        Of `bootstrap_intervals`, or of `cluster_intervals`.
    figures
        Of all rows.
    labels
        One per row.
    clusters
        What rows hang together. Each then counts for one, and the intervals given stay except where no cluster made
        a difference.

    Returns
    -------
    dict
        Newcombe's interval (`auc_interval`) for the AUC of two classes, Wilson's (`share_interval`) for shares, and
        their combination (Newcombe 1998, Statistics in Medicine 17, 873, method 10, for the mean of shares in place of
        their difference) for the balanced accuracy. An AUC of several classes keeps the bootstrap's unless it has
        collapsed; then its ends are the mean of the classes' own, as if they rose and fell together. Figures that are
        neither keep the bootstrap's.
    """
    truth = np.asarray(labels)
    binary, classes = "n_positive" in figures, "confusion" in figures
    sizes = _sizes(truth, clusters) if binary or classes else []
    shares: dict[str, int] = dict.fromkeys(_SHARES, len(truth) if clusters is None else len(set(clusters)))
    if binary and len(sizes) == 2:
        shares |= {"specificity": sizes[0], "sensitivity": sizes[1]}
    found = dict(resampled)
    for name, (low, high) in resampled.items():
        value, collapsed = figures.get(name), low == high
        if value is None or (clusters is not None and not collapsed):
            continue
        if name in shares:
            found[name] = share_interval(value, shares[name])
        elif name == "auc" and len(sizes) > 1 and (binary or collapsed):
            pairs = [(sizes[1], sizes[0])] if binary else [(size, sum(sizes) - size) for size in sizes]
            found[name] = np.mean([auc_interval(value, *pair) for pair in pairs], axis=0).tolist()
        elif name == "balanced_accuracy" and len(sizes) > 1 and (binary or collapsed):
            own = [figures["specificity"], figures["sensitivity"]] if binary else [value] * len(sizes)
            found[name] = mean_share_interval(own, sizes)
    return found


def auc_interval(auc: float, n_positive: int, n_negative: int) -> list[float]:
    """Return the 95 % interval of an AUC from its height and the numbers of subjects alone.

    Method 5 of Newcombe 2006 (Statistics in Medicine 25, 559): all areas θ that lie within 1.96 standard errors of the
    one measured, the error that of Hanley and McNeil 1982 at θ itself, so that an AUC of 1 has an interval too.
    """
    return mean_auc_interval(auc, [(n_positive, n_negative)])


def mean_auc_interval(auc: float, sizes: Sequence[tuple[int, int]]) -> list[float]:
    """Return the 95 % interval of the mean of AUCs of different subjects, as `auc_interval` does of one.

    Parameters
    ----------
    auc
        The mean.
    sizes
        Positive and negative subjects behind each AUC. The variance of the mean is the sum of theirs at the same θ,
        over the square of their number.
    """

    def variance(theta: float, n_positive: int, n_negative: int) -> float:
        n = (n_positive + n_negative) / 2 - 1
        spread = 1 + n * (1 - theta) / (2 - theta) + n * theta / (1 + theta)
        return theta * (1 - theta) * spread / (n_positive * n_negative)

    def outside(theta: float) -> bool:
        error = math.sqrt(sum(variance(theta, *size) for size in sizes)) / len(sizes)
        return abs(theta - auc) > _Z95 * error

    ends = []
    for far in (0.0, 1.0):
        inner, outer = auc, far
        for _ in range(_BISECTIONS):
            middle = (inner + outer) / 2
            inner, outer = (inner, middle) if outside(middle) else (middle, outer)
        ends.append(inner)
    return ends


def share_interval(share: float, n: int) -> list[float]:
    """Return Wilson's 95 % interval (1927, JASA 22, 209) of a share of n that were right."""
    square = _Z95**2 / n
    middle = (share + square / 2) / (1 + square)
    half = _Z95 * math.sqrt(share * (1 - share) / n + square / (4 * n)) / (1 + square)
    return [max(0.0, middle - half) if share > 0 else 0.0, min(1.0, middle + half) if share < 1 else 1.0]


def mean_share_interval(shares: Sequence[float], sizes: Sequence[int]) -> list[float]:
    """Return the 95 % interval of the mean of independent shares, out of Wilson's of each."""
    ends = np.array([share_interval(share, n) for share, n in zip(shares, sizes, strict=True)])
    below, above = np.array(shares) - ends[:, 0], ends[:, 1] - np.array(shares)
    mean = float(np.mean(shares))
    down, up = (float(np.sqrt((far**2).sum())) / len(shares) for far in (below, above))
    return [mean - down, mean + up]


def _sizes(truth: npt.NDArray[Any], clusters: Sequence[str] | None) -> list[int]:
    """Return how many rows, or clusters, hold each class that occurs."""
    if clusters is None:
        return [int((truth == label).sum()) for label in np.unique(truth)]
    names = np.asarray(clusters)
    return [len(set(names[truth == label])) for label in np.unique(truth)]
