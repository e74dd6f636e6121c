"""Figures of classes and numbers, computed per subject."""

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
    """Return the probability that a subject of class 1 scores above one of class 0, ties counting half.

    Of scores [N, R], from R repetitions, the mean over repetitions.
    """
    truth, score = np.asarray(labels) == 1, np.asarray(scores, dtype=np.float64)
    positive, negative = int(truth.sum()), int((~truth).sum())
    if not positive or not negative:
        raise ValueError("an AUC needs subjects of both classes")
    above = rankdata(score, axis=0)[truth].sum(axis=0) - positive * (positive + 1) / 2
    return float(np.mean(above / (positive * negative)))


def multiclass_auc(labels: npt.ArrayLike, scores: npt.ArrayLike) -> float:
    """Return the mean over the classes that occur of the AUC of that class against the rest.

    Parameters
    ----------
    labels
        0 to K − 1, one per subject.
    scores
        [N, K], higher for more probable.
    """
    truth, score = np.asarray(labels).astype(np.int64), np.asarray(scores, dtype=np.float64)
    present = [k for k in range(score.shape[1]) if 0 < (truth == k).sum() < len(truth)]
    if not present:
        raise ValueError("an AUC needs subjects of two classes")
    return float(np.mean([auc(truth == k, score[:, k]) for k in present]))


def multiclass_metrics(labels: npt.ArrayLike, scores: npt.ArrayLike) -> dict[str, Any]:
    """Summarise probabilities of several classes.

    Parameters
    ----------
    labels, scores
        As in `multiclass_auc`.

    Returns
    -------
    dict
        ``accuracy``; ``balanced_accuracy``, the mean over classes that occur of the share called right; ``auc``, None
        where only one class occurs; ``confusion``, rows the truth, columns what was called; ``n``.

    Raises
    ------
    ValueError
        If the shapes do not fit or a score is not finite.
    """
    truth, score = np.asarray(labels).astype(np.int64), np.asarray(scores, dtype=np.float64)
    if score.ndim != 2 or len(truth) != len(score) or not len(truth) or not np.isfinite(score).all():
        raise ValueError(f"labels {truth.shape} and scores {score.shape} must be [N] and a finite [N, K]")
    called, classes = score.argmax(axis=1), score.shape[1]
    confusion = np.bincount(truth * classes + called, minlength=classes**2).reshape(classes, classes)
    sizes = confusion.sum(axis=1)
    several = (sizes > 0).sum() > 1
    return {
        "accuracy": float((called == truth).mean()),
        "balanced_accuracy": float((np.diag(confusion)[sizes > 0] / sizes[sizes > 0]).mean()),
        "auc": multiclass_auc(truth, score) if several else None,
        "confusion": confusion.tolist(),
        "n": len(truth),
    }


def r2(labels: npt.ArrayLike, scores: npt.ArrayLike) -> float:
    """Return the share of the labels' variance that is explained: 0 for predicting their mean, less for worse."""
    truth, score = np.asarray(labels, dtype=np.float64), np.asarray(scores, dtype=np.float64)
    spread = ((truth - truth.mean()) ** 2).sum()
    return float(1 - ((truth - score) ** 2).sum() / spread) if spread > 0 else 0.0


def regression_metrics(labels: npt.ArrayLike, scores: npt.ArrayLike) -> dict[str, Any]:
    """Summarise predicted numbers.

    Returns
    -------
    dict
        ``r2`` (see `r2`), ``r`` (Pearson's correlation, None where either does not vary), ``mae`` (mean absolute error
        in the label's unit), ``n``.

    Raises
    ------
    ValueError
        If the lengths differ or a number is not finite.
    """
    truth, score = np.asarray(labels, dtype=np.float64), np.asarray(scores, dtype=np.float64)
    if truth.shape != score.shape or truth.ndim != 1 or not len(truth) or not np.isfinite(truth + score).all():
        raise ValueError(f"labels {truth.shape} and scores {score.shape} must be two equally long, finite rows")
    varies = len(truth) > 1 and np.ptp(truth) > 0 and np.ptp(score) > 0
    return {
        "r2": r2(truth, score),
        "r": float(np.corrcoef(truth, score)[0, 1]) if varies else None,
        "mae": float(np.abs(truth - score).mean()),
        "n": len(truth),
    }


def roc_points(labels: npt.ArrayLike, scores: npt.ArrayLike) -> dict[str, list[float]]:
    """Return the corners of the ROC curve, from (0, 0) to (1, 1).

    Parameters
    ----------
    labels, scores
        As in `binary_metrics`; both classes must be present. Of scores [N, R], from R repetitions, the curves' mean
        sensitivity at every specificity, whose area is the mean of theirs.

    Returns
    -------
    dict
        ``fpr`` (1 − specificity) and ``tpr`` (sensitivity), equally long, ascending.

    Raises
    ------
    ValueError
        As `binary_metrics`, and if a class is absent.
    """
    curves = []
    for column in np.asarray(scores, dtype=np.float64).reshape(len(np.asarray(scores)), -1).T:
        truth, score = _checked(labels, column)
        if truth.min() == truth.max():
            raise ValueError("a ROC curve needs subjects of both classes")
        curves.append(roc_curve(truth, score)[:2])
    if len(curves) == 1:
        return {"fpr": curves[0][0].tolist(), "tpr": curves[0][1].tolist()}
    at = np.unique(np.concatenate([fpr for fpr, _ in curves]))
    # A curve rises on the spot wherever somebody of class 1 comes next: it has a lower and an upper end there.
    ends = np.mean([_ends(at, fpr, tpr) for fpr, tpr in curves], axis=0)
    return {"fpr": np.repeat(at, 2).tolist(), "tpr": ends.T.ravel().tolist()}


def _ends(at: np.ndarray, fpr: np.ndarray, tpr: np.ndarray) -> np.ndarray:
    """Return the lowest and the highest sensitivity of a ROC curve at some places, [2, places]."""
    between = np.interp(at, fpr, tpr)
    places = np.searchsorted(fpr, at, "left"), np.searchsorted(fpr, at, "right") - 1
    return np.stack([np.where(fpr[place] == at, tpr[place], between) for place in places])


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
