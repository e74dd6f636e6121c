"""A dataset as a Zarr v3 group, over the very bytes of its tars: a chunk is one frame, a byte range of a shard.

    mask             bool [X, Y, Z]
    <key>/bold       int16 or int8 [T, V], one chunk per frame
    <key>/scale      float32 [2, V]: means, then scales; value = mean + q · scale

Every chunk is read through `ShardReader`, so a damaged one raises and is never a fill value.

Shape suffixes: T frames, V brain voxels.
"""

import json
from collections.abc import AsyncIterator, Callable, Iterable
from functools import cached_property
from typing import Any, NoReturn

import zarr
from zarr.abc.store import ByteRequest, OffsetByteRequest, RangeByteRequest, Store, SuffixByteRequest
from zarr.core.buffer import Buffer, BufferPrototype, default_buffer_prototype

from boldforge.data_shards.manifest import Manifest
from boldforge.data_shards.reader import ShardReader
from boldforge.data_shards.tables import RunEntry

_METADATA = "zarr.json"


def open_zarr(manifest: Manifest) -> zarr.Group:
    """Open a dataset with zarr, read-only: ``open_zarr(manifest)[f"{key}/bold"]`` is a zarr array.

    Raises
    ------
    ShardError
        If a shard is missing or cut; later, when what is asked for is damaged.
    """
    return zarr.open_group(ShardStore(manifest), mode="r")


def dataset_attributes(manifest: Manifest) -> dict[str, Any]:
    """Return what the root group says about a dataset."""
    grid = manifest.grid
    return {
        "content_hash": manifest.content_hash,
        "recipe": manifest.recipe.model_dump(mode="json"),
        "grid": {"name": grid.name, "shape": list(grid.shape), "affine": grid.affine.tolist()},
        "voxels": "the True voxels of mask, in the order of array[mask]",
    }


def run_attributes(run: RunEntry, tr: float) -> dict[str, Any]:
    """Return what a run's group says about it."""
    names = {"key", "subject", "session", "site", "task", "phenotype", "simulated", "tsnr_db"}
    about = run.model_dump(mode="json", include=names)
    return {**about, "tr": tr, "value": "scale[0] + bold * scale[1], float32; scale[1] == 0 marks no signal"}


class ShardStore(Store):
    """A read-only zarr store over a dataset's shards; metadata is made when it is asked for.

    Parameters
    ----------
    manifest
        The dataset.
    """

    supports_writes = False
    supports_deletes = False
    supports_listing = True

    def __init__(self, manifest: Manifest) -> None:
        super().__init__(read_only=True)
        self.manifest = manifest
        self._reader = ShardReader(manifest)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ShardStore) and other.manifest.content_hash == self.manifest.content_hash

    def __hash__(self) -> int:
        return hash(self.manifest.content_hash)

    async def get(
        self, key: str, prototype: BufferPrototype | None = None, byte_range: ByteRequest | None = None
    ) -> Buffer | None:
        """Return the bytes of a key, or None where there is none."""
        data = self._bytes(key)
        if data is None:
            return None
        prototype = prototype or default_buffer_prototype()
        return prototype.buffer.from_bytes(data[_slice(byte_range, len(data))])

    async def get_partial_values(
        self, prototype: BufferPrototype, key_ranges: Iterable[tuple[str, ByteRequest | None]]
    ) -> list[Buffer | None]:
        """Return parts of several keys."""
        return [await self.get(key, prototype, byte_range) for key, byte_range in key_ranges]

    async def exists(self, key: str) -> bool:
        """Return whether there is such a key."""
        return self._source(key) is not None

    async def list(self) -> AsyncIterator[str]:
        """Yield every key."""
        for name in ("", "mask", *(name for key in self._runs for name in (key, f"{key}/bold", f"{key}/scale"))):
            yield f"{name}/{_METADATA}".lstrip("/")
        yield "mask/c/0/0/0"
        for key, number in self._runs.items():
            for frame in range(int(self.manifest.index[number]["n_frames"])):
                yield f"{key}/bold/c/{frame}/0"
            yield f"{key}/scale/c/0/0"

    async def list_prefix(self, prefix: str) -> AsyncIterator[str]:
        """Yield every key that begins with a prefix."""
        async for key in self.list():
            if key.startswith(prefix):
                yield key

    async def list_dir(self, prefix: str) -> AsyncIterator[str]:
        """Yield the names directly below a prefix."""
        path = prefix.strip("/")
        if path == "":
            for name in (_METADATA, "mask", *self._runs):
                yield name
        elif path in self._runs:
            for name in (_METADATA, "bold", "scale"):
                yield name
        else:
            start = f"{path}/"
            for name in {key[len(start) :].split("/")[0]: None async for key in self.list_prefix(start)}:
                yield name

    async def set(self, key: str, value: Buffer) -> NoReturn:
        """Refuse: a dataset is not changed through zarr."""
        raise PermissionError(f"{self.manifest.folder}: a dataset is read-only; copy it with export_zarr to change it.")

    async def delete(self, key: str) -> NoReturn:
        """Refuse: a dataset is not changed through zarr."""
        raise PermissionError(f"{self.manifest.folder}: a dataset is read-only; copy it with export_zarr to change it.")

    @cached_property
    def _runs(self) -> dict[str, int]:
        return {run.key: number for number, run in enumerate(self.manifest.runs)}

    def _bytes(self, key: str) -> bytes | None:
        source = self._source(key)
        return None if source is None else source()

    def _source(self, key: str) -> Callable[[], bytes] | None:
        """Return what gives the bytes of a key, None for a key that is not there."""
        fixed: dict[str, Callable[[], bytes]] = {
            _METADATA: lambda: _group(dataset_attributes(self.manifest)),
            f"mask/{_METADATA}": lambda: _array(self.manifest.grid.shape, self.manifest.grid.shape, "bool"),
            "mask/c/0/0/0": lambda: self.manifest.brain_mask().tobytes(),
        }
        if key in fixed:
            return fixed[key]
        name, _, rest = key.partition("/")
        return self._run_source(self._runs[name], rest) if name in self._runs else None

    def _run_source(self, number: int, key: str) -> Callable[[], bytes] | None:
        n_frames, width = int(self.manifest.index[number]["n_frames"]), self.manifest.n_voxels
        fixed: dict[str, Callable[[], bytes]] = {
            _METADATA: lambda: _group(run_attributes(self.manifest.runs[number], self.manifest.recipe.tr)),
            f"bold/{_METADATA}": lambda: _array((n_frames, width), (1, width), self.manifest.dtype.name, _AXES),
            f"scale/{_METADATA}": lambda: _array((2, width), (2, width), "float32", (None, "voxel")),
            "scale/c/0/0": lambda: self._reader.scales(number).tobytes(),
        }
        if key in fixed:
            return fixed[key]
        parts = key.split("/")
        if len(parts) == 4 and parts[:2] == ["bold", "c"] and parts[3] == "0" and parts[2].isdecimal():
            frame = int(parts[2])
            if frame < n_frames:
                return lambda: self._reader.read(number, frame, 1).q.tobytes()
        return None


_AXES = ("time", "voxel")


def _group(attributes: dict[str, Any]) -> bytes:
    return json.dumps({"zarr_format": 3, "node_type": "group", "attributes": attributes}).encode()


def _array(
    shape: tuple[int, ...], chunk: tuple[int, ...], dtype: str, names: tuple[str | None, ...] | None = None
) -> bytes:
    about = {
        "zarr_format": 3,
        "node_type": "array",
        "shape": shape,
        "data_type": dtype,
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": chunk}},
        "chunk_key_encoding": {"name": "default", "configuration": {"separator": "/"}},
        "fill_value": False if dtype == "bool" else 0,
        "codecs": [{"name": "bytes", "configuration": {"endian": "little"}}],
        "attributes": {},
    }
    return json.dumps(about | ({"dimension_names": names} if names else {})).encode()


def _slice(byte_range: ByteRequest | None, n_bytes: int) -> slice:
    if isinstance(byte_range, RangeByteRequest):
        return slice(byte_range.start, byte_range.end)
    if isinstance(byte_range, OffsetByteRequest):
        return slice(byte_range.offset, None)
    if isinstance(byte_range, SuffixByteRequest):
        return slice(max(0, n_bytes - byte_range.suffix), None)
    return slice(None)
