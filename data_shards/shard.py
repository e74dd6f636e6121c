"""Write shards: uncompressed tars that stock WebDataset iterates, `ShardReader` reads by position and zarr opens.

A run's part of a tar (its fragment) fills whole pages, so its bytes do not depend on where in a shard it comes to lie:
workers write fragments side by side, and a shard is its fragments one after another, closed by the end-of-archive mark.
"""

import hashlib
import json
import os
import tarfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt
import xxhash

from boldforge.data_shards.prepare import StoredRun
from boldforge.data_shards.runs import Run
from boldforge.data_shards.tables import RunEntry, ShardEntry, frame_hashes

PAGE = 4096  # positioned reads and memory maps then start on one
_TAR_BLOCK = 512
_END_OF_TAR = bytes(2 * PAGE)  # two blocks of zeros would do; whole pages keep every file's size a multiple of one
_COPY = 8 * 2**20


@dataclass(frozen=True)
class Fragment:
    """A run's part of a tar in a file of its own; offsets in `entries` count from its start, ``xxh3`` is over all."""

    path: Path
    n_bytes: int
    xxh3: str
    entries: tuple[RunEntry, ...]


class _HashedFile:
    """A file being written, with the xxh3-128 and the count of what went through."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.digest = xxhash.xxh3_128()
        self.n_bytes = 0

    def write(self, data: bytes | memoryview) -> None:
        self._file.write(data)
        self.digest.update(data)
        self.n_bytes += len(data)


def write_fragment(path: Path, run: Run, result: StoredRun) -> Fragment:
    """Write a run's part of a tar, under a temporary name until it is complete.

    Members: ``<key>.bold.npy`` [T, V], ``<key>.json``, ``<key>.scale.npy`` float32 [2, V] (means, scales) and
    ``<key>.xxh3.npy`` uint64 [T] (the xxh3-64 of each frame's integers). A run from which frames were removed is
    stored as several, one per stretch between them, so that no reader can take a gap for a step of one TR; the second
    has the key ``<key>_part-2``.

    Raises
    ------
    OSError
        If the file cannot be written; the temporary file is removed first.
    """
    q = np.ascontiguousarray(result.stored.q)
    entries: list[RunEntry] = []
    partial = path.with_name(f".{path.name}.partial")
    try:
        with partial.open("wb") as file:
            out = _HashedFile(file)
            for number, stretch in enumerate(result.prepared.stretches, start=1):
                key = run.key if number == 1 else f"{run.key}_part-{number}"
                entry = _add_run(out, key, run, result, q[stretch.start : stretch.stop], stretch.source_start)
                entries.append(entry)
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    return Fragment(path, out.n_bytes, out.digest.hexdigest(), tuple(entries))


def _add_run(
    out: _HashedFile, key: str, run: Run, result: StoredRun, q: npt.NDArray[Any], source_start: int
) -> RunEntry:
    scale = np.stack([result.stored.mean, result.stored.scale]).astype("<f4")
    hashes = frame_hashes(q)
    about = {
        "subject": run.subject,
        "session": run.session,
        "site": run.site,
        "phenotype": run.phenotype,
        "simulated": run.simulated,
        "value": "mean + q * scale, float32; scale.npy holds the means, then the scales",
    }
    offset = _add_array(out, f"{key}.bold.npy", q)
    _add_text(out, f"{key}.json", json.dumps(about, sort_keys=True).encode())
    scale_offset = _add_array(out, f"{key}.scale.npy", scale)
    hashes_offset = _add_array(out, f"{key}.xxh3.npy", hashes, fill_page=True)
    prepared = result.prepared
    return RunEntry(
        key=key,
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
        source_start=source_start,
        normalisation=prepared.normalisation,
        coverage=round(float((result.stored.scale > 0).mean()), 4),
        tsnr_db=result.tsnr_db,
        shard=0,
        offset=offset,
        scale_offset=scale_offset,
        scale_xxh3=xxhash.xxh3_64_hexdigest(scale.data),
        hashes_offset=hashes_offset,
        hashes_xxh3=xxhash.xxh3_64_hexdigest(hashes.data),
    )


class DamagedFragmentError(Exception):
    """A fragment is not what was written: the machine went down before it reached the disk."""

    def __init__(self, fragment: Fragment) -> None:
        self.fragment = fragment


def join_fragments(path: Path, fragments: Sequence[Fragment]) -> tuple[ShardEntry, list[RunEntry]]:
    """Write a shard from its runs' fragments, on disk under a temporary name before it gets its own.

    Returns
    -------
    The shard, and its runs with offsets in it; which shard of the dataset it is, is for the caller to fill in.

    Raises
    ------
    DamagedFragmentError
        If a fragment does not match its hash.
    OSError
        If the shard cannot be written; the temporary file is removed first.
    """
    partial = path.with_name(f".{path.name}.partial")
    sha256 = hashlib.sha256()
    entries: list[RunEntry] = []
    position = 0
    try:
        with partial.open("wb") as file:
            for fragment in fragments:
                digest = xxhash.xxh3_128()
                for data in _pieces(fragment.path):
                    file.write(data)
                    sha256.update(data)
                    digest.update(data)
                if digest.hexdigest() != fragment.xxh3:
                    raise DamagedFragmentError(fragment)
                entries.extend(_moved(entry, position) for entry in fragment.entries)
                position += fragment.n_bytes
            file.write(_END_OF_TAR)
            sha256.update(_END_OF_TAR)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    return ShardEntry(file=path.name, n_bytes=position + len(_END_OF_TAR), sha256=sha256.hexdigest()), entries


def _moved(entry: RunEntry, by: int) -> RunEntry:
    places = ("offset", "scale_offset", "hashes_offset")
    return entry.model_copy(update={name: getattr(entry, name) + by for name in places})


def _pieces(path: Path) -> Iterable[bytes]:
    with path.open("rb") as file:
        while data := file.read(_COPY):
            yield data


def _add_array(out: _HashedFile, name: str, array: npt.NDArray[Any], fill_page: bool = False) -> int:
    """Write an npy member whose values start on a page, or end on one; return where they start."""
    fields = f"{{'descr': '{array.dtype.str}', 'fortran_order': False, 'shape': {array.shape}, }}".encode()
    # 10 bytes come before the header's text (npy version 1.0), which spaces fill and a newline ends.
    start = out.n_bytes + _TAR_BLOCK + 10
    shortest = start + len(fields) + 1
    aligned = shortest + array.nbytes if fill_page else shortest
    length = len(fields) + 1 + -aligned % PAGE
    header = b"\x93NUMPY\x01\x00" + length.to_bytes(2, "little") + fields.ljust(length - 1) + b"\n"
    _add_header(out, name, len(header) + array.nbytes)
    out.write(header)
    position = out.n_bytes
    out.write(array.data.cast("B"))
    out.write(bytes(-out.n_bytes % _TAR_BLOCK))
    return position


def _add_text(out: _HashedFile, name: str, data: bytes) -> None:
    _add_header(out, name, len(data))
    out.write(data + bytes(-len(data) % _TAR_BLOCK))


def _add_header(out: _HashedFile, name: str, n_bytes: int) -> None:
    about = tarfile.TarInfo(name)
    about.size, about.mode = n_bytes, 0o444
    out.write(about.tobuf(tarfile.USTAR_FORMAT))
