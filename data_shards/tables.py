"""The manifest's tables: one row per shard and per run, in files that open at once however many runs there are.

Three files beside ``manifest.json``, each named after its own hash, so that a new one never takes the place of an old
one that a manifest still names: ``shards-….npy`` and ``index-….npy`` (fixed-size rows, memory-mapped) say where
everything lies; ``runs-….jsonl`` holds one run per line, and a line is parsed when its run is asked for.
"""

import hashlib
import io
import mmap
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, TypeVar, overload

import numpy as np
import numpy.typing as npt
import xxhash
from pydantic import Field, ValidationError

from boldforge.configs import BoldForgeError, StrictModel
from boldforge.configs.durable import write_atomic
from boldforge.data_shards.normalise import Normalisation

SHARD_DTYPE = np.dtype([("number", "<u4"), ("n_bytes", "<u8"), ("sha256", "u1", (32,))])
# subject and site are xxh3-64 of their names (0 where there is none): splits need no text. The others are RunEntry's.
INDEX_DTYPE = np.dtype(
    [
        ("n_frames", "<u4"),
        ("shard", "<u4"),
        ("offset", "<u8"),
        ("scale_offset", "<u8"),
        ("scale_xxh3", "<u8"),
        ("hashes_offset", "<u8"),
        ("hashes_xxh3", "<u8"),
        ("subject", "<u8"),
        ("site", "<u8"),
        ("line", "<u8"),
    ]
)

TableName = Literal["shards", "index", "runs"]
Row = TypeVar("Row")


class ShardError(BoldForgeError):
    """A folder of shards is missing, incomplete or corrupt."""


class TableEntry(StrictModel):
    """One table; ``sha256`` is over the whole file and is checked when it is opened."""

    file: str = Field(pattern=r"^(shards|index|runs)-[0-9a-f]{16}\.(npy|jsonl)$")
    n_bytes: int
    sha256: str


class ShardEntry(StrictModel):
    """One tar file; ``sha256`` is over the whole file."""

    file: str = Field(pattern=r"^shard-[0-9]{6}\.tar$")
    n_bytes: int
    sha256: str


class RunEntry(StrictModel):
    """One stored run. Offsets are bytes from the start of its shard to the first value, past tar and npy headers."""

    key: str
    subject: str
    session: str | None
    site: str | None
    task: str | None
    phenotype: dict[str, float | str | None]
    simulated: bool
    n_frames: int = Field(gt=0)
    source_file: str
    source_sha256: str
    source_tr: float
    source_frames: int
    """Frames of the whole source file."""
    source_start: int = 0
    """Source frame at which this run starts: 0, but for a later stretch of a scrubbed run."""
    normalisation: Normalisation
    coverage: float
    """Share of the grid's brain voxels that carry signal."""
    tsnr_db: float
    """Temporal SNR of the stored integers against the values before quantisation."""
    shard: int
    offset: int
    """Frames follow one another: frame t starts at ``offset + t · V · itemsize``."""
    scale_offset: int
    scale_xxh3: str
    """xxh3-64 (hex) of the run's float32 [2, V]: means, then scales."""
    hashes_offset: int
    hashes_xxh3: str
    """xxh3-64 (hex) of the run's frame hashes, uint64 [T]: xxh3-64 of each frame's integers."""


def name_hash(name: str | None) -> int:
    """Return the 64-bit hash by which the index knows a subject or a site; 0 for None."""
    return 0 if name is None else xxhash.xxh3_64_intdigest(name.encode())


def frame_hashes(q: npt.NDArray[Any]) -> npt.NDArray[np.uint64]:
    """Return the xxh3-64 of each frame of contiguous q [T, V], uint64 [T]."""
    frames = (xxhash.xxh3_64_intdigest(frame.data) for frame in q)
    return np.fromiter(frames, dtype="<u8", count=len(q))


def write_tables(folder: Path, runs: Sequence[RunEntry], shards: Sequence[ShardEntry]) -> dict[TableName, TableEntry]:
    """Write the three tables of a dataset into a folder, each on disk before its name is returned."""
    lines = [run.model_dump_json().encode() + b"\n" for run in runs]
    starts = np.cumsum([0, *map(len, lines)])[:-1]
    index = np.zeros(len(runs), dtype=INDEX_DTYPE)
    for row, run, start in zip(index, runs, starts, strict=True):
        for name in ("n_frames", "shard", "offset", "scale_offset", "hashes_offset"):
            row[name] = getattr(run, name)
        row["scale_xxh3"], row["hashes_xxh3"] = int(run.scale_xxh3, 16), int(run.hashes_xxh3, 16)
        row["subject"], row["site"], row["line"] = name_hash(run.subject), name_hash(run.site), start
    table = np.zeros(len(shards), dtype=SHARD_DTYPE)
    for row, shard in zip(table, shards, strict=True):
        row["number"], row["n_bytes"] = int(shard.file[6:12]), shard.n_bytes
        row["sha256"] = np.frombuffer(bytes.fromhex(shard.sha256), dtype=np.uint8)
    return {
        "shards": _write(folder, "shards", "npy", npy_bytes(table)),
        "index": _write(folder, "index", "npy", npy_bytes(index)),
        "runs": _write(folder, "runs", "jsonl", b"".join(lines)),
    }


def npy_bytes(array: npt.NDArray[Any]) -> bytes:
    """Return an array as the bytes of an npy file."""
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


def _write(folder: Path, name: str, ending: str, data: bytes) -> TableEntry:
    sha256 = hashlib.sha256(data).hexdigest()
    file = f"{name}-{sha256[:16]}.{ending}"
    write_atomic(folder / file, data)
    return TableEntry(file=file, n_bytes=len(data), sha256=sha256)


class Tables:
    """The tables of a dataset in a folder, each checked when it is first needed; pickles as their names.

    All are opened at once: whoever reads a dataset keeps what it has opened when runs are appended to it meanwhile.
    """

    def __init__(self, folder: Path, entries: dict[TableName, TableEntry]) -> None:
        self.folder = folder
        self.entries = entries
        self._maps = {name: self._map(name) for name in entries}

    def __reduce__(self) -> tuple[type["Tables"], tuple[Path, dict[TableName, TableEntry]]]:
        return Tables, (self.folder, self.entries)

    @cached_property
    def index(self) -> npt.NDArray[Any]:
        """One row of `INDEX_DTYPE` per run."""
        return self._rows("index", INDEX_DTYPE)

    @cached_property
    def shards(self) -> npt.NDArray[Any]:
        """One row of `SHARD_DTYPE` per shard."""
        return self._rows("shards", SHARD_DTYPE)

    @cached_property
    def lines(self) -> mmap.mmap:
        """The text of ``runs-….jsonl``."""
        return self.check("runs")

    def check(self, name: TableName) -> mmap.mmap:
        """Return the bytes of a table; raise `ShardError` if it is not the one that the manifest names."""
        entry, data = self.entries[name], self._maps[name]
        if len(data) != entry.n_bytes or hashlib.sha256(data).hexdigest() != entry.sha256:
            raise ShardError(
                f"{self.folder / entry.file}: the dataset's table does not match the hash in its manifest, so it was "
                "changed or damaged; copy it again or build the shards again."
            )
        return data

    def line(self, run: int) -> bytes:
        """Return the JSON of one run."""
        end = int(self.index["line"][run + 1]) if run + 1 < len(self.index) else len(self.lines)
        return self.lines[int(self.index["line"][run]) : end]

    def _rows(self, name: TableName, dtype: np.dtype[Any]) -> npt.NDArray[Any]:
        path, data = self.folder / self.entries[name].file, self.check(name)
        header = io.BytesIO(data[:4096])
        try:
            version = np.lib.format.read_magic(header)  # type: ignore[no-untyped-call]
            if version != (1, 0):
                raise ValueError(f"npy version {version}")
            shape, _, found = np.lib.format.read_array_header_1_0(header)  # type: ignore[no-untyped-call]
            if found != dtype or len(shape) != 1:
                raise ValueError(f"rows of {found}")
        except ValueError as error:
            raise ShardError(f"{path}: is not a table of this release ({error}); build the shards again.") from None
        return np.frombuffer(data, dtype=dtype, count=shape[0], offset=header.tell())

    def _map(self, name: TableName) -> mmap.mmap:
        path = self.folder / self.entries[name].file
        try:
            with path.open("rb") as file:
                return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except (OSError, ValueError) as error:
            found = "is missing" if isinstance(error, FileNotFoundError) else f"cannot be read ({error})"
            raise ShardError(f"{path}: the dataset's table {found}; copy it again or build the shards again.") from None


class _Rows(Sequence[Row]):
    """A sequence whose elements are made when they are asked for."""

    def __init__(self, tables: Tables) -> None:
        self.tables = tables

    def _row(self, number: int) -> Row:
        raise NotImplementedError

    @overload
    def __getitem__(self, number: int) -> Row: ...
    @overload
    def __getitem__(self, number: slice) -> tuple[Row, ...]: ...
    def __getitem__(self, number: int | slice) -> Row | tuple[Row, ...]:
        if isinstance(number, slice):
            return tuple(self._row(i) for i in range(*number.indices(len(self))))
        if not -len(self) <= number < len(self):
            raise IndexError(number)
        return self._row(number % len(self))

    def __iter__(self) -> Iterator[Row]:
        return (self._row(i) for i in range(len(self)))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and len(self) == len(other) and all(map(_equal, self, other))

    __hash__ = None  # type: ignore[assignment]


def _equal(one: object, other: object) -> bool:
    return one == other


class RunTable(_Rows[RunEntry]):
    """All runs of a dataset, in its order; a sequence of `RunEntry`."""

    def __len__(self) -> int:
        return len(self.tables.index)

    def _row(self, number: int) -> RunEntry:
        try:
            return RunEntry.model_validate_json(self.tables.line(number))
        except ValidationError as error:
            path = self.tables.folder / self.tables.entries["runs"].file
            first = str(error).splitlines()[0]
            raise ShardError(f"{path}: line {number + 1} is not a run ({first}); build the shards again.") from None


class ShardTable(_Rows[ShardEntry]):
    """All shards of a dataset; a sequence of `ShardEntry`."""

    def __len__(self) -> int:
        return len(self.tables.shards)

    def _row(self, number: int) -> ShardEntry:
        row = self.tables.shards[number]
        sha256 = row["sha256"].tobytes().hex()
        return ShardEntry(file=f"shard-{int(row['number']):06d}.tar", n_bytes=int(row["n_bytes"]), sha256=sha256)
