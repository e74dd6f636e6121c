"""Trials trained as one batched model, against the same trials one after the other."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from boldforge.finetune import AdapterConfig, Classifier, TrainingConfig, get_task, load_backbone
from boldforge.finetune.cohort import ClipSet
from boldforge.finetune.fit import Epoch, Fit
from boldforge.finetune.lockstep import Lockstep, embed_untrained
from boldforge.finetune.stacked_lora import share_backbone
from boldforge.pretrain import ModelConfig
from finetune_parts.heads import ENCODER
from finetune_parts.made import write_encoder

# As most recipes have it: the stages above the first.
STAGE = 1


@dataclass(frozen=True)
class Sizes:
    """What is trained: encoder and grid, ranks × seeds, training and validation clips, clips per step, epochs."""

    encoder: ModelConfig
    grid: str
    ranks: tuple[int, ...]
    seeds: int
    clips: tuple[int, int]
    batch_size: int
    epochs: int

    @property
    def trials(self) -> list[tuple[int, int]]:
        """Rank and seed of every trial."""
        return [(rank, seed) for seed in range(self.seeds) for rank in self.ranks]


SIZES = {
    "quick": Sizes(ENCODER, "mni4mm", ranks=(1, 8), seeds=1, clips=(4, 2), batch_size=2, epochs=1),
    "cpu": Sizes(ENCODER, "mni4mm", ranks=(1, 4, 16, 64), seeds=2, clips=(8, 4), batch_size=4, epochs=1),
    # NeuroSTORM's own size: 2 mm, 20 frames.
    "cuda": Sizes(
        ENCODER.model_copy(update={"frames": 20}),
        "mni2mm",
        ranks=(1, 4, 16, 64),
        seeds=2,
        clips=(32, 16),
        batch_size=4,
        epochs=3,
    ),
}


@dataclass(frozen=True)
class Taken:
    """Seconds for all trials, by the clock and of the processor, and every trial's last validation loss."""

    wall: float
    processor: float
    losses: list[float]


def measure(scratch: Path, sizes: Sizes, device: str, pairs: int) -> list[tuple[Taken, Taken]]:
    """Train all trials alone and batched, in turns.

    Parameters
    ----------
    scratch
        A folder for the encoder.
    sizes
        What to train.
    device
        ``cpu`` or ``cuda``.
    pairs
        How often; a trial that is trained before them is not counted.

    Returns
    -------
    list
        Of pairs: one after the other, and batched. Both begin with loading the encoder and end with a validation.
    """
    encoder = write_encoder(scratch / "encoder", sizes.encoder, sizes.grid)
    train, validation = _clips(encoder, sizes)

    def alone() -> list[float]:
        return [_last(_fit(encoder, train, validation, trial, sizes, device)) for trial in sizes.trials]

    def batched() -> list[float]:
        backbone = load_backbone(encoder)
        backbone.network.to(device)
        untrained = embed_untrained(backbone, train, STAGE, sizes.batch_size)
        fits = []
        for rank, seed in sizes.trials:
            classifier = _classifier(share_backbone(backbone), rank, seed, device)
            fits.append(Fit(classifier, train, validation, _training(sizes), seed, embeddings=untrained))
        together = Lockstep(backbone, fits)
        for _ in range(sizes.epochs):
            ended = together.step(range(len(fits)))
        return [epoch.validation_loss for epoch in ended if isinstance(epoch, Epoch)]

    def _last(fit: Fit) -> float:
        for _ in range(sizes.epochs):
            epoch = fit.step()
        return epoch.validation_loss or 0.0

    _last(_fit(encoder, train, validation, sizes.trials[0], sizes, device))
    return [(_timed(alone, device), _timed(batched, device)) for _ in range(pairs)]


def _timed(work: Callable[[], list[float]], device: str) -> Taken:
    clocks: Sequence[Callable[[], float]] = (time.perf_counter, time.process_time)
    before = [clock() for clock in clocks]
    losses = work()
    if device == "cuda":
        torch.cuda.synchronize()
    wall, processor = (clock() - start for clock, start in zip(clocks, before, strict=True))
    return Taken(wall, processor, losses)


def _clips(encoder: Path, sizes: Sizes) -> tuple[ClipSet, ClipSet]:
    """Noise as it enters the first adapted stage."""
    backbone = load_backbone(encoder)
    n_voxels = backbone.network.token_grid.n_voxels
    total = sum(sizes.clips)
    generator = torch.Generator().manual_seed(0)
    parts = []
    with torch.no_grad():
        for _ in range(total):
            values = torch.randn(1, sizes.encoder.frames, n_voxels, generator=generator)
            parts.append(backbone.encode_until(values, STAGE))
    x, pooled = (np.concatenate([part[place].numpy() for part in parts]) for place in range(2))
    people, labels = np.arange(total), np.arange(total) % 2.0
    clips = ClipSet(x, pooled, people, people, labels)
    return clips.select(range(sizes.clips[0])), clips.select(range(sizes.clips[0], total))


def _training(sizes: Sizes) -> TrainingConfig:
    return TrainingConfig(epochs=sizes.epochs, batch_size=sizes.batch_size)


def _classifier(backbone, rank: int, seed: int, device: str) -> Classifier:
    adapter = AdapterConfig(rank=rank, first_stage=STAGE)
    return Classifier(backbone, get_task("adhd"), adapter, seed).to(device)


def _fit(encoder: Path, train: ClipSet, validation: ClipSet, trial: tuple[int, int], sizes: Sizes, device: str) -> Fit:
    rank, seed = trial
    return Fit(_classifier(load_backbone(encoder), rank, seed, device), train, validation, _training(sizes), seed)
