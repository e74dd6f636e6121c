"""A sweep whose trials note every epoch that they begin; Ray's workers import this file by its name."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from boldforge.configs import load_config
from boldforge.finetune import SweepConfig, fit, ray_driver, sweep, sweep_rungs
from boldforge.finetune.trial import TrialSpec

LOG = "BOLDFORGE_EPOCH_LOG"
_run_segment, _step, _ray_trial = sweep_rungs.Segment.run, fit.Fit.step, ray_driver._ray_trial
_now: list[str] = []


def _noted_run(segment: sweep_rungs.Segment, spec: TrialSpec, folder: Path, report: sweep_rungs.Report) -> None:
    inner = f"/{segment.inner}" if segment.inner else ""
    _now[:] = ["chosen" if segment.anew else f"{segment.trial.number}{inner}"]
    _run_segment(segment, spec, folder, report)


def _noted_step(fitting: fit.Fit) -> fit.Epoch:
    # One write of a few bytes at the end of a file: several processes may note at once.
    with Path(os.environ[LOG]).open("a") as stream:
        stream.write(f"{_now[0]} {fitting._number + 1}\n")
    return _step(fitting)


def note_epochs() -> None:
    """Let this process note the epochs that it begins."""
    sweep_rungs.Segment.run, fit.Fit.step = _noted_run, _noted_step  # type: ignore[method-assign]


def noted_trial(spec: TrialSpec, folder: Path, parameters: Mapping[str, Any]) -> None:
    """Do what a Ray trial does, and note its epochs; Ray finds this function by its name."""
    note_epochs()
    _ray_trial(spec, folder, parameters)


def sweep_noting_epochs(recipe: Path, log: Path) -> None:
    """Sweep in this process, whose environment and ways of doing things are changed for good."""
    import logged_sweep  # by the name by which a worker can import it

    os.environ[LOG] = str(log)
    logged_sweep.note_epochs()
    ray_driver._ray_trial = logged_sweep.noted_trial
    sweep(load_config(SweepConfig, json.loads(recipe.read_text())))
