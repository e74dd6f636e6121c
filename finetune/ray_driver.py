"""Run a sweep's trials under Ray Tune, on a Ray of this machine or on a cluster, and leave nothing running."""

import logging
from collections import Counter, deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from boldforge.data_shards.ray_session import ray_session
from boldforge.finetune.ray_processes import RayProcesses
from boldforge.finetune.sweep_journal import SweepError
from boldforge.finetune.sweep_rungs import Report, Segment, Trial, failed, one_line
from boldforge.finetune.trial import JOURNAL, TrialSpec, read_curve

logger = logging.getLogger(__name__)
# No files are written that nobody reads, and Ctrl-C ends the sweep like any program.
_ENVIRONMENT = {
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_DISABLE_SIGINT_HANDLER": "1",
    "RAY_AIR_NEW_OUTPUT": "0",
}
# Tune complains about the log files switched off above.
_QUIET_LOGGERS = ("ray.air.execution._internal.event_manager", "ray.tune")
_ATTEMPTS, _SESSION = 3, ".ray-session"


@dataclass(frozen=True)
class RayConfig:
    """Where trials run and what each may use; ``address`` None is a Ray of this machine, started and ended here."""

    concurrency: int
    cpus: int
    gpus: float
    address: str | None


def run_on_ray(
    spec: TrialSpec,
    rounds: Iterator[list[Segment]],
    folder: Path,
    on_epoch: Report,
    config: RayConfig,
    scratch: Path,
) -> None:
    """Do all rounds of work. A trial whose process dies goes on in another one; if Ray dies, a new one is started.

    Parameters
    ----------
    spec
        What the trials have in common.
    rounds
        See `Rounds`.
    folder
        Of the trials; on a cluster all nodes must see it under the same path.
    on_epoch
        Called with trial id, inner fold and epoch after every epoch of every trial.
    config
        Where and with what.
    scratch
        For Ray's own files; the caller removes it.

    Raises
    ------
    SweepError
        With the failing trial's own message; the other trials are stopped.
    """
    first = next(rounds, None)
    if first is None:
        return
    course = _Course(first, rounds, folder)
    cpus, started = config.concurrency * config.cpus, 0
    while not course.finished:
        started += 1
        with ray_session(config.address, cpus, SweepError, "a sweep", _ENVIRONMENT, _QUIET_LOGGERS, folder / _SESSION):
            _check_resources(config)
            course.watch()
            _fit(spec, course, folder, on_epoch, config, scratch / str(started))
            course.put_back()
    if course.error is not None:
        raise course.error


class _RayEndedError(BaseException):
    """Out of Tune by the shortest way: what it does about an Exception would wait for the Ray that has ended."""


class _Course:
    """Hands out the segments of a round, and the next round's only when all of them are done."""

    def __init__(self, first: list[Segment], rounds: Iterator[list[Segment]], folder: Path) -> None:
        self.error: SweepError | None = None
        self._waiting, self._rounds, self._folder = deque(first), rounds, folder
        self._running: dict[str, Segment] = {}
        self._deaths: Counter[tuple[int, bool, int, int]] = Counter()
        self._ray, self._ended_at = RayProcesses(), Counter[int]()

    @property
    def finished(self) -> bool:
        return self.error is not None or not (self._waiting or self._running)

    @property
    def ray_ended(self) -> bool:
        """Whether a process of Ray's own died since `watch`: what Tune then says about trials does not count."""
        return self._ray.ended

    def watch(self) -> None:
        """Look from now on whether the Ray that was just started is alive."""
        self._ray = RayProcesses()

    def put_back(self) -> None:
        """Put back what a Ray that died was doing; where it dies again and again before an epoch is done, give up."""
        if not self.ray_ended or self.finished:
            return
        self._waiting.extendleft(reversed(self._running.values()))
        self._running.clear()
        epochs = sum(len(read_curve(path.parent)) for path in self._folder.rglob(JOURNAL))
        self._ended_at[epochs] += 1
        if self._ended_at[epochs] >= _ATTEMPTS:
            self.error = SweepError(
                f"Ray's own processes died {_ATTEMPTS} times in the same epoch, most likely for lack of memory; set "
                "concurrency=1 or driver=serial, and run the command again."
            )
        else:
            logger.warning("Ray's own processes died; another Ray is started and the sweep goes on.")

    def take(self, tune_id: str) -> Segment | None:
        """Return the next segment to start; None while others must end first."""
        if not self._waiting:
            return None
        self._running[tune_id] = self._waiting.popleft()
        return self._running[tune_id]

    def done(self, tune_id: str, result: Mapping[str, Any] | None, error: bool) -> None:
        """Take note that a segment ended: done, failed with a message, or its process died."""
        if self.ray_ended:
            return
        segment = self._running.pop(tune_id)
        trial = segment.trial
        if error:
            self._died(segment)
        elif result and "failed" in result:
            self.error = failed(trial, result["failed"])
        if self.finished and self.error is None:
            try:
                self._waiting.extend(next(self._rounds, ()))
            except SweepError as damaged:
                self.error = damaged

    def _died(self, segment: Segment) -> None:
        # Counted per epoch, so that a long sweep on a machine with troubles still comes to its end.
        epochs = sum(len(curve) for curve in segment.curves(self._folder))
        place = (segment.trial.number, segment.anew, segment.inner, epochs)
        self._deaths[place] += 1
        if self._deaths[place] < _ATTEMPTS:
            self._waiting.append(segment)
            return
        self.error = SweepError(
            f"The process of the trial at {segment.trial.name} was killed {_ATTEMPTS} times in the same epoch, most "
            "likely for lack of memory; set concurrency=1 or training.batch_size lower, and run the command again."
        )


def _fit(
    spec: TrialSpec,
    course: _Course,
    folder: Path,
    on_epoch: Report,
    config: RayConfig,
    scratch: Path,
) -> None:
    """Let Tune run the course: to Tune a segment is a trial, and the course is its search algorithm."""
    from ray import tune
    from ray.tune.search import Searcher

    class Follow(Searcher):
        def suggest(self, trial_id: str) -> Any:
            if course.finished or course.ray_ended:
                return Searcher.FINISHED
            segment = course.take(trial_id)
            if segment is None:
                return None
            return {
                "trial": segment.trial.number,
                "values": segment.trial.values,
                "until": segment.until,
                "anew": segment.anew,
                "beside": [(trial.number, trial.values) for trial in segment.beside],
                "inner": segment.inner,
            }

        def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
            course.done(trial_id, result, error)

        def save(self, checkpoint_path: str) -> None:
            """Save nothing: the sweep's journal knows more."""

        def restore(self, checkpoint_path: str) -> None:
            """Restore nothing."""

        def __reduce__(self) -> tuple[type[Searcher], tuple[()]]:
            # Ray pickles its settings for a restore that is not used here; open files cannot be pickled.
            return Searcher, ()

    class Collect(tune.Callback):
        def on_trial_result(
            self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any
        ) -> None:
            if "epoch" in result:
                on_epoch(result["trial"], result["inner"], result["epoch"])

        def __reduce__(self) -> tuple[type[tune.Callback], tuple[()]]:
            return tune.Callback, ()

    tuner = tune.Tuner(
        tune.with_resources(partial(_ray_trial, spec, folder), {"cpu": config.cpus, "gpu": config.gpus}),
        tune_config=tune.TuneConfig(
            num_samples=-1,
            search_alg=Follow(),
            max_concurrent_trials=config.concurrency,
            reuse_actors=True,
        ),
        run_config=tune.RunConfig(
            name="sweep",
            storage_path=str(scratch.resolve()),
            stop=_stop_on_failure(course),
            verbose=0,
            callbacks=[Collect()],
        ),
    )
    try:
        tuner.fit()
    except _RayEndedError:
        return
    except Exception:
        # Of a Ray that is not there any more, Tune may fail in many ways.
        if not course.ray_ended:
            raise


def _stop_on_failure(course: _Course) -> Any:
    """Return what ends Tune's run once the course has failed or its Ray has ended."""
    from ray import tune

    class StopOnFailure(tune.Stopper):
        def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
            return False

        def stop_all(self) -> bool:
            if course.ray_ended:
                raise _RayEndedError
            return course.error is not None

        def __reduce__(self) -> tuple[Any, tuple[()]]:
            return tune.stopper.NoopStopper, ()

    return StopOnFailure()


def _ray_trial(spec: TrialSpec, folder: Path, parameters: Mapping[str, Any]) -> None:
    from ray import tune

    beside = tuple(Trial(number, values) for number, values in parameters["beside"])
    trial = Trial(parameters["trial"], parameters["values"])
    segment = Segment(trial, parameters["until"], parameters["anew"], beside, parameters["inner"])

    def report(number: int, inner: int, epoch: int) -> None:
        tune.report({"trial": number, "inner": inner, "epoch": epoch})

    try:
        segment.run(spec, folder, report)
    except Exception as error:
        # Handed over as a result: Tune would tell it from a killed process only by its own classes.
        tune.report({"failed": one_line(error)})


def _check_resources(config: RayConfig) -> None:
    import ray

    for kind, name, asked in (("GPU", "gpus", config.gpus), ("CPU", "cpus", config.cpus)):
        found = ray.cluster_resources().get(kind, 0)
        if found < asked:
            raise SweepError(
                f"{name} is {asked:g} per trial, but Ray sees {found:g} here; "
                + ("set gpus=0 to use CPUs." if kind == "GPU" else "set cpus lower.")
            )
