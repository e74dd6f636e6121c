"""Build a folder of shards from runs: atomic, the same bytes at any number of workers, bad runs listed and left out."""

import errno
import io
import multiprocessing
import os
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path

import numpy as np
import numpy.typing as npt

from boldforge.configs import BoldForgeError, folder_lock
from boldforge.data_shards.grid import brain_mask, get_grid, mask_hash
from boldforge.data_shards.manifest import MANIFEST_FILE, MASK_FILE, REJECTED_FILE, Manifest, RunEntry, ShardEntry
from boldforge.data_shards.nifti import HeaderError, open_bold
from boldforge.data_shards.prepare import RunProblem, StoredRun, store_run
from boldforge.data_shards.recipe import DataRecipe
from boldforge.data_shards.runs import Run, RunList, Skipped
from boldforge.data_shards.shard import write_shard

SHARD_BYTES = 256 * 2**20
SHARD_RUNS = 8
# Holds the new dataset until it is whole. While it stands, shards beside it are ours to remove, manifest or not.
_STAGING = ".building"
_LONGEST_KEY = 80  # a classic tar header holds names of 100 bytes

Progress = Callable[[int, int], None]


class BuildError(BoldForgeError):
    """A build cannot start or go on."""


@dataclass(frozen=True)
class BuildReport:
    """The manifest that was written, and every file that was left out with the reason (also in ``rejected.tsv``)."""

    manifest: Manifest
    rejected: tuple[Skipped, ...]


@dataclass(frozen=True)
class _ShardTask:
    runs: tuple[Run, ...]
    path: Path
    recipe: DataRecipe


@dataclass(frozen=True)
class _ShardResult:
    shard: ShardEntry | None
    runs: list[RunEntry]
    rejected: list[Skipped]


def build_shards(
    runs: RunList | Sequence[Run],
    out: str | Path,
    recipe: DataRecipe,
    workers: int = 1,
    on_progress: Progress | None = None,
    overwrite: bool = False,
) -> BuildReport:
    """Read runs, apply the recipe and write shards, ``manifest.json``, ``mask.npy`` and ``rejected.tsv``.

    A run that cannot be read or used is rejected and the rest goes on. Everything is written into a hidden folder
    in `out` first and moved at the end, the manifest last: a folder with a manifest is complete, and an old dataset
    stays until the new one is whole (the disk must hold both).

    Parameters
    ----------
    runs
        From `find_runs`; what it skipped is listed in ``rejected.tsv`` too.
    out
        A folder, made if missing.
    workers
        Processes; each holds one run in memory.
    on_progress
        Called with (runs done, runs in all).
    overwrite
        Replace the dataset that `out` holds.

    Raises
    ------
    BuildError
        If `out` already holds a dataset, no run could be used, a worker was killed, or the disk is full.
    FolderInUseError
        If another process writes into `out`.
    """
    out = Path(out)
    if out.exists() and not out.is_dir():
        raise BuildError(f"{out}: is a file, expected a folder for the shards.")
    try:
        with folder_lock(out, "writing shards"):
            _check_folder(out, overwrite)
            staging = out / _STAGING
            try:
                _remove_staging(staging)
                staging.mkdir()
                manifest, rejected = _build_in(staging, runs, recipe, workers, on_progress)
            except BaseException:
                _remove_staging(staging)
                raise
            _swap(staging, out)
    except OSError as error:
        if error.errno in {errno.ENOSPC, errno.EDQUOT}:
            raise BuildError(
                f"{out}: no space left on the disk while writing the shards; nothing half-written was kept. Free "
                "some space or choose another --out, and run the same command again."
            ) from None
        raise BuildError(f"{out}: the shards cannot be written ({error.strerror}); choose another --out.") from None
    return BuildReport(manifest.placed_in(out), tuple(rejected))


def _build_in(
    staging: Path, runs: RunList | Sequence[Run], recipe: DataRecipe, workers: int, on_progress: Progress | None
) -> tuple[Manifest, list[Skipped]]:
    skipped = list(runs.skipped) if isinstance(runs, RunList) else []
    usable = runs.runs if isinstance(runs, RunList) else tuple(runs)
    mask = brain_mask(get_grid(recipe.grid))
    tasks, rejected = _plan(usable, staging, recipe, int(mask.sum()))
    results = _run_tasks(tasks, workers, on_progress, done=len(rejected))
    rejected = sorted([*skipped, *rejected, *(item for result in results for item in result.rejected)])
    manifest = _manifest(recipe, mask_hash(mask), int(mask.sum()), results)
    if not manifest.runs:
        out = staging.parent
        if not (out / MANIFEST_FILE).exists():  # the list beside a dataset is the dataset's own
            _write_atomic(out / REJECTED_FILE, _rejected_table(rejected).encode())
        raise BuildError(_nothing_left(out, rejected))
    _write_atomic(staging / REJECTED_FILE, _rejected_table(rejected).encode())
    _write_atomic(staging / MASK_FILE, _npy(mask))
    _write_atomic(staging / MANIFEST_FILE, manifest.model_dump_json(indent=1).encode())
    return manifest, rejected


def _check_folder(out: Path, overwrite: bool) -> None:
    if (out / MANIFEST_FILE).exists() and not overwrite:
        raise BuildError(f"{out}: already holds a dataset; pass --overwrite to replace it, or choose another --out.")
    ours = (out / MANIFEST_FILE).exists() or (out / _STAGING).exists()
    foreign = sorted(out.glob("shard-??????.tar"))
    if foreign and not ours:
        raise BuildError(
            f"{out}: holds {foreign[0].name}, which is no part of a dataset of ours; choose another --out."
        )


def _remove_staging(staging: Path) -> None:
    if staging.exists():
        shutil.rmtree(staging)


def _swap(staging: Path, out: Path) -> None:
    """Put a finished dataset in the place of the old one: only renames, so no full disk can stop it half-way."""
    # The old manifest goes first, the new one comes last: a folder with a manifest is always a whole dataset.
    (out / MANIFEST_FILE).unlink(missing_ok=True)
    for pattern in ("shard-??????.tar", MASK_FILE, REJECTED_FILE):
        for path in out.glob(pattern):
            path.unlink()
    for path in sorted(staging.iterdir(), key=lambda path: path.name == MANIFEST_FILE):
        path.replace(out / path.name)
    _sync_folder(out)
    staging.rmdir()


def _plan(runs: Sequence[Run], out: Path, recipe: DataRecipe, n_voxels: int) -> tuple[list[_ShardTask], list[Skipped]]:
    """Group runs into shards by expected size, from their headers alone: the plan does not depend on the workers."""
    groups: list[list[Run]] = []
    rejected = []
    filled = 0
    keys: set[str] = set()
    for run in runs:
        try:
            bold = open_bold(run.path, run.tr)
            if len(run.key) > _LONGEST_KEY:
                raise HeaderError(f"{run.path}: its name in the dataset ({run.key}) is too long; shorten its entities.")
            if run.key in keys:
                raise HeaderError(
                    f"{run.path}: its name in the dataset ({run.key}) is taken by another run; rename it."
                )
        except HeaderError as error:
            rejected.append(Skipped(run.path, str(error)))
            continue
        keys.add(run.key)
        frames = bold.n_frames * bold.tr / recipe.tr
        size = int(frames * n_voxels * np.dtype(recipe.dtype).itemsize)
        if not groups or filled + size > SHARD_BYTES or len(groups[-1]) == SHARD_RUNS:
            groups.append([])
            filled = 0
        groups[-1].append(run)
        filled += size
    tasks = [_ShardTask(tuple(group), out / f"shard-{i:06d}.tar", recipe) for i, group in enumerate(groups)]
    return tasks, rejected


def _run_tasks(tasks: list[_ShardTask], workers: int, on_progress: Progress | None, done: int) -> list[_ShardResult]:
    total = done + sum(len(task.runs) for task in tasks)
    report = on_progress or (lambda done, total: None)
    report(done, total)
    if workers <= 1 or len(tasks) <= 1:
        results = []
        for task in tasks:
            base = done
            results.append(_build_shard(task, lambda n, base=base: report(base + n, total)))  # type: ignore[misc]
            done += len(task.runs)
        return results
    # Spawned, not forked: a fork of a process with threads (torch, a progress bar) can hang.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(min(workers, len(tasks)), mp_context=context) as pool:
        futures = {pool.submit(_build_shard, task): task for task in tasks}
        try:
            for future in as_completed(futures):
                future.result()
                done += len(futures[future].runs)
                report(done, total)
        except BrokenProcessPool:
            out = tasks[0].path.parent.parent
            raise BuildError(
                f"{out}: one of the {workers} worker processes was killed, most likely because memory ran out; each "
                "holds one run, so pass fewer --workers and run the same command again."
            ) from None
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
        return [future.result() for future in futures]


def _build_shard(task: _ShardTask, on_run: Callable[[int], None] | None = None) -> _ShardResult:
    rejected = []

    def stored() -> Iterator[tuple[Run, StoredRun]]:
        for number, run in enumerate(task.runs, start=1):
            try:
                result = store_run(run, task.recipe)
            except RunProblem as error:
                rejected.append(Skipped(run.path, str(error)))
            else:
                yield replace(run, simulated=result.prepared.simulated), result
            if on_run is not None:
                on_run(number)

    shard, entries = write_shard(task.path, 0, stored())
    return _ShardResult(shard, entries, rejected)


def _manifest(recipe: DataRecipe, mask_sha256: str, n_voxels: int, results: list[_ShardResult]) -> Manifest:
    shards = [result.shard for result in results if result.shard is not None]
    filled = [result for result in results if result.shard is not None]
    runs = [run.model_copy(update={"shard": i}) for i, result in enumerate(filled) for run in result.runs]
    packages = ("boldforge", "nibabel", "nilearn", "numpy", "scipy", "webdataset")
    manifest = Manifest(
        recipe=recipe,
        grid=get_grid(recipe.grid),
        mask_sha256=mask_sha256,
        n_voxels=n_voxels,
        shards=tuple(shards),
        runs=tuple(runs),
        software={"python": sys.version.split()[0], **{name: version(name) for name in packages}},
    )
    return manifest.model_copy(update={"content_hash": manifest.computed_hash()})


def _rejected_table(rejected: list[Skipped]) -> str:
    rows = (f"{path}\t{' '.join(reason.split())}\n" for path, reason in rejected)
    return "path\treason\n" + "".join(rows)


def _nothing_left(out: Path, rejected: list[Skipped]) -> str:
    if not rejected:
        return f"{out}: no runs were given, so there is nothing to store; check the input folder and its layout."
    return f"{out}: none of the {len(rejected)} files could be used; the first because {rejected[0].reason}"


def _npy(array: npt.NDArray[np.bool_]) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


def _write_atomic(path: Path, data: bytes) -> None:
    partial = path.with_name(f".{path.name}.partial")
    with partial.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)
    _sync_folder(path.parent)


def _sync_folder(folder: Path) -> None:
    number = os.open(folder, os.O_RDONLY)  # renames, too, must reach the disk
    try:
        os.fsync(number)
    finally:
        os.close(number)
