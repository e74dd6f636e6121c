"""Add runs to a dataset: new shards beside the old ones, which stay as they are, and a new manifest in one step."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from boldforge.configs.durable import write_atomic
from boldforge.data_shards.build import (
    SHARD_FILES,
    TABLE_FILES,
    collect,
    kept_when_stopped,
    publish,
    rejected_in,
    rejected_table,
    split_list,
    write_manifest,
    writing_into,
)
from boldforge.data_shards.grid import brain_mask, get_grid, mask_hash
from boldforge.data_shards.manifest import REJECTED_FILE, Manifest, load_manifest
from boldforge.data_shards.plan import plan_shards
from boldforge.data_shards.runs import Run, RunList, Skipped
from boldforge.data_shards.staging import STAGING, Staging
from boldforge.data_shards.tables import RunEntry
from boldforge.data_shards.tasks import BuildError
from boldforge.data_shards.work import Progress, fill_shards


class AppendReport(NamedTuple):
    """What an append did: the new manifest, how many runs are new, how many the dataset held, what was left out."""

    manifest: Manifest
    added: int
    known: int
    rejected: tuple[Skipped, ...]


def append_shards(
    runs: RunList | Sequence[Run],
    out: str | Path,
    workers: int | None = None,
    on_progress: Progress | None = None,
    address: str | None = None,
) -> AppendReport:
    """Add the runs that a dataset does not hold yet, by its own recipe.

    Shards that are there are neither read nor written, and runs keep their places in the manifest; new ones come after
    them. The dataset is the old one until the new manifest takes the old one's place. A killed append goes on when
    it is called again.

    Parameters
    ----------
    runs
        From `find_runs`. Those that the dataset holds are passed over; another recording of the same name is rejected.
    out
        The dataset's folder.
    workers, on_progress, address
        See `build_shards`.

    Raises
    ------
    ShardError
        If `out` holds no dataset that this release reads.
    BuildError
        If the dataset's brain mask is not this installation's, Ray cannot start, or the disk is full.
    FolderInUseError
        If another process writes into `out`.
    """
    out = Path(out)
    load_manifest(out)
    skipped, given = split_list(runs)
    with writing_into(out):
        old = load_manifest(out)
        _check_mask(old)
        held = {run.key: run for run in old.runs}
        # Another recording of the same name is no known run: the plan names it and leaves it out.
        new = [run for run in given if run.key not in held or not _is_known(run, held[run.key])]
        published = [shard.file for shard in old.shards]
        first = 1 + max(int(file[6:12]) for file in published)
        plan, unusable = plan_shards(new, old.recipe, old.n_voxels, first, held)
        staging = Staging(out / STAGING)
        with kept_when_stopped(staging):
            staging.open(out, plan, frozenset(published))
            # Shards that an append brought here before it was killed, and that do not fit the plan.
            _remove(out, (SHARD_FILES,), published)
            records = fill_shards(staging, plan, old.recipe, workers, address, on_progress, len(unusable))
            rejected = sorted([*skipped, *unusable, *rejected_in(records)])
            shards, entries = collect(records, len(published))
            joined = _joined_table(out / REJECTED_FILE, rejected).encode()
            if not entries:
                staging.remove()
                write_atomic(out / REJECTED_FILE, joined)
                return AppendReport(old, 0, len(given) - len(new), tuple(rejected))
            write_atomic(staging.folder / REJECTED_FILE, joined)
            manifest = write_manifest(
                staging.folder,
                old.recipe,
                old.mask_sha256,
                old.n_voxels,
                [*old.shards, *shards],
                [*old.runs, *entries],
                old.splits,
            )
            publish(staging, out)
            _remove(out, TABLE_FILES, [table.file for table in manifest.tables.values()])
    return AppendReport(manifest.placed_in(out), len(entries), len(given) - len(new), tuple(rejected))


def _is_known(run: Run, held: RunEntry) -> bool:
    """Say whether a run that is given is the one that the dataset holds under its key."""
    given = (run.subject, run.session, run.site, run.task, run.path.name)
    return given == (held.subject, held.session, held.site, held.task, held.source_file)


def _check_mask(manifest: Manifest) -> None:
    if mask_hash(brain_mask(get_grid(manifest.recipe.grid))) != manifest.mask_sha256:
        raise BuildError(
            f"{manifest.folder}: its brain mask is not this installation's, so new runs would hold other voxels; "
            f"append with the nilearn that it was built with ({manifest.software.get('nilearn')}), or build it again."
        )


def _remove(out: Path, patterns: Sequence[str], kept: Sequence[str]) -> None:
    for path in (path for pattern in patterns for path in out.glob(pattern)):
        if path.name not in kept:
            path.unlink()


def _joined_table(path: Path, rejected: Sequence[Skipped]) -> str:
    lines = path.read_text().splitlines()[1:] if path.is_file() else []
    before = [Skipped(Path(name), reason) for name, _, reason in (line.partition("\t") for line in lines)]
    again = {path for path, _ in rejected}
    return rejected_table(sorted([*(row for row in before if row.path not in again), *rejected]))
