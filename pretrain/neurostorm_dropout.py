"""Spatiotemporal redundancy dropout: while training, tokens that say what their neighbours say are dropped.

After NeuroSTORM (Wang et al. 2025, arXiv 2506.11167), which calls it STRD. Mamba has no attention, so one is made of
its output inside every window, and a token is the likelier to be dropped the more of it one of its neighbours holds.

Shape suffixes: B clips · L tokens · C channels · W windows · N places in a window.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import prod

import numpy as np
import torch
from torch import Tensor, nn

_WINDOWS_AT_ONCE = 128  # 256 places: an attention of 32 MB per clip
_TINY = 1e-8  # NeuroSTORM's: a neighbourhood that holds less attention than this adds little


@dataclass(frozen=True, eq=False)
class WindowTable:
    """Which token stands where in which window of one block.

    Attributes
    ----------
    tokens_WN
        int64; L where the place is empty (not brain, or beyond the grid's end).
    side_WN
        int64; places of one window with another number lie on opposite sides of a seam, so they are no neighbours.
    window
        Tokens along x, y, z, t; N is their product, t fastest.
    """

    tokens_WN: Tensor
    side_WN: Tensor
    window: tuple[int, ...]

    def to(self, device: torch.device) -> "WindowTable":
        """Return the table on a device."""
        return WindowTable(self.tokens_WN.to(device), self.side_WN.to(device), self.window)


def window_table(
    grid: Sequence[int], window: Sequence[int], shift: Sequence[int], keep: np.ndarray, restarts: bool
) -> WindowTable:
    """Lay out the windows that `boldforge.kernels.window_index` scans, with the same arguments.

    Parameters
    ----------
    grid, window, shift
        Tokens along (x, y, z, t), tokens per window, cyclic shift.
    keep
        bool over the grid: the tokens that exist.
    restarts
        True where the scan restarts at the seam of a shifted window; False where it runs on (``wrap``).
    """
    width = tuple(min(g, w) for g, w in zip(grid, window, strict=True))
    number, place, side = (np.zeros((1,) * len(grid), dtype=np.int64) for _ in range(3))
    counts = []
    for axis, (size, wide, asked) in enumerate(zip(grid, width, shift, strict=True)):
        moved = asked if size > wide else 0
        counts.append(-(-size // wide))
        position = np.arange(size)
        rolled = (position - moved) % (counts[-1] * wide)
        along = [-1 if other == axis else 1 for other in range(len(grid))]
        number = number * counts[-1] + (rolled // wide).reshape(along)
        place = place * wide + (rolled % wide).reshape(along)
        side = side * 2 + (restarts & (position < moved)).reshape(along)
    number, place, side = (code[keep] for code in (number, place, side))
    tokens_WN = np.full((prod(counts), prod(width)), len(number), dtype=np.int64)
    side_WN = np.zeros_like(tokens_WN)
    tokens_WN[number, place] = np.arange(len(number))
    side_WN[number, place] = side
    used = (tokens_WN < len(number)).any(axis=1)
    return WindowTable(torch.from_numpy(tokens_WN[used]), torch.from_numpy(side_WN[used]), width)


def window_neighbours(window: Sequence[int], reach: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Say which places of a window are neighbours, bool [N, N] twice: in space (same frame), in time (same patch).

    ``reach`` is the largest distance along any axis of space, and along time. No place is its own neighbour.
    """
    places = torch.cartesian_prod(*(torch.arange(size) for size in window))
    apart = (places[:, None] - places[None]).abs()
    in_space, in_time = apart[..., :3].amax(dim=-1), apart[..., 3]
    spatial = (in_time == 0) & (in_space > 0) & (in_space <= reach[0])
    temporal = (in_space == 0) & (in_time > 0) & (in_time <= reach[1])
    return spatial, temporal


def drop_probability(h_WNC: Tensor, spatial_WNN: Tensor, temporal_WNN: Tensor, exists_WN: Tensor) -> Tensor:
    """Say how likely each token is to be dropped, [W, N] in [0, 1].

    With the pseudo-attention ``A = softmax(h hᵀ / √C)``, the neighbourhoods ``Ω_s`` and ``Ω_t`` of token i, and the
    largest attention ``m_s``, ``m_t`` in each, the dropout weight of a pair is
    ``w_ij = ½ A_ij (m_t / Σ_Ω_s A_ik + m_s / Σ_Ω_t A_ik)``, at most 1; a neighbourhood without tokens adds nothing. A
    token's probability is ``Σ_j w_ij``, over all tokens j of its window, divided by the number of its neighbours.

    Parameters
    ----------
    h_WNC
        Mamba's output, float32.
    spatial_WNN, temporal_WNN
        bool, neighbours that exist; may have one window for all.
    exists_WN
        bool.
    """
    scores_WNN = (h_WNC @ h_WNC.transpose(1, 2)) * h_WNC.shape[2] ** -0.5
    attention_WNN = scores_WNN.masked_fill(~exists_WN[:, None, :], float("-inf")).softmax(dim=-1)
    pull_WN = torch.zeros_like(attention_WNN[..., 0])
    sides = [attention_WNN * near for near in (spatial_WNN, temporal_WNN)]
    for here, other in (sides, sides[::-1]):
        total_WN = here.sum(dim=-1)
        pull_WN += torch.where(total_WN > 0, 0.5 * other.amax(dim=-1) / (total_WN + _TINY), 0.0)
    weight_WN = (attention_WNN * pull_WN[..., None]).clamp(max=1).sum(dim=-1)
    neighbours_WN = spatial_WNN.sum(dim=-1) + temporal_WNN.sum(dim=-1)
    return (weight_WN / neighbours_WN.clamp(min=1)).clamp(0, 1)


class RedundancyDropout(nn.Module):
    """Zero redundant tokens of a Mamba branch.

    Parameters
    ----------
    reach
        See `window_neighbours`.
    """

    def __init__(self, reach: tuple[int, int]) -> None:
        super().__init__()
        self.reach = reach

    def forward(self, h_BLC: Tensor, table: WindowTable, numbers_BL: Tensor) -> Tensor:
        """Drop the tokens whose number, uniform in [0, 1), is below their probability; [B, L, C] to [B, L, C]."""
        kept_BL = numbers_BL >= self.probability(h_BLC, table)
        return h_BLC * kept_BL.unsqueeze(-1).to(h_BLC.dtype)

    @torch.no_grad()
    def probability(self, h_BLC: Tensor, table: WindowTable) -> Tensor:
        """Return each token's probability of being dropped, float32 [B, L]; see `drop_probability`."""
        B, L, _ = h_BLC.shape
        near = [near.to(h_BLC.device) for near in window_neighbours(table.window, self.reach)]
        result_BL = h_BLC.new_zeros(B, L + 1, dtype=torch.float32)
        padded = nn.functional.pad(h_BLC.float(), (0, 0, 0, 1))
        # Autocast would compare likeness in bf16.
        with torch.autocast(h_BLC.device.type, enabled=False):
            for tokens_WN, side_WN in _blocks(table, max(1, _WINDOWS_AT_ONCE // B)):
                exists_WN = tokens_WN < L
                pairs_WNN = exists_WN[:, None, :] & (side_WN[:, None, :] == side_WN[:, :, None])
                spatial_WNN, temporal_WNN = ((pairs_WNN & one).repeat(B, 1, 1) for one in near)
                h_WNC = padded[:, tokens_WN].flatten(0, 1)
                found = drop_probability(h_WNC, spatial_WNN, temporal_WNN, exists_WN.repeat(B, 1))
                result_BL[:, tokens_WN] = found.view(B, *tokens_WN.shape)
        return result_BL[:, :L]


def _blocks(table: WindowTable, size: int) -> Iterator[tuple[Tensor, Tensor]]:
    return zip(table.tokens_WN.split(size), table.side_WN.split(size), strict=True)
