"""Equal work for every program: the longest sequences first, and cuts where the tokens are even.

A GPU hands programs out in order, one whenever another ends, so a long sequence that comes last keeps the whole device
waiting for one program. A thread of the CPU takes neighbouring tasks, so those must hold equally many tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor

from boldforge.kernels.index import ScanIndex


def long_first(index: ScanIndex) -> ScanIndex:
    """Return the same path with its sequences from the longest to the shortest; equally long ones keep their order.

    The result of a scan is the same. Sequences that share a program (flat lanes) get nearly equal lengths, and the last
    programs of a launch are the short ones. Made once and kept; the index itself where it is in that order already.
    """
    return index.cached("long first", lambda: _sorted(index)) or index


def _sorted(index: ScanIndex) -> ScanIndex | None:
    """Return the sorted path, None where it is sorted already: an index that kept itself would never be freed."""
    start = index.cu_seqlens[:-1].long()
    length = index.cu_seqlens.diff().long()
    if not bool((length.diff() > 0).any()):
        return None
    order = torch.argsort(length, descending=True, stable=True)
    start, length = start[order], length[order]
    cu_seqlens = torch.nn.functional.pad(length.cumsum(0), (1, 0))
    place = torch.arange(index.n_tokens, device=start.device)
    place += torch.repeat_interleave(start - cu_seqlens[:-1], length)
    # Its prompts are no longer in the order of the scan, and only their places matter to a kernel.
    found = ScanIndex(index.rows[place], cu_seqlens.to(torch.int32), index.n_tokens)
    vars(found).update(longest=index.longest)
    return found


def even_tasks(index: ScanIndex, b: int, most: int) -> Tensor:
    """Cut the sequences of ``b`` clips into at most ``most`` runs of neighbours with about equally many tokens.

    Returns
    -------
    int64 [tasks + 1]
        The first sequence of every task, sequence ``i`` of clip ``c`` being number ``c * n_sequences + i``. Any run of
        neighbouring tasks holds fewer tokens than its share of all plus the longest sequence.
    """
    starts = (torch.arange(b)[:, None] * index.n_tokens + index.cu_seqlens[:-1].cpu()).flatten()
    n_tasks = min(len(starts), most)
    wanted = torch.arange(n_tasks + 1) * (b * index.n_tokens) // n_tasks
    return torch.searchsorted(starts, wanted)
