"""The hidden folder in which a dataset is built: what is finished stays there, so that a killed build goes on.

.building/
runs/<fingerprint>.tar, .json    a finished run: its part of a tar, and its entry
shard-000000.tar, .json          a finished shard, and its entries; its runs' files are gone
"""

import hashlib
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from pydantic import ValidationError

from boldforge.configs import StrictModel
from boldforge.configs.durable import write_atomic
from boldforge.data_shards.plan import PlannedShard
from boldforge.data_shards.runs import Skipped
from boldforge.data_shards.shard import Fragment
from boldforge.data_shards.tables import RunEntry, ShardEntry

STAGING = ".building"
_ENDINGS = (".json", ".tar")
Record = TypeVar("Record", bound=StrictModel)


class _RunRecord(StrictModel):
    n_bytes: int
    xxh3: str
    entries: tuple[RunEntry, ...]


class ShardRecord(StrictModel):
    """A finished shard: what it was made from, its entry (None where no run could be used), its runs, the rejected."""

    fingerprints: tuple[str, ...]
    shard: ShardEntry | None
    runs: tuple[RunEntry, ...]
    rejected: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Staging:
    """The staging folder of a dataset's folder."""

    folder: Path

    @property
    def fragments(self) -> Path:
        """Where single runs wait for their shard."""
        return self.folder / "runs"

    def open(self, out: Path, plan: Iterable[PlannedShard], published: frozenset[str]) -> None:
        """Make the folder, or keep of an old one what fits the plan and remove the rest.

        Parameters
        ----------
        out
            The dataset's folder: shards that an interrupted build had moved there already are taken back.
        published
            Files of `out` that belong to the dataset that is there.
        """
        self.fragments.mkdir(parents=True, exist_ok=True)
        wanted = {shard.file: shard for shard in plan}
        kept = {f"{run.fingerprint}{ending}" for shard in wanted.values() for run in shard.runs for ending in _ENDINGS}
        for path in self.fragments.iterdir():
            if path.name not in kept:
                path.unlink()
        for path in list(self.folder.glob("*.json")):
            shard = wanted.get(path.with_suffix(".tar").name)
            record = _read(path, ShardRecord) if shard is not None else None
            if record is None or record.shard is None or record.shard.file in published:
                continue
            moved = out / record.shard.file
            if not (self.folder / moved.name).exists() and moved.exists() and _sha256(moved) == record.shard.sha256:
                moved.replace(self.folder / moved.name)
        for path in list(self.folder.iterdir()):
            shard = wanted.get(path.with_suffix(".tar").name)
            if path == self.fragments or (shard is not None and self.finished_shard(shard) is not None):
                continue
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink()

    def finished_shard(self, planned: PlannedShard) -> ShardRecord | None:
        """Return the record of a planned shard that is complete."""
        record = _read((self.folder / planned.file).with_suffix(".json"), ShardRecord)
        if record is None or record.fingerprints != tuple(run.fingerprint for run in planned.runs):
            return None
        if record.shard is not None:
            path = self.folder / record.shard.file
            if not path.is_file() or path.stat().st_size != record.shard.n_bytes:
                return None
        return record

    def finished_run(self, fingerprint: str) -> Fragment | None:
        """Return a run's part of a tar if it is complete."""
        path = self.fragments / f"{fingerprint}.tar"
        record = _read(path.with_suffix(".json"), _RunRecord)
        if record is None or not path.is_file() or path.stat().st_size != record.n_bytes:
            return None
        return Fragment(path, record.n_bytes, record.xxh3, record.entries)

    def record_run(self, fragment: Fragment) -> None:
        """Note that a run's part is complete."""
        record = _RunRecord(n_bytes=fragment.n_bytes, xxh3=fragment.xxh3, entries=fragment.entries)
        # Not brought to the disk: the hash tells, when the shard is written, whether both files got there.
        partial = fragment.path.with_suffix(".partial")
        partial.write_bytes(record.model_dump_json().encode())
        partial.replace(fragment.path.with_suffix(".json"))

    def record_shard(
        self,
        file: str,
        fingerprints: tuple[str, ...],
        shard: ShardEntry | None,
        runs: Iterable[RunEntry],
        rejected: Iterable[Skipped],
    ) -> ShardRecord:
        """Note that a shard is complete, and remove its runs' parts."""
        reasons = tuple((str(path), reason) for path, reason in rejected)
        record = ShardRecord(fingerprints=fingerprints, shard=shard, runs=tuple(runs), rejected=reasons)
        write_atomic((self.folder / file).with_suffix(".json"), record.model_dump_json().encode())
        for fingerprint in fingerprints:
            self.forget_run(fingerprint)
        return record

    def forget_run(self, fingerprint: str) -> None:
        """Remove a run's part."""
        for ending in _ENDINGS:
            (self.fragments / f"{fingerprint}{ending}").unlink(missing_ok=True)

    def remove(self) -> None:
        """Remove the folder and all that is in it."""
        if self.folder.exists():
            shutil.rmtree(self.folder)

    def remove_if_idle(self) -> None:
        """Remove the folder where nothing in it is finished."""
        if not any(self.folder.rglob("*.json")):
            self.remove()


def _read(path: Path, kind: type[Record]) -> Record | None:
    try:
        return kind.model_validate_json(path.read_bytes())
    except (OSError, ValidationError):
        return None


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
