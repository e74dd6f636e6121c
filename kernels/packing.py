"""Segments of a scan side by side: step t of every segment lies in one contiguous slice, with no padding and no mask.

Segments (stretches without a restart) are sorted by length, longest first, so those still running at step t are always
the first ones. A restart costs nothing, because it begins another segment.

Shape suffixes: b clips · L tokens · R rows of a block.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from boldforge.kernels.index import ScanIndex


@dataclass(frozen=True, eq=False)
class Block:
    """Some steps of some segments.

    Parameters
    ----------
    rows : int64 [R]
        Rows of the flattened ``[b * L]`` tokens: the first step of every lane, then the second, and so on.
    sizes : list of int
        How many lanes are running at each step; never increases.
    """

    rows: Tensor
    sizes: list[int]


def packs(index: ScanIndex, batch: int, lanes: int, rows: int) -> list[list[Block]]:
    """Return all segments of ``batch`` clips, at most ``lanes`` at a time, each time in blocks of steps.

    Parameters
    ----------
    index : ScanIndex
        The scan path of one clip.
    batch : int
        Clips b; the rows of clip ``c`` start at ``c * L``.
    lanes, rows : int
        At most so many lanes in a pack and (unless one step has more) rows in a block: what the caller's cache holds.

    Returns
    -------
    list of list of Block
        The blocks of every pack in the order of time; lanes keep their place from one block to the next. Together they
        hold every row exactly once. Kept on the index, so the same request is answered at once.
    """
    return index.cached(("packs", batch, lanes, rows), lambda: _make_packs(index, batch, lanes, rows))


def _make_packs(index: ScanIndex, batch: int, lanes: int, rows: int) -> list[list[Block]]:
    first, length = index.segments
    longest = torch.argsort(length, descending=True, stable=True)
    first = first[longest].repeat_interleave(batch)
    length = length[longest].repeat_interleave(batch)
    offset = (torch.arange(batch) * index.n_tokens).repeat(len(longest))
    lanes = -(-len(length) // -(-len(length) // lanes))  # as few packs as before, but of even size
    device, tokens = index.rows.device, index.tokens.cpu()
    found = []
    for start, size, base in zip(first.split(lanes), length.split(lanes), offset.split(lanes), strict=True):
        step = torch.arange(int(size[0]))[:, None]
        running = step < size
        order = (tokens[(start + step)[running]] + base.expand_as(running)[running]).to(device)
        blocks = _split(running.sum(1).tolist(), rows)
        found.append([Block(*both) for both in zip(order.split([sum(b) for b in blocks]), blocks, strict=True)])
    return found


def _split(sizes: list[int], rows: int) -> list[list[int]]:
    """Cut the steps of a pack into runs of at most ``rows`` rows."""
    blocks: list[list[int]] = [[]]
    room = rows
    for size in sizes:
        if size > room and blocks[-1]:
            blocks.append([])
            room = rows
        blocks[-1].append(size)
        room -= size
    return blocks
