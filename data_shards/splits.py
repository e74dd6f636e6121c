"""Which frames of a dataset are for training and which are held out."""

import math
from typing import Literal, NamedTuple

import numpy as np
from pydantic import Field

from boldforge.configs import StrictModel
from boldforge.data_shards.manifest import Manifest, ShardError


class Segment(NamedTuple):
    """Frames [start, stop) of one run, by its index in the manifest."""

    run: int
    start: int
    stop: int


class Holdout(StrictModel):
    """What is kept away from training."""

    by: Literal["frames", "subject"] = "frames"
    """frames: the end of every run (the only choice with one or two subjects); subject: whole subjects."""
    fraction: float = Field(default=0.1, ge=0.0, lt=1.0)
    """Share of each run's frames, or of the subjects; 0 holds nothing out."""
    seed: int = 0
    """Chooses the subjects."""


def whole_runs(manifest: Manifest) -> tuple[Segment, ...]:
    """Return one segment per run, with all its frames."""
    return tuple(Segment(index, 0, run.n_frames) for index, run in enumerate(manifest.runs))


def split_segments(manifest: Manifest, holdout: Holdout) -> tuple[tuple[Segment, ...], tuple[Segment, ...]]:
    """Split a dataset into (train, held out).

    ``frames`` holds out the last part of every run, in time, so that no held-out frame lies between two training
    frames. ``subject`` holds out all runs of some subjects, drawn by the seed from the sorted subjects.

    Raises
    ------
    ShardError
        If subjects are to be held out and there is only one.
    """
    everything = whole_runs(manifest)
    if holdout.fraction == 0:
        return everything, ()
    if holdout.by == "frames":
        cuts = [stop - math.ceil(stop * holdout.fraction) for _, _, stop in everything]
        train = tuple(Segment(run, 0, cut) for (run, _, _), cut in zip(everything, cuts, strict=True) if cut > 0)
        return train, tuple(Segment(run, cut, stop) for (run, _, stop), cut in zip(everything, cuts, strict=True))
    subjects = sorted({run.subject for run in manifest.runs})
    if len(subjects) < 2:
        raise ShardError(
            f"{manifest.folder}: holds one subject only, so none can be held out; hold out frames "
            "instead (holdout.by=frames)."
        )
    n_out = min(len(subjects) - 1, max(1, round(len(subjects) * holdout.fraction)))
    chosen = {subjects[i] for i in np.random.default_rng(holdout.seed).permutation(len(subjects))[:n_out]}
    train = tuple(segment for segment in everything if manifest.runs[segment.run].subject not in chosen)
    return train, tuple(segment for segment in everything if manifest.runs[segment.run].subject in chosen)
