"""The files of a finetuning folder; no real subject name is written into any of them."""

import csv
import hashlib
import hmac
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from boldforge.configs.durable import write_atomic
from boldforge.data_shards import Manifest
from boldforge.finetune.images import ImageTable
from boldforge.finetune.subjects import Subject


@dataclass(frozen=True)
class Prediction:
    """One test subject's score, by a model that has not seen the subject, and the score from which it says class 1."""

    subject: Subject
    score: float | Sequence[float]
    threshold: float | None
    fold: int


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write readable, standard JSON (no NaN)."""
    write_atomic(path, (json.dumps(content, indent=1, allow_nan=False, default=str) + "\n").encode())


def write_table(path: Path, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Write a tab-separated table with a header line; None is left empty."""
    with path.open("w", newline="") as stream:
        table = csv.writer(stream, delimiter="\t", lineterminator="\n")
        table.writerow(columns)
        table.writerows(["" if value is None else value for value in row] for row in rows)


def pseudonym_key(source: Manifest | ImageTable) -> bytes:
    """Return the secret that orders pseudonyms: a hash of all stored voxels' hashes.

    It goes into no result, and without the scans it cannot be guessed; with them it is the same at every call, so that
    results stay reproducible and a killed run goes on under the same names.
    """
    digest = hashlib.sha256(b"pseudonyms")
    if isinstance(source, Manifest):
        for column in ("hashes_xxh3", "scale_xxh3"):
            digest.update(np.ascontiguousarray(source.index[column]).tobytes())
    else:
        for image in source.images:
            digest.update(image.sha256.encode())
    return digest.digest()


def pseudonyms(people: Sequence[str], key: bytes) -> dict[str, str]:
    """Name people sub-0001 onwards, in the order of their names' hashes under a key; the dictionary has that order."""
    order = sorted(set(people), key=lambda name: hmac.digest(key, name.encode(), "sha256"))
    return {name: f"sub-{number:04d}" for number, name in enumerate(order, start=1)}


def write_predictions(
    path: Path,
    predictions: Sequence[Prediction],
    scores: Sequence[str],
    called: Mapping[str, str],
    parts: bool = False,
) -> None:
    """Write ``subject site fold label score threshold``, subjects under pseudonyms and in their order.

    Parameters
    ----------
    path
        The file.
    predictions
        One per row.
    scores
        What each number of a score is of; where there are several, columns ``score_<name>``. Several scores have no
        threshold; nor has a predicted number one.
    called
        Everybody's pseudonym in the whole cohort, in their order, see `pseudonyms`.
    parts
        Whether rows are parts of subjects: a column ``run`` then counts a subject's runs.
    """
    place = {name: i for i, name in enumerate(called)}
    runs: dict[str, list[int]] = {}
    rows = []
    for p in sorted(predictions, key=lambda p: (place[p.subject.person], p.subject.runs if parts else ())):
        of_person = runs.setdefault(p.subject.person, [])
        of_person += [p.subject.runs[0]] if p.subject.runs[0] not in of_person else []
        rows.append(
            (
                called[p.subject.person],
                *((of_person.index(p.subject.runs[0]) + 1,) if parts else ()),
                p.subject.site,
                p.fold,
                f"{p.subject.label:g}",
                *(f"{score:.6f}" for score in np.atleast_1d(p.score)),
                None if p.threshold is None else f"{p.threshold:.6f}",
            )
        )
    several = bool(predictions) and np.size(predictions[0].score) > 1
    columns = [f"score_{name}" for name in scores] if several else ["score"]
    write_table(path, ("subject", *(("run",) if parts else ()), "site", "fold", "label", *columns, "threshold"), rows)
