"""Clips as a frozen backbone leaves them: one vector each, all that a head alone needs."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from boldforge.data_shards import ShardReader
from boldforge.finetune.adapters import AdapterConfig
from boldforge.finetune.backbone import Backbone, Partway
from boldforge.finetune.classifier import Classifier
from boldforge.finetune.cohort import ClipSet, OnProgress, Subject, plan_clips
from boldforge.finetune.embedding_cache import EmbeddingCache, Embeddings
from boldforge.finetune.sweep_journal import SweepError
from boldforge.finetune.tasks import Task

# Clips per pass. Fixed, because the last bits of an embedding may depend on it.
_BATCH = 8


@dataclass(frozen=True)
class EmbeddedClips:
    """Where the embeddings of some subjects' clips lie, and what a head must know of the network behind them.

    Attributes
    ----------
    embeddings
        One row per clip, in the order of the subjects.
    parameters
        Number of the network's parameters.
    """

    embeddings: Embeddings
    parameters: int

    def load(self, subject: np.ndarray, labels: np.ndarray) -> ClipSet:
        """Return the clips, mapped into memory; `subject` and `labels` as in `ClipSet`.

        Raises
        ------
        SweepError
            If the file is missing or damaged.
        """
        found = self.embeddings.load()
        if found is None:
            raise SweepError(f"{self.embeddings.path}: is missing or damaged; run the same command again.")
        return ClipSet(found, np.zeros((len(found), 0), dtype=np.float32), np.arange(len(found)), subject, labels)


class EmbeddedBackbone:
    """Stands for the frozen network whose embeddings were computed before; gives back what it is given."""

    def __init__(self, dim: int) -> None:
        self.network: nn.Module = nn.Module()
        self.dim, self.n_stages = dim, 1
        self.data: Mapping[str, Any] = {}
        self.pool = self.weights_hash = ""

    def embed(self, values_BTV: Tensor) -> Tensor:
        """Return embeddings [B, C] as they are."""
        return values_BTV

    def encode_until(self, values_BTV: Tensor, stage: int) -> Partway:
        """Return embeddings [B, C] as they are."""
        return Partway(values_BTV, values_BTV.new_zeros(len(values_BTV), 0))

    def embed_from(self, partway: Partway, stage: int) -> Tensor:
        """Return embeddings [B, C] as they are."""
        return partway.x

    def adaptable_layers(self, first_stage: int) -> list[str]:
        """Name no layer."""
        return []

    def stage_parameters(self, first_stage: int) -> list[str]:
        """Name no parameter."""
        return []


def embed_clips(
    backbone: Backbone,
    reader: ShardReader,
    subjects: Sequence[Subject],
    clips: int,
    cache: EmbeddingCache,
    place: Path,
    on_progress: OnProgress | None = None,
) -> EmbeddedClips:
    """Embed evenly spaced clips of every subject, or take them from the cache.

    The key names the weights, the shards (whose hash covers their preprocessing and every voxel), the clips, the
    pooling and what computes; no label is in it or beside it.

    Parameters
    ----------
    backbone
        Frozen, on the device that is to do the work.
    reader, subjects, clips
        As for `gather_clips`.
    cache
        Asked first.
    place
        File for the embeddings.
    on_progress
        Called with clips done and clips in all.
    """
    length = int(backbone.data["clip_length"])
    plan = [(run, start) for _, run, start in plan_clips(reader.manifest, subjects, clips, length)]
    device = next(backbone.network.parameters()).device
    key = {
        "weights": backbone.weights_hash,
        "pool": backbone.pool,
        "shards": reader.manifest.content_hash,
        "recipe": reader.manifest.recipe.model_dump(mode="json"),
        "clip_length": length,
        "clips": plan,
        "torch": torch.__version__,
        "device": device.type,
    }
    found = cache.get(key, lambda: _embed(backbone, reader, plan, length, device, on_progress), place)
    return EmbeddedClips(found, sum(parameter.numel() for parameter in backbone.network.parameters()))


@torch.no_grad()
def mean_embeddings(backbone: Backbone, stage: int, clips: ClipSet) -> np.ndarray:
    """Embed every subject of gathered clips: the mean over its clips' embeddings.

    Parameters
    ----------
    backbone
        The frozen one that the clips were gathered with, on the device that is to do the work.
    stage
        The one that the clips enter.
    clips
        What `gather_clips` gave.

    Returns
    -------
    float64 [subjects, C], in the order of the set's labels.
    """
    device = next(backbone.network.parameters()).device
    sums = np.zeros((len(clips.labels), backbone.dim))
    for first in range(0, len(clips), _BATCH):
        part = np.arange(first, min(first + _BATCH, len(clips)))
        embedded = backbone.embed_from(clips.batch(part, device), stage).double().cpu().numpy()
        np.add.at(sums, clips.subject[part], embedded)
    return sums / np.bincount(clips.subject, minlength=len(sums))[:, None]


def read_labels(folder: Path) -> tuple[np.ndarray, np.ndarray]:
    """Return ``subject`` and ``labels`` of a folder's clips, as in `ClipSet`."""
    return np.load(folder / "subject.npy"), np.load(folder / "labels.npy")


def head_on_embeddings(task: Task, dim: int, seed: int) -> Classifier:
    """Return a classifier that is a head alone and reads embeddings."""
    return Classifier(EmbeddedBackbone(dim), task, AdapterConfig(rank=0), seed)


@torch.no_grad()
def _embed(
    backbone: Backbone,
    reader: ShardReader,
    plan: list[tuple[int, int]],
    length: int,
    device: torch.device,
    on_progress: Callable[[int, int], None] | None,
) -> np.ndarray:
    rows = []
    for first in range(0, len(plan), _BATCH):
        batch = [reader.read(run, start, length) for run, start in plan[first : first + _BATCH]]
        values_BTV = torch.stack([torch.from_numpy(clip.mean + clip.q * clip.scale) for clip in batch])
        rows.append(backbone.embed(values_BTV.to(device)).float().cpu().numpy())
        if on_progress:
            on_progress(first + len(batch), len(plan))
    return np.concatenate(rows)
