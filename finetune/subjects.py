"""The rows of a study: who or what is classified, and what must stay together in the folds."""

from dataclasses import dataclass


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
        Scanner, None where unknown.
    runs
        Positions in ``manifest.runs``.
    part_of
        The person, where a row is not a whole person.
    starts
        First frames of the row's clips in its one run; empty for clips spread evenly over all of its runs.
    """

    name: str
    label: float
    site: str | None
    runs: tuple[int, ...]
    part_of: str | None = None
    starts: tuple[int, ...] = ()

    @property
    def person(self) -> str:
        """Whose brain it is."""
        return self.name if self.part_of is None else self.part_of


@dataclass(frozen=True)
class Cohort:
    """The rows that can be used, sorted by name, and how many cannot."""

    subjects: tuple[Subject, ...]
    n_unlabelled: int
    n_too_short: int
    n_duplicates: int
    simulated: bool
