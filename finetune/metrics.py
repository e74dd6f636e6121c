"""Figures of a two-class decision, computed per subject."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from sklearn.metrics import roc_auc_score, roc_curve


def binary_metrics(labels: Sequence[int], scores: Sequence[float], threshold: float = 0.5) -> dict[str, Any]:
    """Summarise how well scores tell class 1 from class 0.

    Parameters
    ----------
    labels
        0 or 1, one per subject.
    scores
        Probability of class 1, one per subject.
    threshold
        A score at or above it is called class 1. With a class-weighted loss 0.5 is the balanced point.

    Returns
    -------
    dict
        ``accuracy``, ``balanced_accuracy`` (mean of the next two), ``sensitivity`` (called 1 among class 1),
        ``specificity`` (called 0 among class 0), ``auc`` (probability that a random class 1 subject scores above a
        random class 0 subject, ties counting half), ``n``, ``n_positive``. A figure that is undefined because a class
        is absent is None.

    Raises
    ------
    ValueError
        If the lengths differ, there are no subjects, a label is not 0 or 1, or a score is not finite.
    """
    truth, score = _checked(labels, scores)
    called = score >= threshold
    sensitivity = _share(called[truth == 1])
    specificity = _share(~called[truth == 0])
    both = sensitivity is not None and specificity is not None
    return {
        "accuracy": float((called == (truth == 1)).mean()),
        "balanced_accuracy": (sensitivity + specificity) / 2 if both else None,  # type: ignore[operator]
        "auc": float(roc_auc_score(truth, score)) if both else None,
        "sensitivity": sensitivity,
        "specificity": specificity,
        "n": len(truth),
        "n_positive": int(truth.sum()),
    }


def roc_points(labels: Sequence[int], scores: Sequence[float]) -> dict[str, list[float]]:
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


def _checked(labels: Sequence[int], scores: Sequence[float]) -> tuple[np.ndarray, np.ndarray]:
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
