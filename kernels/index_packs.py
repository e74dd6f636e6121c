"""Many clips of different lengths as one: their tokens one after the other, their paths side by side.

A batch ``[b, L, C]`` needs one L; clips with other masks or lengths are concatenated along the token axis instead:

    index, sizes = pack_indices(indices)
    ys = scan(torch.cat(xs, dim=1), index).split(sizes, dim=1)
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from boldforge.kernels.index import RESTART, ScanIndex


def pack_indices(indices: Sequence[ScanIndex]) -> tuple[ScanIndex, tuple[int, ...]]:
    """Return one path over the concatenated tokens of several clips, and how many tokens each clip has.

    Parameters
    ----------
    indices : sequence of ScanIndex
        The path of every clip, all on one device and with equally many prompts. An index may occur several times.

    Returns
    -------
    ScanIndex
        The sequences of the first clip, then those of the second, and so on; no sequence crosses from one clip to the
        next. Tokens are numbered clip after clip; prompts, where there are any, come after the tokens of all clips.
    tuple of int
        ``n_clip_tokens`` of every clip: what ``torch.split`` takes to part the tokens again.

    Raises
    ------
    ValueError
        If there is no index, if they differ in device or prompts, or if their tokens do not fit into 31 bits.
    """
    if not indices:
        raise ValueError("indices must list at least one ScanIndex, found none.")
    first = indices[0]
    for number, index in enumerate(indices):
        if index.rows.device != first.rows.device or index.prompts != first.prompts:
            raise ValueError(
                f"indices must agree on device and prompts: indices[0] has {first.rows.device} and {first.prompts}, "
                f"indices[{number}] has {index.rows.device} and {index.prompts}."
            )
    total = sum(index.n_tokens for index in indices)
    if total >= 2**31:
        raise ValueError(f"indices must hold fewer than {2**31} tokens together, found {total}.")
    sizes = tuple(index.n_clip_tokens for index in indices)
    rows, cu_seqlens = [], [first.cu_seqlens[:1]]
    own, prompt, place = 0, sum(sizes), 0
    for index, size in zip(indices, sizes, strict=True):
        token = index.tokens
        moved = torch.where(token < size, token + own, token + (prompt - size))
        rows.append(torch.where(index.rows < 0, moved | RESTART, moved).to(torch.int32))
        cu_seqlens.append(index.cu_seqlens[1:] + place)
        own, prompt, place = own + size, prompt + index.n_tokens - size, place + index.n_tokens
    return ScanIndex(torch.cat(rows), torch.cat(cu_seqlens), total, first.prompts), sizes
