"""Train an adapter and a head, epoch by epoch."""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
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
from boldforge.finetune.tasks.base import Arranging, Comparing

_MOMENTS = "optimizer."


class DivergedError(FinetuneError):
    """The loss of a training is no longer a finite number."""


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
    scores
        Of the validation subjects, [N] or [N, K]; None without them.
    """

    number: int
    train_loss: float
    validation_loss: float | None
    figures: dict[str, Any] | None
    improved: bool
    scores: np.ndarray | None = field(default=None, repr=False, compare=False)


def fit(
    classifier: Classifier,
    train: ClipSet,
    validation: ClipSet | None,
    config: TrainingConfig,
    epochs: int,
    seed: int,
) -> Iterator[Epoch]:
    """Train in place for some epochs, see `Fit`; the classifier holds the epoch's weights at every yield."""
    fitting = Fit(classifier, train, validation, config, seed)
    for _ in range(epochs):
        yield fitting.step()


class Fit:
    """Training that can be put away after any epoch and taken up again, to the same bits.

    The head's scale is first set from the training clips. The order of the clips and the adapter's dropout are pure
    functions of (seed, epoch).

    Parameters
    ----------
    classifier
        Trained in place; starts where it stands, or where `state` stood.
    train, validation
        As they enter the classifier's first adapted stage.
    config
        Rates and sizes; its ``epochs`` and ``patience`` are the caller's business.
    seed
        Of the order and the dropout.
    state
        What `state` gave after an epoch of the same training; None begins.
    done, best
        With a state: the epochs behind it, and the validation figure and loss of the best of them.
    embeddings
        Of the training clips [clips, C] before anything is learned, where the caller has them already.
    """

    def __init__(
        self,
        classifier: Classifier,
        train: ClipSet,
        validation: ClipSet | None,
        config: TrainingConfig,
        seed: int,
        *,
        state: Mapping[str, Tensor] | None = None,
        done: int = 0,
        best: tuple[float, float] | None = None,
        embeddings: Tensor | None = None,
    ) -> None:
        self._classifier, self._config, self._seed = classifier, config, seed
        self._number = done
        self._best = None if best is None else (best[0], -best[1])
        self._criterion = classifier.task.criterion(train.labels[train.subject].tolist())
        if state is not None:
            classifier.load_state({name: state[name] for name in state if not name.startswith(_MOMENTS)})
        else:
            classifier.head.fit_unit(*classifier.task.scale(train.labels.tolist()))
        self._training = _Embedder(classifier, train, config.batch_size)
        self._validating = _Embedder(classifier, validation, config.batch_size) if validation is not None else None
        # Where all is trained, what a first embedding was says nothing.
        if state is None and classifier.adapter.kind != "full":
            classifier.head.fit_scale(self._training.everything() if embeddings is None else embeddings)
        adapter = [parameter for parameter in classifier.network.parameters() if parameter.requires_grad]
        groups: list[dict[str, Any]] = [{"params": list(classifier.head.parameters()), "lr": config.head_lr}]
        groups += [{"params": adapter, "lr": config.lr}] if adapter else []
        self._optimizer = torch.optim.AdamW(groups, weight_decay=config.weight_decay)
        if state is not None:
            self._load_moments(state)

    @property
    def classifier(self) -> Classifier:
        """What is trained."""
        return self._classifier

    @property
    def train(self) -> ClipSet:
        """The training clips."""
        return self._training.clips

    @property
    def validation(self) -> ClipSet | None:
        """The validation clips."""
        return None if self._validating is None else self._validating.clips

    @property
    def batch_size(self) -> int:
        """Clips per step."""
        return self._config.batch_size

    def step(self) -> Epoch:
        """Train one epoch and measure it.

        Raises
        ------
        DivergedError
            If the loss is no longer a finite number.
        """
        batches, seed = self.begin_epoch()
        total = 0.0
        self._classifier.train(True)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            for positions in batches:
                loss = self.loss(self._training.embed(positions), positions)
                loss.backward()
                self.update()
                total += loss.item() * len(positions)
        self._classifier.train(False)
        return self.end_epoch(total / len(self.train), self._everything_to_validate)

    def begin_epoch(self) -> tuple[list[np.ndarray], int]:
        """Return the next epoch's batches, as positions among the training clips, and the seed of its dropout."""
        self._number += 1
        seed = np.random.SeedSequence([self._seed, self._number])
        order = np.random.default_rng(seed).permutation(len(self.train))
        if isinstance(self._classifier.task, Arranging):
            order = self._classifier.task.order(self.train.subject_labels, order)
        batches = np.array_split(order, math.ceil(len(self.train) / self._config.batch_size))
        return batches, int(seed.generate_state(1)[0])

    def loss(self, embeddings_BC: Tensor, positions: np.ndarray) -> Tensor:
        """Return the loss of a batch; its gradients are the caller's to compute."""
        return self._criterion(self._classifier.head(embeddings_BC), self._training.labels(positions))

    def update(self) -> None:
        """Take one step of the optimizer, the gradient clipped, and drop the gradients."""
        trainable = [parameter for group in self._optimizer.param_groups for parameter in group["params"]]
        torch.nn.utils.clip_grad_norm_(trainable, self._config.clip_norm)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)

    def end_epoch(self, loss: float, embed: Callable[[], Tensor]) -> Epoch:
        """Measure the epoch that was begun.

        Parameters
        ----------
        loss
            Mean over the epoch's clips.
        embed
            Returns the validation clips' embeddings [clips, C]; not called without validation clips.

        Raises
        ------
        DivergedError
            If the loss, a trained weight or a validation score is not a finite number.
        """
        number = self._number
        if not math.isfinite(loss):
            raise self._diverged(f"the training loss is {loss}")
        # The last step of an epoch may break what no training loss has seen.
        if not all(bool(p.isfinite().all()) for group in self._optimizer.param_groups for p in group["params"]):
            raise self._diverged("a trained weight is not a finite number")
        if self._validating is None:
            return Epoch(number, loss, None, None, improved=True)
        embeddings_NC = embed()
        with torch.no_grad():
            if not bool(self._classifier.head(embeddings_NC).isfinite().all()):
                raise self._diverged("a validation score is not a finite number")
        loss_now, figures, scores = _measure(self._validating, self._criterion, embeddings_NC)
        rank = (float(figures[self._classifier.task.selects_by]), -loss_now)
        improved = self._best is None or rank > self._best
        self._best = rank if improved else self._best
        return Epoch(number, loss, loss_now, figures, improved, scores)

    def _diverged(self, what: str) -> DivergedError:
        config = self._config
        return DivergedError(
            f"{what} in epoch {self._number}; set training.lr below {config.lr:g} and training.head_lr below "
            f"{config.head_lr:g}."
        )

    def _everything_to_validate(self) -> Tensor:
        assert self._validating is not None
        return self._validating.everything()

    def state(self) -> dict[str, Tensor]:
        """Return copies of the classifier's own state and of the optimizer's moments."""
        moments = {
            f"{_MOMENTS}{place}.{name}": tensor.detach().cpu().clone()
            for place, kept in self._optimizer.state_dict()["state"].items()
            for name, tensor in kept.items()
        }
        return self._classifier.state() | moments

    def _load_moments(self, state: Mapping[str, Tensor]) -> None:
        kept: dict[int, dict[str, Tensor]] = {}
        for key in state:
            if key.startswith(_MOMENTS):
                place, name = key.removeprefix(_MOMENTS).split(".")
                kept.setdefault(int(place), {})[name] = state[key]
        groups = self._optimizer.state_dict()["param_groups"]
        self._optimizer.load_state_dict({"state": kept, "param_groups": groups})


def predict_subjects(classifier: Classifier, clips: ClipSet, batch_size: int) -> np.ndarray:
    """Return one score per subject of the set, [N] or [N, K], in the order of its labels: the mean over its clips."""
    source = _Embedder(classifier, clips, batch_size)
    with torch.no_grad():
        return _pool_subjects(classifier, clips, classifier.head(source.everything()))


def batches_in_order(n_clips: int, batch_size: int) -> list[np.ndarray]:
    """Cut clips into batches of nearly one size, as positions."""
    return np.array_split(np.arange(n_clips), math.ceil(n_clips / batch_size))


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
        return torch.cat([self.embed(part) for part in batches_in_order(len(self.clips), self.batch_size)])

    def labels(self, positions: np.ndarray) -> Tensor:
        """[B]."""
        return torch.from_numpy(self.clips.labels[self.clips.subject[positions]]).to(self.device)


@torch.no_grad()
def _measure(
    source: _Embedder, criterion: Criterion, embeddings_NC: Tensor
) -> tuple[float, dict[str, Any], np.ndarray]:
    """Return the mean loss per clip, the task's figures per subject, and the subjects' scores."""
    classifier, clips = source.classifier, source.clips
    logits_NK = classifier.head(embeddings_NC)
    loss = float(criterion(logits_NK, source.labels(np.arange(len(clips)))))
    scores = _pool_subjects(classifier, clips, logits_NK)
    return loss, classifier.task.metrics(clips.labels, scores), scores


def _pool_subjects(classifier: Classifier, clips: ClipSet, logits_NK: Tensor) -> np.ndarray:
    scores = classifier.task.scores(logits_NK).double().cpu().numpy()
    sums = np.zeros((len(clips.labels), *scores.shape[1:]))
    np.add.at(sums, clips.subject, scores)
    counts = np.bincount(clips.subject, minlength=len(clips.labels))
    pooled = sums / counts.reshape(-1, *[1] * (scores.ndim - 1))
    return classifier.task.settle(clips.labels, pooled) if isinstance(classifier.task, Comparing) else pooled
