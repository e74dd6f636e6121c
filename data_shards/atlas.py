"""Atlases: integer label volumes with names, and the same labels on a grid."""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from boldforge.configs import BoldForgeError
from boldforge.data_shards.grid import Affine, Grid, mask_centres
from boldforge.data_shards.nifti import HeaderError, read_volume

_FOLDER = Path(__file__).parent / "atlas"
_PACKAGED = {"aal3": (_FOLDER / "AAL3v1_1mm.nii.gz", _FOLDER / "AAL3v1_labels.txt", _FOLDER / "AAL3v1_groups.txt")}


class AtlasError(BoldForgeError):
    """An atlas volume or its label table cannot be used."""


@dataclass(frozen=True, eq=False)
class Atlas:
    """A label volume, int32 [X, Y, Z], its affine [4, 4] to RAS+ mm, and the names of the ids that occur in it.

    ``groups`` is the table of groups of regions that the atlas came with; see `load_groups`.
    """

    name: str
    volume: npt.NDArray[np.int32]
    affine: Affine
    labels: dict[int, str]
    sha256: str
    groups: Path | None = None

    def ids(self, names: list[str]) -> list[int]:
        """Return the ids of the named regions, in the order given.

        Raises
        ------
        AtlasError
            For a name that the atlas does not have.
        """
        known = {name: number for number, name in self.labels.items()}
        missing = [name for name in names if name not in known]
        if missing:
            raise AtlasError(
                f"Atlas {self.name} has no region named {', '.join(missing)}; "
                f"its names look like {', '.join(list(known)[:3])}."
            )
        return [known[name] for name in names]


def load_atlas(name_or_path: str | Path = "aal3", labels: str | Path | None = None) -> Atlas:
    """Load a packaged atlas by name, or any NIfTI label volume with its table.

    Parameters
    ----------
    name_or_path
        ``aal3``, or the path of a 3D NIfTI file of whole numbers (0 is background).
    labels
        A text file with one ``id name`` pair per line (spaces, tab or comma between); a name is one word, and what
        follows it is not read. Without a table, regions are named by their number.

    Raises
    ------
    AtlasError
        If a file is missing or unreadable, the volume is not 3D whole numbers or holds no region, or a line of the
        table is malformed, or the table does not name a region that is there.
    """
    table = Path(labels) if labels is not None else None
    groups = None
    if str(name_or_path) in _PACKAGED:
        name = str(name_or_path)
        path, packaged_table, groups = _PACKAGED[name]
        table = table or packaged_table
    else:
        path = Path(name_or_path)
        name = path.name.removesuffix(".gz").removesuffix(".nii")
        if not path.is_file():
            raise AtlasError(
                f"{path}: no such atlas; give a NIfTI label volume, or one of: {', '.join(sorted(_PACKAGED))}."
            )
    volume, affine = _read_volume(path)
    names = _read_table(table) if table is not None else {}
    # AAL3 keeps the ids of regions that it replaced (35, 36, 81, 82): nothing may ever sample an id without voxels.
    present = [int(number) for number in np.unique(volume) if number != 0]
    if not present:
        raise AtlasError(f"{path}: every voxel is 0, so there is no region; expected a volume of region numbers.")
    nameless = [number for number in present if number not in names]
    if table is not None and nameless:
        some = ", ".join(str(number) for number in nameless[:3]) + (", …" if len(nameless) > 3 else "")
        raise AtlasError(
            f"{table}: names none of the regions {some} of atlas {name} ({len(nameless)} of {len(present)}); give the "
            "whole table of this atlas, or the atlas that the table belongs to."
        )
    return Atlas(
        name=name,
        volume=volume,
        affine=affine,
        labels={number: names.get(number, str(number)) for number in present},
        sha256=hashlib.sha256(path.read_bytes()).hexdigest(),
        groups=groups,
    )


def load_groups(atlas: Atlas, table: str | Path | None = None) -> dict[str, tuple[int, ...]]:
    """Read groups of regions: lobes, limbic, cerebellum and so on.

    Parameters
    ----------
    table
        A text file with one ``region group`` pair of names per line (spaces, tab or comma between). A region may be in
        several groups, or in none. None: the table that the atlas came with.

    Returns
    -------
    dict
        Ids of the regions of each group, in the table's order.

    Raises
    ------
    AtlasError
        If the atlas has no table of its own and none is given, the file is missing, a line is malformed, or a region
        does not exist.
    """
    path = Path(table) if table is not None else atlas.groups
    if path is None:
        raise AtlasError(
            f"Atlas {atlas.name} comes without groups of regions; set mask.groups to a text file with one "
            "'region group' pair per line."
        )
    known = {name: number for number, name in atlas.labels.items()}
    groups: dict[str, list[int]] = {}
    for line, region, group in _read_pairs(path, "region group"):
        if region not in known:
            raise AtlasError(
                f"{path}: line {line} names region {region}, which atlas {atlas.name} does not have; "
                f"its names look like {', '.join(list(known)[:3])}."
            )
        if known[region] not in groups.setdefault(group, []):
            groups[group].append(known[region])
    if not groups:
        raise AtlasError(f"{path}: no group in it; expected one 'region group' pair per line.")
    return {name: tuple(ids) for name, ids in groups.items()}


def atlas_on_grid(atlas: Atlas, grid: Grid) -> npt.NDArray[np.int16]:
    """Return the atlas' labels at the grid's voxel centres (nearest atlas voxel, through the affines).

    Returns
    -------
    int16 [X, Y, Z], 0 where the atlas has no label or does not reach. A centre exactly between two atlas voxels takes
    the one with the higher index.
    """
    centres = mask_centres(grid, np.ones(grid.shape, dtype=bool))
    to_atlas = np.linalg.inv(atlas.affine)
    voxel = np.floor(np.round(centres @ to_atlas[:3, :3].T + to_atlas[:3, 3], 6) + 0.5).astype(np.int64)
    inside = ((voxel >= 0) & (voxel < np.array(atlas.volume.shape))).all(axis=1)
    values = np.zeros(len(centres), dtype=np.int16)
    values[inside] = atlas.volume[tuple(voxel[inside].T)]
    return values.reshape(grid.shape)


def _read_volume(path: Path) -> tuple[npt.NDArray[np.int32], Affine]:
    try:
        data, affine = read_volume(path)
    except HeaderError as error:
        raise AtlasError(str(error)) from None
    volume = np.rint(data).astype(np.int32)
    # int8 would wrap above 127 (AAL3 goes to 170); int16 is what the grid's labels are kept in.
    if not np.array_equal(volume, data) or volume.min() < 0 or volume.max() > np.iinfo(np.int16).max:
        raise AtlasError(f"{path}: labels must be whole numbers from 0 to 32767, found {data.min()} to {data.max()}.")
    return volume, affine


def _read_table(path: Path) -> dict[int, str]:
    names: dict[int, str] = {}
    for line, number, name in _read_pairs(path, "id name"):
        if not number.isdigit():
            raise AtlasError(f"{path}: line {line} begins with {number!r}, expected 'id name'.")
        if name in names.values() and names.get(int(number)) != name:
            raise AtlasError(
                f"{path}: line {line} gives a second region the name {name}; names are one word each and unlike, as "
                "Left_Thalamus is."
            )
        names[int(number)] = name
    return names


def _read_pairs(path: Path, expected: str) -> Iterator[tuple[int, str, str]]:
    """Yield number, first and second word of each line that is neither empty nor a comment."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError):
        raise AtlasError(f"{path}: no such table; give a text file with one '{expected}' pair per line.") from None
    for number, line in enumerate(lines, start=1):
        words = line.replace(",", " ").split()
        if not words or line.startswith("#"):
            continue
        if len(words) < 2:
            raise AtlasError(f"{path}: line {number} is {line!r}, expected '{expected}'.")
        yield number, words[0], words[1]
