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
    score: float | Sequence[float]
    threshold: float | None
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


def write_predictions(path: Path, predictions: Sequence[Prediction], classes: Sequence[str], seed: int) -> None:
    """Write ``subject site fold label score threshold``; sub-0001 onwards, in an order drawn from the seed.

    Several classes have a column of scores each, ``score_<class>``, and no threshold; nor has a predicted number one.
    """
    order = np.random.default_rng([seed, len(predictions)]).permutation(len(predictions))
    names = [f"score_{name}" for name in classes] if len(classes) > 2 else ["score"]
    rows = [
        (
            f"sub-{number:04d}",
            p.subject.site,
            p.fold,
            f"{p.subject.label:g}",
            *(f"{score:.6f}" for score in np.atleast_1d(p.score)),
            None if p.threshold is None else f"{p.threshold:.6f}",
        )
        for number, p in enumerate((predictions[i] for i in order), start=1)
    ]
    write_table(path, ("subject", "site", "fold", "label", *names, "threshold"), rows)
