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

from boldforge.finetune.intervals import cluster_intervals
from boldforge.finetune.metrics import auc

DRAWS = 2000
Figures = Callable[[Any, Any], Mapping[str, Any]]
Headline = Callable[[npt.ArrayLike, npt.ArrayLike], float]


def bootstrap_intervals(
    labels: npt.ArrayLike,
    scores: npt.ArrayLike,
    figures: Callable[[Any, Any], Mapping[str, Any]],
    seed: int,
    draws: int = 1000,
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

    Returns
    -------
    dict
        Figure to [low, high]. Counts (``n``, ``n_positive``) have none.
    """
    truth, score = np.asarray(labels), np.asarray(scores)
    generator = np.random.default_rng([seed, len(truth)])
    found: dict[str, list[float]] = {}
    for _ in range(draws):
        drawn = generator.integers(len(truth), size=len(truth))
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
) -> dict[str, float | None]:
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
        that has learned sites and nothing else is at chance here however well it scores; of one site the same, None
        where no site has two different labels. Both are (1 + draws as high) / (1 + draws).
    """
    truth, score = np.asarray(labels), np.asarray(scores, dtype=np.float64)
    site = np.array([s or "" for s in sites])
    groups = [np.flatnonzero(site == name) for name in np.unique(site)]
    told = any(len(np.unique(truth[group])) > 1 for group in groups)
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
    found: dict[str, float | None] = {name: (1 + count) / (1 + draws) for name, count in hits.items()}
    return found if told else found | {"p_within_sites": None}


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
        What hangs together where rows are parts of subjects: it is left out, and exchanged, as a whole.

    Returns
    -------
    dict
        ``difference``: model minus baseline. ``interval``: 95 %, over resampled subjects or, of clusters, as
        `cluster_intervals` gives it; None where these are too few. ``p``: two-sided, from
        exchanging the two models' scores subject by subject, which is what they would allow if they were equally good.
    """
    truth = np.asarray(labels)
    one, two = np.asarray(scores, dtype=np.float64), np.asarray(others, dtype=np.float64)
    if headline is auc:
        one, two = rankdata(one, axis=0), rankdata(two, axis=0)
    observed = headline(truth, one) - headline(truth, two)
    generator = np.random.default_rng([seed, len(truth), 2])
    # Blocks of one person, or of one run, rise and fall together.
    names, place = np.unique(np.arange(len(truth)) if clusters is None else np.array(clusters), return_inverse=True)

    def difference_of(rows: npt.NDArray[np.int64]) -> dict[str, float | None]:
        several = len(np.unique(truth[rows])) > 1
        return {"": headline(truth[rows], one[rows]) - headline(truth[rows], two[rows]) if several else None}

    resampled, as_far = [], 0
    for _ in range(draws):
        if clusters is None:
            resampled.append(difference_of(generator.integers(len(truth), size=len(truth)))[""])
        swap = (generator.random(len(names)) < 0.5)[place].reshape(-1, *[1] * (one.ndim - 1))
        difference = headline(truth, np.where(swap, two, one)) - headline(truth, np.where(swap, one, two))
        as_far += abs(difference) >= abs(observed) - 1e-12
    if clusters is None:
        found = [value for value in resampled if value is not None]
        interval: list[float] | None = [float(q) for q in np.quantile(found, [0.025, 0.975])]
    else:
        interval = cluster_intervals(difference_of, clusters).get("")
    return {"difference": observed, "interval": interval, "p": (1 + as_far) / (1 + draws)}


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
