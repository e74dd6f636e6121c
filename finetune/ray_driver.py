"""Run a sweep's trials on a local Ray, under Ray Tune's ASHA scheduler, and leave nothing running."""

import logging
import os
import secrets
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from boldforge.finetune.errors import FinetuneError
from boldforge.finetune.trial import TrialSpec, run_trial

# No statistics are sent anywhere, no files are written that nobody reads, and Ctrl-C ends the sweep like any program.
_ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_DISABLE_SIGINT_HANDLER": "1",
    "RAY_AIR_NEW_OUTPUT": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    # Ray guards its ports with a token; one made here keeps it from writing its own into the user's home.
    "RAY_AUTH_TOKEN": secrets.token_hex(32),
}
# Ray repeats in the log what `SweepError` says in a sentence, and complains about the log files switched off above.
_QUIET_LOGGERS = (
    "ray._private.worker",
    "ray._private.authentication",
    "ray.air.execution._internal.event_manager",
    "ray.tune",
)
_OBJECT_STORE_BYTES = 80 * 2**20
_STATE_FILE = "state.safetensors"


class SweepError(FinetuneError):
    """A trial failed, or Ray could not start."""


@dataclass(frozen=True)
class AshaConfig:
    """When ASHA (Li et al. 2020, arXiv 1810.05934) may stop a trial, and what a trial may use."""

    figure: str
    grace: int
    reduction: int
    concurrency: int
    cpus: int
    gpus: float


@dataclass(frozen=True)
class TrialResult:
    """A trial's curve, epoch by epoch, and the weights of its best epoch."""

    rank: int
    history: tuple[dict[str, Any], ...]
    state: dict[str, Tensor]


def run_on_ray(
    spec: TrialSpec,
    ranks: Sequence[int],
    asha: AshaConfig,
    folder: Path,
    on_epoch: Callable[[int, int], None],
) -> list[TrialResult]:
    """Train one trial per rank.

    Parameters
    ----------
    spec
        The trial; its adapter's rank is replaced.
    ranks
        One trial each, started in this order.
    asha
        Stopping rule and resources.
    folder
        For Ray's own files; the caller removes it.
    on_epoch
        Called with rank and epoch after every epoch of every trial.

    Returns
    -------
    list of TrialResult
        In the order of `ranks`.

    Raises
    ------
    SweepError
        With the failing trial's own message; the other trials are stopped.
    """
    with _quiet_ray():
        import ray
        from ray import tune

        history: dict[int, list[dict[str, Any]]] = {rank: [] for rank in ranks}

        class Collect(tune.Callback):
            def on_trial_result(
                self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any
            ) -> None:
                history[trial.config["rank"]].append(dict(result))
                on_epoch(trial.config["rank"], result["epoch"])

            def __reduce__(self) -> tuple[type[tune.Callback], tuple[()]]:
                # Ray pickles its settings for a restore that is not used here; a progress bar's lock cannot be pickled.
                return tune.Callback, ()

        # A short path of our own: Ray puts sockets below it, and socket names are limited to about 100 characters.
        with tempfile.TemporaryDirectory(prefix="bf-", ignore_cleanup_errors=True) as session:
            try:
                _start(session, asha)
                tuner = _tuner(spec, ranks, asha, folder, Collect())
                return [_result(result, history) for result in _checked(tuner.fit(), ranks)]
            finally:
                ray.shutdown()


def _start(session: str, asha: AshaConfig) -> None:
    import ray

    if ray.is_initialized():
        raise SweepError("Ray is already running in this process; call ray.shutdown() before a sweep.")
    try:
        ray.init(
            address="local",
            num_cpus=asha.concurrency * asha.cpus,
            include_dashboard=False,
            log_to_driver=False,
            configure_logging=False,
            object_store_memory=_OBJECT_STORE_BYTES,
            _temp_dir=session,
        )
    except (OSError, RuntimeError, ValueError) as error:
        raise SweepError(f"Ray could not start on this machine ({_line(error)}); see boldforge doctor.") from error
    gpus = ray.cluster_resources().get("GPU", 0)
    if gpus < asha.gpus:
        raise SweepError(f"gpus is {asha.gpus:g} per trial, but Ray sees {gpus:g} here; set gpus=0 to use CPUs.")


def _tuner(spec: TrialSpec, ranks: Sequence[int], asha: AshaConfig, folder: Path, callback: Any) -> Any:
    from ray import tune
    from ray.tune.schedulers import ASHAScheduler

    scheduler = ASHAScheduler(
        time_attr="epoch",
        max_t=spec.training.epochs,
        grace_period=min(asha.grace, spec.training.epochs),
        reduction_factor=asha.reduction,
    )
    return tune.Tuner(
        tune.with_resources(partial(_ray_trial, spec), {"cpu": asha.cpus, "gpu": asha.gpus}),
        param_space={"rank": tune.grid_search(list(ranks))},
        tune_config=tune.TuneConfig(
            metric=asha.figure,
            mode="max",
            scheduler=scheduler,
            max_concurrent_trials=asha.concurrency,
            reuse_actors=True,
        ),
        run_config=tune.RunConfig(
            name="sweep",
            storage_path=str(folder.resolve()),
            verbose=0,
            callbacks=[callback],
            failure_config=tune.FailureConfig(max_failures=0, fail_fast=True),
        ),
    )


def _ray_trial(spec: TrialSpec, parameters: Mapping[str, Any]) -> None:
    from ray import tune

    def report(figures: dict[str, Any], state: Mapping[str, Tensor] | None) -> None:
        if state is None:
            tune.report(figures)
            return
        with tempfile.TemporaryDirectory() as folder:
            save_file(dict(state), Path(folder) / _STATE_FILE)
            tune.report(figures, checkpoint=tune.Checkpoint.from_directory(folder))

    adapter = spec.adapter.model_copy(update={"rank": parameters["rank"]})
    run_trial(replace(spec, adapter=adapter), report)


def _checked(results: Any, ranks: Sequence[int]) -> list[Any]:
    from ray.exceptions import RayActorError

    for result in results:
        if isinstance(result.error, RayActorError):
            raise SweepError(
                f"The process of the trial at rank {result.config['rank']} was killed, most likely for lack of memory; "
                "set concurrency=1, or training.batch_size lower."
            ) from result.error
        if result.error is not None:
            cause = getattr(result.error, "cause", None) or result.error
            raise SweepError(f"The trial at rank {result.config['rank']} failed: {_line(cause)}") from result.error
    return sorted(results, key=lambda result: ranks.index(result.config["rank"]))


def _result(result: Any, history: Mapping[int, list[dict[str, Any]]]) -> TrialResult:
    rank = result.config["rank"]
    # Only an epoch that is the best so far writes a checkpoint, so the newest one is the best.
    with result.checkpoint.as_directory() as folder:
        state = load_file(Path(folder) / _STATE_FILE)
    return TrialResult(rank, tuple(history[rank]), state)


def _line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__


@contextmanager
def _quiet_ray() -> Iterator[None]:
    before = {name: os.environ.get(name) for name in _ENVIRONMENT}
    os.environ.update(_ENVIRONMENT)
    levels = {name: logging.getLogger(name).level for name in _QUIET_LOGGERS}
    for name in levels:
        logging.getLogger(name).setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
