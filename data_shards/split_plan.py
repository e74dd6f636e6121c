"""Subject-level splits: which people are for training and which are kept for validation and test."""

from typing import Annotated

import numpy as np
import numpy.typing as npt
from pydantic import Field, model_validator

from boldforge.configs import StrictModel
from boldforge.data_shards.tables import name_hash

TRAIN = "train"
SplitName = Annotated[str, Field(pattern=r"^[a-z][a-z0-9_-]*$")]


class SplitPlan(StrictModel):
    """A rule that puts every subject into one split, whatever other subjects there are.

    A subject's split follows from the label and the seed alone. So a subject has one split in all sessions and runs,
    and keeps it when others are added to the dataset.
    """

    fractions: dict[SplitName, Annotated[float, Field(gt=0, lt=1)]] = Field(default={"validation": 0.1, "test": 0.1})
    """Expected share of the subjects in each split; the rest is ``train``."""
    seed: int = Field(default=0, ge=0)
    """Chooses the subjects."""
    fixed: dict[SplitName, tuple[str, ...]] = Field(default={})
    """Subjects whose split is given, such as a published test set."""

    @model_validator(mode="after")
    def _disjoint(self) -> "SplitPlan":
        if sum(self.fractions.values()) >= 1:
            raise ValueError("the fractions leave nothing to train on; their sum must be below 1")
        if TRAIN in self.fractions:
            raise ValueError("train is what the other splits leave; give it no fraction")
        labels = [label for group in self.fixed.values() for label in group]
        if repeated := sorted({label for label in labels if labels.count(label) > 1}):
            raise ValueError(f"subject {repeated[0]} is in more than one fixed split")
        return self

    @property
    def names(self) -> tuple[str, ...]:
        """The splits, ``train`` first."""
        return (TRAIN, *sorted({*self.fractions, *self.fixed} - {TRAIN}))

    def assign(self, subjects: npt.NDArray[np.uint64]) -> npt.NDArray[np.int64]:
        """Return the place in `names` of each subject's split.

        Parameters
        ----------
        subjects
            Hashes of the labels, as in `Manifest.index`.
        """
        drawn = drawn_numbers(subjects, self.seed)
        split = np.zeros(len(subjects), dtype=np.int64)
        below = 0.0
        for name, fraction in sorted(self.fractions.items()):
            split[(drawn >= below) & (drawn < below + fraction)] = self.names.index(name)
            below += fraction
        for name, labels in self.fixed.items():
            given = np.array([name_hash(label) for label in labels], dtype=np.uint64)
            split[np.isin(subjects, given)] = self.names.index(name)
        return split


def drawn_numbers(subjects: npt.NDArray[np.uint64], seed: int) -> npt.NDArray[np.float64]:
    """Return a number in [0, 1] per subject that follows from the hash of its label and the seed alone."""
    drawn: npt.NDArray[np.float64] = _scatter(subjects ^ np.uint64(name_hash(str(seed)))) / 2.0**64
    return drawn


def _scatter(values: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """Return splitmix64's finaliser of each value (Steele, Lea and Flood 2014): close values land far apart."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))
