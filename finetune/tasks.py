"""What is predicted: where the label is found, the loss, and the figures. One class per task."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits

from boldforge.finetune.errors import FinetuneError
from boldforge.finetune.metrics import binary_metrics

Criterion = Callable[[Tensor, Tensor], Tensor]


class Task(Protocol):
    """One question asked of a subject."""

    name: str
    """Written into ``task.json`` and accepted by `get_task`."""
    n_outputs: int
    """Numbers the head gives per clip."""
    classes: tuple[str, ...]
    """Meaning of the labels, in order."""
    selects_by: str
    """The figure of `metrics` that model selection maximises."""

    def label(self, phenotype: Mapping[str, float | str | None]) -> int | None:
        """Return a subject's label, None where it is missing."""

    def criterion(self, labels: Sequence[int]) -> Criterion:
        """Return the loss, fitted to the training clips' labels: of logits [B, K] and labels [B], a scalar."""

    def scores(self, logits_BK: Tensor) -> Tensor:
        """Return what is averaged over a subject's clips and reported, [B]."""

    def metrics(self, labels: npt.ArrayLike, scores: npt.ArrayLike, threshold: float = 0.5) -> dict[str, Any]:
        """Return the figures, per subject."""


class AdhdDiagnosis:
    """Tell subjects with ADHD (1) from typically developing controls (0), by the phenotype column ``diagnosis``."""

    name = "adhd"
    n_outputs = 1
    classes: tuple[str, ...] = ("control", "ADHD")
    selects_by = "auc"
    column = "diagnosis"

    def label(self, phenotype: Mapping[str, float | str | None]) -> int | None:
        """Return 0 or 1, or None where the diagnosis is missing.

        Raises
        ------
        FinetuneError
            If the column holds anything else.
        """
        value = phenotype.get(self.column)
        if value is None:
            return None
        if value not in (0, 1):
            raise FinetuneError(
                f"phenotype column {self.column!r} holds {value!r}, expected 0 (control), 1 (ADHD) or nothing; correct "
                "the phenotype table and shard again."
            )
        return int(value)

    def criterion(self, labels: Sequence[int]) -> Criterion:
        """Return a binary cross-entropy in which both classes have the same say: weight n / (2 · n of the class)."""
        counts = torch.bincount(torch.as_tensor(labels), minlength=2).double()
        class_weights = (counts.sum() / (2 * counts.clamp(min=1))).float()

        def loss(logits_BK: Tensor, labels_B: Tensor) -> Tensor:
            weight_B = class_weights.to(logits_BK.device)[labels_B]
            return binary_cross_entropy_with_logits(logits_BK[:, 0], labels_B.to(logits_BK.dtype), weight=weight_B)

        return loss

    def scores(self, logits_BK: Tensor) -> Tensor:
        """Return the probability of ADHD, [B]."""
        return logits_BK[:, 0].sigmoid()

    def metrics(self, labels: npt.ArrayLike, scores: npt.ArrayLike, threshold: float = 0.5) -> dict[str, Any]:
        """Return `binary_metrics`."""
        return binary_metrics(labels, scores, threshold)


_TASKS: dict[str, type[AdhdDiagnosis]] = {AdhdDiagnosis.name: AdhdDiagnosis}


def get_task(name: str) -> Task:
    """Return the task of that name.

    Raises
    ------
    FinetuneError
        If there is none.
    """
    if name not in _TASKS:
        raise FinetuneError(f"task is {name!r}, expected one of: {', '.join(sorted(_TASKS))}.")
    return _TASKS[name]()
