"""Re-read a whole dataset against its checksums, and name everything that is damaged."""

import hashlib
import tarfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import numpy.typing as npt
import xxhash

from boldforge.data_shards.build import SHARD_FILES
from boldforge.data_shards.manifest import MANIFEST_FILE, MASK_FILE, Manifest, load_manifest
from boldforge.data_shards.tables import ShardEntry, ShardError, frame_hashes, npy_bytes

MEMBERS = ("bold.npy", "json", "scale.npy", "xxh3.npy")
_MEND = "copy it again or build the shards again."
_NAMED = 8  # frames listed by number; of more, only how many


class Damage(NamedTuple):
    """Something that is not what the manifest says: which file, and a sentence about it."""

    path: Path
    reason: str


def verify_shards(folder: str | Path, on_progress: Callable[[int, int], None] | None = None) -> tuple[Damage, ...]:
    """Read everything that a manifest names and compare it with its checksums.

    Parameters
    ----------
    folder
        The folder of shards.
    on_progress
        Called with (shards done, shards in all).

    Returns
    -------
    tuple of Damage
        Empty for a sound dataset. Of a damaged shard every run that is hit is named, with what of it. Where the
        manifest or its index is damaged, nothing says what the rest should be, and only that is named.
    """
    folder = Path(folder)
    try:
        manifest = load_manifest(folder)
        n_shards = len(manifest.shards)
    except ShardError as error:
        return (_damage(folder / MANIFEST_FILE, error),)
    found = []
    try:
        manifest.opened.check("runs")
    except ShardError as error:
        found.append(_damage(folder / manifest.tables["runs"].file, error))
    try:
        # Bytes that numpy would forgive (a header's padding, a True that is not 1) are damage all the same.
        if npy_bytes(manifest.brain_mask()) != (folder / MASK_FILE).read_bytes():
            raise ShardError(f"{folder / MASK_FILE}: is not byte for byte what was written; {_MEND}")
    except ShardError as error:
        found.append(_damage(folder / MASK_FILE, error))
    if any(damage.path.suffix == ".jsonl" for damage in found):
        return tuple(found)  # what follows names runs by it
    report = on_progress or (lambda done, total: None)
    report(0, n_shards)
    for number, shard in enumerate(manifest.shards):
        found.extend(_verify_shard(manifest, number, shard))
        report(number + 1, n_shards)
    named = {shard.file for shard in manifest.shards}
    for path in sorted(folder.glob(SHARD_FILES)):
        if path.name not in named:
            found.append(Damage(path, f"{path}: is no part of the dataset, but readers of all tars get it; remove it."))
    return tuple(found)


def _damage(path: Path, error: ShardError) -> Damage:
    return Damage(path, str(error))


def _verify_shard(manifest: Manifest, number: int, shard: ShardEntry) -> list[Damage]:
    path = manifest.folder / shard.file
    try:
        with path.open("rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() == shard.sha256:
                return []
            what = list(_what_is_damaged(manifest, number, shard, file))
    except FileNotFoundError:
        what = ["is missing"]
    except OSError as error:
        what = [f"cannot be read ({error.strerror})"]
    return [Damage(path, f"{path}: {reason}; {_MEND}") for reason in what]


def _what_is_damaged(manifest: Manifest, number: int, shard: ShardEntry, file: BinaryIO) -> Iterator[str]:
    size = file.seek(0, 2)
    if size != shard.n_bytes:
        yield f"has {size} bytes, expected {shard.n_bytes}"
    runs = np.flatnonzero(manifest.index["shard"] == number)
    hit = False
    for run in runs:
        parts = _damaged_parts(manifest, manifest.index[run], file)
        if parts:
            hit = True
            yield f"run {manifest.runs[int(run)].key}: {', '.join(parts)} damaged"
    members = _damaged_members(manifest, runs, file)
    if members:
        yield f"the tar's own headers are damaged: {_some(members)} not found where expected"
    elif not hit and size == shard.n_bytes:
        yield "its sha256 is another, but all values are sound: a text member or a header's lesser fields are damaged"


def _some(names: Sequence[str]) -> str:
    """Name up to four; one damaged header ends the walk, so that all behind it count as well."""
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")


def _damaged_parts(manifest: Manifest, row: Any, file: BinaryIO) -> list[str]:
    scale = _read(file, int(row["scale_offset"]), 8 * manifest.n_voxels)
    hashes = _read(file, int(row["hashes_offset"]), 8 * int(row["n_frames"]))
    parts = []
    if xxhash.xxh3_64_intdigest(scale) != row["scale_xxh3"]:
        parts.append("scales")
    if xxhash.xxh3_64_intdigest(hashes) != row["hashes_xxh3"]:
        return [*parts, "list of frame hashes"]
    frames = _damaged_frames(manifest, row, file, np.frombuffer(hashes, dtype="<u8"))
    if len(frames) > _NAMED:
        parts.append(f"{len(frames)} of {int(row['n_frames'])} frames")
    elif frames:
        parts.append(f"frame{'s' * (len(frames) > 1)} {', '.join(map(str, frames))}")
    return parts


def _damaged_frames(
    manifest: Manifest, row: Any, file: BinaryIO, hashes: npt.NDArray[np.uint64], at_once: int = 16
) -> list[int]:
    damaged = []
    for start in range(0, len(hashes), at_once):
        wanted = hashes[start : start + at_once]
        data = _read(file, int(row["offset"]) + start * manifest.frame_bytes, len(wanted) * manifest.frame_bytes)
        whole = len(data) // manifest.frame_bytes
        q = np.frombuffer(data, dtype=np.uint8, count=whole * manifest.frame_bytes).reshape(whole, -1)
        bad = np.flatnonzero(frame_hashes(q) != wanted[:whole])
        damaged += [start + int(i) for i in bad] + list(range(start + whole, start + len(wanted)))
    return damaged


def _damaged_members(manifest: Manifest, runs: npt.NDArray[np.int64], file: BinaryIO) -> list[str]:
    """Return which members a reader of tars would miss, or find elsewhere than the manifest says."""
    file.seek(0)
    found: dict[str, tuple[int, int]] = {}
    try:
        with tarfile.open(fileobj=file, mode="r:") as tar:
            for member in tar:
                found[member.name] = (member.offset_data, member.offset_data + member.size)
    except (tarfile.TarError, OSError, ValueError):
        pass  # what was found before counts
    missing = []
    for run in runs:
        row, key = manifest.index[run], manifest.runs[int(run)].key
        places = {"bold.npy": "offset", "scale.npy": "scale_offset", "xxh3.npy": "hashes_offset"}
        for name in MEMBERS:
            start, stop = found.get(f"{key}.{name}", (-1, -1))
            place = int(row[places[name]]) if name in places else start
            if start < 0 or not start <= place <= stop:
                missing.append(f"{key}.{name}")
    return missing


def _read(file: BinaryIO, offset: int, n_bytes: int) -> bytes:
    file.seek(offset)
    return file.read(n_bytes)
