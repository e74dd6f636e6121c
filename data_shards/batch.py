"""One rank's share of a step, and how its integers become values on the device.

Shape suffixes: B clips · T frames · V brain voxels · X, Y, Z the grid.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from boldforge.data_shards.buffers import BufferPool


class SkippedClip(NamedTuple):
    """A clip that was left out because its bytes are damaged."""

    dataset: int
    run: int
    start: int
    reason: str


class ClipScales:
    """Means and scales of a batch's clips, float32 [2, b, V]: each run's own until they are needed side by side.

    Parameters
    ----------
    parts
        The tensor, or per clip the read-only [2, V] of its run, None for a place without a clip.
    n_voxels, buffers
        V, and where the tensor's memory comes from; needed for parts.
    """

    def __init__(
        self,
        parts: "torch.Tensor | Sequence[npt.NDArray[np.float32] | None]",
        n_voxels: int = 0,
        buffers: BufferPool | None = None,
    ) -> None:
        self._parts = parts
        self._n_voxels = n_voxels
        self._buffers = buffers

    def __reduce__(self) -> tuple[Any, ...]:
        return ClipScales, (self.both(),)  # a tensor goes to another process through shared memory

    def both(self) -> torch.Tensor:
        """Return means and scales as one tensor, the same one each time."""
        if not isinstance(self._parts, torch.Tensor):
            shape = (2, len(self._parts), self._n_voxels)
            both = torch.empty(shape) if self._buffers is None else self._buffers.tensor(shape, "float32")
            rows = both.numpy()
            for place, part in enumerate(self._parts):
                rows[:, place] = 0 if part is None else part
            self._parts = both
        return self._parts


@dataclass(frozen=True)
class ClipBatch:
    """One rank's share of a step: q [b, T, V] integers, scale and mean [b, V] float32, the rest [b].

    The scales are copied into one tensor of the batch's own when they are first asked for.

    A place without a clip (padding, or a damaged clip under ``damage="skip"``) has ``valid`` False, run and start -1,
    and zeros for q, scale and mean: like every voxel of scale 0 it counts in no loss.
    """

    q: torch.Tensor
    scales: "ClipScales"
    run: torch.Tensor
    start: torch.Tensor
    dataset: torch.Tensor
    """Which source of a mixture; 0 where there is one dataset."""
    valid: torch.Tensor
    step: int
    until: int
    """Samples of the stream up to the end of this step, over all ranks."""
    skipped: tuple[SkippedClip, ...] = ()

    @property
    def scale(self) -> torch.Tensor:
        """float32 [b, V]."""
        return self.scales.both()[1]

    @property
    def mean(self) -> torch.Tensor:
        """float32 [b, V]."""
        return self.scales.both()[0]

    def __len__(self) -> int:
        return len(self.q)

    def dequantise(self, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """Return values_BTV, ``mean + q · scale``: integers travel to the device, the arithmetic is float32 there."""
        there = self.to(device)
        return torch.addcmul(there.mean[:, None], there.q.float(), there.scale[:, None]).to(dtype)

    def dense(
        self, mask: npt.NDArray[np.bool_], device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
    ) -> torch.Tensor:
        """Return values_BTXYZ, zero outside the brain: dequantised and scattered on the device.

        Parameters
        ----------
        mask
            `Manifest.brain_mask`, bool [X, Y, Z] with V True.
        """
        values_BTV = self.dequantise(device, dtype)
        cube_BTC = values_BTV.new_zeros(*values_BTV.shape[:2], mask.size)
        where_V = torch.from_numpy(np.flatnonzero(mask)).to(device, non_blocking=True)
        return cube_BTC.index_copy_(2, where_V, values_BTV).view(*values_BTV.shape[:2], *mask.shape)

    def signal(self) -> torch.Tensor:
        """Return bool [b, V]: which voxels carry signal in their run; the others never count in a loss."""
        return self.scale > 0

    def to(self, device: torch.device | str) -> "ClipBatch":
        """Return the batch with q, scale and mean on a device, copied while the host goes on where they are pinned."""
        q, both = (part.to(device, non_blocking=True) for part in (self.q, self.scales.both()))
        return replace(self, q=q, scales=ClipScales(both))

    def pin_memory(self) -> "ClipBatch":
        """Return the batch in pinned memory; what `torch.utils.data.DataLoader` calls with ``pin_memory=True``."""
        return replace(self, q=self.q.pin_memory(), scales=ClipScales(self.scales.both().pin_memory()))
