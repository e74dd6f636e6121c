"""Mixtures of datasets: which dataset each sample comes from, computed per sample like the order itself."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from boldforge.data_shards.manifest import Manifest
from boldforge.data_shards.permutation import mix, permute
from boldforge.data_shards.splits import Segment
from boldforge.data_shards.tables import ShardError

_BLOCK = 1024


@dataclass(frozen=True)
class Source:
    """One dataset of a mixture."""

    manifest: Manifest
    segments: Sequence[Segment] | None = None
    """Frames to draw from; all by default."""
    weight: float | None = None
    """Share of the samples, relative to the other sources'; by default its share of the clips."""


class Mixture:
    """Deals samples to datasets: every block of 1024 samples holds each dataset's exact share, in a random order.

    Parameters
    ----------
    weights
        One per dataset; their sum is free. A share is rounded to 1/1024 and is never less than that.
    key
        Chooses the order within the blocks.

    Raises
    ------
    ShardError
        If a weight is not positive and finite.
    """

    def __init__(self, weights: Sequence[float], key: int) -> None:
        shares = np.array(weights, dtype=np.float64)
        if not (np.isfinite(shares).all() and (shares > 0).all() and 0 < len(shares) <= _BLOCK):
            raise ShardError(f"The weights of a mixture must be positive numbers, got {list(weights)}.")
        exact = shares / shares.sum() * _BLOCK
        counts = np.maximum(1, np.floor(exact)).astype(np.int64)
        # The largest remainders get what rounding down left over; the largest share gives what raising to 1 took.
        for index in np.argsort(counts - exact, kind="stable")[: max(0, _BLOCK - int(counts.sum()))]:
            counts[index] += 1
        while (excess := int(counts.sum()) - _BLOCK) > 0:
            largest = int(counts.argmax())
            counts[largest] -= min(excess, int(counts[largest]) - 1)
        self.counts = tuple(int(count) for count in counts)
        self._ends = np.cumsum(counts)
        self._key = key

    def place(self, sample: int) -> tuple[int, int]:
        """Return (dataset, the dataset's own sample number) of a sample of the mixture."""
        block, within = divmod(sample, _BLOCK)
        slot = permute(within, _BLOCK, mix(self._key, block))
        dataset = int(np.searchsorted(self._ends, slot, side="right"))
        first = int(self._ends[dataset - 1]) if dataset else 0
        return dataset, block * self.counts[dataset] + slot - first


def check_alike(manifests: Sequence[Manifest]) -> None:
    """Refuse datasets whose clips cannot stand in one batch.

    Raises
    ------
    ShardError
        Naming what differs: grid, brain mask or a key of the recipe.
    """
    first = manifests[0]
    for other in manifests[1:]:
        mine, theirs = _traits(first), _traits(other)
        for name in mine:
            if mine[name] != theirs[name]:
                raise ShardError(
                    f"{first.place} and {other.place} cannot be mixed: their {name} is {_shown(mine[name])} and "
                    f"{_shown(theirs[name])}; build both with one recipe."
                )


def _traits(manifest: Manifest) -> dict[str, Any]:
    """Return all that values depend on but the source files: a key that recipes gain later is compared, too."""
    recipe = manifest.recipe
    named = {name: getattr(recipe, name) for name in type(recipe).model_fields}
    return {**named, "grid": manifest.grid.name, "brain mask": manifest.mask_sha256[:8]}


def _shown(value: Any) -> str:
    if value is None or value == ():
        return "none"
    return ", ".join(value) if isinstance(value, tuple) else str(value)
