"""The tasks of a build: store a run's part, join the parts of a shard. Any process can perform them."""

from dataclasses import dataclass, replace

from boldforge.configs import BoldForgeError
from boldforge.data_shards.plan import PlannedRun
from boldforge.data_shards.prepare import RunProblem, store_run
from boldforge.data_shards.recipe import DataRecipe
from boldforge.data_shards.runs import Skipped
from boldforge.data_shards.shard import DamagedFragmentError, Fragment, join_fragments, write_fragment
from boldforge.data_shards.staging import ShardRecord, Staging
from boldforge.data_shards.tables import RunEntry, ShardEntry


class BuildError(BoldForgeError):
    """A build cannot start or go on."""


@dataclass(frozen=True)
class RunTask:
    """Read a run, apply the recipe and write its part of a tar."""

    planned: PlannedRun
    recipe: DataRecipe
    staging: Staging

    @property
    def name(self) -> str:
        """What tells the task from all others."""
        return self.planned.fingerprint


@dataclass(frozen=True)
class ShardTask:
    """Write a shard from its runs' parts: fingerprints in order, and why those that have none were rejected."""

    file: str
    fingerprints: tuple[str, ...]
    rejected: tuple[tuple[str, Skipped], ...]
    staging: Staging

    @property
    def name(self) -> str:
        """What tells the task from all others."""
        return self.file


Task = RunTask | ShardTask


@dataclass(frozen=True)
class Outcome:
    """How a task ended: as planned, or with a run that was rejected, or with one whose part has to be written again."""

    task: Task
    rejected: str | None = None
    lost: str | None = None
    record: ShardRecord | None = None


def perform(task: Task) -> Outcome:
    """Do a task.

    Raises
    ------
    OSError
        If the staging folder cannot be written to.
    """
    return _store(task) if isinstance(task, RunTask) else _join(task)


def _store(task: RunTask) -> Outcome:
    run = task.planned.run
    try:
        result = store_run(run, task.recipe, task.staging.folder)
    except RunProblem as error:
        return Outcome(task, rejected=str(error))
    path = task.staging.fragments / f"{task.planned.fingerprint}.tar"
    run = replace(run, simulated=result.prepared.simulated)
    task.staging.record_run(write_fragment(path, run, result))
    return Outcome(task)


def _join(task: ShardTask) -> Outcome:
    rejected = dict(task.rejected)
    fragments: list[Fragment] = []
    for fingerprint in task.fingerprints:
        if fingerprint not in rejected:
            fragment = task.staging.finished_run(fingerprint)
            if fragment is None:
                return Outcome(task, lost=fingerprint)
            fragments.append(fragment)
    shard: ShardEntry | None = None
    entries: list[RunEntry] = []
    if fragments:
        try:
            shard, entries = join_fragments(task.staging.folder / task.file, fragments)
        except DamagedFragmentError as error:
            return Outcome(task, lost=error.fragment.path.stem)
    record = task.staging.record_shard(task.file, task.fingerprints, shard, entries, rejected.values())
    return Outcome(task, record=record)
