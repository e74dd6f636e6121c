"""The NeuroSTORM-style masked autoencoder on brain-only tokens.

Structure after Wang et al. 2025 (arXiv 2506.11167): patch embedding, stages of shifted-window Mamba blocks with 2×2×2
merging between them, and a decoder that expands back to patches. Time is never merged.

Shape suffixes: B clips · T frames · V brain voxels · S spatial tokens · L = S·T tokens · C channels · P voxels in a
patch.
"""

from collections.abc import Iterable
from typing import Annotated, Literal, cast

import numpy as np
import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from boldforge.configs import ConfigError, StrictModel
from boldforge.kernels import ScanIndex, window_index
from boldforge.pretrain.mamba import Block, ShiftedMamba
from boldforge.pretrain.tokens import Stage, TokenGrid, gather_patches

Edge = Annotated[int, Field(ge=1)]
Window = tuple[Edge, Edge, Edge, Edge]


class ModelConfig(StrictModel):
    """Shape of the network; see the fields for units and reasons."""

    patch_mm: float = Field(12.0, gt=0, description="Edge of a patch in mm; 12 mm is NeuroSTORM's 6 voxels at 2 mm.")
    frames: int = Field(20, ge=1, description="T, frames per clip; one token per patch and frame.")
    embed_dim: int = Field(
        32, ge=2, description="C of the first stage; doubles at every merging. A multiple of 32 suits the kernels."
    )
    depths: tuple[Edge, ...] = Field((2, 2, 6, 2), description="Blocks per encoder stage.")
    decoder_depths: tuple[Edge, ...] = Field(
        (6, 2, 2), description="Blocks per decoder stage, coarse to fine; one fewer than the encoder's."
    )
    window: Window = Field((4, 4, 4, 4), description="Tokens per window along x, y, z, t; clipped to the grid.")
    last_window: Window | None = Field(None, description="Window of the last encoder stage, if another.")
    scan_mode: Literal["region", "wrap"] = Field(
        "region",
        description="At a shifted window's seam: restart the scan (region), or run on as NeuroSTORM does (wrap).",
    )
    d_state: int = Field(16, ge=1, le=64, description="N, states per inner channel.")
    d_conv: int = Field(4, ge=1, le=8, description="Width of the causal convolution, in tokens.")
    expand: int = Field(2, ge=1, description="Inner channels per channel.")
    mlp_ratio: float = Field(4.0, gt=0, description="Hidden units of the MLP per channel.")
    drop_path: float = Field(0.0, ge=0, lt=1, description="Largest stochastic-depth rate; grows linearly with depth.")
    backend: str = Field("auto", description="Scan backend; auto takes the fastest that runs here.")

    @model_validator(mode="after")
    def _decoder_mirrors_encoder(self) -> "ModelConfig":
        if len(self.decoder_depths) != len(self.depths) - 1:
            raise ValueError(
                f"decoder_depths has {len(self.decoder_depths)} entries, expected one fewer than depths: "
                f"{len(self.depths) - 1}"
            )
        return self

    @property
    def n_stages(self) -> int:
        """Number of encoder stages."""
        return len(self.depths)

    def patch_size(self, voxel_mm: float) -> tuple[int, int, int]:
        """Voxels per patch along x, y, z for voxels of this edge in mm.

        Raises
        ------
        ConfigError
            If a patch is not a whole number of voxels.
        """
        edge = round(self.patch_mm / voxel_mm)
        if edge < 1 or abs(edge * voxel_mm - self.patch_mm) > 1e-3 * voxel_mm:
            raise ConfigError(
                f"model.patch_mm is {self.patch_mm:g}, no multiple of the grid's voxels of {voxel_mm:g} mm; use "
                f"{max(1, edge) * voxel_mm:g}, or shard on another grid."
            )
        return edge, edge, edge


class PatchMerging(nn.Module):
    """Concatenate 2×2×2 children (missing ones are zero), LayerNorm, Linear 8C to 2C without bias."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(8 * dim)
        self.reduction = nn.Linear(8 * dim, 2 * dim, bias=False)

    def forward(self, x_BSTC: Tensor, children_S8: Tensor) -> Tensor:
        """[B, S, T, C] and int64 [S', 8] to [B, S', T, 2C]."""
        padded = nn.functional.pad(x_BSTC, (0, 0, 0, 0, 0, 1))
        B, _, T, C = x_BSTC.shape
        picked = padded.index_select(1, children_S8.reshape(-1)).view(B, -1, 8, T, C)
        return self.reduction(self.norm(picked.transpose(2, 3).flatten(3)))


class PatchExpanding(nn.Module):
    """Linear C to 4C without bias, seen as 8 children of C/2 channels, LayerNorm; children outside the brain vanish."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.expand = nn.Linear(dim, 4 * dim, bias=False)
        self.norm = nn.LayerNorm(dim // 2)

    def forward(self, x_BSTC: Tensor, parent_S: Tensor, slot_S: Tensor) -> Tensor:
        """[B, S', T, C] and int64 [S] twice to [B, S, T, C/2]."""
        B, S, T, C = x_BSTC.shape
        children = self.expand(x_BSTC).view(B, S, T, 8, C // 2).transpose(2, 3).reshape(B, S * 8, T, C // 2)
        return self.norm(children.index_select(1, parent_S * 8 + slot_S))


class EncoderStage(nn.Module):
    """Position and time embeddings, then blocks; odd blocks scan shifted windows."""

    def __init__(self, stage: Stage, frames: int, dim: int, blocks: list[Block]) -> None:
        super().__init__()
        self.position = nn.Parameter(torch.empty(stage.n_tokens, 1, dim))
        self.time = nn.Parameter(torch.empty(1, frames, dim))
        nn.init.trunc_normal_(self.position, std=0.02)
        nn.init.trunc_normal_(self.time, std=0.02)
        self.blocks = nn.ModuleList(blocks)


class NeuroStorm(nn.Module):
    """Masked autoencoder for 4D fMRI.

    Parameters
    ----------
    config
        Shape of the network.
    token_grid
        Tokens of a clip; ``config.frames`` frames, ``config.n_stages`` stages.
    """

    patch_voxels: Tensor
    brain_mask_bits: Tensor

    def __init__(self, config: ModelConfig, token_grid: TokenGrid) -> None:
        super().__init__()
        self.config = config
        self.token_grid = token_grid
        self._indexes: dict[tuple[int, bool, torch.device], ScanIndex] = {}
        patch_voxels = torch.from_numpy(token_grid.patch_voxels)
        patch = patch_voxels.shape[1]
        dims = [config.embed_dim * 2**i for i in range(config.n_stages)]
        rates = np.linspace(0, config.drop_path, sum(config.depths)).tolist()

        self.register_buffer("patch_voxels", patch_voxels, persistent=False)
        packed = np.packbits(token_grid.mask.reshape(-1))
        self.register_buffer("brain_mask_bits", torch.from_numpy(packed))
        for i in range(config.n_stages - 1):
            self.register_buffer(f"children_{i}", torch.from_numpy(token_grid.children[i]), persistent=False)
            self.register_buffer(f"parent_{i}", torch.from_numpy(token_grid.parent[i]), persistent=False)
            self.register_buffer(f"slot_{i}", torch.from_numpy(token_grid.slot[i]), persistent=False)

        self.patch_embed = nn.Linear(patch, dims[0])
        self.mask_token = nn.Parameter(torch.zeros(dims[0]))
        stages, used = [], 0
        for stage, dim, depth in zip(token_grid.stages, dims, config.depths, strict=True):
            blocks = [self._block(dim, rate) for rate in rates[used : used + depth]]
            stages.append(EncoderStage(stage, config.frames, dim, blocks))
            used += depth
        self.stages = nn.ModuleList(stages)
        self.merging = nn.ModuleList(PatchMerging(dim) for dim in dims[:-1])
        self.expanding = nn.ModuleList(PatchExpanding(dim) for dim in dims[:0:-1])
        self.decoder = nn.ModuleList(
            nn.ModuleList(self._block(dim, 0.0) for _ in range(depth))
            for dim, depth in zip(dims[-2::-1], config.decoder_depths, strict=True)
        )
        self.norm_up = nn.LayerNorm(dims[0])
        self.decoder_pred = nn.Linear(dims[0], patch)
        nn.init.trunc_normal_(self.mask_token, std=0.02)

    @property
    def dim(self) -> int:
        """C of the last encoder stage."""
        return self.config.embed_dim * 2 ** (self.config.n_stages - 1)

    def encode(self, values_BTV: Tensor, mask_BL: Tensor | None = None) -> Tensor:
        """Encode clips.

        Parameters
        ----------
        values_BTV
            Normalised brain-voxel values [B, T, V].
        mask_BL
            bool [B, L], true where a token is replaced by the mask token; None hides nothing.

        Returns
        -------
        Tensor
            [B, S·T, C] tokens of the last stage, row = s·T + t.
        """
        x_BLC = self.embed_patches(values_BTV, mask_BL)
        for stage in range(self.config.n_stages):
            x_BLC = self.encode_stage(x_BLC, stage)
        return x_BLC

    def embed_patches(self, values_BTV: Tensor, mask_BL: Tensor | None = None) -> Tensor:
        """Turn clips [B, T, V] into first-stage tokens [B, L, C], hidden ones replaced; see `encode`."""
        self._check(values_BTV)
        x_BLC = self.patch_embed(gather_patches(values_BTV, self.patch_voxels))
        if mask_BL is not None:
            x_BLC = torch.where(mask_BL.unsqueeze(-1), self.mask_token.to(x_BLC.dtype), x_BLC)
        return x_BLC

    def encode_stage(self, x_BLC: Tensor, i: int) -> Tensor:
        """Run stage i: its embeddings, its blocks, and (but for the last) the merging into the next stage's tokens."""
        stage, T = cast(EncoderStage, self.stages[i]), self.config.frames
        x_BLC = (x_BLC.unflatten(1, (-1, T)) + (stage.position + stage.time)).flatten(1, 2)
        x_BLC = self._run_blocks(x_BLC, stage.blocks, i)
        if i < len(self.merging):
            children = self.get_buffer(f"children_{i}")
            x_BLC = self.merging[i](x_BLC.unflatten(1, (-1, T)), children).flatten(1, 2)
        return x_BLC

    def decode(self, x_BLC: Tensor) -> Tensor:
        """Expand last-stage tokens [B, L', C'] to patches of voxels [B, L, P]."""
        T = self.config.frames
        for step, (expanding, blocks) in enumerate(zip(self.expanding, self.decoder, strict=True)):
            i = self.config.n_stages - 2 - step
            parent, slot = self.get_buffer(f"parent_{i}"), self.get_buffer(f"slot_{i}")
            x_BLC = expanding(x_BLC.unflatten(1, (-1, T)), parent, slot).flatten(1, 2)
            x_BLC = self._run_blocks(x_BLC, cast(nn.ModuleList, blocks), i)
        return self.decoder_pred(self.norm_up(x_BLC))

    def forward(self, values_BTV: Tensor, mask_BL: Tensor | None = None) -> Tensor:
        """Reconstruct clips from their visible tokens: [B, T, V] and bool [B, L] to patches [B, L, P]."""
        return self.decode(self.encode(values_BTV, mask_BL))

    def _block(self, dim: int, drop_path: float) -> Block:
        config = self.config
        mixer = ShiftedMamba(dim, config.d_state, config.d_conv, config.expand, config.backend)
        return Block(dim, mixer, config.mlp_ratio, drop_path)

    def _run_blocks(self, x_BLC: Tensor, blocks: Iterable[nn.Module], stage: int) -> Tensor:
        for number, block in enumerate(blocks):
            x_BLC = block(x_BLC, self._index(stage, shifted=number % 2 == 1, device=x_BLC.device))
        return x_BLC

    def _index(self, stage: int, shifted: bool, device: torch.device) -> ScanIndex:
        key = (stage, shifted, device)
        if key not in self._indexes:
            config, tokens = self.config, self.token_grid.stages[stage]
            last = stage == config.n_stages - 1
            window = config.last_window if last and config.last_window else config.window
            grid = (*tokens.grid, config.frames)
            keep = torch.from_numpy(tokens.keep).unsqueeze(-1).expand(grid)
            shift = tuple(w // 2 if shifted and g > w else 0 for w, g in zip(window, grid, strict=True))
            self._indexes[key] = window_index(grid, window, shift, mode=config.scan_mode, keep=keep).to(device)
        return self._indexes[key]

    def _check(self, values_BTV: Tensor) -> None:
        expected = (self.config.frames, self.token_grid.n_voxels)
        if values_BTV.ndim != 3 or tuple(values_BTV.shape[1:]) != expected:
            raise ValueError(
                f"expected clips [B, {expected[0]} frames, {expected[1]} brain voxels], got {list(values_BTV.shape)}"
            )
