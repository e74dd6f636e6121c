"""The tokens that the encoder computes where it sees only what is not hidden (He et al. 2022, arXiv 2111.06377).

The visible tokens of all clips of a batch lie one after the other as [1, N, C]: a batch of one, so that nothing
token-wise notices. Clips may see different tokens, and at coarser stages differently many: a token of the next stage
exists for a clip if any of its children does; those that do not are zero, as at the brain's edge.

Shape suffixes: B clips · S spatial tokens of a stage · T frames · L = S·T tokens · N visible tokens of all clips · C
channels · K children of a token of the next stage · W windows.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from boldforge.kernels import ScanIndex, keep_tokens
from boldforge.pretrain.neurostorm_dropout import WindowTable
from boldforge.pretrain.tokens import TokenGrid


@dataclass(frozen=True, eq=False)
class VisibleTokens:
    """The visible tokens of a batch at one stage.

    Attributes
    ----------
    visible_BL
        bool, on the CPU.
    row_N
        int64, clip · L + token of every visible token, ascending; on the model's device.
    clip_N
        int64, the clip of every visible token; on the model's device.
    children_NK
        int64 [N of the next stage, K], visible tokens merged into each of the next stage's, N where the child does not
        exist or is hidden; on the model's device. None for the last stage.
    """

    visible_BL: Tensor
    row_N: Tensor
    clip_N: Tensor
    children_NK: Tensor | None
    _indexes: dict[tuple[ScanIndex, int], ScanIndex] = field(default_factory=dict, init=False, repr=False)

    @property
    def n_clips(self) -> int:
        """B."""
        return len(self.visible_BL)

    def pick(self, x_BLC: Tensor) -> Tensor:
        """Take the visible tokens: [B, L, C] to [1, N, C]; [1, L, C] stands for the same in every clip."""
        return x_BLC.expand(self.n_clips, -1, -1).flatten(0, 1).index_select(0, self.row_N).unsqueeze(0)

    def fill(self, x_1NC: Tensor, hidden_BLC: Tensor) -> Tensor:
        """Put the visible tokens back to their places, `hidden_BLC` (or [1, L, C]) elsewhere: [B, L, C]."""
        whole_BLC = hidden_BLC.expand(self.n_clips, -1, -1)
        flat = whole_BLC.flatten(0, 1).to(x_1NC.dtype).index_copy(0, self.row_N, x_1NC[0])
        return flat.view(whole_BLC.shape)

    def index(self, whole: ScanIndex, prompts: int = 0) -> ScanIndex:
        """Return the path over the visible tokens, in the order of the path over `whole` clips on the CPU; kept."""
        key = (whole, prompts)
        if key not in self._indexes:
            self._indexes[key] = keep_tokens(whole, self.visible_BL, prompts).to(self.row_N.device)
        return self._indexes[key]

    def windows(self, whole: WindowTable) -> WindowTable:
        """Return the windows of all clips with the visible tokens in them."""
        B, L = self.visible_BL.shape
        N, device = len(self.row_N), self.row_N.device
        number_BL = torch.full((B, L + 1), N, device=device)
        number_BL[self.clip_N, self.row_N - self.clip_N * L] = torch.arange(N, device=device)
        tokens_WN = number_BL[:, whole.tokens_WN].flatten(0, 1)
        used = (tokens_WN < N).any(dim=1)
        return WindowTable(tokens_WN[used], whole.side_WN.repeat(B, 1)[used], whole.window)


def visible_tokens(
    mask_BL: Tensor, token_grid: TokenGrid, device: torch.device, joined: Sequence[int] | None = None
) -> list[VisibleTokens]:
    """List what is visible of a batch at every stage.

    Parameters
    ----------
    mask_BL
        bool, true where hidden. Tables are built on the CPU: a mask that lies there spares waiting for the device.
    token_grid
        Tokens of a clip.
    device
        Where the tables are used.
    joined
        Frames that each merging joins, 1 unless given; the last of an odd number lacks its second child.

    Raises
    ------
    ValueError
        If the mask does not fit the tokens, or hides all of a clip.
    """
    S = token_grid.stages[0].n_tokens
    if mask_BL.dtype != torch.bool or mask_BL.ndim != 2 or mask_BL.shape[1] % S or mask_BL.shape[1] == 0:
        raise ValueError(f"the mask must be bool [B, {S} · frames], found {mask_BL.dtype} {list(mask_BL.shape)}")
    visible_BL = ~mask_BL.cpu()
    if not visible_BL.any(dim=1).all():
        raise ValueError("the mask hides all tokens of a clip, so that its encoder has nothing to see; hide fewer")
    visible_BST, found = visible_BL.unflatten(1, (S, -1)), []
    for children, times in zip(token_grid.children, joined or [1] * len(token_grid.children), strict=True):
        coarse_BST, children_NK = _merge(visible_BST, torch.from_numpy(children), times)
        found.append(_listed(visible_BST.flatten(1), children_NK.to(device), device))
        visible_BST = coarse_BST
    return [*found, _listed(visible_BST.flatten(1), None, device)]


def _listed(visible_BL: Tensor, children_NK: Tensor | None, device: torch.device) -> VisibleTokens:
    row_N = visible_BL.flatten().nonzero().flatten()
    clip_N = row_N.div(visible_BL.shape[1], rounding_mode="floor")
    return VisibleTokens(visible_BL, row_N.to(device), clip_N.to(device), children_NK)


def _merge(visible_BST: Tensor, children_S8: Tensor, times: int) -> tuple[Tensor, Tensor]:
    """Return the next stage's visible tokens [B, S', T'], and the visible children [N', 8 · times] of each."""
    N, T = int(visible_BST.sum()), visible_BST.shape[2]
    number_BST = torch.where(visible_BST, visible_BST.flatten().cumsum(0).view_as(visible_BST) - 1, N)
    padded_BST = torch.nn.functional.pad(number_BST, (0, -T % times, 0, 1), value=N)
    children_BSTK = padded_BST[:, children_S8].unflatten(3, (-1, times)).transpose(2, 3).flatten(3)
    exists_BST = (children_BSTK < N).any(dim=3)
    return exists_BST, children_BSTK[exists_BST]
