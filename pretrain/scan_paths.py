"""The paths along which a network's blocks scan their tokens: one per stage, clip length, window, shift and device."""

from dataclasses import dataclass

import numpy as np
import torch

from boldforge.kernels import ScanIndex, window_index
from boldforge.pretrain.model_config import ModelConfig, Window
from boldforge.pretrain.neurostorm_dropout import WindowTable, window_table
from boldforge.pretrain.tokens import TokenGrid


@dataclass(frozen=True)
class Place:
    """What a scan path depends on: the stage, its frames T, the window and its shift."""

    stage: int
    frames: int
    window: Window
    shift: Window


class ScanPaths:
    """Build each path when it is first asked for, and keep it.

    Parameters
    ----------
    config, token_grid
        Of the network.
    """

    def __init__(self, config: ModelConfig, token_grid: TokenGrid) -> None:
        self._mode = config.scan_mode
        self._token_grid = token_grid
        self._indexes: dict[tuple[Place, torch.device, int], ScanIndex] = {}
        self._tables: dict[tuple[Place, torch.device], WindowTable] = {}

    def place(self, stage: int, frames: int, window: Window, shifted: bool) -> Place:
        """Name a path; a shifted one is moved by half a window along the axes that are larger than it."""
        grid = (*self._token_grid.stages[stage].grid, frames)
        x, y, z, t = (w // 2 if shifted and g > w else 0 for w, g in zip(window, grid, strict=True))
        return Place(stage, frames, window, (x, y, z, t))

    def index(self, place: Place, device: torch.device, prompts: int = 0) -> ScanIndex:
        """Return the scan index, with so many prompts before every stretch."""
        key = (place, device, prompts)
        if key not in self._indexes:
            keep = torch.from_numpy(self._keep(place))
            index = window_index(keep.shape, place.window, place.shift, mode=self._mode, keep=keep, prompts=prompts)
            self._indexes[key] = index.to(device)
        return self._indexes[key]

    def table(self, place: Place, device: torch.device) -> WindowTable:
        """Return which token stands where in which window, for the redundancy dropout."""
        key = (place, device)
        if key not in self._tables:
            keep = self._keep(place)
            table = window_table(keep.shape, place.window, place.shift, keep, self._mode == "region")
            self._tables[key] = table.to(device)
        return self._tables[key]

    def _keep(self, place: Place) -> np.ndarray:
        """Bool [x, y, z, t]: the tokens that exist."""
        return np.repeat(self._token_grid.stages[place.stage].keep[..., None], place.frames, axis=-1)
