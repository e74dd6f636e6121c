"""Read stretches of stored runs by position, and never hand out bytes that fail their checksum."""

import errno
import os
from collections import OrderedDict
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from xxhash import xxh3_64_intdigest

from boldforge.configs import BoldForgeError
from boldforge.data_shards.manifest import Manifest
from boldforge.data_shards.tables import ShardError

_OPEN_FILES = 64  # a dataset may have more shards than a process may open files
_CACHED_RUNS = 64
LOOK_AT = 4096


class OpenFilesError(BoldForgeError):
    """Too many files are open in a process: no fault of a shard, so nothing that would be skipped."""


class QuantisedClip(NamedTuple):
    """Stored frames of one run: q [T, V] int16 or int8, scale [V], mean [V]; ``value = mean + q · scale``."""

    q: npt.NDArray[Any]
    scale: npt.NDArray[np.float32]
    mean: npt.NDArray[np.float32]


class _RunTail(NamedTuple):
    """What belongs to every clip of a run.

    Its shard, where its frames begin there and how many they are; float32 [2, V] means and scales; the frames' hashes.
    """

    shard: int
    offset: int
    n_frames: int
    scale: npt.NDArray[np.float32]
    hashes: list[int]


class ShardReader:
    """Reads clips by position. Every frame that is handed out has been checked against its hash, every time.

    A dataset's shards are looked at when the reader is made, each for its size; beyond `LOOK_AT` shards, where that
    would take longer than all else, each when it is first opened.

    Parameters
    ----------
    manifest
        The dataset.
    look
        Whether to look at the shards at once; False where another reader has, or where damage is to be skipped.

    Raises
    ------
    ShardError
        From the constructor when a shard is missing or has another size than the manifest says; from `read` when what
        is asked for is damaged.
    """

    def __init__(self, manifest: Manifest, look: bool = True) -> None:
        self.manifest = manifest
        self._files: OrderedDict[int, int] = OrderedDict()
        self._runs: OrderedDict[int, _RunTail] = OrderedDict()
        self._remote = manifest.remote
        self._frame_bytes = manifest.frame_bytes
        if look and self._remote is None and len(manifest.shards) <= LOOK_AT:
            for shard in manifest.shards:
                path = manifest.folder / shard.file
                self._check_size(path, path.stat().st_size if path.is_file() else None, shard.n_bytes)

    def read(self, run_index: int, start: int, length: int, out: npt.NDArray[Any] | None = None) -> QuantisedClip:
        """Return `length` frames of a run from frame `start`, read into `out` [length, V] where it is given.

        Raises
        ------
        ShardError
            If these frames, or the run's scales, are damaged. What `out` then holds is of no use.
        IndexError
            If the frames do not lie within the run.
        """
        q = np.empty((length, self.manifest.n_voxels), dtype=self.manifest.dtype) if out is None else out
        if length < 1 or len(q) != length:
            raise IndexError(f"{length} frames were asked for, into an array of {len(q)}")
        mean, scale = self.fill(run_index, start, q)
        return QuantisedClip(q, scale, mean)

    def fill(self, run_index: int, start: int, q: npt.NDArray[Any]) -> npt.NDArray[np.float32]:
        """Read frames of a run from frame `start` into all of `q` [T, V]; return its means and scales as `scales` does.

        Raises as `read` does.
        """
        try:
            return self._read(run_index, start, q)
        except ShardError:
            if self._remote is None:
                raise
            # It may be the cache that is damaged: what lies at the address decides.
            row = self.manifest.index[run_index]
            shard = self.manifest.shards[int(row["shard"])]
            for position, n_bytes in (
                (int(row["offset"]) + start * self.manifest.frame_bytes, q.nbytes),
                (int(row["scale_offset"]), 8 * q.shape[1]),
                (int(row["hashes_offset"]), 8 * int(row["n_frames"])),
            ):
                self._remote.forget(shard, position, n_bytes)
            return self._read(run_index, start, q)

    def _read(self, run_index: int, start: int, q: npt.NDArray[Any]) -> npt.NDArray[np.float32]:
        """Read frames into `q` and check each against its hash."""
        tail = self._tail(run_index)
        if start < 0 or start + len(q) > tail.n_frames:
            key = self.manifest.runs[run_index].key
            raise IndexError(f"{key}: frames {start} to {start + len(q)} are outside its {tail.n_frames} frames")
        view, size = q.data.cast("B"), self._frame_bytes
        self._fill(run_index, tail.shard, view, tail.offset + start * size)
        for frame in range(len(q)):
            if xxh3_64_intdigest(view[frame * size : (frame + 1) * size]) != tail.hashes[start + frame]:
                raise self._damaged(run_index, f"frame {start + frame}")
        return tail.scale

    def scales(self, run_index: int) -> npt.NDArray[np.float32]:
        """Return a run's float32 [2, V]: means, then scales.

        Raises
        ------
        ShardError
            If they are damaged.
        """
        return self._tail(run_index).scale

    def close(self) -> None:
        """Close the files that are open."""
        while self._files:
            os.close(self._files.popitem()[1])

    def __getstate__(self) -> dict[str, Any]:
        # File descriptors do not travel to another process.
        return {**self.__dict__, "_files": OrderedDict()}

    def __del__(self) -> None:
        if hasattr(self, "_files"):
            self.close()

    def _tail(self, run_index: int) -> "_RunTail":
        """Return what is read once per run: its scales and its frames' hashes."""
        if run_index in self._runs:
            self._runs.move_to_end(run_index)
            return self._runs[run_index]
        row = self.manifest.index[run_index]
        shard, n_frames = int(row["shard"]), int(row["n_frames"])
        scale = np.empty((2, self.manifest.n_voxels), dtype="<f4")
        hashes = np.empty(n_frames, dtype="<u8")
        self._fill(run_index, shard, scale.data.cast("B"), int(row["scale_offset"]))
        self._fill(run_index, shard, hashes.data.cast("B"), int(row["hashes_offset"]))
        if xxh3_64_intdigest(scale.data) != row["scale_xxh3"]:
            raise self._damaged(run_index, "scales")
        if xxh3_64_intdigest(hashes.data) != row["hashes_xxh3"]:
            raise self._damaged(run_index, "list of frame hashes")
        # Handed out again and again: whoever writes into them would bend every later clip.
        scale.setflags(write=False)
        tail = _RunTail(shard, int(row["offset"]), n_frames, scale, hashes.tolist())
        self._runs[run_index] = tail
        if len(self._runs) > _CACHED_RUNS:
            self._runs.popitem(last=False)
        return tail

    def _fill(self, run_index: int, shard: int, buffer: memoryview, offset: int) -> None:
        if self._remote is not None:
            self._remote.fill(self.manifest.shards[shard], offset, buffer)
            return
        file = self._file(shard)
        done = 0
        while done < len(buffer):
            try:
                count = os.preadv(file, [buffer[done:]], offset + done)
            except OSError as error:
                raise self._damaged(run_index, f"bytes, which the disk does not give: {error.strerror}") from None
            if count == 0:
                raise self._damaged(run_index, "end, which is cut off")
            done += count

    def _file(self, shard: int) -> int:
        if shard not in self._files:
            entry = self.manifest.shards[shard]
            path = self.manifest.folder / entry.file
            try:
                number = self._open(path)
            except FileNotFoundError:
                self._check_size(path, None, entry.n_bytes)
                raise
            except OSError as error:
                raise ShardError(f"{path}: the shard cannot be opened ({error.strerror}).") from None
            try:
                self._check_size(path, os.fstat(number).st_size, entry.n_bytes)
            except ShardError:
                os.close(number)  # or the next clip would be read from what is left of the shard
                raise
            self._files[shard] = number
            if len(self._files) > _OPEN_FILES:
                os.close(self._files.popitem(last=False)[1])
        self._files.move_to_end(shard)
        return self._files[shard]

    def _open(self, path: Path) -> int:
        for last_try in (False, True):
            try:
                return os.open(path, os.O_RDONLY)
            except OSError as error:
                if error.errno not in {errno.EMFILE, errno.ENFILE}:
                    raise
                if last_try:
                    raise OpenFilesError(
                        f"{path}: cannot be opened, because too many files are open already; raise the limit "
                        "(ulimit -n) or read with fewer workers."
                    ) from None
                self.close()  # those of other shards, which are opened again when they are needed
        raise AssertionError

    def _check_size(self, path: Path, size: int | None, expected: int) -> None:
        if size != expected:
            found = "is missing" if size is None else f"has {size} bytes, expected {expected}"
            raise ShardError(f"{path}: the shard {found}; copy it again or build the shards again.")

    def _damaged(self, run_index: int, what: str) -> ShardError:
        run = self.manifest.runs[run_index]
        file = self.manifest.shards[run.shard].file
        path = self.manifest.folder / file if self._remote is None else f"{self._remote.url}/{file}"
        return ShardError(
            f"{path}: run {run.key} does not match its checksum (its {what}), the shard is damaged; "
            "copy it again or build the shards again."
        )
