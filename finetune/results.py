"""The files of a finetuning folder; no real subject name is written into any of them."""

import csv
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from boldforge.finetune.cohort import Subject


@dataclass(frozen=True)
class Prediction:
    """One test subject's score, by a model that has not seen the subject, and the score from which it says class 1."""

    subject: Subject
    score: float
    threshold: float
    fold: int


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write readable, standard JSON (no NaN)."""
    path.write_text(json.dumps(content, indent=1, allow_nan=False, default=str) + "\n")


def write_table(path: Path, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Write a tab-separated table with a header line; None is left empty."""
    with path.open("w", newline="") as stream:
        table = csv.writer(stream, delimiter="\t", lineterminator="\n")
        table.writerow(columns)
        table.writerows(["" if value is None else value for value in row] for row in rows)


def write_predictions(path: Path, predictions: Sequence[Prediction], seed: int) -> None:
    """Write ``subject site fold label score threshold``; sub-0001 onwards, in an order drawn from the seed."""
    order = np.random.default_rng([seed, len(predictions)]).permutation(len(predictions))
    columns = ("subject", "site", "fold", "label", "score", "threshold")
    rows = [
        (f"sub-{number:04d}", p.subject.site, p.fold, p.subject.label, f"{p.score:.6f}", f"{p.threshold:.6f}")
        for number, p in enumerate((predictions[i] for i in order), start=1)
    ]
    write_table(path, columns, rows)


def count_classes(subjects: Sequence[Subject]) -> dict[str, int]:
    """Return ``n`` and ``n_positive``."""
    return {"n": len(subjects), "n_positive": sum(subject.label == 1 for subject in subjects)}
