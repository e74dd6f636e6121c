"""How sure a figure is: intervals, chance, calibration, sites, and whether one model beats another.

Everything here resamples or permutes subjects, never clips or runs. Scores from several repetitions of a
cross-validation, [N, R], stay apart: a figure is its mean over repetitions, not that of their averaged scores, which
would be another model's.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.stats import rankdata

from boldforge.finetune.metrics import auc

DRAWS = 2000
Figures = Callable[[Any, Any], Mapping[str, Any]]
Headline = Callable[[npt.ArrayLike, npt.ArrayLike], float]


class _Clusters:
    """Draws rows with replacement, those of one cluster together; without clusters every row by itself.

    Blocks of one person, or of one run, rise and fall together: drawn one by one they would make intervals too narrow.
    """

    def __init__(self, rows: int, clusters: Sequence[str] | None) -> None:
        self._rows = rows
        self._members: list[npt.NDArray[np.int64]] | None = None
        self._place = np.arange(rows)
        if clusters is not None:
            names, self._place = np.unique(np.array(clusters), return_inverse=True)
            self._members = [np.flatnonzero(self._place == place) for place in range(len(names))]

    def draw(self, generator: np.random.Generator) -> npt.NDArray[np.int64]:
        """Return rows, some of them several times."""
        if self._members is None:
            return generator.integers(self._rows, size=self._rows)
        drawn = generator.integers(len(self._members), size=len(self._members))
        return np.concatenate([self._members[place] for place in drawn])

    def choose(self, generator: np.random.Generator) -> npt.NDArray[np.bool_]:
        """Return about half of the clusters, as a mask over rows."""
        count = self._rows if self._members is None else len(self._members)
        return (generator.random(count) < 0.5)[self._place]


def bootstrap_intervals(
    labels: npt.ArrayLike,
    scores: npt.ArrayLike,
    figures: Callable[[Any, Any], Mapping[str, Any]],
    seed: int,
    draws: int = 1000,
    clusters: Sequence[str] | None = None,
) -> dict[str, list[float]]:
    """Return the 95 % percentile interval of every numeric figure over resampled subjects.

    Parameters
    ----------
    labels, scores
        One per subject.
    figures
        Computes the figures of some subjects; a figure that is None in a draw (a class is absent) sits that draw out.
    seed
        Of the draws.
    draws
        Number of resamplings, with replacement.
    clusters
        What is drawn where rows hang together; None draws row by row.

    Returns
    -------
    dict
        Figure to [low, high]. Counts (``n``, ``n_positive``) have none.
    """
    truth, score = np.asarray(labels), np.asarray(scores)
    generator = np.random.default_rng([seed, len(truth)])
    found: dict[str, list[float]] = {}
    rows = _Clusters(len(truth), clusters)
    for _ in range(draws):
        drawn = rows.draw(generator)
        for name, value in figures(truth[drawn], score[drawn]).items():
            if isinstance(value, float) and not name.startswith("n_"):
                found.setdefault(name, []).append(value)
    return {name: [float(q) for q in np.quantile(values, [0.025, 0.975])] for name, values in found.items()}


def permutation_test(
    labels: npt.ArrayLike,
    scores: npt.ArrayLike,
    sites: Sequence[str | None],
    seed: int,
    draws: int = DRAWS,
    headline: Headline = auc,
) -> dict[str, float]:
    """Ask how often labels that mean nothing give so high a figure.

    Parameters
    ----------
    labels, scores, sites
        One per subject; scores may be several, of repetitions or classes, as the headline takes them.
    seed, draws
        Of the permutations.
    headline
        The figure.

    Returns
    -------
    dict
        ``p``: labels permuted among all subjects. ``p_within_sites``: permuted inside each site only, so that a model
        that has learned sites and nothing else is at chance here however well it scores; of one site the same. Both
        are (1 + draws as high) / (1 + draws).
    """
    truth, score = np.asarray(labels), np.asarray(scores, dtype=np.float64)
    site = np.array([s or "" for s in sites])
    groups = [np.flatnonzero(site == name) for name in np.unique(site)]
    generator = np.random.default_rng([seed, len(truth), 1])
    observed = headline(truth, score)
    hits = {"p": 0, "p_within_sites": 0}
    for _ in range(draws):
        hits["p"] += headline(generator.permutation(truth), score) >= observed - 1e-12
        if len(groups) == 1:
            hits["p_within_sites"] = hits["p"]
            continue
        within = truth.copy()
        for group in groups:
            within[group] = generator.permutation(truth[group])
        hits["p_within_sites"] += headline(within, score) >= observed - 1e-12
    return {name: (1 + count) / (1 + draws) for name, count in hits.items()}


def calibration(labels: npt.ArrayLike, scores: npt.ArrayLike, bins: int = 5) -> list[dict[str, float]]:
    """Compare what was predicted with what was so, in groups of about equally many subjects by score.

    Parameters
    ----------
    labels, scores
        One per subject, or scores [N, R]: every repetition has its own groups, and each group's figures are the means.
    bins
        Number of groups.

    Returns
    -------
    list of dict
        ``predicted`` (mean score), ``observed`` (share of class 1) and ``n``, lowest scores first.
    """
    truth, score = np.asarray(labels), np.asarray(scores, dtype=np.float64)
    score_NR = score.reshape(len(truth), -1)
    order_NR = np.argsort(score_NR, axis=0, kind="stable")
    sorted_NR, truth_NR = np.take_along_axis(score_NR, order_NR, axis=0), truth[order_NR]
    return [
        {"predicted": float(sorted_NR[part].mean()), "observed": float(truth_NR[part].mean()), "n": len(part)}
        for part in np.array_split(np.arange(len(truth)), min(bins, len(truth)))
    ]


def per_site(
    labels: npt.ArrayLike, scores: npt.ArrayLike, sites: Sequence[str | None], figures: Figures
) -> list[dict[str, Any]]:
    """Return the figures of every site's subjects, sites by name; the unknown site is None and comes last."""
    truth, score = np.asarray(labels), np.asarray(scores)
    names = sorted({site for site in sites if site is not None}) + ([None] if None in sites else [])
    rows = []
    for name in names:
        inside = np.array([site == name for site in sites])
        rows.append({"site": name, **figures(truth[inside], score[inside])})
    return rows


def compare(
    labels: npt.ArrayLike,
    scores: npt.ArrayLike,
    others: npt.ArrayLike,
    seed: int,
    draws: int = DRAWS,
    headline: Headline = auc,
    clusters: Sequence[str] | None = None,
) -> dict[str, Any]:
    """Compare two models on the same subjects by one figure, paired.

    Parameters
    ----------
    labels
        One per subject.
    scores, others
        The model's and the baseline's, in the same order of subjects; [N, R] of repetitions.
    seed, draws
        Of the resamplings.
    headline
        The figure. For an AUC of two classes the models' scores are first turned into ranks, since they may live on
        different scales.
    clusters
        What is resampled and exchanged where rows hang together.

    Returns
    -------
    dict
        ``difference``: model minus baseline. ``interval``: 95 %, over resampled subjects. ``p``: two-sided, from
        exchanging the two models' scores subject by subject, which is what they would allow if they were equally good.
    """
    truth = np.asarray(labels)
    one, two = np.asarray(scores, dtype=np.float64), np.asarray(others, dtype=np.float64)
    if headline is auc:
        one, two = rankdata(one, axis=0), rankdata(two, axis=0)
    observed = headline(truth, one) - headline(truth, two)
    generator = np.random.default_rng([seed, len(truth), 2])
    resampled, as_far = [], 0
    rows = _Clusters(len(truth), clusters)
    for _ in range(draws):
        drawn = rows.draw(generator)
        if len(np.unique(truth[drawn])) > 1:
            resampled.append(headline(truth[drawn], one[drawn]) - headline(truth[drawn], two[drawn]))
        swap = rows.choose(generator).reshape(-1, *[1] * (one.ndim - 1))
        difference = headline(truth, np.where(swap, two, one)) - headline(truth, np.where(swap, one, two))
        as_far += abs(difference) >= abs(observed) - 1e-12
    low, high = np.quantile(resampled, [0.025, 0.975])
    return {"difference": observed, "interval": [float(low), float(high)], "p": (1 + as_far) / (1 + draws)}


def best_threshold(labels: npt.ArrayLike, scores: npt.ArrayLike) -> float:
    """Return the score from which on to say class 1, by the balanced accuracy of validation subjects.

    Parameters
    ----------
    labels, scores
        Of validation subjects, never of those that are tested.

    Returns
    -------
    float
        Halfway between two neighbouring scores, or the lowest; of equally good places the one nearest to 0.5, which is
        what the class-weighted loss aims at. 0.5 if a class is absent.
    """
    truth, score = np.asarray(labels) == 1, np.asarray(scores, dtype=np.float64)
    if truth.all() or not truth.any():
        return 0.5
    levels = np.unique(score)
    places = np.concatenate([[0.5, levels[0]], (levels[1:] + levels[:-1]) / 2])
    called = score[None, :] >= places[:, None]
    balanced = (called[:, truth].mean(axis=1) + (~called[:, ~truth]).mean(axis=1)) / 2
    good = places[balanced >= balanced.max() - 1e-12]
    return float(good[np.argmin(np.abs(good - 0.5))])
