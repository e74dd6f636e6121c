"""A trial that trains once in each of several inner folds: one curve, one figure and one threshold of all of them."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from boldforge.finetune.trial import TrialSpec, has_diverged


def merge_curves(curves: Sequence[tuple[dict[str, Any], ...]], figure: str) -> tuple[dict[str, Any], ...]:
    """Return the curve of a trial from those of its inner folds; of a single one it is that.

    Every number is the mean over the inner folds. An epoch has ``improved`` by the rule for a single split: a higher
    mean figure, or one as high at a lower mean validation loss. A trial that has diverged in one inner fold has
    diverged; its curve ends where the first of them did.

    Parameters
    ----------
    curves
        What each inner fold has recorded. Epochs that not all of them have are left out.
    figure
        By which epochs are compared.

    Returns
    -------
    tuple of dict
        Epoch lines without what names files. ``<figure>_by_fold``: the figure in every inner fold. ``scores``: those of
        all validation subjects, one inner fold after the other, where the lines have them.
    """
    if len(curves) == 1:
        return curves[0]
    trained = [[line for line in curve if "diverged" not in line] for curve in curves]
    merged: list[dict[str, Any]] = []
    best: tuple[float, float] | None = None
    for lines in zip(*trained, strict=False):
        value, loss = _mean(lines, figure), _mean(lines, "validation_loss")
        improved = best is None or (value, -loss) > best
        best = (value, -loss) if improved else best
        line = {
            "epoch": lines[0]["epoch"],
            "train_loss": _mean(lines, "train_loss"),
            "validation_loss": loss,
            figure: value,
            "improved": improved,
            f"{figure}_by_fold": [each[figure] for each in lines],
        }
        if "scores" in lines[0]:
            line["scores"] = [score for each in lines for score in each["scores"]]
        merged.append(line | _sizes(lines[0]))
    ended = [curve[-1] for curve in curves if has_diverged(curve)]
    if ended:
        first = min(ended, key=lambda line: line["epoch"])
        merged.append({"epoch": len(merged) + 1, "diverged": first["diverged"]} | _sizes(first))
    return tuple(merged)


def pooled_scores(spec: TrialSpec, labels: np.ndarray, epoch: dict[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    """Return labels and scores of all who validate, each by the model that was not trained on them.

    Parameters
    ----------
    spec
        With inner folds.
    labels
        Of all subjects whom the trial may see.
    epoch
        A line of `merge_curves`.
    """
    validating = [place for split in spec.inner for place in split.validation]
    return labels[validating], np.array(epoch["scores"])


def _mean(lines: Sequence[dict[str, Any]], name: str) -> float:
    # Summed exactly, so that equal figures in another order of the folds are equal.
    return math.fsum(line[name] for line in lines) / len(lines)


def _sizes(line: dict[str, Any]) -> dict[str, Any]:
    return {name: line[name] for name in ("trainable_parameters", "total_parameters")}
