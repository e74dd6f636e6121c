"""Paths over the tokens that clips keep, taken out of the path over all tokens without sorting anything again.

Shape suffixes: b clips · L tokens of a clip · S places in the scan of a clip · K kept tokens of all clips.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from boldforge.kernels.index import RESTART, ScanIndex, prepend_prompts


def keep_tokens(index: ScanIndex, keep: Tensor, prompts: int = 0) -> ScanIndex:
    """Return one path over the kept tokens of several clips, in the order in which ``index`` visits them.

    The same tables as ``pack_indices`` of ``window_index(..., keep=...)`` of every clip, in a few passes over ``keep``:
    cheap enough for masks that change at every step.

    Parameters
    ----------
    index : ScanIndex
        The path over all L tokens of a clip, without prompts.
    keep : bool [b, L]
        The tokens that each clip keeps, on the index's device.
    prompts : int
        Prompts P before the tokens of every stretch that keeps any, as in ``window_index``.

    Returns
    -------
    ScanIndex
        Kept tokens are numbered clip after clip, in token order; so they are the rows of ``x[keep]`` [K, C].

    Raises
    ------
    ValueError
        If the shapes do not fit, or nothing is kept.
    """
    if index.prompts:
        raise ValueError(f"index must have no prompts, found {index.prompts}; give their number as prompts.")
    if keep.dtype != torch.bool or keep.ndim != 2 or keep.shape[1] != index.n_tokens:
        raise ValueError(f"keep must be bool [any, {index.n_tokens}], found {keep.dtype} {list(keep.shape)}.")
    sequence, stretch = index.cached("sequence and stretch", lambda: _numbers(index))
    visited = keep[:, index.tokens].flatten().nonzero().flatten()
    if len(visited) == 0:
        raise ValueError("keep lists no token: at least one must be kept.")
    clip = visited.div(index.n_tokens, rounding_mode="floor")
    place = visited - clip * index.n_tokens
    number = keep.flatten().cumsum(0) - 1
    rows = number[clip * index.n_tokens + index.tokens[place]]
    new_sequence = (clip * index.n_sequences + sequence[place]).diff() != 0
    restart = pad((stretch[place].diff() != 0) & ~new_sequence, (1, 0))
    edges = new_sequence.nonzero().flatten() + 1
    cu_seqlens = pad(pad(edges, (1, 0)), (0, 1), value=len(rows)).to(torch.int32)
    rows = torch.where(restart, rows | RESTART, rows).to(torch.int32)
    kept = ScanIndex(rows, cu_seqlens, len(rows))
    return prepend_prompts(kept, prompts) if prompts else kept


def _numbers(index: ScanIndex) -> tuple[Tensor, Tensor]:
    """Return the number of the sequence and of the stretch at every place of the scan, int64 [S] each."""
    lengths = index.cu_seqlens.diff().long()
    sequence = torch.repeat_interleave(torch.arange(len(lengths), device=lengths.device), lengths)
    return sequence, index.starts.cumsum(0)
