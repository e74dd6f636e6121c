"""The table by which the scan's backward goes: spans of a few tokens along the path, none across a restart.

So no decay has to be cut inside a span, and what crosses a restart is replaced, not multiplied by zero: a NaN stays in
its stretch.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from boldforge.kernels.index import RESTART, ScanIndex

MOST_IN_32_BITS = 2**31 - 1
"""Elements of a tensor that addresses in 32 bits reach; more take the same kernels in 64 bits."""


class Spans(NamedTuple):
    """Tokens of an index in spans, in the order of the scan.

    Parameters
    ----------
    rows : int32 [n_spans, steps]
        Tokens in the low 31 bits. The first of a span has its sign bit set where the state restarts before it. A later
        one has it where the stretch has ended: it is not there, and the token named is the span's first again.
    cu_spans : int32 [n_sequences + 1]
        Sequence ``i`` owns the spans from ``cu_spans[i]`` to ``cu_spans[i + 1]``.
    """

    rows: Tensor
    cu_spans: Tensor


def steps_for(dtype: torch.dtype) -> int:
    """Return the tokens of a span for inputs of this type; their states live in registers, and more would spill."""
    return 2 if dtype == torch.float32 else 4


def spans_of(index: ScanIndex, steps: int) -> Spans:
    """Return the spans of at most ``steps`` tokens, on the device of the index; built once for an index."""
    return index.cached(("spans", steps), lambda: _spans(index, steps))


def _spans(index: ScanIndex, steps: int) -> Spans:
    first, length = index.segments
    count = (length + steps - 1) // steps
    segment = torch.repeat_interleave(torch.arange(len(first)), count)
    number = torch.arange(len(segment)) - (count.cumsum(0) - count)[segment]
    place = (first[segment] + number * steps)[:, None] + torch.arange(steps)
    missing = place >= (first + length)[segment, None]
    codes = index.rows.cpu()
    rows = codes[torch.where(missing, place[:, :1], place)]
    rows = torch.where(missing, rows | RESTART, rows)
    cu_spans = torch.searchsorted(place[:, 0].contiguous(), index.cu_seqlens.cpu().long()).to(torch.int32)
    return Spans(rows.to(index.rows.device), cu_spans.to(index.rows.device))
