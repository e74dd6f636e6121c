"""Read stretches of stored runs by position, and never hand out bytes that fail their checksum."""

import os
from collections import OrderedDict
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import xxhash

from boldforge.data_shards.manifest import Manifest, RunEntry, ShardError

_OPEN_FILES = 64  # a dataset may have more shards than a process may open files
_CACHED_SCALES = 64
_BLOCK = 8 * 2**20


class QuantisedClip(NamedTuple):
    """Stored frames of one run: q [T, V] int16 or int8, scale [V], mean [V]; ``value = mean + q · scale``."""

    q: npt.NDArray[Any]
    scale: npt.NDArray[np.float32]
    mean: npt.NDArray[np.float32]


class ShardReader:
    """Reads clips by position. Every shard's size is checked at once, every run's checksum before its first clip.

    Parameters
    ----------
    manifest
        The dataset.
    verified
        Runs (by index) that another reader of the same process has verified already; shared with it from then on.

    Raises
    ------
    ShardError
        From the constructor when a shard is missing or has another size than the manifest says; from `read` when a run
        does not match its checksum.
    """

    def __init__(self, manifest: Manifest, verified: set[int] | None = None) -> None:
        self.manifest = manifest
        self.verified = set() if verified is None else verified
        for shard in manifest.shards:
            path = manifest.folder / shard.file
            size = path.stat().st_size if path.is_file() else None
            if size != shard.n_bytes:
                found = "is missing" if size is None else f"has {size} bytes, expected {shard.n_bytes}"
                raise ShardError(f"{path}: the shard {found}; copy it again or build the shards again.")
        self._files: OrderedDict[int, int] = OrderedDict()
        self._scales: OrderedDict[int, npt.NDArray[np.float32]] = OrderedDict()

    def read(self, run_index: int, start: int, length: int, out: npt.NDArray[Any] | None = None) -> QuantisedClip:
        """Return `length` frames of a run from frame `start`, read into `out` [length, V] where it is given.

        Raises
        ------
        ShardError
            If the run's bytes are damaged.
        IndexError
            If the frames do not lie within the run.
        """
        run = self.manifest.runs[run_index]
        if start < 0 or length < 1 or start + length > run.n_frames:
            raise IndexError(f"{run.key}: frames {start} to {start + length} are outside its {run.n_frames} frames")
        if run_index not in self.verified:
            self._verify(run)
            self.verified.add(run_index)
        q = np.empty((length, self.manifest.n_voxels), dtype=self.manifest.dtype) if out is None else out
        self._fill(run, q.data.cast("B"), run.offset + start * q.strides[0])
        mean, scale = self._scale(run_index)
        return QuantisedClip(q, scale, mean)

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

    def _scale(self, run_index: int) -> npt.NDArray[np.float32]:
        if run_index not in self._scales:
            run = self.manifest.runs[run_index]
            scale = np.empty((2, self.manifest.n_voxels), dtype="<f4")
            self._fill(run, scale.data.cast("B"), run.scale_offset)
            if xxhash.xxh3_64_hexdigest(scale.data) != run.scale_checksum:
                raise self._damaged(run)
            self._scales[run_index] = scale
            if len(self._scales) > _CACHED_SCALES:
                self._scales.popitem(last=False)
        self._scales.move_to_end(run_index)
        return self._scales[run_index]

    def _verify(self, run: RunEntry) -> None:
        digest = xxhash.xxh3_64()
        end = run.offset + run.n_frames * self.manifest.n_voxels * self.manifest.dtype.itemsize
        position = run.offset
        while position < end:
            data = os.pread(self._file(run.shard), min(_BLOCK, end - position), position)
            if not data:
                raise self._damaged(run)
            digest.update(data)
            position += len(data)
        if digest.hexdigest() != run.checksum:
            raise self._damaged(run)

    def _fill(self, run: RunEntry, buffer: memoryview, offset: int) -> None:
        done = 0
        while done < len(buffer):
            count = os.preadv(self._file(run.shard), [buffer[done:]], offset + done)
            if count == 0:
                raise self._damaged(run)
            done += count

    def _file(self, shard: int) -> int:
        if shard not in self._files:
            path = self.manifest.folder / self.manifest.shards[shard].file
            try:
                self._files[shard] = os.open(path, os.O_RDONLY)
            except OSError as error:
                raise ShardError(f"{path}: the shard cannot be opened ({error.strerror}).") from None
            if len(self._files) > _OPEN_FILES:
                os.close(self._files.popitem(last=False)[1])
        self._files.move_to_end(shard)
        return self._files[shard]

    def _damaged(self, run: RunEntry) -> ShardError:
        path = self.manifest.folder / self.manifest.shards[run.shard].file
        return ShardError(
            f"{path}: run {run.key} does not match its checksum, the shard is damaged; "
            "copy it again or build the shards again."
        )
