"""The work of a build: one task per run, one more per shard; what is finished stays in the staging folder."""

from collections import deque
from collections.abc import Callable, Iterator, Sequence

from boldforge.data_shards.plan import PlannedShard
from boldforge.data_shards.ray_build import perform_on_ray
from boldforge.data_shards.recipe import DataRecipe
from boldforge.data_shards.runs import Skipped
from boldforge.data_shards.staging import ShardRecord, Staging
from boldforge.data_shards.tasks import Outcome, RunTask, ShardTask, Task, perform

# Ray takes seconds to start: fewer runs than this are sooner done here.
FEWEST_FOR_RAY = 4

Progress = Callable[[int, int], None]


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
