"""The smallest sweep that has everything, and what of its results must not depend on how it ran."""

from pathlib import Path
from typing import Any

SMALL: dict[str, Any] = {
    "clips": 1,
    "folds": 3,
    "ranks": [0, 1],
    "grace": 1,
    "adapter": {"first_stage": 1},
    "training": {"epochs": 1},
    "driver": "serial",
}
FILES = (
    "sweep.json",
    "trials.tsv",
    "journal.jsonl",
    "best/metrics.json",
    "best/predictions.tsv",
    "best/adapter/task.json",
    "best/adapter/head.safetensors",
)


def read_swept(out: Path) -> dict[str, bytes]:
    """Return the files of a sweep; its own folder's name reads OUT."""
    return {name: (out / name).read_bytes().replace(str(out).encode(), b"OUT") for name in FILES}
