"""A scan path is a table: which token comes next, and where the state starts from zero.

Shift, window, flip, brain mask and prompts all become one permutation of the tokens, so activations never leave token
order. A *stretch* is what the scan visits without a restart: a window, or the part of it on one side of a seam.

Shape suffixes: S places in the scan · L tokens of a clip (S = L, each token is visited once) · P prompts of a stretch.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from math import prod
from typing import Any, Literal, TypeVar
from weakref import WeakValueDictionary

import torch
from torch import Tensor

T = TypeVar("T")

RESTART = -(2**31)
"""The sign bit of an int32: set on a row, the state restarts before that token."""


@dataclass(frozen=True, eq=False)
class ScanIndex:
    """The order in which a scan visits the tokens of one clip.

    Parameters
    ----------
    rows : int32 [S]
        The token at every place of the scan in the low 31 bits; the sign bit says that the state restarts before it.
        Every token occurs exactly once.
    cu_seqlens : int32 [n_sequences + 1]
        Sequence ``i`` is ``rows[cu_seqlens[i]:cu_seqlens[i + 1]]``; no sequence is empty, and each starts from zero.
    n_tokens : int
        The number of tokens L of the clip, prompts included; equal to S.
    prompts : int
        Prompts P at the start of every stretch. They are the last tokens, in the order of the scan: prompt ``p`` of
        stretch ``i`` is token ``n_clip_tokens + i * P + p`` (see ``expand_prompts``).

    Raises
    ------
    ValueError
        If the tables do not fit each other. The content is checked on the CPU only, so that building an index on an
        accelerator does not wait for it.
    """

    rows: Tensor
    cu_seqlens: Tensor
    n_tokens: int
    prompts: int = 0
    _tables: dict[Hashable, Any] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        for name, table in (("rows", self.rows), ("cu_seqlens", self.cu_seqlens)):
            if table.dtype != torch.int32 or table.ndim != 1:
                raise ValueError(f"{name} must be int32 with one axis, found {table.dtype} {list(table.shape)}.")
        if len(self.rows) != self.n_tokens or self.n_tokens == 0:
            raise ValueError(f"rows must list all {self.n_tokens} tokens once, found {len(self.rows)} rows.")
        if len(self.cu_seqlens) < 2:
            raise ValueError(
                f"cu_seqlens needs at least two entries, 0 and the number of rows; found {len(self.cu_seqlens)}."
            )
        if self.prompts < 0:
            raise ValueError(f"prompts must be 0 or more, found {self.prompts}.")
        _living[_place(self.rows, self.cu_seqlens)] = self
        if self.rows.device.type != "cpu":
            return
        if int(self.cu_seqlens[0]) != 0 or int(self.cu_seqlens[-1]) != self.n_tokens:
            ends = [int(self.cu_seqlens[0]), int(self.cu_seqlens[-1])]
            raise ValueError(f"cu_seqlens must run from 0 to {self.n_tokens}, found {ends[0]} to {ends[1]}.")
        if int(self.cu_seqlens.diff().min()) < 1:
            raise ValueError("cu_seqlens must increase at every step: a sequence is never empty.")
        if int(self.tokens.max()) >= self.n_tokens or int(torch.bincount(self.tokens).max()) > 1:
            raise ValueError(f"rows must name every token 0…{self.n_tokens - 1} exactly once.")
        if self.prompts:
            self._check_prompts()

    def _check_prompts(self) -> None:
        first, length = self.segments
        if int(length.min()) <= self.prompts:
            raise ValueError(
                f"prompts must leave room for a token in every stretch: found {self.prompts} prompts and a stretch of "
                f"{int(length.min())} places."
            )
        found = self.tokens[first[:, None] + torch.arange(self.prompts)].flatten()
        if not torch.equal(found, torch.arange(self.n_clip_tokens, self.n_tokens)):
            raise ValueError(
                f"rows must begin every stretch with its {self.prompts} prompts, the tokens from "
                f"{self.n_clip_tokens} on in the order of the scan."
            )

    def cached(self, key: Hashable, make: Callable[[], T]) -> T:
        """Return what ``make`` made for this key the first time: tables that follow from the index are built once."""
        if key not in self._tables:
            self._tables[key] = make()
        return self._tables[key]

    def to(self, device: torch.device | str) -> ScanIndex:
        """Return this index on ``device``; the copy is made once and kept."""
        device = torch.device(device)
        if device == self.rows.device:
            return self
        return self.cached(("to", device), lambda: self._copy(device))

    def _copy(self, device: torch.device) -> ScanIndex:
        copy = ScanIndex(self.rows.to(device), self.cu_seqlens.to(device), self.n_tokens, self.prompts)
        if self.rows.device.type == "cpu":
            # Known here already; asking the copy would make the host wait for the device.
            vars(copy).update(segments=self.segments, longest=self.longest)
        return copy

    @property
    def n_sequences(self) -> int:
        """The number of sequences (windows that hold at least one token)."""
        return len(self.cu_seqlens) - 1

    @property
    def n_clip_tokens(self) -> int:
        """The number of tokens without the prompts, which come after them."""
        return self.n_tokens - self.prompts * len(self.segments[0]) if self.prompts else self.n_tokens

    @cached_property
    def longest(self) -> int:
        """The number of places of the longest sequence."""
        return int(self.cu_seqlens.diff().max())

    @cached_property
    def tokens(self) -> Tensor:
        """int64 [S]: the token at every place of the scan."""
        return self.rows.long() & 0x7FFFFFFF

    @cached_property
    def inverse(self) -> Tensor:
        """int64 [L]: the place of every token in the scan; ``x[tokens][inverse]`` is ``x``."""
        inverse = torch.empty_like(self.tokens)
        inverse[self.tokens] = torch.arange(self.n_tokens, device=self.rows.device)
        return inverse

    @cached_property
    def starts(self) -> Tensor:
        """Bool [S]: the state is zero before this place (first of a sequence, or a restart)."""
        starts = self.rows < 0
        starts[self.cu_seqlens[:-1].long()] = True
        return starts

    @cached_property
    def segments(self) -> tuple[Tensor, Tensor]:
        """(first place, length) of every stretch without a restart, each int64 [n_segments], on the CPU."""
        first = self.starts.cpu().nonzero().flatten()
        return first, torch.diff(first, append=torch.tensor([self.n_tokens]))

    def neighbours(self, steps: int) -> Tensor:
        """Return the tokens up to ``steps`` places before or after each token in the same segment.

        Parameters
        ----------
        steps : int
            How far to look back (positive) or ahead (negative).

        Returns
        -------
        int64 [abs(steps), L]
            Row ``j - 1`` holds, for every token, the token ``j`` places away; ``n_tokens`` where there is none.
        """
        return self.cached(("neighbours", steps), lambda: self._make_neighbours(steps))

    def _make_neighbours(self, steps: int) -> Tensor:
        place = torch.arange(self.n_tokens, device=self.rows.device)
        segment = self.starts.cumsum(0)
        table = torch.full((abs(steps), self.n_tokens), self.n_tokens, device=self.rows.device)
        for row in range(abs(steps)):
            other = place - (row + 1 if steps > 0 else -row - 1)
            inside = other.clamp(0, self.n_tokens - 1)
            found = (other == inside) & (segment[inside] == segment)
            table[row, self.tokens[found]] = self.tokens[inside[found]]
        return table


# As long as an index lives, no other tensor lies where its rows do.
_living: WeakValueDictionary[tuple[int, int], ScanIndex] = WeakValueDictionary()


def index_of(rows: Tensor, cu_seqlens: Tensor) -> ScanIndex:
    """Return the index that these very tables belong to, with all it has cached; a new one if that is gone.

    An operator of torch takes tensors only, and finds its index through this.
    """
    return _living.get(_place(rows, cu_seqlens)) or ScanIndex(rows, cu_seqlens, len(rows))


def _place(rows: Tensor, cu_seqlens: Tensor) -> tuple[int, int]:
    return rows.data_ptr(), cu_seqlens.data_ptr()


def window_index(
    grid: Sequence[int],
    window: Sequence[int],
    shift: Sequence[int],
    mode: Literal["region", "wrap"] = "region",
    keep: Tensor | None = None,
    reverse: bool = False,
    order: Sequence[int] | None = None,
    prompts: int = 0,
) -> ScanIndex:
    """Return the scan path of (cyclically shifted) windows over a token grid, one sequence per window.

    Parameters
    ----------
    grid : sequence of int
        Tokens along (x, y, z, t). Tokens are numbered in raster order, the last axis fastest.
    window, shift : sequence of int
        Window size and cyclic shift per axis, in tokens, ``0 <= shift < window``. An axis not larger than its window
        is one window, unshifted.
    mode : {"region", "wrap"}
        A cyclic shift glues opposite sides of the grid into the windows at its edge. ``region`` visits such a window
        one side after the other and restarts the state in between. ``wrap`` visits it in raster order without a
        restart, which is NeuroSTORM's order.
    keep : bool, shape ``grid`` or flat, optional
        The tokens that exist (brain). They are numbered in raster order among themselves; windows without any vanish.
    reverse : bool
        Visit every window backwards.
    order : sequence of int, optional
        The axes from the slowest to the fastest inside a window; (0, 1, 2, 3) unless given, t fastest.
    prompts : int
        Prompts P before the tokens of every stretch, as in NeuroSTORM's task-specific prompt tuning: so before every
        window in ``wrap`` mode, and again after every restart in ``region`` mode, because the state that carries
        their influence is zero there. They come first when a window is visited backwards too.

    Returns
    -------
    ScanIndex
        On the CPU.

    Raises
    ------
    ValueError
        If the arguments do not fit each other or ``keep`` keeps nothing.

    Notes
    -----
    Where the grid is not a multiple of the window, windows are laid out as if the far end were padded, and the padding
    is not listed. NeuroSTORM (arXiv 2506.11167) scans zeros there, so ``wrap`` equals it only where nothing is padded.
    """
    order = range(len(grid)) if order is None else order
    _check_layout(grid, window, shift, order, prompts)
    if mode not in ("region", "wrap"):
        raise ValueError(f'mode must be "region" or "wrap", found {mode!r}.')

    region_id, window_id, local_id = _axis_codes(grid, window, shift, order)
    if mode == "wrap":
        region_id.zero_()
    kept = _kept_tokens(grid, keep)
    window_id, region_id, local_id = window_id[kept], region_id[kept], local_id[kept]

    inside = region_id * prod(map(min, grid, window)) + local_id
    span = int(inside.max()) + 1
    path = torch.argsort(window_id * span + (span - 1 - inside if reverse else inside))
    window_id, region_id = window_id[path], region_id[path]
    new_window = window_id.diff() != 0
    restart = torch.nn.functional.pad((region_id.diff() != 0) & ~new_window, (1, 0))
    rows = torch.where(restart, path | RESTART, path).to(torch.int32)
    edges = new_window.nonzero().flatten() + 1
    cu_seqlens = torch.nn.functional.pad(torch.nn.functional.pad(edges, (1, 0)), (0, 1), value=len(path))
    index = ScanIndex(rows, cu_seqlens.to(torch.int32), len(path))
    return prepend_prompts(index, prompts) if prompts else index


def _check_layout(
    grid: Sequence[int], window: Sequence[int], shift: Sequence[int], order: Sequence[int], prompts: int
) -> None:
    if not len(grid) == len(window) == len(shift) > 0:
        raise ValueError(f"grid {grid}, window {window} and shift {shift} must have one entry per axis.")
    if min(grid) < 1 or min(window) < 1:
        raise ValueError(f"grid {grid} and window {window} must be at least 1 along every axis.")
    if any(not 0 <= s < w for s, w in zip(shift, window, strict=True)):
        raise ValueError(f"shift {shift} must lie between 0 and the window {window} minus 1 along every axis.")
    if sorted(order) != list(range(len(grid))):
        raise ValueError(f"order must name each of the axes 0…{len(grid) - 1} once, found {order}.")
    if prompts < 0:
        raise ValueError(f"prompts must be 0 or more, found {prompts}.")


def _axis_codes(
    grid: Sequence[int], window: Sequence[int], shift: Sequence[int], order: Sequence[int]
) -> tuple[Tensor, Tensor, Tensor]:
    """Return region, window and place in the window of every token of the dense grid, each int64 [L], raster order."""
    region_id = window_id = local_id = torch.zeros(1, dtype=torch.int64)
    widths = [min(size, wanted) for size, wanted in zip(grid, window, strict=True)]
    for axis, (size, width) in enumerate(zip(grid, widths, strict=True)):
        moved = 0 if size == width else shift[axis]
        n_windows = -(-size // width)
        position = torch.arange(size)
        rolled = (position - moved) % (n_windows * width)
        faster = prod(widths[other] for other in order[order.index(axis) + 1 :])
        region_id = (region_id[:, None] * 2 + (position < moved)).flatten()
        window_id = (window_id[:, None] * n_windows + rolled // width).flatten()
        local_id = (local_id[:, None] + rolled % width * faster).flatten()
    return region_id, window_id, local_id


def _kept_tokens(grid: Sequence[int], keep: Tensor | None) -> Tensor:
    """Return the dense numbers of the tokens that exist, ascending."""
    n_dense = prod(grid)
    if keep is None:
        return torch.arange(n_dense)
    if not isinstance(keep, Tensor):
        raise ValueError(f"keep must be a bool tensor over the grid {list(grid)}, found {type(keep).__name__}.")
    if keep.dtype != torch.bool or (keep.shape != torch.Size(grid) and keep.shape != (n_dense,)):
        raise ValueError(f"keep must be bool over the grid {list(grid)}, found {keep.dtype} {list(keep.shape)}.")
    kept = keep.cpu().flatten().nonzero().flatten()
    if len(kept) == 0:
        raise ValueError("keep lists no token: at least one must be kept.")
    return kept


def prepend_prompts(index: ScanIndex, prompts: int) -> ScanIndex:
    """Return the index with prompts at the start of every stretch; they are numbered after the tokens there are."""
    first, _ = index.segments
    stretch = index.starts.cumsum(0) - 1
    prompt = torch.arange(len(first) * prompts).view(-1, prompts)
    place = first[:, None] + prompt
    tokens = torch.empty(index.n_tokens + prompt.numel(), dtype=torch.int64)
    tokens[torch.arange(index.n_tokens) + (stretch + 1) * prompts] = index.tokens
    tokens[place] = index.n_tokens + prompt
    tokens[place[index.rows[first] < 0, 0]] |= RESTART
    starts = index.cu_seqlens[:-1].long()
    cu_seqlens = torch.nn.functional.pad(starts + stretch[starts] * prompts, (0, 1), value=len(tokens))
    return ScanIndex(tokens.to(torch.int32), cu_seqlens.to(torch.int32), len(tokens), prompts)
