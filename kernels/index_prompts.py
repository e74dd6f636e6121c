"""Learnt prompts in the token axis: one copy for every stretch of the scan, after the clip's own tokens.

Task-specific prompt tuning (NeuroSTORM, arXiv 2506.11167) prepends the same learnt tokens to every window before the
mixer and strips them after it. Here the index puts them first in the path (``window_index(..., prompts=P)``), and they
are appended to the tokens:

    y = strip_prompts(mixer(expand_prompts(x, prompts, index), index), index)

Shape suffixes: b clips · L tokens · P prompts · C channels.
"""

from __future__ import annotations

import torch
from torch import Tensor

from boldforge.kernels.index import ScanIndex


def expand_prompts(x: Tensor, prompts: Tensor, index: ScanIndex) -> Tensor:
    """Return the tokens followed by one copy of the prompts for every stretch of the index.

    Parameters
    ----------
    x : [b, L, C]
        Tokens of the clips, ``L = index.n_clip_tokens``.
    prompts : [P, C]
        Learnt prompts, ``P = index.prompts``; their gradient is the sum over all copies.
    index : ScanIndex
        A path with prompts.

    Returns
    -------
    [b, index.n_tokens, C]
        In the type of ``x``.

    Raises
    ------
    ValueError
        If a shape does not fit the index; names the argument, what was found and what was wanted.
    """
    if x.ndim != 3 or x.shape[1] != index.n_clip_tokens:
        raise ValueError(f"x must have shape [any, {index.n_clip_tokens}, any], found {list(x.shape)}.")
    if prompts.shape != (index.prompts, x.shape[2]):
        raise ValueError(f"prompts must have shape [{index.prompts}, {x.shape[2]}], found {list(prompts.shape)}.")
    if not index.prompts:
        return x
    copies = (index.n_tokens - index.n_clip_tokens) // index.prompts
    return torch.cat([x, prompts.to(x.dtype).repeat(copies, 1).expand(len(x), -1, -1)], dim=1)


def strip_prompts(y: Tensor, index: ScanIndex) -> Tensor:
    """Return the clip's own tokens [b, index.n_clip_tokens, C] of ``y`` [b, index.n_tokens, C], as a view."""
    if y.ndim != 3 or y.shape[1] != index.n_tokens:
        raise ValueError(f"y must have shape [any, {index.n_tokens}, any], found {list(y.shape)}.")
    return y[:, : index.n_clip_tokens]
