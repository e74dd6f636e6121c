"""Spread a build over Ray: a few more tasks in flight than there are CPUs, crashed ones tried again."""

from collections import Counter, deque
from collections.abc import Iterator
from typing import Any

from boldforge.data_shards.ray_session import ray_session
from boldforge.data_shards.tasks import BuildError, Outcome, RunTask, Task, perform

ATTEMPTS = 3
# Enough that no CPU waits for the next task; everything else stays here, where it costs nothing.
_IN_FLIGHT_PER_CPU = 2


def perform_on_ray(queue: deque[Task], workers: int | None, address: str | None) -> Iterator[Outcome]:
    """Perform tasks until the queue, which may grow meanwhile, is empty; yield outcomes as they come.

    A task whose process dies (killed for memory, crashed, its node lost) is tried again, the last time with nothing
    beside it. A run that kills its process every time is rejected.

    Parameters
    ----------
    queue
        The tasks.
    workers
        Processes on this machine, or with an address tasks at a time (None: as many as the cluster has CPUs).
    address
        A Ray cluster's address; None starts Ray on this machine and ends it afterwards. Its nodes must see the same
        files under the same paths and have this release installed.

    Raises
    ------
    BuildError
        If Ray cannot start or be reached, or a shard cannot be written.
    OSError
        If the staging folder cannot be written to.
    """
    with ray_session(address, workers, BuildError, "a build") as ray:
        remote = ray.remote(num_cpus=1, max_retries=0)(_perform_there)
        cpus = max(1, int(ray.cluster_resources().get("CPU", 1)))
        bound = workers if address is not None and workers is not None else _IN_FLIGHT_PER_CPU * cpus
        in_flight: dict[Any, Task] = {}
        crashes: Counter[str] = Counter()
        last_chance: deque[Task] = deque()
        while queue or in_flight or last_chance:
            while queue and len(in_flight) < bound:
                task = queue.popleft()
                in_flight[remote.remote(task)] = task
            if not in_flight:
                task = last_chance.popleft()
                in_flight[remote.remote(task)] = task
            (done, *_), _ = ray.wait(list(in_flight), num_returns=1)
            task = in_flight.pop(done)
            try:
                result = ray.get(done)
            except _crashes() as error:
                crashes[task.name] += 1
                if crashes[task.name] < ATTEMPTS:
                    (last_chance if crashes[task.name] == ATTEMPTS - 1 else queue).append(task)
                    continue
                result = _given_up(task, error)
            if isinstance(result, BaseException):
                raise result
            yield result


def _perform_there(task: Task) -> Outcome | OSError:
    try:
        return perform(task)
    except OSError as error:
        # Handed over as a value: Ray would wrap it, and the error number would be lost.
        return OSError(error.errno, error.strerror, error.filename)


def _given_up(task: Task, error: Exception) -> Outcome | BuildError:
    from ray.exceptions import OutOfMemoryError

    why = "memory ran out" if isinstance(error, OutOfMemoryError) else "killed, most likely because memory ran out"
    if isinstance(task, RunTask):
        path = task.planned.run.path
        return Outcome(
            task,
            rejected=f"{path}: the process that read it ended {ATTEMPTS} times ({why}), the last time with no other "
            "beside it; check the file, or use a machine with more memory.",
        )
    return BuildError(
        f"{task.staging.folder / task.file}: the process that wrote it ended {ATTEMPTS} times ({why}); run the "
        "same command again to go on, with fewer --workers."
    )


def _crashes() -> tuple[type[Exception], ...]:
    from ray import exceptions

    return (
        exceptions.WorkerCrashedError,
        exceptions.OutOfMemoryError,
        exceptions.NodeDiedError,
        exceptions.LocalRayletDiedError,
    )
