"""Whose brain it is: recordings of one person shall be more alike than those of two."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional

from boldforge.data_shards import Manifest
from boldforge.finetune.errors import FinetuneError
from boldforge.finetune.events import EventsConfig
from boldforge.finetune.same_scans import same_scans_in
from boldforge.finetune.subjects import Cohort, Subject
from boldforge.finetune.tasks.base import Criterion, Kind, Phenotype

TEMPERATURE = 0.1
_DRAWS = 5000


class Reidentification:
    """Find a recording of the same person among those of the fold's test subjects.

    A row is a session, or a run where nobody has two sessions. The head gives an embedding of 64 numbers; a supervised
    contrastive loss draws those of one person together (Khosla et al. 2020, arXiv 2004.11362). A test recording is
    compared by cosine with all other test recordings of its fold, of people that training has not seen. Columns of
    ``predictions.tsv``: subject, run, site, fold, label, and ``score_rank`` (of the best recording of the same person,
    1 is a hit), ``score_candidates`` (with how many it was compared), ``score_matches`` (how many of these are the
    person's).

    Parameters
    ----------
    classes
        Not used; people in training are not those one meets later.
    """

    name = "reidentify"
    kind: Kind = "match"
    column = "subject"
    rows = "recordings"
    baselines: tuple[str, ...] = ("connectivity", "image")
    n_outputs = 64
    n_scores = 3
    classes: tuple[str, ...] = ("rank", "candidates", "matches")
    selects_by = "top1"
    chance = 0.0
    every_class_trains = False

    def __init__(self, classes: Sequence[str] = ()) -> None:
        pass

    def label(self, phenotype: Phenotype) -> float | None:
        """Return None: the label is the person."""
        return None

    def scale(self, labels: Sequence[float]) -> tuple[float, float]:
        """Return (1, 0): only directions count."""
        return 1.0, 0.0

    def criterion(self, labels: Sequence[float]) -> Criterion:
        """Return the supervised contrastive loss; a clip without another of its person in the batch does not count."""

        def loss(outputs_BK: Tensor, labels_B: Tensor) -> Tensor:
            unit_BK = functional.normalize(outputs_BK, dim=1)
            logits_BB = unit_BK @ unit_BK.T / TEMPERATURE
            itself = torch.eye(len(logits_BB), dtype=torch.bool, device=logits_BB.device)
            same = (labels_B[:, None] == labels_B[None, :]) & ~itself
            log_BB = logits_BB - logits_BB.masked_fill(itself, -torch.inf).logsumexp(dim=1, keepdim=True)
            positives_B = same.sum(dim=1)
            per_clip_B = -(log_BB.masked_fill(~same, 0.0).sum(dim=1) / positives_B.clamp(min=1))
            counted = positives_B > 0
            return (per_clip_B * counted).sum() / counted.sum().clamp(min=1)

        return loss

    def order(self, labels: npt.NDArray[Any], drawn: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Put the clips of a person side by side, people as they were drawn, so that a batch has pairs."""
        _, first = np.unique(labels[drawn], return_index=True)
        place = dict(zip(labels[drawn][first], first, strict=True))
        return drawn[np.argsort([place[label] for label in labels[drawn]], kind="stable")]

    def scores(self, outputs_BK: Tensor) -> Tensor:
        """Return unit vectors, [B, 64]."""
        return functional.normalize(outputs_BK, dim=1)

    def settle(self, labels: npt.ArrayLike, embeddings_NK: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
        """Compare every recording with all others of the set: rank of the best match, candidates, matches, [N, 3]."""
        truth, values = np.asarray(labels), np.asarray(embeddings_NK, dtype=np.float64)
        values = values / np.maximum(np.linalg.norm(values, axis=1, keepdims=True), 1e-12)
        similarity = values @ values.T
        np.fill_diagonal(similarity, -np.inf)
        same = truth[:, None] == truth[None, :]
        np.fill_diagonal(same, False)
        best = np.where(same, similarity, -np.inf).max(axis=1, keepdims=True)
        others = ~same & ~np.eye(len(truth), dtype=bool)
        # Equal ones count against it, or an embedding that never changes would find everybody.
        rank = 1 + ((similarity >= best - 1e-12) & others).sum(axis=1)
        return np.stack([rank, np.full(len(truth), len(truth) - 1), same.sum(axis=1)], axis=1).astype(np.float64)

    def metrics(
        self, labels: npt.ArrayLike, scores: npt.ArrayLike, threshold: float | npt.ArrayLike = 0.5
    ) -> dict[str, Any]:
        """Return ``top1``, ``top5``, their ``chance``, and among how many was chosen."""
        rank, candidates, matches = np.asarray(scores, dtype=np.float64).T
        return {
            "top1": float((rank == 1).mean()),
            "top5": float((rank <= 5).mean()),
            "chance": float((matches / candidates).mean()),
            "n_candidates": float(candidates.mean()),
            "n": len(rank),
        }

    def headline(self, labels: npt.ArrayLike, scores: npt.ArrayLike) -> float:
        """Return the share of recordings whose most similar one is of the same person."""
        return float((np.asarray(scores)[:, 0] == 1).mean())

    def chance_test(self, labels: npt.ArrayLike, scores: npt.NDArray[Any], seed: int) -> dict[str, float]:
        """Say how often guessing among the candidates finds as many people; scores [N, 3], of repetitions [N, R, 3].

        Recordings of one person are often each other's best match, so a guess is right for all of them or for none,
        and in all repetitions or in none.
        """
        names, person = np.unique(np.asarray(labels), return_inverse=True)
        rank_RN, candidates_RN, matches_RN = np.asarray(scores, dtype=np.float64).reshape(len(person), -1, 3).T
        generator = np.random.default_rng([seed, len(person), 4])
        drawn = generator.random((_DRAWS, len(names)))[:, person]
        guessed = sum((drawn < share_N).sum(axis=1) for share_N in matches_RN / candidates_RN)
        return {"p": float((1 + (guessed >= (rank_RN == 1).sum()).sum()) / (1 + _DRAWS))}

    def strata(self, labels: Sequence[float]) -> list[int]:
        """Return the people."""
        return [int(label) for label in labels]


def open_reidentification(
    manifest: Manifest, events: EventsConfig, clip_length: int
) -> tuple[Reidentification, Cohort]:
    """List the recordings of everybody who has two or more.

    Raises
    ------
    FinetuneError
        If fewer than four people have.
    """
    # A scan that is listed as two of a person's recordings would be found for sure.
    same = same_scans_in(manifest)
    recordings: dict[str, dict[str, dict[str, list[int]]]] = {"session": {}, "run": {}}
    people, n_too_short = {run.subject for run in manifest.runs}, 0
    for position, run in enumerate(manifest.runs):
        if run.subject in same.people or position in same.recordings:
            continue
        if run.n_frames < clip_length:
            n_too_short += 1
            continue
        for kind, part in (("session", run.session or ""), ("run", run.key.split("_part-")[0])):
            recordings[kind].setdefault(run.subject, {}).setdefault(part, []).append(position)
    # Runs of one session are more alike than two sessions are: a person is told more easily, for reasons not their own.
    found = next(
        (kind for kind in ("session", "run") if any(len(parts) > 1 for parts in recordings[kind].values())), "run"
    )
    usable = {name: parts for name, parts in recordings[found].items() if len(parts) > 1}
    if len(usable) < 4:
        raise FinetuneError(
            f"{len(usable)} of {len(people)} people have two recordings of {clip_length} frames or more, expected at "
            "least 4; give shards with several sessions or runs of each."
        )
    rows = [
        Subject(f"{name}@{part}", number, manifest.runs[runs[0]].site, tuple(runs), name)
        for number, name in enumerate(sorted(usable))
        for part, runs in sorted(usable[name].items())
    ]
    simulated = any(manifest.runs[position].simulated for row in rows for position in row.runs)
    left = len(people) - len(usable) - len(same.people)
    counted = (left, n_too_short, len(same.people), simulated, len(same.recordings))
    return Reidentification(), Cohort(tuple(rows), *counted)
