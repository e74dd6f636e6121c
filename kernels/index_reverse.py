"""The same scan path walked backwards, for a network that reads every window in both directions."""

from __future__ import annotations

import torch

from boldforge.kernels.index import RESTART, ScanIndex, prepend_prompts


def reverse_index(index: ScanIndex) -> ScanIndex:
    """Return the path that visits every sequence of ``index`` from its last token to its first.

    It restarts at the same seams. Prompts come before the tokens of every stretch here too. The result is made once
    and kept on the index.

    Parameters
    ----------
    index : ScanIndex
        Any path, on any device.
    """
    return index.cached("reversed", lambda: _reversed_where_it_lies(index))


def _reversed_where_it_lies(index: ScanIndex) -> ScanIndex:
    if index.rows.device.type == "meta":
        return index  # no content to turn round; the shape is the same
    here = ScanIndex(index.rows.cpu(), index.cu_seqlens.cpu(), index.n_tokens, index.prompts)
    return _make_reversed(here).to(index.rows.device)


def _make_reversed(index: ScanIndex) -> ScanIndex:
    if index.prompts:
        return prepend_prompts(_make_reversed(_without_prompts(index)), index.prompts)
    start, end = index.cu_seqlens[:-1].long(), index.cu_seqlens[1:].long()
    place = torch.arange(index.n_tokens)
    mirrored = (start + end - 1).repeat_interleave(end - start) - place
    ends = index.starts.roll(-1)  # the place before a start ends a stretch, and the last place ends the last one
    restart = ends[mirrored]
    restart[start] = False
    tokens = index.tokens[mirrored]
    rows = torch.where(restart, tokens | RESTART, tokens).to(torch.int32)
    return ScanIndex(rows, index.cu_seqlens.clone(), index.n_tokens)


def _without_prompts(index: ScanIndex) -> ScanIndex:
    kept = index.tokens < index.n_clip_tokens
    starts = index.starts.nonzero().flatten()
    # A restart stands on a prompt, and moves on to the token behind it.
    restart = torch.zeros_like(kept)
    restart[starts[index.rows[starts] < 0] + index.prompts] = True
    tokens = index.tokens
    rows = torch.where(restart, tokens | RESTART, tokens).to(torch.int32)[kept]
    cu_seqlens = torch.nn.functional.pad(kept.cumsum(0), (1, 0))[index.cu_seqlens.long()].to(torch.int32)
    return ScanIndex(rows, cu_seqlens, index.n_clip_tokens)
