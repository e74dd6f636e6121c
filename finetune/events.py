"""BIDS events: which condition a run's frames belong to, and where clips of one condition lie."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt
from pydantic import Field

from boldforge.configs import StrictModel
from boldforge.data_shards.dataset_files import files_named, is_outside
from boldforge.data_shards.phenotype import parse_number, read_table
from boldforge.data_shards.tables import RunEntry
from boldforge.finetune.errors import FinetuneError

REST = -1
_FILE = re.compile(r".*events\.tsv$")
_ENTITY = re.compile(r"(sub|ses|task|run)-([A-Za-z0-9]+)")
_OPENFMRI = re.compile(r"sub(\d+)/BOLD/task(\d+)_run(\d+)$")


class EventsConfig(StrictModel):
    """Where a task's events are and how they become labels."""

    folder: Path | None = Field(
        None,
        description="Folder below which the *_events.tsv files are (onset, duration and a column of conditions); with "
        "--data, that folder by default. A run's column events, where it has one, names its file in here.",
    )
    column: str = Field("trial_type", description="Column of the conditions.")
    embeddings: Path | None = Field(
        None,
        description="For task retrieval: a table of the images' embeddings, a name as in the column and then one "
        "column per number.",
    )
    delay: float = Field(
        5.0,
        ge=0,
        le=20,
        description="Seconds by which the BOLD response follows the stimulus: events are moved by so much. A response "
        "to a block peaks about 5 s after it begins (Boynton et al. 1996).",
    )
    rest: Literal["leave-out", "class"] = Field(
        "leave-out", description="What to do with frames outside all events: leave them out, or make rest a class."
    )
    rest_names: tuple[str, ...] = Field(
        ("rest", "baseline", "fixation"), description="Conditions that are rest by another name."
    )
    share: float = Field(
        0.5,
        gt=0,
        le=1,
        description="Smallest share of a clip's frames that must be of its condition; others are left out.",
    )


@dataclass(frozen=True)
class Event:
    """Onset and duration in seconds from the run's first frame, and the table's row."""

    onset: float
    duration: float
    row: dict[str, str]


@dataclass(frozen=True)
class Block:
    """Frames ``start`` to ``stop`` of one condition, and the first frames of the clips that lie on them."""

    condition: int
    start: int
    stop: int
    clips: tuple[int, ...]


class EventFiles:
    """The events files below a folder, by what their names and places say of subject, session, task and run.

    Raises
    ------
    FinetuneError
        If the folder is not given, does not exist or holds none.
    """

    def __init__(self, folder: Path | None) -> None:
        if folder is None:
            raise FinetuneError(
                "events.folder is not set, so no condition is known; give the folder with the *_events.tsv files."
            )
        if not folder.is_dir():
            raise FinetuneError(f"{folder}: no such folder of events; correct events.folder.")
        self.folder = folder
        found = (path for path in files_named(folder, _FILE) if not is_outside(path, folder))
        self._files = [(_entities(path), path) for path in found]

    def of(self, run: RunEntry) -> Path | None:
        """Return the file of a run: the most specific one that contradicts nothing that is known of it."""
        named = run.phenotype.get("events")
        if isinstance(named, str):
            path = self.folder / named
            if is_outside(path, self.folder) or not path.is_file():
                raise FinetuneError(
                    f"{path}: run {run.key} names these events, but there is no such file in the folder."
                )
            return path
        known = dict(_ENTITY.findall(run.key))
        fitting = [
            (len(entities), path)
            for entities, path in self._files
            if entities and all(_same(value, known.get(name)) for name, value in entities.items())
        ]
        return max(fitting, key=lambda item: (item[0], str(item[1])))[1] if fitting else None


def read_events(path: Path, column: str) -> list[Event]:
    """Read an events file, in order of onset; rows without an onset or a condition are left out.

    Raises
    ------
    FinetuneError
        If a column is missing or a number is none.
    """
    rows = read_table(path)
    needed = ("onset", "duration", column)
    missing = [name for name in needed if rows and name not in rows[0]]
    if missing:
        raise FinetuneError(
            f"{path}: has no column {missing[0]!r}; its columns are {', '.join(rows[0])}. Correct the file or "
            "events.column."
        )
    events = []
    for number, row in enumerate(rows, start=2):
        if not row[column] or row[column].lower() == "n/a" or row["onset"].lower() == "n/a":
            continue
        onset, duration = parse_number(row["onset"]), parse_number(row["duration"]) or 0.0
        if onset is None or duration < 0:
            raise FinetuneError(
                f"{path}: line {number} has onset {row['onset']!r} and duration {row['duration']!r}, expected seconds."
            )
        events.append(Event(onset, duration, row))
    return sorted(events, key=lambda event: event.onset)


def frame_conditions(
    events: Sequence[tuple[Event, int]], n_frames: int, tr: float, first: float, delay: float
) -> npt.NDArray[np.int64]:
    """Return every frame's condition, `REST` outside all events.

    Parameters
    ----------
    events
        With their conditions, in order of onset; where two overlap the later one counts.
    n_frames, tr, first
        Frames of the run, seconds between them, and the time of the first one.
    delay
        Seconds by which events are moved. An event shorter than a frame counts as one frame.
    """
    time = first + tr * np.arange(n_frames)
    conditions = np.full(n_frames, REST)
    for event, condition in events:
        begin = event.onset + delay
        conditions[(time >= begin) & (time < begin + max(event.duration, tr))] = condition
    return conditions


def find_blocks(
    conditions: npt.NDArray[np.int64], clip_length: int, share: float, rest: bool
) -> tuple[list[Block], int]:
    """Lay clips on every stretch of one condition.

    A stretch longer than a clip takes as many clips side by side as fit; a shorter one takes one clip around its
    middle, which then reaches into its neighbours. A clip is kept if most of its frames, and at least `share` of them,
    are of the stretch's condition.

    Returns
    -------
    blocks
        Stretches with at least one clip.
    mixed
        How many stretches had none.
    """
    edges = np.flatnonzero(np.diff(conditions)) + 1
    blocks, mixed, last = [], 0, len(conditions) - clip_length
    for stretch in np.split(np.arange(len(conditions)), edges) if last >= 0 else []:
        start, stop, condition = int(stretch[0]), int(stretch[-1]) + 1, int(conditions[stretch[0]])
        if condition == REST and not rest:
            continue
        fitting = max(1, len(stretch) // clip_length)
        spare = len(stretch) - fitting * clip_length
        places = {min(max(start + spare // 2 + i * clip_length, 0), last) for i in range(fitting)}
        clips = tuple(at for at in sorted(places) if _rules(conditions[at : at + clip_length], condition, share))
        blocks += [Block(condition, start, stop, clips)] if clips else []
        mixed += not clips
    return blocks, mixed


def _rules(conditions: npt.NDArray[np.int64], condition: int, share: float) -> bool:
    values, counts = np.unique(conditions, return_counts=True)
    mine = int(counts[values == condition].sum())
    return mine >= share * len(conditions) and mine == counts.max() and (counts == mine).sum() == 1


def _entities(path: Path) -> dict[str, str]:
    place = _OPENFMRI.search(path.parent.as_posix())
    if place is not None:
        return dict(zip(("sub", "task", "run"), place.groups(), strict=True))
    return dict(_ENTITY.findall(path.name))


def _same(wanted: str, known: str | None) -> bool:
    """Compare entity values; a run's number may be padded, and is followed by other entities in a key."""
    if known is None:
        return False
    one, two = (re.match(r"\d+", text) for text in (wanted, known))
    if one is None or two is None or one.group() != wanted:
        return wanted == known
    return int(one.group()) == int(two.group()) and (two.group() == known or not known[two.end()].isdigit())
