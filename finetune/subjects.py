"""The rows of a study: who or what is classified, and what must stay together in the folds."""

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass, fields


@dataclass(frozen=True)
class Subject:
    """One row: a labelled subject, or a part of one, such as a block of a task.

    Attributes
    ----------
    name
        Of the row; unique.
    label
        Its label; a whole number for classes.
    site
        Scanner, None where unknown; the first run's where there are several.
    runs
        Positions in ``manifest.runs``.
    part_of
        The person, where a row is not a whole person.
    starts
        First frames of the row's clips in its one run; empty for clips spread evenly over all of its runs.
    sites
        All scanners that are known, where a row has several runs.
    """

    name: str
    label: float
    site: str | None
    runs: tuple[int, ...]
    part_of: str | None = None
    starts: tuple[int, ...] = ()
    sites: tuple[str, ...] = ()

    @property
    def person(self) -> str:
        """Whose brain it is."""
        return self.name if self.part_of is None else self.part_of


@dataclass(frozen=True)
class Cohort:
    """The rows that can be used, sorted by name, and how many cannot.

    Attributes
    ----------
    subjects
        The rows.
    n_unlabelled, n_too_short
        Subjects (for tasks of parts of subjects: runs) without a label, and with short runs only.
    n_duplicates, n_repeated
        Subjects who share a scan with another one, and recordings whose scan the same subject has twice.
    simulated
        Whether any run is.
    n_several_sites
        Subjects who were scanned at several sites and count for the first.
    """

    subjects: tuple[Subject, ...]
    n_unlabelled: int
    n_too_short: int
    n_duplicates: int
    simulated: bool
    n_repeated: int = 0
    n_several_sites: int = 0


def known_sites(sites: Iterable[str | None]) -> tuple[str, ...]:
    """Return the sites that are known, each once, in their order."""
    return tuple(dict.fromkeys(site for site in sites if site is not None))


def rows_hash(rows: Iterable[Subject]) -> str:
    """Return the sha256 of all that rows say; what is at its default counts for nothing.

    A field that `Subject` gets later so leaves the hashes of older rows as they were.
    """
    said = []
    for row in rows:
        values = [(field.name, getattr(row, field.name), field.default) for field in fields(row)]
        said.append({name: value for name, value, default in values if value != default})
    return hashlib.sha256(json.dumps(said, sort_keys=True, default=float).encode()).hexdigest()
