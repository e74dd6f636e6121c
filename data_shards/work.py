"""The work of a build: one task per run, one more per shard; what is finished stays in the staging folder."""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

from boldforge.configs import BoldForgeError
from boldforge.data_shards.plan import PlannedRun, PlannedShard
from boldforge.data_shards.prepare import RunProblem, store_run
from boldforge.data_shards.recipe import DataRecipe
from boldforge.data_shards.runs import Skipped
from boldforge.data_shards.shard import DamagedFragmentError, Fragment, join_fragments, write_fragment
from boldforge.data_shards.staging import ShardRecord, Staging
from boldforge.data_shards.tables import RunEntry, ShardEntry

# Ray takes seconds to start: fewer runs than this are sooner done here.
FEWEST_FOR_RAY = 4

Progress = Callable[[int, int], None]


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


def fill_shards(
    staging: Staging,
    plan: Sequence[PlannedShard],
    recipe: DataRecipe,
    workers: int | None,
    address: str | None,
    on_progress: Progress | None,
    rejected: int,
) -> list[ShardRecord]:
    """Do what is left of a plan, and return the record of every shard in the plan's order.

    Parameters
    ----------
    staging
        Opened for this plan; holds what was finished before.
    workers, address
        See `build_shards`.
    on_progress
        Called with (runs done, runs in all).
    rejected
        How many runs the plan has left out: they count as done.
    """
    book = _Book(staging, plan, recipe)
    total = rejected + sum(len(planned.runs) for planned in plan)
    report = on_progress or (lambda done, total: None)
    report(rejected + len(book.done), total)
    left = sum(isinstance(task, RunTask) for task in book.queue)
    if address is None and ((workers or 1) == 1 or left < FEWEST_FOR_RAY):
        outcomes = _perform_here(book.queue)
    else:
        from boldforge.data_shards.ray_build import perform_on_ray

        outcomes = perform_on_ray(book.queue, workers, address)
    for outcome in outcomes:
        book.enter(outcome)
        report(rejected + len(book.done), total)
    return [book.records[planned.file] for planned in plan]


def _perform_here(queue: deque[Task]) -> Iterator[Outcome]:
    while queue:
        yield perform(queue.popleft())


class _Book:
    """Which runs and shards are done, and what there is to do next; `queue` grows while its tasks are performed."""

    def __init__(self, staging: Staging, plan: Sequence[PlannedShard], recipe: DataRecipe) -> None:
        self.staging = staging
        self.recipe = recipe
        self.queue: deque[Task] = deque()
        self.records: dict[str, ShardRecord] = {}
        self.done: set[str] = set()
        self.rejected: dict[str, Skipped] = {}
        self.runs = {run.fingerprint: (run, planned) for planned in plan for run in planned.runs}
        self.waiting: dict[str, set[str]] = {}
        for planned in plan:
            record = staging.finished_shard(planned)
            fingerprints = {run.fingerprint for run in planned.runs}
            if record is not None:
                self.records[planned.file] = record
                self.done |= fingerprints
                continue
            finished = {name for name in fingerprints if staging.finished_run(name) is not None}
            self.done |= finished
            self.waiting[planned.file] = fingerprints - finished
            self.queue.extend(RunTask(r, recipe, staging) for r in planned.runs if r.fingerprint not in finished)
            self._join_if_complete(planned)

    def enter(self, outcome: Outcome) -> None:
        """Note how a task ended, and line up what follows from it."""
        task = outcome.task
        if outcome.lost is not None:
            run, planned = self.runs[outcome.lost]
            self.staging.forget_run(outcome.lost)
            self.waiting[planned.file].add(outcome.lost)
            self.queue.appendleft(RunTask(run, self.recipe, self.staging))
        elif isinstance(task, ShardTask):
            assert outcome.record is not None
            self.records[task.file] = outcome.record
        else:
            run, planned = self.runs[task.name]
            if outcome.rejected is not None:
                self.rejected[task.name] = Skipped(run.run.path, outcome.rejected)
            self.done.add(task.name)
            self.waiting[planned.file].remove(task.name)
            self._join_if_complete(planned)

    def _join_if_complete(self, planned: PlannedShard) -> None:
        if not self.waiting[planned.file]:
            names = tuple(run.fingerprint for run in planned.runs)
            rejected = tuple((name, self.rejected[name]) for name in names if name in self.rejected)
            self.queue.appendleft(ShardTask(planned.file, names, rejected, self.staging))
