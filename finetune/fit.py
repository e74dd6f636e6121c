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
        1e-3, gt=0, le=1, description="Step size of the adapter; LoRA bears far more than full fine-tuning's 5e-5."
    )
    head_lr: float = Field(
        5e-3, gt=0, le=1, description="Step size of the head, which starts from nothing on standardised embeddings."
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
    task = classifier.task
    criterion = task.criterion(train.labels[train.subject].tolist())
    classifier.head.fit_unit(*task.scale(train.labels.tolist()))
    training = _Embedder(classifier, train, config.batch_size)
    validating = _Embedder(classifier, validation, config.batch_size) if validation is not None else None
    if classifier.adapter.kind == "lora":  # where all is trained, what a first embedding was says nothing
        classifier.head.fit_scale(training.everything())
    adapter = [parameter for parameter in classifier.network.parameters() if parameter.requires_grad]
    groups: list[dict[str, Any]] = [{"params": list(classifier.head.parameters()), "lr": config.head_lr}]
    groups += [{"params": adapter, "lr": config.lr}] if adapter else []
    optimizer = torch.optim.AdamW(groups, weight_decay=config.weight_decay)
    best: tuple[float, float] | None = None
    for number in range(1, epochs + 1):
        loss = _train_epoch(training, criterion, optimizer, config, np.random.SeedSequence([seed, number]))
        if not math.isfinite(loss):
            raise FinetuneError(
                f"the training loss is {loss} in epoch {number}; set training.lr below {config.lr:g} and "
                f"training.head_lr below {config.head_lr:g}."
            )
        if validating is None:
            yield Epoch(number, loss, None, None, improved=True)
            continue
        loss_now, figures = _measure(validating, criterion)
        rank = (float(figures[task.selects_by]), -loss_now)
        improved = best is None or rank > best
        best = rank if improved else best
        yield Epoch(number, loss, loss_now, figures, improved)


def predict_subjects(classifier: Classifier, clips: ClipSet, batch_size: int) -> np.ndarray:
    """Return one score per subject of the set, [N] or [N, K], in the order of its labels: the mean over its clips."""
    source = _Embedder(classifier, clips, batch_size)
    with torch.no_grad():
        return _pool_subjects(classifier, clips, classifier.head(source.everything()))


class _Embedder:
    """Embeds the clips of a set; only once where no adapter is trained, since nothing below the head then changes."""

    def __init__(self, classifier: Classifier, clips: ClipSet, batch_size: int) -> None:
        self.classifier = classifier
        self.clips = clips
        self.batch_size = batch_size
        self.device = classifier.head.mean.device
        self._kept: Tensor | None = None
        if classifier.adapter.frozen:
            self._kept = self.everything()

    def embed(self, positions: np.ndarray) -> Tensor:
        """[B, C], with a gradient where there is one to be had."""
        if self._kept is not None:
            return self._kept[torch.from_numpy(positions).to(self.device)]
        partway = self.clips.batch(positions, self.device)
        return self.classifier.backbone.embed_from(partway, self.classifier.adapter.first_stage)

    @torch.no_grad()
    def everything(self) -> Tensor:
        """[clips, C]."""
        if self._kept is not None:
            return self._kept
        parts = np.array_split(np.arange(len(self.clips)), math.ceil(len(self.clips) / self.batch_size))
        return torch.cat([self.embed(part) for part in parts])

    def labels(self, positions: np.ndarray) -> Tensor:
        """[B]."""
        return torch.from_numpy(self.clips.labels[self.clips.subject[positions]]).to(self.device)


def _train_epoch(
    source: _Embedder,
    criterion: Criterion,
    optimizer: torch.optim.Optimizer,
    config: TrainingConfig,
    seed: np.random.SeedSequence,
) -> float:
    classifier, n_clips = source.classifier, len(source.clips)
    trainable = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    order = np.random.default_rng(seed).permutation(n_clips)
    total = 0.0
    classifier.train(True)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int(seed.generate_state(1)[0]))
        for positions in np.array_split(order, math.ceil(n_clips / config.batch_size)):
            loss = criterion(classifier.head(source.embed(positions)), source.labels(positions))
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(trainable, config.clip_norm)
            optimizer.step()
            total += loss.item() * len(positions)
    classifier.train(False)
    return total / n_clips


@torch.no_grad()
def _measure(source: _Embedder, criterion: Criterion) -> tuple[float, dict[str, Any]]:
    """Return the mean loss per clip and the task's figures per subject."""
    classifier, clips = source.classifier, source.clips
    logits_NK = classifier.head(source.everything())
    loss = float(criterion(logits_NK, source.labels(np.arange(len(clips)))))
    return loss, classifier.task.metrics(clips.labels, _pool_subjects(classifier, clips, logits_NK))


def _pool_subjects(classifier: Classifier, clips: ClipSet, logits_NK: Tensor) -> np.ndarray:
    scores = classifier.task.scores(logits_NK).double().cpu().numpy()
    sums = np.zeros((len(clips.labels), *scores.shape[1:]))
    np.add.at(sums, clips.subject, scores)
    counts = np.bincount(clips.subject, minlength=len(clips.labels))
    return sums / counts.reshape(-1, *[1] * (scores.ndim - 1))
