"""Build a folder of shards from runs: atomic, resumable, the same bytes however it was built, bad runs left out."""

import errno
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from boldforge.configs import folder_lock
from boldforge.configs.durable import sync_folder, write_atomic
from boldforge.data_shards.grid import brain_mask, get_grid, mask_hash
from boldforge.data_shards.manifest import MANIFEST_FILE, MASK_FILE, REJECTED_FILE, Manifest, software_xxh3
from boldforge.data_shards.plan import plan_shards, software
from boldforge.data_shards.recipe import DataRecipe
from boldforge.data_shards.runs import Run, RunList, Skipped
from boldforge.data_shards.split_plan import SplitPlan
from boldforge.data_shards.staging import STAGING, ShardRecord, Staging
from boldforge.data_shards.tables import RunEntry, ShardEntry, npy_bytes, write_tables
from boldforge.data_shards.tasks import BuildError
from boldforge.data_shards.work import Progress, fill_shards

SHARD_FILES = "shard-??????.tar"
TABLE_FILES = ("index-*.npy", "shards-*.npy", "runs-*.jsonl")


@dataclass(frozen=True)
class BuildReport:
    """The manifest that was written, and every file that was left out with the reason (also in ``rejected.tsv``)."""

    manifest: Manifest
    rejected: tuple[Skipped, ...]


def build_shards(
    runs: RunList | Sequence[Run],
    out: str | Path,
    recipe: DataRecipe,
    workers: int | None = None,
    on_progress: Progress | None = None,
    overwrite: bool = False,
    address: str | None = None,
) -> BuildReport:
    """Read runs, apply the recipe and write shards, manifest with tables, ``mask.npy`` and ``rejected.tsv``.

    A run that cannot be read or used is rejected and the rest goes on. Everything is written into a hidden folder
    in `out` first and moved at the end, the manifest last: a folder with a manifest is complete, and an old dataset
    stays until the new one is whole (the disk must hold both). What is finished stays in the hidden folder when a build
    is stopped or killed, and the same call goes on from there.

    Parameters
    ----------
    runs
        From `find_runs`; what it skipped is listed in ``rejected.tsv`` too.
    out
        A folder, made if missing.
    workers
        Processes; each holds one run in memory. One, or very few runs, are handled in this process; otherwise Ray
        starts them. With an address, tasks at a time: by default as many as the cluster has CPUs.
    on_progress
        Called with (runs done, runs in all).
    overwrite
        Replace the dataset that `out` holds.
    address
        A Ray cluster to work on; its nodes must see `out` and the runs under the same paths.

    Raises
    ------
    BuildError
        If `out` already holds a dataset, no run could be used, Ray cannot start, or the disk is full.
    FolderInUseError
        If another process writes into `out`.
    """
    out = Path(out)
    skipped, usable = split_list(runs)
    with writing_into(out):
        _check_folder(out, overwrite)
        staging = Staging(out / STAGING)
        mask = brain_mask(get_grid(recipe.grid))
        n_voxels = int(mask.sum())
        plan, rejected = plan_shards(usable, recipe, n_voxels)
        with kept_when_stopped(staging):
            published = out.glob(SHARD_FILES) if (out / MANIFEST_FILE).exists() else ()
            staging.open(out, plan, frozenset(path.name for path in published))
            records = fill_shards(staging, plan, recipe, workers, address, on_progress, len(rejected))
            rejected = sorted([*skipped, *rejected, *rejected_in(records)])
            shards, entries = collect(records)
            if not entries:
                _give_up(staging, out, rejected)
            write_atomic(staging.folder / REJECTED_FILE, rejected_table(rejected).encode())
            write_atomic(staging.folder / MASK_FILE, npy_bytes(mask))
            manifest = write_manifest(staging.folder, recipe, mask_hash(mask), n_voxels, shards, entries)
            _swap(staging, out)
    return BuildReport(manifest.placed_in(out), tuple(rejected))


def split_list(runs: RunList | Sequence[Run]) -> tuple[list[Skipped], tuple[Run, ...]]:
    """Return what was skipped when runs were looked for, and the runs."""
    return (list(runs.skipped), runs.runs) if isinstance(runs, RunList) else ([], tuple(runs))


@contextmanager
def writing_into(out: Path) -> Iterator[None]:
    """Keep a dataset's folder to this process, and say what is wrong with the disk in a sentence."""
    if out.exists() and not out.is_dir():
        raise BuildError(f"{out}: is a file, expected a folder for the shards.")
    try:
        with folder_lock(out, "writing shards"):
            yield
    except OSError as error:
        if error.errno in {errno.ENOSPC, errno.EDQUOT}:
            raise BuildError(
                f"{out}: no space left on the disk while writing the shards; nothing half-written was kept. Free "
                "some space and run the same command again: it goes on with the runs that are not finished yet."
            ) from None
        raise BuildError(f"{out}: the shards cannot be written ({error.strerror}); choose another --out.") from None


@contextmanager
def kept_when_stopped(staging: Staging) -> Iterator[None]:
    """Leave a staging folder for the next build if anything in it is finished, whatever ends this one."""
    try:
        yield
    except BaseException:
        staging.remove_if_idle()
        raise


def rejected_in(records: Sequence[ShardRecord]) -> list[Skipped]:
    """Return the runs that turned out to be unusable while they were read."""
    return [Skipped(Path(path), reason) for record in records for path, reason in record.rejected]


def collect(records: Sequence[ShardRecord], first: int = 0) -> tuple[list[ShardEntry], list[RunEntry]]:
    """Return the shards that hold anything and their runs, numbered from `first` on."""
    filled = [(record.shard, record.runs) for record in records if record.shard is not None]
    entries = [run.model_copy(update={"shard": first + i}) for i, (_, runs) in enumerate(filled) for run in runs]
    return [shard for shard, _ in filled], entries


def write_manifest(
    folder: Path,
    recipe: DataRecipe,
    mask_sha256: str,
    n_voxels: int,
    shards: Sequence[ShardEntry],
    runs: Sequence[RunEntry],
    splits: SplitPlan | None = None,
) -> Manifest:
    """Write a dataset's tables, then its manifest; a plan of splits stays when runs are added."""
    versions = software()
    manifest = Manifest(
        recipe=recipe,
        grid=get_grid(recipe.grid),
        mask_sha256=mask_sha256,
        n_voxels=n_voxels,
        n_runs=len(runs),
        n_frames=sum(run.n_frames for run in runs),
        simulated=any(run.simulated for run in runs),
        tables=write_tables(folder, runs, shards),
        splits=splits,
        software=versions,
        software_xxh3=software_xxh3(versions),
    )
    manifest = manifest.model_copy(update={"content_hash": manifest.computed_hash()})
    write_atomic(folder / MANIFEST_FILE, manifest.model_dump_json(indent=1).encode())
    return manifest


def rejected_table(rejected: Sequence[Skipped]) -> str:
    """Return the text of ``rejected.tsv``."""
    rows = (f"{' '.join(str(path).split())}\t{_reason(path, reason)}\n" for path, reason in rejected)
    return "path\treason\n" + "".join(rows)


def _reason(path: Path, reason: str) -> str:
    """Return a reason as one line that does not begin with the file's path, which stands beside it."""
    return " ".join(reason.removeprefix(f"{path}: ").split())


def _check_folder(out: Path, overwrite: bool) -> None:
    ours = (out / STAGING).exists() or _is_manifest(out)
    foreign = [path for pattern in (MANIFEST_FILE, SHARD_FILES, MASK_FILE, *TABLE_FILES) for path in out.glob(pattern)]
    if foreign and not ours:
        raise BuildError(
            f"{out}: holds {foreign[0].name}, which is no part of a dataset of ours; choose another --out."
        )
    if (out / MANIFEST_FILE).exists() and not overwrite:
        raise BuildError(
            f"{out}: already holds a dataset; pass --overwrite to replace it, --append to add runs to it, or choose "
            "another --out."
        )


def _is_manifest(out: Path) -> bool:
    """Say whether a folder's ``manifest.json`` is a dataset's, be it of another release or damaged."""
    path = out / MANIFEST_FILE
    return path.is_file() and (any(out.glob(SHARD_FILES)) or b'"schema_version"' in path.read_bytes())


def _give_up(staging: Staging, out: Path, rejected: list[Skipped]) -> None:
    staging.remove()
    if not (out / MANIFEST_FILE).exists():  # the list beside a dataset is the dataset's own
        write_atomic(out / REJECTED_FILE, rejected_table(rejected).encode())
    if not rejected:
        raise BuildError(
            f"{out}: no runs were given, so there is nothing to store; check the input folder and its layout."
        )
    path, reason = rejected[0]
    raise BuildError(
        f"{out}: none of the {len(rejected)} files could be used, the first of them {path}: {_reason(path, reason)}"
    )


def _swap(staging: Staging, out: Path) -> None:
    """Put a finished dataset in the place of the old one: only renames, so no full disk can stop it half-way."""
    # The old manifest goes first, the new one comes last: a folder with a manifest is always a whole dataset.
    (out / MANIFEST_FILE).unlink(missing_ok=True)
    for pattern in (SHARD_FILES, MASK_FILE, REJECTED_FILE, *TABLE_FILES):
        for path in out.glob(pattern):
            path.unlink()
    publish(staging, out)


def publish(staging: Staging, out: Path) -> None:
    """Move what a manifest names into the dataset's folder, then the manifest; then the staging folder is done with."""
    names = [path.name for pattern in (SHARD_FILES, *TABLE_FILES) for path in staging.folder.glob(pattern)]
    for name in (*sorted(names), MASK_FILE, REJECTED_FILE):
        if (staging.folder / name).exists():
            (staging.folder / name).replace(out / name)
    sync_folder(out)
    (staging.folder / MANIFEST_FILE).replace(out / MANIFEST_FILE)
    sync_folder(out)
    staging.remove()
