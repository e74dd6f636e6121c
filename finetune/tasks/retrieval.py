"""Which image somebody looked at: clips are matched with embeddings of the images, which the user supplies."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional

from boldforge.data_shards import Manifest
from boldforge.data_shards.phenotype import read_table
from boldforge.finetune.block_rows import RunEvents
from boldforge.finetune.errors import FinetuneError
from boldforge.finetune.events import EventsConfig
from boldforge.finetune.subjects import Cohort
from boldforge.finetune.tasks.base import Criterion, Kind, Phenotype

TEMPERATURE = 0.07
"""Where CLIP's begins (Radford et al. 2021, arXiv 2103.00020); not learned, as trials are few."""


class ImageRetrieval:
    """Rank N images by how well their embeddings fit a block's clips.

    The head gives a vector of the embeddings' length D; a symmetric InfoNCE loss draws it to the embedding of the image
    that was shown and away from those of the other images in the batch, and the other way round (van den Oord et al.
    2018, arXiv 1807.03748). Scores are cosines with all N images that occur in the cohort. Columns of
    ``predictions.tsv``: subject, run, site, fold, label, ``score_<image>`` for each image.

    Parameters
    ----------
    classes
        Names of the images, in the order of the labels.
    tensors
        ``candidates`` [N, D], their embeddings; any scale.
    """

    name = "retrieval"
    kind: Kind = "multiclass"
    column = "events"
    rows = "blocks"
    baselines: tuple[str, ...] = ("regions", "image")
    selects_by = "top1"
    every_class_trains = False

    def __init__(self, classes: Sequence[str], tensors: Mapping[str, Tensor]) -> None:
        self.classes: tuple[str, ...] = tuple(classes)
        self.tensors = {"candidates": functional.normalize(tensors["candidates"].float(), dim=1)}
        self.n_scores, self.n_outputs = self.tensors["candidates"].shape
        self.chance = 1 / self.n_scores

    def label(self, phenotype: Phenotype) -> float | None:
        """Return None: an image belongs to a block, not to a person."""
        return None

    def scale(self, labels: Sequence[float]) -> tuple[float, float]:
        """Return (1, 0): only directions count."""
        return 1.0, 0.0

    def criterion(self, labels: Sequence[float]) -> Criterion:
        """Return the symmetric InfoNCE loss; clips of the same image are no negatives of each other."""
        candidates = self.tensors["candidates"]

        def loss(outputs_BD: Tensor, labels_B: Tensor) -> Tensor:
            shown = labels_B.long()
            images_BD = candidates.to(outputs_BD.device)[shown]
            logits_BB = functional.normalize(outputs_BD, dim=1) @ images_BD.T / TEMPERATURE
            same_BB = (shown[:, None] == shown[None, :]).to(logits_BB.dtype)
            target_BB = same_BB / same_BB.sum(dim=1, keepdim=True)
            forward = functional.cross_entropy(logits_BB, target_BB)
            return (forward + functional.cross_entropy(logits_BB.T, target_BB)) / 2

        return loss

    def scores(self, outputs_BK: Tensor) -> Tensor:
        """Return the cosine with every image, [B, N]."""
        return functional.normalize(outputs_BK, dim=1) @ self.tensors["candidates"].to(outputs_BK.device).T

    def match(self, predicted_ND: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
        """Return the scores of embeddings that another model predicted."""
        return self.scores(torch.from_numpy(predicted_ND).float()).double().numpy()

    def metrics(
        self, labels: npt.ArrayLike, scores: npt.ArrayLike, threshold: float | npt.ArrayLike = 0.5
    ) -> dict[str, Any]:
        """Return ``top1`` and ``top5`` (share of blocks whose image is ranked first, or among five), and mean rank."""
        rank = self._rank(labels, scores)
        return {
            "top1": float((rank < 1).mean()),
            "top5": float(np.clip(5 - rank, 0, 1).mean()),
            "mean_rank": float(rank.mean() + 1),
            "n": len(rank),
            "n_candidates": self.n_scores,
        }

    def headline(self, labels: npt.ArrayLike, scores: npt.ArrayLike) -> float:
        """Return the share of blocks whose image is ranked first."""
        return float((self._rank(labels, scores) < 1).mean())

    def strata(self, labels: Sequence[float]) -> list[int]:
        """Return the images."""
        return [int(label) for label in labels]

    def _rank(self, labels: npt.ArrayLike, scores: npt.ArrayLike) -> npt.NDArray[np.float64]:
        """Return how many images score above the right one; equal ones count half, so that a constant is at chance."""
        truth, score = np.asarray(labels).astype(np.int64), np.asarray(scores, dtype=np.float64)
        own = np.take_along_axis(score, truth[:, None], axis=1)
        return (score > own).sum(axis=1) + ((score == own).sum(axis=1) - 1) / 2


def open_retrieval(manifest: Manifest, events: EventsConfig, clip_length: int) -> tuple[ImageRetrieval, Cohort]:
    """Read the runs' events and the table of embeddings, and lay clips on the blocks of images.

    Parameters
    ----------
    manifest, events, clip_length
        As for `boldforge.finetune.tasks.states.open_states`; ``events.column`` names the column of images and
        ``events.embeddings`` their table. Events whose image is not in the table are left out.

    Raises
    ------
    FinetuneError
        If there are no events, no table, or fewer than two of its images were shown.
    """
    if events.embeddings is None:
        raise FinetuneError(
            "events.embeddings is not set; give a table with a column of images' names, as in the events, and one "
            "column per number of their embeddings."
        )
    known = read_embeddings(events.embeddings)
    found = RunEvents(manifest, events, clip_length)
    shown = [name for name in found.conditions if name in known]
    if len(shown) < 2:
        some = ", ".join(found.conditions[:3]) or "nothing"
        raise FinetuneError(
            f"{events.embeddings}: names {len(shown)} of the images in column {events.column!r} of the events ({some}, "
            "…), expected two at least; correct the names, or events.column."
        )
    cohort = found.rows({name: i for i, name in enumerate(shown)})
    return ImageRetrieval(shown, {"candidates": torch.from_numpy(np.stack([known[name] for name in shown]))}), cohort


def read_embeddings(path: Path) -> dict[str, npt.NDArray[np.float32]]:
    """Read a TSV or CSV: a header, then an image's name and its numbers in every line.

    Raises
    ------
    FinetuneError
        If it is missing, a value is no number, a name occurs twice, or an embedding is all zeros.
    """
    if not path.is_file():
        raise FinetuneError(f"{path}: no such table of embeddings; correct events.embeddings.")
    known: dict[str, npt.NDArray[np.float32]] = {}
    for line, row in enumerate(read_table(path), start=2):
        name, *numbers = row.values()
        try:
            values = np.array([float(number) for number in numbers], dtype=np.float32)
        except ValueError:
            values = np.array([math.nan])
        if not len(values) or not np.isfinite(values).all() or not values.any() or name in known:
            raise FinetuneError(
                f"{path}: line {line} ({name}): expected a name that occurs once, and finite numbers that are not "
                "all zero."
            )
        known[name] = values
    return known
