"""The manifest: what a folder of shards holds, where each run lies and how to check it. Versioned JSON."""

import hashlib
import json
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import numpy.typing as npt
from pydantic import ConfigDict, Field, PlainSerializer, PlainValidator, PrivateAttr, ValidationError

from boldforge.configs import BoldForgeError, StrictModel
from boldforge.data_shards.grid import Grid, mask_hash
from boldforge.data_shards.normalise import Normalisation
from boldforge.data_shards.recipe import DataRecipe

SCHEMA_VERSION: Literal[1] = 1
MANIFEST_FILE = "manifest.json"
MASK_FILE = "mask.npy"
REJECTED_FILE = "rejected.tsv"


class ShardError(BoldForgeError):
    """A folder of shards is missing, incomplete or corrupt."""


def _grid_from_json(value: Any) -> Grid:
    if isinstance(value, Grid):
        return value
    affine = np.array(value["affine"], dtype=np.float64).reshape(4, 4)
    affine.setflags(write=False)
    x, y, z = (int(size) for size in value["shape"])
    return Grid(str(value["name"]), (x, y, z), affine)


def _grid_to_json(grid: Grid) -> dict[str, Any]:
    return {"name": grid.name, "shape": list(grid.shape), "affine": grid.affine.tolist()}


GridField = Annotated[Grid, PlainValidator(_grid_from_json), PlainSerializer(_grid_to_json)]


class ShardEntry(StrictModel):
    """One tar file; ``sha256`` is over the whole file."""

    file: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*\.tar$")
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
    normalisation: Normalisation
    coverage: float
    """Share of the grid's brain voxels that carry signal."""
    tsnr_db: float
    """Temporal SNR of the stored integers against the values before quantisation."""
    shard: int
    offset: int
    checksum: str
    """xxh3-64 (hex) of the run's integers, [T, V] in C order, little-endian."""
    scale_offset: int
    scale_checksum: str
    """xxh3-64 (hex) of the run's float32 [2, V]: means, then scales."""


class Manifest(StrictModel):
    """Everything about a folder of shards; build one with `load_manifest` or `build_shards`."""

    model_config = ConfigDict(extra="forbid", frozen=True, arbitrary_types_allowed=True)

    schema_version: Literal[1] = SCHEMA_VERSION
    recipe: DataRecipe
    grid: GridField
    mask_sha256: str
    n_voxels: int
    shards: tuple[ShardEntry, ...]
    runs: tuple[RunEntry, ...]
    software: dict[str, str]
    content_hash: str = ""
    _folder: Path | None = PrivateAttr(default=None)

    @property
    def folder(self) -> Path:
        """The folder that the manifest was loaded from or written to."""
        if self._folder is None:
            raise ShardError("This manifest was never saved, so it has no shards to read; load it with load_manifest.")
        return self._folder

    @property
    def dtype(self) -> np.dtype[Any]:
        """The stored integers' little-endian type."""
        return np.dtype(self.recipe.dtype).newbyteorder("<")

    @property
    def simulated(self) -> bool:
        """Whether any run is of a simulated subject."""
        return any(run.simulated for run in self.runs)

    def computed_hash(self) -> str:
        """Return the sha256 over everything but the software versions: equal data, equal hash."""
        content = self.model_dump(mode="json", exclude={"content_hash", "software"})
        return hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()

    def placed_in(self, folder: Path) -> "Manifest":
        """Return this manifest as found in a folder."""
        placed = self.model_copy()
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
        except (OSError, ValueError) as error:
            raise ShardError(f"{path}: the brain mask cannot be read ({error}); build the shards again.") from None
        if mask.dtype != np.bool_ or mask.shape != self.grid.shape or mask_hash(mask) != self.mask_sha256:
            raise ShardError(f"{path}: is not the brain mask that these shards were made with; build the shards again.")
        return mask


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
    path = path / MANIFEST_FILE if path.is_dir() else path
    if not path.is_file():
        raise ShardError(f"{path}: no manifest here; build the shards with: boldforge shard INPUT --out {path.parent}")
    try:
        content = json.loads(path.read_text())
        version = content.get("schema_version") if isinstance(content, dict) else None
        if version != SCHEMA_VERSION:
            raise ShardError(
                f"{path}: has schema version {version}, this release reads {SCHEMA_VERSION}; build it again."
            )
        manifest = Manifest.model_validate(content)
    except (ValidationError, json.JSONDecodeError, UnicodeDecodeError) as error:
        first = str(error).splitlines()[0]
        raise ShardError(f"{path}: is not a valid manifest ({first}); build the shards again.") from None
    if manifest.computed_hash() != manifest.content_hash:
        raise ShardError(
            f"{path}: does not match its content hash, so it was changed or damaged; build the shards again."
        )
    return manifest.placed_in(path.parent)
