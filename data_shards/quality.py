"""Quality figures of a dataset: read from its shards, a few frames at a time; what lies far from the rest is flagged.

A run's figures are those of what is stored: on the grid, cleaned, at the recipe's TR.

Shape suffixes: T frames, V brain voxels of the grid.
"""

import os
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from boldforge.data_shards.manifest import Manifest
from boldforge.data_shards.normalise import Normalisation
from boldforge.data_shards.reader import ShardReader

Values = npt.NDArray[np.float64]
ImageKind = Literal["mean", "deviation", "change"]
MeasureName = Literal["tsnr", "tsnr_db", "dvars", "spikes", "coverage", "frames"]

SPIKE = 1.5
"""A frame whose DVARS is more than this times its run's median counts as a spike."""
FLAG_Z = 3.5
"""Iglewicz and Hoaglin 1993: modified z-scores beyond 3.5 are labelled potential outliers."""
LEAST_RUNS = 5
"""With fewer there is no "rest" to lie far from."""
DVARS_EDGES = np.linspace(0.0, 3.0, 61)
"""Edges of the bins in which every frame's DVARS is counted; the last bin takes all that is larger."""

_MOST_THREADS = 8
_BLOCK_BYTES = 4 * 2**20  # of stored integers; float32 copies of them are two or four times as large


class Rule(NamedTuple):
    """When a run is flagged: which side of the median is bad, and the least spread that z is counted in.

    Where most runs agree to the digit, the spread is zero and any difference would be infinite: so none counts as
    smaller than `least`, for a ``relative`` rule a share of the median.
    """

    side: Literal["low", "high", "both"]
    least: float
    relative: bool


RULES: dict[MeasureName, Rule] = {
    "tsnr": Rule("low", 0.05, True),
    "tsnr_db": Rule("low", 0.5, False),
    "dvars": Rule("both", 0.05, True),
    "spikes": Rule("high", 0.01, False),
    "coverage": Rule("low", 0.01, False),
    "frames": Rule("low", 0.05, True),
}


class RunQuality(NamedTuple):
    """One run's figures; not a number where one is not defined.

    Attributes
    ----------
    number
        The run's place in the manifest.
    coverage
        Share of the grid's brain voxels that carry signal.
    tsnr
        Median over voxels of the mean over time by the standard deviation over time; only where the mean is known.
    tsnr_db
        Temporal SNR of the stored integers against the values before quantisation, as the build recorded it.
    dvars
        Median over frames; see `measure_run`.
    spikes
        Share of frames whose DVARS is more than `SPIKE` times that median.
    """

    number: int
    key: str
    subject: str
    site: str | None
    simulated: bool
    frames: int
    source_tr: float
    coverage: float
    tsnr: float
    tsnr_db: float
    dvars: float
    spikes: float


class Flag(NamedTuple):
    """A run that lies far from the others in one measure."""

    number: int
    measure: MeasureName
    value: float
    median: float
    z: float


@dataclass(frozen=True, eq=False)
class RunMoments:
    """A run over time, in stored units, all [V]: mean, variance, mean square change between frames; dvars [T - 1]."""

    mean: Values
    variance: Values
    change: Values
    covered: npt.NDArray[np.bool_]
    dvars: Values


@dataclass(frozen=True, eq=False)
class DatasetQuality:
    """A dataset's figures.

    Attributes
    ----------
    image_kind
        What survives the normalisation in every run: the ``mean`` over time, else the standard ``deviation``, else
        (where each voxel was divided by its own) the ``change`` from frame to frame.
    image_V
        That image, each run's divided by its median over the brain, averaged over the runs that cover a voxel;
        not a number where none does.
    share_V
        Share of the runs that cover a voxel.
    dvars_counts
        Frames by DVARS, in the bins of `DVARS_EDGES`.
    """

    manifest: Manifest
    runs: tuple[RunQuality, ...]
    flags: tuple[Flag, ...]
    image_kind: ImageKind
    image_V: Values
    share_V: Values
    dvars_counts: npt.NDArray[np.int64]


def measure_quality(
    manifest: Manifest, on_progress: Callable[[int, int], None] | None = None, workers: int | None = None
) -> DatasetQuality:
    """Read a dataset once, checksums included, and measure every run.

    Memory holds some frames and a few images of the grid per thread, and a row of figures per run.

    Parameters
    ----------
    manifest
        The dataset.
    on_progress
        Called with (frames done, frames in all), one call at a time, from any thread.
    workers
        Threads, by default one per CPU and at most eight; the figures are the same bits at any number.

    Raises
    ------
    ShardError
        If a shard is missing or damaged.
    """
    ShardReader(manifest).close()  # a shard that is missing or cut is told before hours of reading
    kinds: tuple[ImageKind, ...] = _kinds(manifest.recipe.normalisation)
    sums = {kind: np.zeros(manifest.n_voxels) for kind in kinds}
    covering = np.zeros(manifest.n_voxels, dtype=np.int64)
    counts = np.zeros(len(DVARS_EDGES) - 1, dtype=np.int64)
    rows = []
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    threads = workers or min(cpus, _MOST_THREADS)
    for number, (run, moments) in enumerate(zip(manifest.runs, _measured(manifest, on_progress, threads), strict=True)):
        covering += moments.covered
        for kind in kinds:
            sums[kind] += np.nan_to_num(run_image(moments, run.normalisation, kind))
        counts += np.histogram(np.minimum(moments.dvars, DVARS_EDGES[-1]), DVARS_EDGES)[0]
        rows.append(
            RunQuality(
                number=number,
                key=run.key,
                subject=run.subject,
                site=run.site,
                simulated=run.simulated,
                frames=run.n_frames,
                source_tr=run.source_tr,
                coverage=float(moments.covered.mean()),
                tsnr=temporal_snr_of(moments, run.normalisation),
                tsnr_db=run.tsnr_db,
                **_dvars_figures(moments.dvars),
            )
        )
    # Residual data keep no mean, whatever the normalisation: their tSNR is not defined.
    kind = kinds[0] if kinds[0] != "mean" or all(np.isfinite(row.tsnr) for row in rows) else kinds[-1]
    image_V = np.divide(sums[kind], covering, out=np.full(manifest.n_voxels, np.nan), where=covering > 0)
    share_V = covering / max(len(rows), 1)
    return DatasetQuality(manifest, tuple(rows), flag_outliers(rows), kind, image_V, share_V, counts)


def measure_run(reader: ShardReader, number: int, on_frames: Callable[[int], None] | None = None) -> RunMoments:
    """Measure one run over time, reading it once.

    DVARS is the root mean square over the covered voxels of the change from one frame to the next (Power et al. 2012),
    here divided by the root mean square over the same voxels of their standard deviation over time. So it has no
    units, and does not depend on how a run was scaled: white noise has √2, a slow signal less.

    Parameters
    ----------
    reader
        Of the dataset.
    number
        Which run.
    on_frames
        Called with the number of frames read so far.

    Raises
    ------
    ShardError
        If the run is damaged.
    """
    scales = reader.scales(number)
    scale = scales[1].astype(np.float64)
    weight = np.square(scales[1])
    sum_q, sum_qq, sum_dd = (np.zeros(len(scale)) for _ in range(3))
    squares = []
    n_frames, last = 0, None
    for q in run_blocks(reader, number):
        values = q.astype(np.float32)
        sum_q += values.sum(axis=0)
        sum_qq += np.einsum("tv,tv->v", values, values)
        change = np.diff(values if last is None else np.concatenate([last, values]), axis=0)
        np.square(change, out=change)
        sum_dd += change.sum(axis=0)
        squares.append(np.einsum("tv,v->t", change, weight))
        last = values[-1:]
        n_frames += len(q)
        if on_frames is not None:
            on_frames(n_frames)
    covered = scale > 0
    variance = np.square(scale) * np.maximum(sum_qq / n_frames - np.square(sum_q / n_frames), 0)
    total = variance[covered].sum()
    dvars = np.sqrt(np.concatenate(squares).astype(np.float64) / total) if total > 0 else np.zeros(0)
    return RunMoments(
        mean=scales[0] + scale * sum_q / n_frames,
        variance=variance,
        change=np.square(scale) * sum_dd / max(n_frames - 1, 1),
        covered=covered,
        dvars=dvars,
    )


def temporal_snr_of(moments: RunMoments, how: Normalisation) -> float:
    """Return the median over voxels of mean over standard deviation, in time; not a number where no mean is known.

    A mean and a deviation of the whole run lead back to the source's values; percent signal change is relative to the
    mean, so that the quotient is 100 over its deviation. The other normalisations have removed the mean, and in
    residual data it was gone before: there the means lie below the deviations.
    """
    used = moments.covered & (moments.variance > 0)
    deviation = np.sqrt(moments.variance[used])
    if how.method == "percent-signal-change":
        return float(np.median(100 / deviation)) if used.any() else np.nan
    if how.mean is None or how.std is None or not used.any():
        return np.nan
    mean, deviation = how.mean + how.std * moments.mean[used], how.std * deviation
    return float(np.median(mean / deviation)) if np.median(mean) > np.median(deviation) else np.nan


def run_image(moments: RunMoments, how: Normalisation, kind: ImageKind) -> Values:
    """Return an image of a run, [V], divided by its median over the brain; not a number where it carries no signal."""
    if kind == "mean":
        image = moments.mean * (how.std or 1.0) + (how.mean or 0.0)
    else:
        image = np.sqrt(moments.variance if kind == "deviation" else moments.change)
    middle = np.median(image[moments.covered]) if moments.covered.any() else np.nan
    return np.where(moments.covered, image / middle if middle else np.nan, np.nan)


def flag_outliers(runs: Sequence[RunQuality]) -> tuple[Flag, ...]:
    """Flag the runs that lie far from the rest: the furthest first.

    ``z = (value − median) / spread``, where the spread is 1.4826 times the median absolute deviation and never less
    than the rule's; a run is flagged where z is beyond `FLAG_Z` on the bad side. A measure that fewer than `LEAST_RUNS`
    runs have flags nothing.
    """
    flags = []
    for measure, rule in RULES.items():
        values = np.array([getattr(run, measure) for run in runs], dtype=np.float64)
        known = values[np.isfinite(values)]
        if len(known) < LEAST_RUNS:
            continue
        median = float(np.median(known))
        least = rule.least * abs(median) if rule.relative else rule.least
        spread = max(1.4826 * float(np.median(np.abs(known - median))), least, np.finfo(np.float64).tiny)
        z = (values - median) / spread
        far = {"low": z < -FLAG_Z, "high": z > FLAG_Z, "both": np.abs(z) > FLAG_Z}[rule.side]
        for run, value, z_run in zip(*(np.array(each)[far] for each in (range(len(runs)), values, z)), strict=True):
            flags.append(Flag(runs[int(run)].number, measure, float(value), median, float(z_run)))
    return tuple(sorted(flags, key=lambda flag: (-abs(flag.z), flag.number, flag.measure)))


def _measured(manifest: Manifest, on_progress: Callable[[int, int], None] | None, threads: int) -> Iterator[RunMoments]:
    """Yield every run's moments in the dataset's order; few more than the threads work on are held at a time."""
    report = on_progress or (lambda done, total: None)
    own = threading.local()
    lock = threading.Lock()
    done = 0

    def measure(number: int) -> RunMoments:
        if not hasattr(own, "reader"):
            own.reader = ShardReader(manifest, look=False)
        before = 0

        def onwards(frames: int) -> None:
            nonlocal done, before
            with lock:
                done, before = done + frames - before, frames
                report(done, manifest.n_frames)

        return measure_run(own.reader, number, onwards)

    report(0, manifest.n_frames)
    waiting: deque[Future[RunMoments]] = deque()
    pool = ThreadPoolExecutor(threads, "quality")
    try:
        for number in range(manifest.n_runs):
            waiting.append(pool.submit(measure, number))
            if len(waiting) > threads:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


def _kinds(method: str) -> tuple[ImageKind, ...]:
    if method in ("global-z", "min-max", "neurostorm"):
        return ("mean", "deviation")
    return ("change",) if method == "voxel-z" else ("deviation",)


def _dvars_figures(dvars: Values) -> dict[str, Any]:
    if len(dvars) == 0:
        return {"dvars": np.nan, "spikes": np.nan}
    median = float(np.median(dvars))
    return {"dvars": median, "spikes": float((dvars > SPIKE * median).mean())}


def run_blocks(reader: ShardReader, number: int) -> Iterator[npt.NDArray[Any]]:
    """Yield a run's integers [n, V], some frames at a time; each block takes the place of the one before."""
    n_frames = int(reader.manifest.index["n_frames"][number])
    length = max(1, _BLOCK_BYTES // reader.manifest.frame_bytes)
    buffer = np.empty((min(length, n_frames), reader.manifest.n_voxels), dtype=reader.manifest.dtype)
    for start in range(0, n_frames, len(buffer)):
        yield reader.read(number, start, min(len(buffer), n_frames - start), buffer[: n_frames - start]).q
