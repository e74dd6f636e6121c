"""Write one shard: an uncompressed tar that stock WebDataset iterates and `ShardReader` reads by position."""

import hashlib
import json
import os
import tarfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt
import xxhash

from boldforge.data_shards.manifest import RunEntry, ShardEntry
from boldforge.data_shards.prepare import StoredRun
from boldforge.data_shards.runs import Run

_ALIGNMENT = 4096  # a page: positioned reads and memory maps then start on one
_TAR_BLOCK = 512


class HashedFile:
    """A file being written, with the sha256 and the count of what went through."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._digest = hashlib.sha256()
        self._abandoned = False
        self.n_bytes = 0

    def write(self, data: bytes) -> int:
        """Write bytes and count them."""
        if self._abandoned:
            return len(data)
        self._file.write(data)
        self._digest.update(data)
        self.n_bytes += len(data)
        return len(data)

    def abandon(self) -> None:
        """Swallow what still comes: tarfile flushes when collected, and would fail once more on a full disk."""
        self._abandoned = True

    def sha256(self) -> str:
        """Return the hex digest of everything written so far."""
        return self._digest.hexdigest()


def write_shard(
    path: Path, index: int, runs: Iterable[tuple[Run, StoredRun]]
) -> tuple[ShardEntry | None, list[RunEntry]]:
    """Write runs into a new tar, under a temporary name until it is complete and on disk.

    Members per run: ``<key>.bold.npy`` [T, V], ``<key>.json``, ``<key>.scale.npy`` [2, V] (means, scales).

    Parameters
    ----------
    path
        The shard's final name.
    index
        The shard's place in the manifest.
    runs
        Consumed one by one, so that only one run is in memory. Without any, no file is left.

    Raises
    ------
    OSError
        If the file cannot be written; the temporary file is removed first.
    """
    from webdataset import TarWriter

    partial = path.with_name(f".{path.name}.partial")
    written: list[tuple[Run, StoredRun, str, str]] = []
    try:
        with partial.open("wb") as file:
            hashed = HashedFile(file)
            try:
                tar = TarWriter(hashed, encoder=False, compress=False, mtime=0)
                for run, result in runs:
                    written.append((run, result, *_write_run(tar, run, result)))
                tar.close()
                file.flush()
                os.fsync(file.fileno())
            except BaseException:
                hashed.abandon()
                raise
        if not written:
            partial.unlink()
            return None, []
        entries = _entries(partial, index, written)
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    return ShardEntry(file=path.name, n_bytes=hashed.n_bytes, sha256=hashed.sha256()), entries


def _write_run(tar: Any, run: Run, result: StoredRun) -> tuple[str, str]:
    stored = result.stored
    scale = np.stack([stored.mean, stored.scale]).astype("<f4")
    about = {
        "subject": run.subject,
        "session": run.session,
        "site": run.site,
        "phenotype": run.phenotype,
        "simulated": run.simulated,
        "value": "mean + q * scale, float32; scale.npy holds the means, then the scales",
    }
    position = tar.tarstream.offset + _TAR_BLOCK
    tar.write(
        {
            "__key__": run.key,
            "bold.npy": _npy_header(stored.q, position) + stored.q.tobytes(),
            "json": json.dumps(about, sort_keys=True).encode(),
            "scale.npy": _npy_header(scale, 0) + scale.tobytes(),
        }
    )
    return xxhash.xxh3_64_hexdigest(stored.q.data), xxhash.xxh3_64_hexdigest(scale.data)


def _npy_header(array: npt.NDArray[Any], position: int) -> bytes:
    """Return an npy version 1.0 header padded so that a payload behind it, at `position`, starts on a page."""
    fields = f"{{'descr': '{array.dtype.str}', 'fortran_order': False, 'shape': {array.shape}, }}".encode()
    length = -(-(position + 10 + len(fields) + 1) // _ALIGNMENT) * _ALIGNMENT - position - 10
    return b"\x93NUMPY\x01\x00" + length.to_bytes(2, "little") + fields.ljust(length - 1) + b"\n"


def _entries(path: Path, index: int, written: list[tuple[Run, StoredRun, str, str]]) -> list[RunEntry]:
    """Find each payload in the finished tar, by the tar's own headers."""
    with tarfile.open(path) as tar:
        members = {member.name: member for member in tar.getmembers()}
    entries = []
    for run, result, checksum, scale_checksum in written:
        bold, scale = members[f"{run.key}.bold.npy"], members[f"{run.key}.scale.npy"]
        q, prepared = result.stored.q, result.prepared
        entries.append(
            RunEntry(
                key=run.key,
                subject=run.subject,
                session=run.session,
                site=run.site,
                task=run.task,
                phenotype=run.phenotype,
                simulated=run.simulated,
                n_frames=len(q),
                source_file=run.path.name,
                source_sha256=result.source_sha256,
                source_tr=prepared.source_tr,
                source_frames=prepared.source_frames,
                normalisation=prepared.normalisation,
                coverage=round(float((result.stored.scale > 0).mean()), 4),
                tsnr_db=result.tsnr_db,
                shard=index,
                offset=bold.offset_data + bold.size - q.nbytes,
                checksum=checksum,
                scale_offset=scale.offset_data + scale.size - 8 * q.shape[1],
                scale_checksum=scale_checksum,
            )
        )
    return entries
