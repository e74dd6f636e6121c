"""Figures of a two-class decision, computed per subject."""

from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.stats import rankdata
from sklearn.metrics import roc_curve


def binary_metrics(
    labels: npt.ArrayLike, scores: npt.ArrayLike, threshold: float | npt.ArrayLike = 0.5
) -> dict[str, Any]:
    """Summarise how well scores tell class 1 from class 0.

    Parameters
    ----------
    labels
        0 or 1, one per subject.
    scores
        Probability of class 1, one per subject.
    threshold
        A score at or above it is called class 1; one for all, or one per subject, where folds have their own. With a
        class-weighted loss 0.5 is the balanced point.

    Returns
    -------
    dict
        ``accuracy``, ``balanced_accuracy`` (mean of the next two), ``sensitivity`` (called 1 among class 1),
        ``specificity`` (called 0 among class 0), ``auc`` (probability that a random class 1 subject scores above a
        random class 0 subject, ties counting half), ``brier`` (mean squared distance of score and label), ``n``,
        ``n_positive``. A figure that is undefined because a class is absent is None.

    Raises
    ------
    ValueError
        If the lengths differ, there are no subjects, a label is not 0 or 1, or a score is not finite.
    """
    truth, score = _checked(labels, scores)
    called = score >= np.asarray(threshold)
    sensitivity = _share(called[truth == 1])
    specificity = _share(~called[truth == 0])
    both = sensitivity is not None and specificity is not None
    return {
        "accuracy": float((called == (truth == 1)).mean()),
        "balanced_accuracy": (sensitivity + specificity) / 2 if both else None,  # type: ignore[operator]
        "auc": auc(truth, score) if both else None,
        "sensitivity": sensitivity,
        "specificity": specificity,
        "brier": float(((score - truth) ** 2).mean()),
        "n": len(truth),
        "n_positive": int(truth.sum()),
    }


def auc(labels: npt.ArrayLike, scores: npt.ArrayLike) -> float:
    """Return the probability that a subject of class 1 scores above one of class 0, ties counting half."""
    truth, score = np.asarray(labels) == 1, np.asarray(scores, dtype=np.float64)
    positive, negative = int(truth.sum()), int((~truth).sum())
    if not positive or not negative:
        raise ValueError("an AUC needs subjects of both classes")
    return float((rankdata(score)[truth].sum() - positive * (positive + 1) / 2) / (positive * negative))


def roc_points(labels: npt.ArrayLike, scores: npt.ArrayLike) -> dict[str, list[float]]:
    """Return the corners of the ROC curve, from (0, 0) to (1, 1).

    Parameters
    ----------
    labels, scores
        As in `binary_metrics`; both classes must be present.

    Returns
    -------
    dict
        ``fpr`` (1 − specificity) and ``tpr`` (sensitivity), equally long, ascending.

    Raises
    ------
    ValueError
        As `binary_metrics`, and if a class is absent.
    """
    truth, score = _checked(labels, scores)
    if truth.min() == truth.max():
        raise ValueError("a ROC curve needs subjects of both classes")
    fpr, tpr, _ = roc_curve(truth, score)
    return {"fpr": fpr.tolist(), "tpr": tpr.tolist()}


def _checked(labels: npt.ArrayLike, scores: npt.ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    truth, score = np.asarray(labels), np.asarray(scores, dtype=np.float64)
    if truth.shape != score.shape or truth.ndim != 1 or not len(truth):
        raise ValueError(f"labels {truth.shape} and scores {score.shape} must be two equally long, non-empty rows")
    if not np.isin(truth, (0, 1)).all():
        raise ValueError("labels must be 0 or 1")
    if not np.isfinite(score).all():
        raise ValueError("scores must be finite")
    return truth.astype(np.int64), score


def _share(hits: np.ndarray) -> float | None:
    return float(hits.mean()) if len(hits) else None
