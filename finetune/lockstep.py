"""Train several trials side by side as one batched model: one backbone, one pass, every trial its own training.

Shape suffixes: K trials · B clips of a trial's batch · C channels of an embedding.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from boldforge.finetune.backbone import Backbone, Partway
from boldforge.finetune.cohort import ClipSet
from boldforge.finetune.errors import FinetuneError
from boldforge.finetune.fit import DivergedError, Epoch, Fit, batches_in_order
from boldforge.finetune.stacked_lora import OwnDraws, Stack


class Lockstep:
    """Trials that take their steps together, see `Stack`; each gets what it would get alone, to rounding.

    Ranks, scales, dropout, step sizes, seeds, order of the clips, gradient clipping and heads are every trial's own.
    How the trials are composed changes the last bits of a product, so the same trials together give the same bits, and
    a trial alone nearly the same.

    Parameters
    ----------
    backbone
        As for `Stack`.
    fits
        The trials' trainings, on as many clips each, and of one batch size.

    Raises
    ------
    FinetuneError
        If the trials cannot be batched.
    """

    def __init__(self, backbone: Backbone, fits: Sequence[Fit]) -> None:
        sizes = sorted({(len(fit.train), len(fit.validation or ()), fit.batch_size) for fit in fits})
        if len(sizes) != 1:
            raise FinetuneError(
                "trials of one batch must have as many training clips, validation clips and clips per step; found "
                f"{' and '.join(map(str, sizes))}."
            )
        self._fits = tuple(fits)
        self._stack = Stack(backbone, [fit.classifier for fit in fits])
        self._device = fits[0].classifier.head.mean.device

    def step(self, trials: Sequence[int]) -> list[Epoch | DivergedError]:
        """Train these trials for one epoch each and measure them.

        Parameters
        ----------
        trials
            Positions among the trainings; the others rest.

        Returns
        -------
        list
            One for each: the epoch, or why there is none.
        """
        fits = [self._fits[trial] for trial in trials]
        begun = [fit.begin_epoch() for fit in fits]
        self._stack.active = tuple(trials)
        totals_K = torch.zeros(len(fits), dtype=torch.float64)
        for fit in fits:
            fit.classifier.train(True)
        with torch.random.fork_rng(devices=[]):
            self._stack.draws = OwnDraws([seed for _, seed in begun], self._device)
            for batches in zip(*(batches for batches, _ in begun), strict=True):
                totals_K += self._learn(fits, batches) * len(batches[0])
            self._stack.draws = None
        for fit in fits:
            fit.classifier.train(False)
        embeddings_KNC = self._everything([fit.validation for fit in fits])
        return [
            _ended(fit, total / len(fit.train), embeddings_NC)
            for fit, total, embeddings_NC in zip(fits, totals_K.tolist(), embeddings_KNC, strict=True)
        ]

    def _learn(self, fits: Sequence[Fit], batches: Sequence[np.ndarray]) -> Tensor:
        """Take one step of every trial and return their losses [K]."""
        clips = _together([fit.train for fit in fits], batches, self._device)
        embeddings_KBC = self._stack.embed(clips)
        losses = [
            fit.loss(embeddings_BC, positions)
            for fit, embeddings_BC, positions in zip(fits, embeddings_KBC, batches, strict=True)
        ]
        losses_K = torch.stack(losses)
        # No trial's loss depends on another's parameters, so each gets the gradient of its own.
        losses_K.sum().backward()
        for fit in fits:
            fit.update()
        return losses_K.detach().double().cpu()

    @torch.no_grad()
    def _everything(self, sets: Sequence[ClipSet | None]) -> list[Tensor] | Tensor:
        """Embed all validation clips of every trial, [K, clips, C]; nothing for trials without."""
        found = [clips for clips in sets if clips is not None]
        if not found:
            return [torch.empty(0)] * len(sets)
        parts = batches_in_order(len(found[0]), self._fits[0].batch_size)
        return torch.cat(
            [self._stack.embed(_together(found, [part] * len(found), self._device)) for part in parts], dim=1
        )


def _ended(fit: Fit, loss: float, embeddings_NC: Tensor) -> Epoch | DivergedError:
    try:
        return fit.end_epoch(loss, lambda: embeddings_NC)
    except DivergedError as error:
        return error


def _together(sets: Sequence[ClipSet], batches: Sequence[np.ndarray], device: torch.device) -> Partway:
    """Return the trials' batches one after the other; what all of them read is read once."""
    if all(clips is sets[0] and np.array_equal(batch, batches[0]) for clips, batch in zip(sets, batches, strict=True)):
        x, pooled = sets[0].batch(batches[0], device)
        return Partway(x.repeat(len(sets), *[1] * (x.ndim - 1)), pooled.repeat(len(sets), 1))
    parts = [clips.batch(batch, device) for clips, batch in zip(sets, batches, strict=True)]
    return Partway(torch.cat([part.x for part in parts]), torch.cat([part.pooled for part in parts]))


@torch.no_grad()
def embed_untrained(backbone: Backbone, clips: ClipSet, stage: int, batch_size: int) -> Tensor:
    """Embed all clips of a set by the backbone alone, [clips, C]: where LoRA begins, whatever its rank."""
    device = next(backbone.network.parameters()).device
    parts = batches_in_order(len(clips), batch_size)
    return torch.cat([backbone.embed_from(clips.batch(part, device), stage) for part in parts])
