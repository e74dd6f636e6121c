"""What every task answers: where its label is found, how it is learned, and what is reported."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt
from torch import Tensor

Criterion = Callable[[Tensor, Tensor], Tensor]
Kind = Literal["binary", "multiclass", "regression", "match"]
Phenotype = Mapping[str, float | str | None]


class Task(Protocol):
    """One question asked of a subject, or of a part of one.

    It may also be `Matching`, `Comparing` or `Arranging`. ``every_class_trains`` is false where a label may be missing
    among the training rows; ``chance_test(labels, scores, seed)``, of scores by row and repetition, takes the place of
    permuted labels.
    """

    name: str
    """Written into ``task.json`` and accepted by `get_task`."""
    kind: Kind
    """Decides the folds' strata, the baselines and what is drawn."""
    column: str
    """Phenotype column that holds the answer."""
    rows: str
    """What is classified, in the plural: ``subjects``, or parts of them such as ``blocks``."""
    baselines: tuple[str, ...]
    """Plain models it is measured beside unless the recipe names others."""
    n_outputs: int
    """Numbers the head gives per clip."""
    n_scores: int
    """Numbers reported per row: 1, or one per class."""
    classes: tuple[str, ...]
    """Meaning of the labels 0, 1, …, in order; empty for a regression."""
    selects_by: str
    """The figure of `metrics` that selection maximises and that models are compared by."""
    chance: float
    """What that figure is where nothing can be known."""

    def label(self, phenotype: Phenotype) -> float | None:
        """Return a subject's label (a whole number for classes), None where it is missing."""

    def scale(self, labels: Sequence[float]) -> tuple[float, float]:
        """Return what the head's outputs are multiplied by and then shifted by, from the training subjects' labels."""

    def criterion(self, labels: Sequence[float]) -> Criterion:
        """Return the loss, fitted to the training clips' labels: of head outputs [B, K] and labels [B], a scalar."""

    def scores(self, outputs_BK: Tensor) -> Tensor:
        """Return what is averaged over a subject's clips and reported, [B] or, for several classes, [B, K]."""

    def metrics(
        self, labels: npt.ArrayLike, scores: npt.ArrayLike, threshold: float | npt.ArrayLike = 0.5
    ) -> dict[str, Any]:
        """Return the figures, per subject; only two-class tasks have a threshold."""

    def headline(self, labels: npt.ArrayLike, scores: npt.ArrayLike) -> float:
        """Return the figure ``selects_by`` alone, for resampling."""

    def strata(self, labels: Sequence[float]) -> list[int]:
        """Return the class, or the group of near labels, by which subjects are dealt evenly to the folds."""


@runtime_checkable
class Matching(Protocol):
    """A task whose answer is one of some candidates, which have embeddings."""

    tensors: Mapping[str, Tensor]

    def match(self, predicted_ND: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
        """Return the scores [N, candidates] of embeddings that a plain model predicted."""


@runtime_checkable
class Comparing(Protocol):
    """A task in which the rows of a set are compared with one another."""

    def settle(self, labels: npt.ArrayLike, embeddings_NK: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
        """Return every row's scores from all rows' embeddings."""


@runtime_checkable
class Arranging(Protocol):
    """A task that needs certain clips in one batch."""

    def order(self, labels: npt.NDArray[Any], drawn: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Rearrange an epoch's clips, given their labels and the order in which they were drawn."""


def named_classes(task: Task) -> list[str]:
    """Return what labels 0, 1, … mean; nothing where labels are numbers or candidates."""
    return list(task.classes) if task.kind in ("binary", "multiclass") else []


def describe_labels(task: Task, labels: Sequence[float]) -> dict[str, Any]:
    """Return ``n``, and by kind ``n_positive``, ``n_per_class``, or the labels' mean and deviation."""
    counted: dict[str, Any] = {"n": len(labels)}
    if task.kind == "binary":
        counted["n_positive"] = sum(label == 1 for label in labels)
    elif task.kind == "match":
        counted["n_people"] = len(set(labels))
    elif task.kind == "multiclass":
        counted["n_per_class"] = {name: sum(label == i for label in labels) for i, name in enumerate(task.classes)}
    else:
        counted |= {"mean": float(np.mean(labels)), "deviation": float(np.std(labels))}
    return counted
