"""Train an adapter and a head, epoch by epoch."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from boldforge.configs import StrictModel
from boldforge.finetune.classifier import Classifier
from boldforge.finetune.cohort import ClipSet
from boldforge.finetune.errors import FinetuneError
from boldforge.finetune.tasks import Criterion


class TrainingConfig(StrictModel):
    """How an adapter and its head are trained (AdamW, constant rate)."""

    epochs: int = Field(20, ge=1, description="Most passes over the training clips.")
    patience: int = Field(
        5, ge=1, description="Epochs without a better validation figure before training stops; the best is kept."
    )
    lr: float = Field(
        5e-3, gt=0, le=1, description="Step size of the adapter; LoRA bears far more than full fine-tuning's 5e-5."
    )
    head_lr: float = Field(
        1e-2, gt=0, le=1, description="Step size of the head, which starts from nothing on standardised embeddings."
    )
    weight_decay: float = Field(
        0.1,
        ge=0,
        description="AdamW's decay, times the step size at every step; strong, as subjects are few.",
    )
    batch_size: int = Field(8, ge=1, description="Clips per step.")
    clip_norm: float = Field(1.0, gt=0, description="Largest gradient norm of a step; longer ones are shortened.")


@dataclass(frozen=True)
class Epoch:
    """What one epoch gave.

    Attributes
    ----------
    number
        Counted from 1.
    train_loss
        Mean over the epoch's clips, while it learned.
    validation_loss, figures
        Measured after the epoch, per clip and per subject; None without validation clips.
    improved
        Whether this is the best epoch so far: higher selection figure, or as high with a lower validation loss.
    """

    number: int
    train_loss: float
    validation_loss: float | None
    figures: dict[str, Any] | None
    improved: bool


def fit(
    classifier: Classifier,
    train: ClipSet,
    validation: ClipSet | None,
    config: TrainingConfig,
    epochs: int,
    seed: int,
) -> Iterator[Epoch]:
    """Train in place; the classifier holds the epoch's weights at every yield.

    The head's scale is first set from the training clips. The order of the clips and the adapter's dropout are pure
    functions of (seed, epoch).

    Parameters
    ----------
    classifier
        Starts where it stands.
    train, validation
        As they enter the classifier's first adapted stage.
    config
        Rates and sizes; its own ``epochs`` and ``patience`` are the caller's business.
    epochs
        Passes over the training clips.
    seed
        Of the order and the dropout.

    Yields
    ------
    Epoch

    Raises
    ------
    FinetuneError
        If the loss is no longer a finite number.
    """
    task, stage = classifier.task, classifier.adapter.first_stage
    device = classifier.head.mean.device
    criterion = task.criterion(train.labels[train.subject].tolist())
    classifier.head.fit_scale(_embed(classifier, train, config.batch_size))
    adapter = [parameter for parameter in classifier.network.parameters() if parameter.requires_grad]
    groups = [{"params": list(classifier.head.parameters()), "lr": config.head_lr}]
    groups += [{"params": adapter, "lr": config.lr}] if adapter else []
    optimizer = torch.optim.AdamW(groups, weight_decay=config.weight_decay)
    trainable = [parameter for group in groups for parameter in group["params"]]  # type: ignore[attr-defined]
    best: tuple[float, float] | None = None
    for number in range(1, epochs + 1):
        order = np.random.default_rng([seed, number]).permutation(len(train))
        total = 0.0
        classifier.train(True)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(int(np.random.SeedSequence([seed, number]).generate_state(1)[0]))
            for clips in np.array_split(order, math.ceil(len(order) / config.batch_size)):
                x, labels = train.batch(clips)
                loss = criterion(classifier(x.to(device), stage), labels.to(device))
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                torch.nn.utils.clip_grad_norm_(trainable, config.clip_norm)
                optimizer.step()
                total += loss.item() * len(clips)
        classifier.train(False)
        if not math.isfinite(total):
            raise FinetuneError(
                f"the training loss is {total} in epoch {number}; set training.lr below {config.lr:g} and "
                f"training.head_lr below {config.head_lr:g}."
            )
        if validation is None:
            yield Epoch(number, total / len(train), None, None, improved=True)
            continue
        loss_now, figures = evaluate(classifier, validation, criterion, config.batch_size)
        rank = (float(figures[task.selects_by]), -loss_now)
        improved = best is None or rank > best
        best = rank if improved else best
        yield Epoch(number, total / len(train), loss_now, figures, improved)


def evaluate(
    classifier: Classifier, clips: ClipSet, criterion: Criterion, batch_size: int
) -> tuple[float, dict[str, Any]]:
    """Return the mean loss per clip and the task's figures per subject."""
    logits_NK = _logits(classifier, clips, batch_size)
    labels_N = torch.from_numpy(clips.labels[clips.subject]).to(logits_NK.device)
    loss = float(criterion(logits_NK, labels_N))
    return loss, classifier.task.metrics(clips.labels.tolist(), _pool_subjects(classifier, clips, logits_NK))


def predict_subjects(classifier: Classifier, clips: ClipSet, batch_size: int) -> list[float]:
    """Return one score per subject of the set, in the order of its labels: the mean over the subject's clips."""
    return _pool_subjects(classifier, clips, _logits(classifier, clips, batch_size))


def _pool_subjects(classifier: Classifier, clips: ClipSet, logits_NK: Tensor) -> list[float]:
    scores = classifier.task.scores(logits_NK).double().cpu().numpy()
    sums = np.bincount(clips.subject, weights=scores, minlength=len(clips.labels))
    return (sums / np.bincount(clips.subject, minlength=len(clips.labels))).tolist()


@torch.no_grad()
def _embed(classifier: Classifier, clips: ClipSet, batch_size: int) -> Tensor:
    stage, device = classifier.adapter.first_stage, classifier.head.mean.device
    parts = np.array_split(np.arange(len(clips)), math.ceil(len(clips) / batch_size))
    return torch.cat([classifier.backbone.embed_from(clips.batch(part)[0].to(device), stage) for part in parts])


@torch.no_grad()
def _logits(classifier: Classifier, clips: ClipSet, batch_size: int) -> Tensor:
    return classifier.head(_embed(classifier, clips, batch_size))
