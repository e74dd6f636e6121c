"""Between stages: merging tokens on the way down, expanding them on the way up.

Shape suffixes: B clips · S, S' spatial tokens of a stage and of the next coarser one · T, T' frames there · C channels.
"""

import torch
from torch import Tensor, nn


class PatchMerging(nn.Module):
    """Concatenate 2×2×2 children (missing ones are zero), LayerNorm, Linear to 2C without bias.

    Parameters
    ----------
    dim
        C.
    times
        Frames that are merged too: 1 or 2. The last frame of an odd number lacks its second child.
    """

    def __init__(self, dim: int, times: int = 1) -> None:
        super().__init__()
        self.times = times
        self.norm = nn.LayerNorm(8 * times * dim)
        self.reduction = nn.Linear(8 * times * dim, 2 * dim, bias=False)

    def forward(self, x_BSTC: Tensor, children_S8: Tensor) -> Tensor:
        """[B, S, T, C] and int64 [S', 8] to [B, S', T', 2C]; children are in the order (x, y, z, t), t fastest."""
        B, _, T, C = x_BSTC.shape
        padded = nn.functional.pad(x_BSTC, (0, 0, 0, -T % self.times, 0, 1))
        picked = padded.index_select(1, children_S8.reshape(-1)).view(B, -1, 8, padded.shape[2], C)
        together = picked.unflatten(3, (-1, self.times)).transpose(2, 3)
        return self.reduction(self.norm(together.flatten(3)))

    def merge_visible(self, x_1NC: Tensor, children_NK: Tensor) -> Tensor:
        """Merge tokens that lie one after the other, clips and frames alike: [1, N, C] and [N', K] to [1, N', 2C]."""
        padded = nn.functional.pad(x_1NC, (0, 0, 0, 1))
        picked = padded.index_select(1, children_NK.flatten()).view(1, len(children_NK), -1)
        return self.reduction(self.norm(picked))


class PatchExpanding(nn.Module):
    """Undo the shape of `PatchMerging`: Linear without bias to children of C/2 channels each, LayerNorm.

    Children outside the brain, or after the last frame, vanish.

    Parameters
    ----------
    dim
        C.
    times
        Frames made of one: 1 or 2.
    """

    def __init__(self, dim: int, times: int = 1) -> None:
        super().__init__()
        self.times = times
        self.expand = nn.Linear(dim, 4 * times * dim, bias=False)
        self.norm = nn.LayerNorm(dim // 2)

    def forward(self, x_BSTC: Tensor, parent_S: Tensor, slot_S: Tensor, frames: int) -> Tensor:
        """[B, S', T', C], int64 [S] twice and T to [B, S, T, C/2]."""
        B, _, _, C = x_BSTC.shape
        children = self.expand(x_BSTC).unflatten(3, (8, self.times, C // 2)).transpose(2, 3)
        rows = children.flatten(3, 4).reshape(B, -1, x_BSTC.shape[2] * self.times, C // 2)
        picked = rows.index_select(1, parent_S * 8 + slot_S)[:, :, :frames]
        # Under autocast LayerNorm gives float32 on CUDA, but bf16 on the CPU: the residual stream is float32 on both.
        return self.norm(picked.to(torch.promote_types(picked.dtype, torch.float32)))


def frames_at(stage: int, frames: int, times: tuple[int, ...]) -> int:
    """Return the frames of a stage's tokens; `times` says how many each merging joins."""
    for joined in times[:stage]:
        frames = -(-frames // joined)
    return frames
