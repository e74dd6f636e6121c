"""Any phenotype column: two classes, several, or a number."""

import re
from collections.abc import Sequence
from difflib import get_close_matches
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional

from boldforge.finetune.errors import FinetuneError
from boldforge.finetune.metrics import auc, binary_metrics, multiclass_auc, multiclass_metrics, r2, regression_metrics
from boldforge.finetune.tasks.base import Criterion, Kind, Phenotype

SUBJECT_BASELINES = ("site", "demographics", "connectivity", "connectivity-svm", "mean-image", "image")
_MOST_NAMED = 3


class TwoClasses:
    """Tell the second class of a column (label 1) from the first (label 0).

    Parameters
    ----------
    name
        Of the task.
    column
        Phenotype column.
    values
        The column's value for class 0 and for class 1; another value is refused, nothing is missing.
    classes
        What to call them.
    """

    kind: Kind = "binary"
    rows = "subjects"
    baselines: tuple[str, ...] = SUBJECT_BASELINES
    n_outputs = 1
    n_scores = 1
    selects_by = "auc"
    chance = 0.5

    def __init__(
        self, name: str, column: str, values: tuple[object, object], classes: tuple[str, str] | None = None
    ) -> None:
        self.name = name
        self.column = column
        self.values = values
        self.classes: tuple[str, ...] = classes or (str(values[0]), str(values[1]))

    def label(self, phenotype: Phenotype) -> float | None:
        """Return 0 or 1, or None where the column is empty.

        Raises
        ------
        FinetuneError
            If the column holds anything else.
        """
        found = phenotype.get(self.column)
        if found is None:
            return None
        if found not in self.values:
            meaning = " or ".join(
                name if str(value) == name else f"{value} ({name})"
                for value, name in zip(self.values, self.classes, strict=True)
            )
            raise FinetuneError(
                f"phenotype column {self.column!r} holds {found!r}, expected {meaning} or nothing; correct the "
                "phenotype table and shard again."
            )
        return self.values.index(found)

    def scale(self, labels: Sequence[float]) -> tuple[float, float]:
        """Return (1, 0): logits have no unit."""
        return 1.0, 0.0

    def criterion(self, labels: Sequence[float]) -> Criterion:
        """Return a binary cross-entropy in which both classes have the same say: weight n / (2 · n of the class)."""
        class_weights = _balanced(labels, 2)

        def loss(logits_BK: Tensor, labels_B: Tensor) -> Tensor:
            weight_B = class_weights.to(logits_BK.device)[labels_B.long()]
            return functional.binary_cross_entropy_with_logits(
                logits_BK[:, 0], labels_B.to(logits_BK.dtype), weight=weight_B
            )

        return loss

    def scores(self, outputs_BK: Tensor) -> Tensor:
        """Return the probability of class 1, [B]."""
        return outputs_BK[:, 0].sigmoid()

    def metrics(
        self, labels: npt.ArrayLike, scores: npt.ArrayLike, threshold: float | npt.ArrayLike = 0.5
    ) -> dict[str, Any]:
        """Return `binary_metrics`."""
        return binary_metrics(labels, scores, threshold)

    def headline(self, labels: npt.ArrayLike, scores: npt.ArrayLike) -> float:
        """Return the AUC."""
        return auc(labels, scores)

    def strata(self, labels: Sequence[float]) -> list[int]:
        """Return the classes."""
        return [int(label) for label in labels]


class SeveralClasses:
    """Tell the classes of a column from one another.

    Parameters
    ----------
    name, column
        As in `TwoClasses`.
    classes
        The column's values as texts, in the order of the labels.
    """

    kind: Kind = "multiclass"
    rows = "subjects"
    baselines: tuple[str, ...] = SUBJECT_BASELINES
    selects_by = "auc"
    chance = 0.5

    def __init__(self, name: str, column: str, classes: Sequence[str]) -> None:
        self.name = name
        self.column = column
        self.classes: tuple[str, ...] = tuple(classes)
        self.n_outputs = self.n_scores = len(self.classes)

    def label(self, phenotype: Phenotype) -> float | None:
        """Return the class's number, None where the column is empty.

        Raises
        ------
        FinetuneError
            If it holds a class that is not one of ``classes``.
        """
        value = phenotype.get(self.column)
        if value is None:
            return None
        if as_text(value) not in self.classes:
            raise FinetuneError(
                f"phenotype column {self.column!r} holds {value!r}, expected one of {', '.join(self.classes)} or "
                "nothing; correct the phenotype table and shard again."
            )
        return self.classes.index(as_text(value))

    def scale(self, labels: Sequence[float]) -> tuple[float, float]:
        """Return (1, 0): logits have no unit."""
        return 1.0, 0.0

    def criterion(self, labels: Sequence[float]) -> Criterion:
        """Return a cross-entropy in which every class has the same say."""
        class_weights = _balanced(labels, self.n_outputs)

        def loss(logits_BK: Tensor, labels_B: Tensor) -> Tensor:
            # Not torch's weighted mean, which divides by a batch's weights: a batch of rare classes would weigh less.
            losses_B = functional.cross_entropy(logits_BK, labels_B.long(), reduction="none")
            return (losses_B * class_weights.to(logits_BK.device)[labels_B.long()]).mean()

        return loss

    def scores(self, outputs_BK: Tensor) -> Tensor:
        """Return the probabilities, [B, K]."""
        return outputs_BK.softmax(dim=-1)

    def metrics(
        self, labels: npt.ArrayLike, scores: npt.ArrayLike, threshold: float | npt.ArrayLike = 0.5
    ) -> dict[str, Any]:
        """Return `multiclass_metrics`; the most probable class is the one that is called."""
        return multiclass_metrics(labels, scores)

    def headline(self, labels: npt.ArrayLike, scores: npt.ArrayLike) -> float:
        """Return the mean over classes of the AUC of a class against the rest."""
        return multiclass_auc(labels, scores)

    def strata(self, labels: Sequence[float]) -> list[int]:
        """Return the classes."""
        return [int(label) for label in labels]


class Number:
    """Predict a number.

    Parameters
    ----------
    name, column
        As in `TwoClasses`.
    """

    kind: Kind = "regression"
    rows = "subjects"
    baselines: tuple[str, ...] = SUBJECT_BASELINES
    n_outputs = 1
    n_scores = 1
    classes: tuple[str, ...] = ()
    selects_by = "r2"
    chance = 0.0

    def __init__(self, name: str, column: str) -> None:
        self.name = name
        self.column = column

    def label(self, phenotype: Phenotype) -> float | None:
        """Return the number, None where the column is empty.

        Raises
        ------
        FinetuneError
            If it is not a number.
        """
        value = phenotype.get(self.column)
        if value is None:
            return None
        if isinstance(value, str) or not np.isfinite(value):
            raise FinetuneError(
                f"phenotype column {self.column!r} holds {value!r}, expected a number or nothing; correct the "
                f"phenotype table and shard again, or ask for classify:{self.column}."
            )
        return float(value)

    def scale(self, labels: Sequence[float]) -> tuple[float, float]:
        """Return deviation and mean: the head learns in units of the training subjects' spread."""
        spread = float(np.std(labels))
        return (spread if spread > 0 else 1.0), float(np.mean(labels))

    def criterion(self, labels: Sequence[float]) -> Criterion:
        """Return the mean squared error over the training clips' variance, 1 for predicting their mean."""
        variance = self.scale(labels)[0] ** 2

        def loss(outputs_BK: Tensor, labels_B: Tensor) -> Tensor:
            return functional.mse_loss(outputs_BK[:, 0], labels_B.to(outputs_BK.dtype)) / variance

        return loss

    def scores(self, outputs_BK: Tensor) -> Tensor:
        """Return the prediction in the column's unit, [B]."""
        return outputs_BK[:, 0]

    def metrics(
        self, labels: npt.ArrayLike, scores: npt.ArrayLike, threshold: float | npt.ArrayLike = 0.5
    ) -> dict[str, Any]:
        """Return `regression_metrics`."""
        return regression_metrics(labels, scores)

    def headline(self, labels: npt.ArrayLike, scores: npt.ArrayLike) -> float:
        """Return the share of the variance explained."""
        return r2(labels, scores)

    def strata(self, labels: Sequence[float]) -> list[int]:
        """Return up to four groups of about equally many subjects, by label."""
        groups = max(1, min(4, len(labels) // 10))
        rank = np.argsort(np.argsort(labels, kind="stable"), kind="stable")
        return [int(place * groups // len(labels)) for place in rank]


def check_column(column: str, phenotypes: Sequence[Phenotype]) -> None:
    """Make sure that a phenotype column exists.

    Raises
    ------
    FinetuneError
        If it does not, naming the columns that do.
    """
    columns = sorted({name for phenotype in phenotypes for name in phenotype})
    if column in columns:
        return
    if not columns:
        raise FinetuneError(
            f"there is no phenotype column {column!r}, nor any other; shard a folder with a phenotype table."
        )
    plain = {re.sub(r"\W+", "_", name.lower()): name for name in columns}
    asked = re.sub(r"\W+", "_", column.lower())
    near = get_close_matches(asked, plain, 1) or [name for name in plain if asked in name.split("_")]
    hint = f"did you mean {plain[near[0]]!r}? The" if near else "the"
    raise FinetuneError(f"there is no phenotype column {column!r}; {hint} columns are {', '.join(columns)}.")


def check_numbers(column: str, phenotypes: Sequence[Phenotype]) -> None:
    """Make sure that a phenotype column holds numbers, but for what is missing.

    Raises
    ------
    FinetuneError
        If it does not, saying in how many runs, some of the texts, and how many runs have no value.
    """
    texts = [value for phenotype in phenotypes if isinstance(value := phenotype.get(column), str)]
    if not texts:
        return
    empty = sum(phenotype.get(column) is None for phenotype in phenotypes)
    kinds = sorted(set(texts))
    some = ", ".join(map(repr, kinds[:_MOST_NAMED])) + (", …" if len(kinds) > _MOST_NAMED else "")
    raise FinetuneError(
        f"phenotype column {column!r} holds no number in {len(texts)} of {len(phenotypes)} runs ({some}), and nothing "
        f"in {empty}, which are left out; correct or empty the cells and shard again, or ask for classify:{column}."
    )


def as_text(value: float | str) -> str:
    """Return a class's name: a text as it is, a number with all its digits, a whole one without a decimal point."""
    if isinstance(value, str):
        return value
    return str(int(value)) if value == int(value) else repr(float(value))


def _balanced(labels: Sequence[float], classes: int) -> Tensor:
    counts = torch.bincount(torch.as_tensor(labels).long(), minlength=classes).double()
    return (counts.sum() / (classes * counts.clamp(min=1))).float()
