"""The shifted-window Mamba block on channel-last tokens.

Everything but the causal convolution and the selective scan is token-wise, so activations stay in token order for the
whole network and only those two see the scan index.

Shape suffixes: B clips · L tokens · C channels · D inner channels · N states · K conv width.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

from boldforge.kernels import ScanIndex, expand_prompts, reverse_index, shifted_conv, shifted_scan, strip_prompts
from boldforge.pretrain.draws import Draws
from boldforge.pretrain.neurostorm_dropout import RedundancyDropout, WindowTable
from boldforge.pretrain.visible import VisibleTokens


class _Path(nn.Module):
    """What one direction of the scan learns: convolution, step sizes, input and output weights, decay and skip."""

    def _make_path(self, inner: int, dt_rank: int, d_state: int, d_conv: int) -> None:
        # Kept as numbers: under ZeRO-3 a parameter that lies with another rank has no shape.
        self.dt_rank, self.d_state = dt_rank, d_state
        self.conv1d = nn.Conv1d(inner, inner, d_conv, groups=inner, padding=d_conv - 1)
        self.x_proj = nn.Linear(inner, dt_rank + 2 * d_state, bias=False)
        self.dt_proj = nn.Linear(dt_rank, inner, bias=False)
        self.dt_bias = nn.Parameter(torch.empty(inner))
        self.A_log = nn.Parameter(torch.log(torch.arange(1, d_state + 1, dtype=torch.float32)).repeat(inner, 1))
        self.D = nn.Parameter(torch.ones(inner))

    @torch.no_grad()
    def _initialise_step_sizes(self) -> None:
        # softplus(bias) spread log-uniformly over [1e-3, 1e-1]: memories of 10 to 1,000 tokens at the start.
        inner = len(self.dt_bias)
        nn.init.uniform_(self.dt_proj.weight, -(self.dt_rank**-0.5), self.dt_rank**-0.5)
        step = torch.exp(torch.rand(inner) * (math.log(0.1) - math.log(0.001)) + math.log(0.001))
        self.dt_bias.copy_(step + torch.log(-torch.expm1(-step)))

    def walk(self, x_BLD: Tensor, z_BLD: Tensor, index: ScanIndex, backend: str) -> Tensor:
        """Convolve and scan along the index, gated by z; [B, L, D] twice to [B, L, D]."""
        x_BLD = shifted_conv(x_BLD, self.conv1d.weight.squeeze(1), self.conv1d.bias, index, backend=backend)
        ranks = [self.dt_rank, self.d_state, self.d_state]
        dt_BLR, B_BLN, C_BLN = self.x_proj(x_BLD).split(ranks, dim=-1)
        dt_BLD = self.dt_proj(dt_BLR)
        A_DN = -torch.exp(self.A_log.float())
        return shifted_scan(
            x_BLD, dt_BLD, A_DN, B_BLN, C_BLN, self.D.float(), z_BLD, self.dt_bias.float(), index, backend=backend
        )


class _Backward(_Path):
    """The other direction's own weights."""

    def __init__(self, inner: int, dt_rank: int, d_state: int, d_conv: int) -> None:
        super().__init__()
        self._make_path(inner, dt_rank, d_state, d_conv)
        self._initialise_step_sizes()

    def forward(self, x_BLD: Tensor, z_BLD: Tensor, index: ScanIndex, backend: str) -> Tensor:
        """See `walk`; ZeRO-3 fetches the weights of what is called."""
        return self.walk(x_BLD, z_BLD, index, backend)


class ShiftedMamba(_Path):
    """Mamba-1 mixer whose token order is given by a scan index; parameter names and shapes are mamba-ssm's.

    Parameters
    ----------
    dim
        C, channels in and out.
    d_state, d_conv, expand
        N, K and D / C.
    backend
        Scan backend, see `boldforge.kernels.available_backends`.
    bidirectional
        Also scan every sequence backwards and add what that gives. As in Vision Mamba (Zhu et al. 2024, arXiv
        2401.09417) the projections in and out, most of the weights, are shared, and what shapes the scan is not:
        memory before a token and after it need not fade alike.

    Notes
    -----
    Gu and Dao 2023, arXiv 2312.00752. The projections are called as modules, never through their weights, so that an
    adapter wrapped around one of them is alive. `dt_bias` is mamba-ssm's ``dt_proj.bias``, kept apart because the
    kernel adds it in float32: near its usual value of -7, bf16 would round step sizes by up to three per cent.
    """

    def __init__(
        self,
        dim: int,
        d_state: int = 16,
        d_conv: int = 4,
        expand: int = 2,
        backend: str = "auto",
        bidirectional: bool = False,
    ) -> None:
        super().__init__()
        inner, dt_rank = expand * dim, math.ceil(dim / 16)
        self.backend = backend
        self.in_proj = nn.Linear(dim, 2 * inner, bias=False)
        self._make_path(inner, dt_rank, d_state, d_conv)
        self.out_proj = nn.Linear(inner, dim, bias=False)
        self._initialise_step_sizes()
        self.backwards = _Backward(inner, dt_rank, d_state, d_conv) if bidirectional else None

    def forward(self, x_BLC: Tensor, index: ScanIndex) -> Tensor:
        """Mix tokens along the scan index; [B, L, C] to [B, L, C]."""
        x_BLD, z_BLD = self.in_proj(x_BLC).chunk(2, dim=-1)
        y_BLD = self.walk(x_BLD, z_BLD, index, self.backend)
        if self.backwards is not None:
            y_BLD = y_BLD + self.backwards(x_BLD, z_BLD, reverse_index(index), self.backend)
        return self.out_proj(y_BLD)


class Mlp(nn.Module):
    """Linear, GELU, Linear."""

    def __init__(self, dim: int, ratio: float) -> None:
        super().__init__()
        hidden = max(1, int(dim * ratio))
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x_BLC: Tensor) -> Tensor:
        """Token-wise; [B, L, C] to [B, L, C]."""
        return self.fc2(functional.gelu(self.fc1(x_BLC)))


class Block(nn.Module):
    """LayerNorm, shifted Mamba, LayerNorm, MLP, each on a residual branch with stochastic depth.

    Parameters
    ----------
    dim
        C.
    mixer, mlp_ratio, drop_path
        See `ModelConfig`.
    redundancy
        Drops tokens of the Mamba branch while training; None drops nothing.
    prompts
        P, learned tokens that every window begins with.
    """

    prompt: nn.Parameter | None

    def __init__(
        self,
        dim: int,
        mixer: ShiftedMamba,
        mlp_ratio: float,
        drop_path: float,
        redundancy: RedundancyDropout | None = None,
        prompts: int = 0,
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.mamba = mixer
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = Mlp(dim, mlp_ratio)
        self.drop_path = drop_path
        self.redundancy = redundancy
        self.register_parameter("prompt", None)
        if prompts:
            self.prompt = nn.Parameter(torch.empty(prompts, dim))
            nn.init.trunc_normal_(self.prompt, std=0.02)

    def forward(
        self,
        x_BLC: Tensor,
        index: ScanIndex,
        windows: WindowTable | None = None,
        visible: VisibleTokens | None = None,
        draws: Draws | None = None,
    ) -> Tensor:
        """Apply the block along a scan index, which has the block's prompts; [B, L, C] to [B, L, C].

        `windows` is for the redundancy dropout; `visible` says whose tokens these are where clips share [1, N, C];
        `draws` decide what is dropped, and None drops nothing.
        """
        mixed_BLC = self._mix(self.norm1(x_BLC), index)
        if self.redundancy is not None and draws is not None:
            assert windows is not None and draws.tokens_BL is not None, "the model lays the windows out, and draws"
            mixed_BLC = self.redundancy(mixed_BLC, windows, _of_tokens(draws.tokens_BL, visible))
        x_BLC = x_BLC + self._drop(mixed_BLC, draws, 0, visible)
        return x_BLC + self._drop(self.mlp(self.norm2(x_BLC)), draws, 1, visible)

    def _mix(self, x_BLC: Tensor, index: ScanIndex) -> Tensor:
        if self.prompt is None:
            return self.mamba(x_BLC, index)
        return strip_prompts(self.mamba(expand_prompts(x_BLC, self.prompt, index), index), index)

    def _drop(self, branch_BLC: Tensor, draws: Draws | None, branch: int, visible: VisibleTokens | None) -> Tensor:
        if draws is None or self.drop_path == 0:
            return branch_BLC
        keep = 1 - self.drop_path
        alive_B1 = draws.branches_B2[:, branch, None] < keep
        # A clip's branch is dropped whole.
        alive_BL = alive_B1 if visible is None else alive_B1[visible.clip_N].T
        return branch_BLC * (alive_BL.unsqueeze(-1).to(branch_BLC.dtype) / keep)


def _of_tokens(numbers_BL: Tensor, visible: VisibleTokens | None) -> Tensor:
    """Take the visible tokens' numbers, [1, N] where clips share it."""
    return numbers_BL if visible is None else visible.pick(numbers_BL.unsqueeze(-1)).squeeze(-1)
