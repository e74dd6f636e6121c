"""Rows of a task with events: blocks of one condition, with the clips that lie on them."""

import logging
from collections.abc import Mapping

from boldforge.configs import count_of
from boldforge.data_shards import Manifest
from boldforge.finetune.errors import FinetuneError
from boldforge.finetune.events import (
    REST,
    Event,
    EventFiles,
    EventsConfig,
    find_blocks,
    frame_conditions,
    read_events,
)
from boldforge.finetune.same_scans import same_scans_in
from boldforge.finetune.subjects import Cohort, Subject

logger = logging.getLogger(__name__)


class RunEvents:
    """The events of every run that has some.

    Parameters
    ----------
    manifest, events, clip_length
        Shards, where their events are, and the frames of a clip.

    Attributes
    ----------
    of_run
        Position in ``manifest.runs`` to its events.
    n_unlabelled, n_too_short
        Runs without an events file, and runs shorter than a clip.
    same
        What is left out because its scan occurs twice.
    """

    def __init__(self, manifest: Manifest, events: EventsConfig, clip_length: int) -> None:
        self._manifest, self._events, self._length = manifest, events, clip_length
        self.of_run: dict[int, list[Event]] = {}
        self.n_unlabelled = self.n_too_short = 0
        files = EventFiles(events.folder)
        paths = [files.of(run) for run in manifest.runs]
        self.same = same_scans_in(manifest, [path is not None for path in paths])
        for position, (run, path) in enumerate(zip(manifest.runs, paths, strict=True)):
            if run.subject in self.same.people or position in self.same.recordings:
                continue
            if path is None:
                self.n_unlabelled += 1
            elif run.n_frames < clip_length:
                self.n_too_short += 1
            else:
                self.of_run[position] = read_events(path, events.column)

    @property
    def conditions(self) -> list[str]:
        """What occurs in the column, but for rest, sorted."""
        found = {event.row[self._events.column] for listed in self.of_run.values() for event in listed}
        return sorted(found - set(self._events.rest_names))

    def rows(self, label: Mapping[str, int], rest: int | None = None) -> Cohort:
        """Lay clips on the blocks of the conditions that have a label.

        Parameters
        ----------
        label
            Condition to label; frames of others are left out.
        rest
            Label of the frames outside all events; None leaves them out.

        Raises
        ------
        FinetuneError
            If no clip is mostly of one condition.
        """
        events, length, tr = self._events, self._length, self._manifest.recipe.tr
        rows, mixed = [], 0
        other = max(label.values(), default=0) + 1
        for position, listed in self.of_run.items():
            run = self._manifest.runs[position]
            names = [(event, event.row[events.column]) for event in listed]
            numbered = [(event, REST if name in events.rest_names else label.get(name, other)) for event, name in names]
            first = run.source_start * run.source_tr
            conditions = frame_conditions(numbered, run.n_frames, tr, first, events.delay)
            blocks, without = find_blocks(conditions, length, events.share, rest is not None)
            mixed += without
            for block in blocks:
                if block.condition == other:
                    continue
                number = rest if block.condition == REST else block.condition
                assert number is not None, "blocks of rest are only asked for where rest has a label"
                name = f"{run.key}@{block.start:05d}"
                rows.append(Subject(name, number, run.site, (position,), run.subject, block.clips))
        if not rows:
            raise FinetuneError(
                f"none of {mixed} blocks holds a clip of {length} frames ({length * tr:g} s) of which "
                f"{100 * events.share:.0f} % are of one condition; set events.share lower, or use an encoder with "
                "shorter clips."
            )
        if mixed:
            logger.warning("left out for want of a clip that is mostly of one condition: %s", count_of(mixed, "block"))
        simulated = any(self._manifest.runs[row.runs[0]].simulated for row in rows)
        ordered = tuple(sorted(rows, key=lambda row: row.name))
        n_duplicates, n_repeated = len(self.same.people), len(self.same.recordings)
        return Cohort(ordered, self.n_unlabelled, self.n_too_short, n_duplicates, simulated, n_repeated)
