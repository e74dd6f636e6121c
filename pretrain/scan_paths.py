"""The paths along which a network's blocks scan their tokens: one per stage, clip length, window, shift and device."""

from collections import OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Generic, TypeVar

import numpy as np
import torch

from boldforge.kernels import ScanIndex, window_index
from boldforge.pretrain.model_config import ModelConfig, Window
from boldforge.pretrain.neurostorm_dropout import WindowTable, window_table
from boldforge.pretrain.tokens import TokenGrid

# A model of `time: seconds` may meet clips of every length there is; tables of the paths of one are some megabytes.
_LENGTHS = 4

_Table = TypeVar("_Table")


@dataclass(frozen=True)
class Place:
    """What a scan path depends on: the stage, its frames T, the window and its shift."""

    stage: int
    frames: int
    window: Window
    shift: Window


class _Recent(Generic[_Table]):
    """The results asked for last; older ones are built again."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._kept: OrderedDict[Hashable, _Table] = OrderedDict()

    def __len__(self) -> int:
        return len(self._kept)

    def get(self, key: Hashable, build: Callable[[], _Table]) -> _Table:
        if key not in self._kept:
            self._kept[key] = build()
            if len(self._kept) > self._size:
                self._kept.popitem(last=False)
        self._kept.move_to_end(key)
        return self._kept[key]


class ScanPaths:
    """Build each path when it is first asked for, and keep those of the last few clip lengths.

    Parameters
    ----------
    config, token_grid
        Of the network.
    """

    def __init__(self, config: ModelConfig, token_grid: TokenGrid) -> None:
        self._mode = config.scan_mode
        self._token_grid = token_grid
        # Straight and shifted windows of every stage, of the encoder and of the decoder, on the CPU and on a device.
        size = _LENGTHS * 2 * (2 * config.n_stages - 1) * 2
        self._indexes = _Recent[ScanIndex](size)
        self._tables = _Recent[WindowTable](size)

    def place(self, stage: int, frames: int, window: Window, shifted: bool) -> Place:
        """Name a path; a shifted one is moved by half a window along the axes that are larger than it."""
        grid = (*self._token_grid.stages[stage].grid, frames)
        x, y, z, t = (w // 2 if shifted and g > w else 0 for w, g in zip(window, grid, strict=True))
        return Place(stage, frames, window, (x, y, z, t))

    def index(self, place: Place, device: torch.device, prompts: int = 0) -> ScanIndex:
        """Return the scan index, with so many prompts before every stretch."""

        def build() -> ScanIndex:
            keep = torch.from_numpy(self._keep(place))
            index = window_index(keep.shape, place.window, place.shift, mode=self._mode, keep=keep, prompts=prompts)
            return index.to(device)

        return self._indexes.get((place, device, prompts), build)

    def table(self, place: Place, device: torch.device) -> WindowTable:
        """Return which token stands where in which window, for the redundancy dropout."""

        def build() -> WindowTable:
            keep = self._keep(place)
            table = window_table(keep.shape, place.window, place.shift, keep, self._mode == "region")
            return table.to(device)

        return self._tables.get((place, device), build)

    def _keep(self, place: Place) -> np.ndarray:
        """Bool [x, y, z, t]: the tokens that exist."""
        return np.repeat(self._token_grid.stages[place.stage].keep[..., None], place.frames, axis=-1)
