"""One run, what was left out and why, and the list of both that a layout gives."""

import math
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from boldforge.data_shards.dataset_files import links_to_folders
from boldforge.data_shards.phenotype import LayoutError, Phenotype


@dataclass(frozen=True)
class Run:
    """One 4D recording of one subject in one session.

    ``tr`` is in seconds, None where the file's own header is to be asked. ``phenotype`` uses the canonical names
    ``diagnosis`` (0 control, 1 ADHD), ``dx`` (the table's own code), ``age`` (years) and ``sex`` ("F", "M") where they
    are known.
    """

    subject: str
    session: str | None
    site: str | None
    tr: float | None
    path: Path
    mask_path: Path | None = None
    phenotype: Phenotype = field(default_factory=dict)
    task: str | None = None
    number: str | None = None
    simulated: bool = False
    confounds_path: Path | None = None

    def __post_init__(self) -> None:
        # A manifest is JSON, which has no infinity and no NaN: what is not finite is not known.
        known = {name: _finite(value) for name, value in self.phenotype.items()}
        object.__setattr__(self, "phenotype", known)

    @property
    def key(self) -> str:
        """The run's name inside a dataset; without dots, because WebDataset splits names at the first one."""
        entities = (("sub", self.subject), ("ses", self.session), ("task", self.task), ("run", self.number))
        return "_".join(f"{name}-{re.sub('[^A-Za-z0-9]+', '', value)}" for name, value in entities if value)


def _finite(value: float | str | None) -> float | str | None:
    if isinstance(value, str) or value is None:
        return value
    try:
        return float(value) if math.isfinite(value) else None
    except TypeError:
        raise LayoutError(f"A phenotype is {value!r}, expected a number, a text or None.") from None


class Skipped(NamedTuple):
    """A file that was left out, and why (with the mend where there is one)."""

    path: Path
    reason: str


@dataclass(frozen=True)
class RunList:
    """What `find_runs` found: runs sorted by key, what was skipped, the layout that was read, and what else to know."""

    runs: tuple[Run, ...]
    skipped: tuple[Skipped, ...]
    layout: str
    notes: tuple[str, ...] = ()


def links_not_entered(folder: Path) -> list[Skipped]:
    """Return the links to folders outside a folder, which no layout follows."""
    reason = "is a link to a folder outside the dataset, which is not entered; give that folder itself."
    return [Skipped(path, reason) for path in links_to_folders(folder)]
