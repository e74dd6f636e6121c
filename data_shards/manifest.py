"""The manifest: what a folder of shards holds, where each run lies and how to check it: versioned JSON."""

import hashlib
import json
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import numpy.typing as npt
import xxhash
from pydantic import ConfigDict, PlainSerializer, PlainValidator, PrivateAttr

from boldforge.configs import StrictModel
from boldforge.data_shards.grid import Grid, mask_hash
from boldforge.data_shards.recipe import DataRecipe
from boldforge.data_shards.split_plan import SplitPlan
from boldforge.data_shards.tables import RunTable, ShardError, ShardTable, TableEntry, TableName, Tables

SCHEMA_VERSION: Literal[2] = 2
MANIFEST_FILE = "manifest.json"
MASK_FILE = "mask.npy"
REJECTED_FILE = "rejected.tsv"


def _grid_from_json(value: Any) -> Grid:
    if isinstance(value, Grid):
        return value
    try:
        affine = np.array(value["affine"], dtype=np.float64).reshape(4, 4)
        x, y, z = (int(size) for size in value["shape"])
        name = str(value["name"])
    except (KeyError, TypeError, OverflowError) as error:
        raise ValueError(f"a grid needs a name, a shape and an affine ({error})") from None
    affine.setflags(write=False)
    return Grid(name, (x, y, z), affine)


def _grid_to_json(grid: Grid) -> dict[str, Any]:
    return {"name": grid.name, "shape": list(grid.shape), "affine": grid.affine.tolist()}


GridField = Annotated[Grid, PlainValidator(_grid_from_json), PlainSerializer(_grid_to_json)]


class Manifest(StrictModel):
    """Everything about a folder of shards; build one with `load_manifest` or `build_shards`."""

    model_config = ConfigDict(extra="forbid", frozen=True, arbitrary_types_allowed=True)

    schema_version: Literal[2] = SCHEMA_VERSION
    recipe: DataRecipe
    grid: GridField
    mask_sha256: str
    n_voxels: int
    n_runs: int
    n_frames: int
    simulated: bool
    """Whether any run is of a simulated subject."""
    tables: dict[TableName, TableEntry]
    splits: SplitPlan | None = None
    """Which subjects are for training; see `store_splits`."""
    software: dict[str, str]
    software_xxh3: str
    """xxh3-64 (hex) of the versions, which the content hash leaves out."""
    content_hash: str = ""
    _folder: Path | None = PrivateAttr(default=None)
    _remote: Any = PrivateAttr(default=None)

    @property
    def folder(self) -> Path:
        """The folder that the manifest was loaded from or written to."""
        if self._folder is None:
            raise ShardError("This manifest was never saved, so it has no shards to read; load it with load_manifest.")
        return self._folder

    @property
    def place(self) -> str:
        """Where the dataset lies, as errors name it: the folder or the address."""
        return str(self.folder) if self._remote is None else str(self._remote.url)

    @property
    def remote(self) -> Any:
        """The `boldforge.data_shards.remote.RemoteShards` that the shards are read from; None where they are local."""
        return self._remote

    def read_from(self, remote: Any) -> "Manifest":
        """Return this manifest with its shards at an address."""
        placed = self.placed_in(self.folder)
        placed._remote = remote
        return placed

    @property
    def dtype(self) -> np.dtype[Any]:
        """The stored integers' little-endian type."""
        return np.dtype(self.recipe.dtype).newbyteorder("<")

    @cached_property
    def opened(self) -> Tables:
        """The tables, each opened and checked when it is first needed."""
        return Tables(self.folder, self.tables)

    @cached_property
    def runs(self) -> RunTable:
        """One `RunEntry` per run, each parsed when it is asked for."""
        return RunTable(self.opened)

    @cached_property
    def shards(self) -> ShardTable:
        """One `ShardEntry` per shard."""
        return ShardTable(self.opened)

    @property
    def index(self) -> npt.NDArray[Any]:
        """One row of `boldforge.data_shards.tables.INDEX_DTYPE` per run: lengths, places and hashes."""
        return self.opened.index

    @property
    def frame_bytes(self) -> int:
        """Bytes of one stored frame."""
        return self.n_voxels * self.dtype.itemsize

    def computed_hash(self) -> str:
        """Return the sha256 over everything but the software versions: equal data, equal hash.

        Tables count by their own hashes.
        """
        content = self.model_dump(mode="json", exclude={"content_hash", "software", "software_xxh3"})
        return hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()

    def placed_in(self, folder: Path) -> "Manifest":
        """Return this manifest as found in a folder."""
        placed = Manifest(**{name: getattr(self, name) for name in type(self).model_fields})
        placed._folder = folder
        return placed

    def brain_mask(self) -> npt.NDArray[np.bool_]:
        """Return the mask that the shards were made with, bool [X, Y, Z].

        Raises
        ------
        ShardError
            If the mask file is missing or is not the one that the manifest names.
        """
        path = self.folder / MASK_FILE
        try:
            mask = np.load(path, allow_pickle=False)
        except Exception as error:  # of a damaged header numpy lets through whatever Python's tokenizer raises
            raise ShardError(f"{path}: the brain mask cannot be read ({error}); build the shards again.") from None
        # numpy takes any byte for a bool: one that is neither 0 nor 1 is a flipped bit.
        whole = mask.dtype == np.bool_ and mask.view(np.uint8).max(initial=0) <= 1
        if not whole or mask.shape != self.grid.shape or mask_hash(mask) != self.mask_sha256:
            raise ShardError(f"{path}: is not the brain mask that these shards were made with; build the shards again.")
        return mask


def software_xxh3(versions: dict[str, str]) -> str:
    """Return the hash that a manifest carries of its software versions."""
    return xxhash.xxh3_64_hexdigest(json.dumps(versions, sort_keys=True).encode())


def load_manifest(path: str | Path) -> Manifest:
    """Load and check a manifest.

    Parameters
    ----------
    path
        The folder of shards, or its ``manifest.json``.

    Raises
    ------
    ShardError
        If there is none, it is not valid, was edited, or was written by a newer version.
    """
    path = Path(path)
    try:
        if not path.exists():
            raise ShardError(
                f"{path}: no such folder of shards; check the name, or build it: boldforge shard INPUT --out {path}"
            )
        path = path / MANIFEST_FILE if path.is_dir() else path
        if not path.exists():
            raise ShardError(
                f"{path}: no manifest here; build the shards with: boldforge shard INPUT --out {path.parent}"
            )
        data = path.read_bytes()
    except (OSError, ValueError) as error:  # ValueError: a zero byte in the name
        raise ShardError(
            f"{path}: the manifest cannot be read ({getattr(error, 'strerror', None) or error}); check that it is a "
            "file, and its permissions."
        ) from None
    manifest = parse_manifest(data, str(path), str(path.parent)).placed_in(path.parent)
    if len(manifest.runs) != manifest.n_runs:
        raise ShardError(
            f"{path}: names {manifest.n_runs} runs, its index {len(manifest.runs)}; build the shards again."
        )
    return manifest


def parse_manifest(data: bytes, name: str, folder: str) -> Manifest:
    """Return the manifest that these bytes are, checked by itself; its tables are not looked at.

    Parameters
    ----------
    data
        Of a ``manifest.json``.
    name, folder
        What an error calls the file and the dataset's folder.

    Raises
    ------
    ShardError
        If it is not valid, was edited, or was written by a newer version.
    """
    try:
        content = json.loads(data)
        version = content.get("schema_version") if isinstance(content, dict) else None
        if version != SCHEMA_VERSION:
            age = "an older" if isinstance(version, int) and version < SCHEMA_VERSION else "another"
            raise ShardError(
                f"{name}: was built by {age} release (schema version {version}, this one reads {SCHEMA_VERSION}); "
                f"build the shards again: boldforge shard INPUT --out {folder} --overwrite"
            )
        manifest = Manifest.model_validate(content)
    except (ValueError, RecursionError) as error:  # no JSON, JSON of something else, or nested beyond reason
        first = str(error).splitlines()[0]
        raise ShardError(f"{name}: is not a valid manifest ({first}); build the shards again.") from None
    if manifest.computed_hash() != manifest.content_hash or software_xxh3(manifest.software) != manifest.software_xxh3:
        raise ShardError(
            f"{name}: does not match its content hash, so it was changed or damaged; build the shards again."
        )
    return manifest
