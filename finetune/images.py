"""A table of 3D images as the rows of a study: CT, structural MRI, fractional anisotropy, mean diffusivity."""

import hashlib
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast, get_args

import nibabel as nib
import numpy as np
import numpy.typing as npt
import torch
from pydantic import Field
from torch import Tensor

from boldforge.configs import StrictModel, count_of
from boldforge.data_shards.dataset_files import why_refused
from boldforge.data_shards.nifti import SIMULATED_MARK
from boldforge.data_shards.phenotype import Phenotype, canonical, parse_value, read_table
from boldforge.finetune.errors import FinetuneError
from boldforge.finetune.same_scans import find_same_scans
from boldforge.finetune.subjects import Cohort, Subject, known_sites
from boldforge.finetune.tasks import Task
from boldforge.finetune.volumes import CubeRecipe, Kind, read_cube

logger = logging.getLogger(__name__)
_KNOWN = frozenset({"path", "subject", "site", "kind"})


class ImagesConfig(StrictModel):
    """Which images, and how they become cubes."""

    table: Path = Field(
        description="TSV or CSV with the columns path (relative to the table, inside its folder) and subject; site and "
        "kind if wanted, all others are phenotypes. Several images of a subject are averaged as clips are."
    )
    cube: CubeRecipe = Field(description="What the images hold and how they are placed; a column kind has precedence.")


@dataclass(frozen=True)
class Image:
    """One row of the table."""

    path: Path
    subject: str
    site: str | None
    kind: Kind
    phenotype: Phenotype
    sha256: str
    """Of the voxels and where they lie, however the file was written."""


class ImageTable:
    """The images of a table.

    Parameters
    ----------
    config
        The table and the cube.

    Raises
    ------
    FinetuneError
        If a column is missing, a file is not there or lies outside the table's folder, or a kind is unknown.
    """

    def __init__(self, config: ImagesConfig) -> None:
        self.config = config
        table = config.table
        if not table.is_file():
            raise FinetuneError(f"{table}: no such table of images; write one with the columns path and subject.")
        rows = read_table(table)
        missing = [name for name in ("path", "subject") if not rows or name not in rows[0]]
        if missing:
            columns = ", ".join(rows[0]) if rows else "none"
            raise FinetuneError(f"{table}: has no column {missing[0]!r}; its columns are {columns}.")
        self.images = [self._image(row, line) for line, row in enumerate(rows, start=2)]

    @property
    def content_hash(self) -> str:
        """Hash of all images' voxels, what they are read as, and phenotypes."""
        content = [
            (image.sha256, image.kind, image.subject, image.site, sorted(image.phenotype.items()))
            for image in self.images
        ]
        return hashlib.sha256(repr(content).encode()).hexdigest()

    @property
    def phenotypes(self) -> list[Phenotype]:
        """One per image."""
        return [image.phenotype for image in self.images]

    def find_cohort(self, task: Task) -> Cohort:
        """List the labelled subjects; ``runs`` of a subject are positions in ``images``.

        Raises
        ------
        FinetuneError
            If no subject has a label, or two rows of one subject disagree.
        """
        of_subject: dict[str, list[int]] = {}
        for position, image in enumerate(self.images):
            of_subject.setdefault(image.subject, []).append(position)
        same = find_same_scans(
            [image.subject for image in self.images],
            range(len(self.images)),
            [(image.sha256,) for image in self.images],
            [task.label(image.phenotype) is not None for image in self.images],
        )
        subjects, n_unlabelled = [], 0
        for name in sorted(of_subject.keys() - same.people):
            images = [self.images[position] for position in of_subject[name]]
            labels = {label for image in images if (label := task.label(image.phenotype)) is not None}
            if len(labels) > 1:
                raise FinetuneError(
                    f"{self.config.table}: subject {name} has different {task.name} labels in different rows; "
                    "correct it."
                )
            if labels:
                kept = tuple(position for position in of_subject[name] if position not in same.recordings)
                sites = known_sites(self.images[position].site for position in kept)
                subjects.append(Subject(name, labels.pop(), next(iter(sites), None), kept, sites=sites))
            else:
                n_unlabelled += 1
        if not subjects:
            raise FinetuneError(
                f"{self.config.table}: none of {len(of_subject)} subjects has a label for task {task.name!r} (column "
                f"{task.column}); fill the column in, or ask for another task."
            )
        n_several_sites = sum(len(subject.sites) > 1 for subject in subjects)
        if n_several_sites:
            logger.warning(
                "With images of several sites, of which the first counts: %s", count_of(n_several_sites, "subject")
            )
        simulated = any(self._is_simulated(position) for subject in subjects for position in subject.runs)
        counted = (n_unlabelled, 0, len(same.people), simulated, len(same.recordings), n_several_sites)
        return Cohort(tuple(subjects), *counted)

    def cubes(self, subjects: Sequence[Subject], most: int) -> Iterator[tuple[int, Tensor]]:
        """Yield each image's subject (position in `subjects`) and cube, float32 [1, 1, size, size, size]."""
        for number, subject in enumerate(subjects):
            for position in subject.runs[:most]:
                yield number, torch.from_numpy(self._cube(position))[None, None]

    def features(
        self, subjects: Sequence[Subject], kinds: Sequence[str], advance: Callable[[], None]
    ) -> dict[str, npt.NDArray[Any]]:
        """Return every subject's features for the baselines ``site``, ``demographics`` and ``volume``.

        ``volume``: the cube, averaged over 2×2×2 voxels and over the subject's images.

        Raises
        ------
        FinetuneError
            If another kind is asked for.
        """
        unknown = [kind for kind in kinds if kind not in {"site", "demographics", "volume"}]
        if unknown:
            raise FinetuneError(
                f"images have no {unknown[0]}, which a baseline needs; set baselines to some of site, demographics and "
                "volume."
            )
        found: dict[str, list[Any]] = {kind: [] for kind in kinds}
        for subject in subjects:
            phenotype = self.images[subject.runs[0]].phenotype
            age = phenotype.get("age")
            values = {
                "site": [subject.site or ""],
                "demographics": [
                    subject.site or "",
                    str(phenotype.get("sex") or ""),
                    age if isinstance(age, int | float) else np.nan,
                ],
            }
            for kind in kinds:
                if kind == "volume":
                    found[kind].append(np.mean([_coarse(self._cube(position)) for position in subject.runs], axis=0))
                else:
                    found[kind].append(values[kind])
            advance()
        return {kind: np.array(rows, None if kind == "volume" else object) for kind, rows in found.items()}

    def _image(self, row: dict[str, str], line: int) -> Image:
        table = self.config.table
        path, kind = table.parent / row["path"], row.get("kind") or self.config.cube.kind
        reason = why_refused(path, table.parent) if row["path"] else None
        if reason or not row["path"] or not path.is_file() or not row["subject"]:
            what = reason or "names no file that is there, or no subject"
            raise FinetuneError(f"{table}: line {line} ({row['path'] or 'no path'}): {what}; correct the line.")
        if kind not in get_args(Kind):
            raise FinetuneError(f"{table}: line {line} has kind {kind!r}, expected one of {', '.join(get_args(Kind))}.")
        site = row.get("site")
        return Image(
            path,
            row["subject"].removeprefix("sub-"),
            None if parse_value(site) is None else site,
            cast(Kind, kind),
            canonical(row, _KNOWN),
            _scan_hash(path),
        )

    def _cube(self, position: int) -> npt.NDArray[np.float32]:
        image = self.images[position]
        return read_cube(image.path, self.config.cube.model_copy(update={"kind": image.kind}))

    def _is_simulated(self, position: int) -> bool:
        header: Any = nib.load(self.images[position].path).header
        return "descrip" in header and header["descrip"].item() == SIMULATED_MARK


def _scan_hash(path: Path) -> str:
    """Return the hash of a volume's values in the order of RAS+, and of its affine to a thousandth of a millimetre.

    So a volume is known again when it was compressed, stored in another type, or turned. Of a file that cannot be read
    it is the bytes'; what is wrong with it is said where its cube is read.
    """
    try:
        image: Any = nib.as_closest_canonical(nib.load(path))
        values = np.asarray(image.dataobj, dtype="<f4").squeeze()
        where = np.round(np.asarray(image.affine, dtype="<f8"), 3)
    except Exception:  # nibabel lets through whatever its decoders raise
        with path.open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    # Adding zero makes one of the two zeros.
    content = (np.ascontiguousarray(values + 0).tobytes(), (where + 0).tobytes(), repr(values.shape).encode())
    return hashlib.sha256(b"".join(content)).hexdigest()


def _coarse(cube: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    even = cube[tuple(slice(size - size % 2) for size in cube.shape)]
    x, y, z = (size // 2 for size in even.shape)
    return even.reshape(x, 2, y, 2, z, 2).mean(axis=(1, 3, 5)).ravel()
