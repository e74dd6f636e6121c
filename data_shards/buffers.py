"""Memory for batches that is used again: fresh memory costs more in page faults than the reading that fills it."""

import math
import weakref
from typing import Any

import numpy as np
import numpy.typing as npt
import torch


class BufferPool:
    """Gives out tensors whose memory comes back by itself once nothing refers to them any more.

    Parameters
    ----------
    pin_memory
        Pinned tensors instead; torch keeps a pool of those itself.
    keep
        How many unused buffers of one size to hold on to.
    """

    def __init__(self, pin_memory: bool = False, keep: int = 4) -> None:
        self._pin = pin_memory
        self._keep = keep
        self._free: dict[int, list[npt.NDArray[np.uint8]]] = {}

    def __reduce__(self) -> tuple[Any, ...]:
        return BufferPool, (self._pin, self._keep)

    def tensor(self, shape: tuple[int, ...], dtype: npt.DTypeLike) -> torch.Tensor:
        """Return a tensor of any content."""
        kind = np.dtype(dtype)
        if self._pin:
            return torch.empty(shape, dtype=getattr(torch, kind.name), pin_memory=True)
        n_bytes = math.prod(shape) * kind.itemsize
        free = self._free.setdefault(n_bytes, [])
        memory = free.pop() if free else np.empty(n_bytes, dtype=np.uint8)
        array = memory.view(kind).reshape(shape)
        # Any tensor that shares the storage keeps `array` alive, and `array` is what the memory waits for.
        weakref.finalize(array, self._take_back, memory).atexit = False
        return torch.from_numpy(array)

    def _take_back(self, memory: npt.NDArray[np.uint8]) -> None:
        free = self._free[memory.nbytes]
        if len(free) < self._keep:
            free.append(memory)
