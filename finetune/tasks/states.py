"""What a person was doing while a clip was recorded: the conditions of a task, from BIDS events."""

from collections import Counter
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from boldforge.data_shards import Manifest
from boldforge.finetune.block_rows import RunEvents
from boldforge.finetune.errors import FinetuneError
from boldforge.finetune.events import EventsConfig
from boldforge.finetune.subjects import Cohort
from boldforge.finetune.tasks.base import Phenotype
from boldforge.finetune.tasks.columns import SeveralClasses

_MOST_CLASSES = 50


class TaskState(SeveralClasses):
    """Tell the conditions of a task from one another.

    A row is a block: frames of one run that belong to one condition, with the clips that lie on them, whose scores are
    averaged. Columns of ``predictions.tsv``: subject, run, site, fold, label, and ``score_<condition>`` for each.

    Parameters
    ----------
    classes
        The conditions, in the order of the labels.
    """

    rows = "blocks"
    selects_by = "accuracy"
    baselines: tuple[str, ...] = ("regions", "image")

    def __init__(self, classes: Sequence[str]) -> None:
        super().__init__("states", "events", classes)
        self.chance = 1 / len(self.classes)

    def label(self, phenotype: Phenotype) -> float | None:
        """Return None: a condition belongs to a block, not to a person."""
        return None

    def headline(self, labels: npt.ArrayLike, scores: npt.ArrayLike) -> float:
        """Return the share of blocks that are called right."""
        return float((np.asarray(scores).argmax(axis=1) == np.asarray(labels)).mean())


def open_states(manifest: Manifest, events: EventsConfig, clip_length: int) -> tuple[TaskState, Cohort]:
    """Read the runs' events and lay clips on their blocks.

    Parameters
    ----------
    manifest
        Of the shards.
    events
        Where the events are, the delay, and what to do with rest.
    clip_length
        T, frames.

    Returns
    -------
    task, cohort
        The cohort's rows are blocks. Runs without events count as ``n_unlabelled``, runs shorter than a clip as
        ``n_too_short``.

    Raises
    ------
    FinetuneError
        If there are no events, fewer than two conditions, or no clip belongs to one condition.
    """
    found = RunEvents(manifest, events, clip_length)
    names = found.conditions
    rest = len(names) if events.rest == "class" else None
    classes = tuple(names) if rest is None else (*names, "rest")
    if not found.of_run or not 2 <= len(classes) <= _MOST_CLASSES:
        what = (
            f"column {events.column!r} holds {len(classes)} conditions" if found.of_run else "no run has an events file"
        )
        raise FinetuneError(
            f"{events.folder}: {what}, expected 2 to {_MOST_CLASSES} conditions in files named like the runs; correct "
            "events.folder or events.column."
        )
    cohort = found.rows({name: i for i, name in enumerate(names)}, rest)
    counts = Counter(int(row.label) for row in cohort.subjects)
    without_blocks = [name for i, name in enumerate(classes) if not counts[i]]
    if without_blocks:
        raise FinetuneError(
            f"no clip of {clip_length} frames is mostly of condition {without_blocks[0]!r}; set events.share "
            "lower, use an encoder with shorter clips, or name it in events.rest_names."
        )
    return TaskState(classes), cohort
