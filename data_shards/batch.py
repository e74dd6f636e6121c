"""One rank's share of a step, and how its integers become values on the device.

Shape suffixes: B clips · T frames · V brain voxels · X, Y, Z the grid.
"""

from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch


class SkippedClip(NamedTuple):
    """A clip that was left out because its bytes are damaged."""

    dataset: int
    run: int
    start: int
    reason: str


@dataclass(frozen=True)
class ClipBatch:
    """One rank's share of a step: q [b, T, V] integers, scale and mean [b, V] float32, the rest [b].

    A place without a clip (padding, or a damaged clip under ``damage="skip"``) has ``valid`` False, run and start -1,
    and zeros for q, scale and mean: like every voxel of scale 0 it counts in no loss.
    """

    q: torch.Tensor
    scale: torch.Tensor
    mean: torch.Tensor
    run: torch.Tensor
    start: torch.Tensor
    dataset: torch.Tensor
    """Which source of a mixture; 0 where there is one dataset."""
    valid: torch.Tensor
    step: int
    until: int
    """Samples of the stream up to the end of this step, over all ranks."""
    skipped: tuple[SkippedClip, ...] = ()

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
        q, scale, mean = (part.to(device, non_blocking=True) for part in (self.q, self.scale, self.mean))
        return replace(self, q=q, scale=scale, mean=mean)

    def pin_memory(self) -> "ClipBatch":
        """Return the batch in pinned memory; what `torch.utils.data.DataLoader` calls with ``pin_memory=True``."""
        return replace(self, q=self.q.pin_memory(), scale=self.scale.pin_memory(), mean=self.mean.pin_memory())
