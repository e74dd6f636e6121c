"""The NeuroSTORM-style masked autoencoder on brain-only tokens.

Structure after Wang et al. 2025 (arXiv 2506.11167): patch embedding, stages of shifted-window Mamba blocks with 2×2×2
merging between them, and a decoder that expands back to patches. Time is never merged.

Shape suffixes: B clips · T frames · V brain voxels · S spatial tokens · L = S·T tokens · C channels · P voxels in a
patch.
"""

from collections.abc import Iterable
from math import prod
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from boldforge.kernels import ScanIndex, window_index
from boldforge.pretrain.mamba import Block, ShiftedMamba
from boldforge.pretrain.model_config import MaskToken, ModelConfig, Window
from boldforge.pretrain.neurostorm_dropout import RedundancyDropout, WindowTable, window_table
from boldforge.pretrain.tokens import Stage, TokenGrid, gather_patches, window_places
from boldforge.pretrain.visible import VisibleTokens, visible_tokens

MASK_TOKEN_NAMES: dict[MaskToken, str] = {
    "random": "mask_token",
    "window": "window_mask_token",
    "atlas": "atlas_mask_token",
}
"""The parameter of each mask token."""


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

    def merge_visible(self, x_1NC: Tensor, children_NK: Tensor) -> Tensor:
        """Merge tokens that lie one after the other, clips and frames alike: [1, N, C] and [N', K] to [1, N', 2C]."""
        padded = nn.functional.pad(x_1NC, (0, 0, 0, 1))
        picked = padded.index_select(1, children_NK.flatten()).view(1, len(children_NK), -1)
        return self.reduction(self.norm(picked))


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
        children = children.index_select(1, parent_S * 8 + slot_S)
        # Under autocast LayerNorm gives float32 on CUDA, but bf16 on the CPU: the residual stream is float32 on both.
        return self.norm(children.to(torch.promote_types(children.dtype, torch.float32)))


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

    Attributes
    ----------
    checkpoint_activations : bool
        Keep only the input of every block for the backward pass, which computes the rest again: the same bits, less
        memory, a third more work. False at first.
    """

    patch_voxels: Tensor
    brain_mask_bits: Tensor
    window_places: Tensor

    def __init__(self, config: ModelConfig, token_grid: TokenGrid) -> None:
        super().__init__()
        self.config = config
        self.token_grid = token_grid
        self.checkpoint_activations = False
        self._visible: list[VisibleTokens] = []
        self._indexes: dict[tuple[int, int, Window, Window, torch.device], ScanIndex] = {}
        self._tables: dict[tuple[int, Window, Window, torch.device], WindowTable] = {}
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
        self._make_mask_tokens(dims[-1 if config.encoder_sees == "visible" else 0])
        stages, used = [], 0
        for stage, dim, depth in zip(token_grid.stages, dims, config.depths, strict=True):
            blocks = [self._encoder_block(dim, rate) for rate in rates[used : used + depth]]
            stages.append(EncoderStage(stage, config.frames, dim, blocks))
            used += depth
        self.stages = nn.ModuleList(stages)
        self.merging = nn.ModuleList(PatchMerging(dim) for dim in dims[:-1])
        if config.decoder:
            self._make_decoder(dims, patch)
        for name in config.mask_tokens:
            nn.init.trunc_normal_(getattr(self, MASK_TOKEN_NAMES[name]), std=0.02)

    def _make_mask_tokens(self, dim: int) -> None:
        names = self.config.mask_tokens
        if "random" in names:
            self.mask_token = nn.Parameter(torch.empty(dim))
        if "window" in names:
            self.window_mask_token = nn.Parameter(torch.empty(prod(self.config.window), dim))
            places = window_places(self.token_grid, self.config.window)
            self.register_buffer("window_places", torch.from_numpy(places), persistent=False)
        if "atlas" in names:
            self.atlas_mask_token = nn.Parameter(torch.empty(dim))

    def _make_decoder(self, dims: list[int], patch: int) -> None:
        self.expanding = nn.ModuleList(PatchExpanding(dim) for dim in dims[:0:-1])
        self.decoder = nn.ModuleList(
            nn.ModuleList(self._block(dim, 0.0) for _ in range(depth))
            for dim, depth in zip(dims[-2::-1], self.config.decoder_depths, strict=True)
        )
        self.norm_up = nn.LayerNorm(dims[0])
        self.decoder_pred = nn.Linear(dims[0], patch)

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
            bool [B, L], true where a token is hidden: replaced by the mask token, or where ``encoder_sees: visible``
            not computed at all. None hides nothing.

        Returns
        -------
        Tensor
            [B, S·T, C] tokens of the last stage, row = s·T + t. With ``encoder_sees: visible`` those without any
            visible voxel are the mask token plus the last stage's embeddings.
        """
        if mask_BL is not None and self.config.encoder_sees == "visible":
            return self._encode_visible(values_BTV, mask_BL)
        x_BLC = self.embed_patches(values_BTV, mask_BL)
        for stage in range(self.config.n_stages):
            x_BLC = self.encode_stage(x_BLC, stage)
        return x_BLC

    def _encode_visible(self, values_BTV: Tensor, mask_BL: Tensor) -> Tensor:
        self._check(values_BTV)
        # Kept until the next batch: the backward pass asks for the paths again, and makes anew those that are gone.
        stages = self._visible = visible_tokens(mask_BL, self.token_grid, values_BTV.device)
        x_BLC = self.patch_embed(stages[0].pick(gather_patches(values_BTV, self.patch_voxels)))
        for i, visible in enumerate(stages):
            x_BLC = self.encode_stage(x_BLC, i, visible)
        return stages[-1].fill(x_BLC, self._mask_token() + self._embedding(len(stages) - 1).flatten(1, 2))

    def embed_patches(self, values_BTV: Tensor, mask_BL: Tensor | None = None) -> Tensor:
        """Turn clips [B, T, V] into first-stage tokens [B, L, C], hidden ones replaced; see `encode`."""
        self._check(values_BTV)
        x_BLC = self.patch_embed(gather_patches(values_BTV, self.patch_voxels))
        if mask_BL is not None:
            x_BLC = torch.where(mask_BL.to(x_BLC.device).unsqueeze(-1), self._mask_token().to(x_BLC.dtype), x_BLC)
        return x_BLC

    def encode_stage(self, x_BLC: Tensor, i: int, visible: VisibleTokens | None = None) -> Tensor:
        """Run stage i: its embeddings, its blocks, and (but for the last) the merging into the next stage's tokens.

        With `visible`, tokens are those alone, [1, N, C].
        """
        embedding_1LC = self._embedding(i).flatten(1, 2)
        x_BLC = x_BLC + (embedding_1LC if visible is None else visible.pick(embedding_1LC))
        blocks = cast(EncoderStage, self.stages[i]).blocks
        x_BLC = self._run_blocks(x_BLC, blocks, i, self._encoder_window(i), visible)
        if i == len(self.merging):
            return x_BLC
        merging = cast(PatchMerging, self.merging[i])
        if visible is not None:
            assert visible.children_NK is not None, "only the last stage has no children table"
            return merging.merge_visible(x_BLC, visible.children_NK)
        children = self.get_buffer(f"children_{i}")
        return merging(x_BLC.unflatten(1, (-1, self.config.frames)), children).flatten(1, 2)

    def _embedding(self, i: int) -> Tensor:
        """Return what stage i adds to its tokens: [1, S, T, C]."""
        stage = cast(EncoderStage, self.stages[i])
        return (stage.position + stage.time).unsqueeze(0)

    def decode(self, x_BLC: Tensor) -> Tensor:
        """Expand last-stage tokens [B, L', C'] to patches of voxels [B, L, P].

        Raises
        ------
        ValueError
            If the model is an encoder alone.
        """
        if not self.config.decoder:
            raise ValueError("this model is an encoder alone (decoder: false): it embeds clips, it cannot rebuild them")
        T = self.config.frames
        for step, (expanding, blocks) in enumerate(zip(self.expanding, self.decoder, strict=True)):
            i = self.config.n_stages - 2 - step
            parent, slot = self.get_buffer(f"parent_{i}"), self.get_buffer(f"slot_{i}")
            x_BLC = expanding(x_BLC.unflatten(1, (-1, T)), parent, slot).flatten(1, 2)
            x_BLC = self._run_blocks(x_BLC, cast(nn.ModuleList, blocks), i, self.config.window)
        return self.decoder_pred(self.norm_up(x_BLC))

    def forward(self, values_BTV: Tensor, mask_BL: Tensor | None = None) -> Tensor:
        """Reconstruct clips from their visible tokens: [B, T, V] and bool [B, L] to patches [B, L, P]."""
        return self.decode(self.encode(values_BTV, mask_BL))

    def _mask_token(self) -> Tensor:
        """Return what replaces hidden tokens: [C], or [L, C] where it depends on the place in the window."""
        if not self.config.mask_tokens:
            raise ValueError("this model has no mask token (mask_tokens is empty): nothing can be hidden from it")
        first = self.config.mask_tokens[0]
        token: Tensor = getattr(self, MASK_TOKEN_NAMES[first])
        return token[self.window_places] if first == "window" else token

    def _block(self, dim: int, drop_path: float, **extras: Any) -> Block:
        config = self.config
        mixer = ShiftedMamba(dim, config.d_state, config.d_conv, config.expand, config.backend)
        return Block(dim, mixer, config.mlp_ratio, drop_path, **extras)

    def _encoder_block(self, dim: int, drop_path: float) -> Block:
        redundancy = RedundancyDropout(self.config.redundancy_reach) if self.config.redundancy_dropout else None
        return self._block(dim, drop_path, redundancy=redundancy, prompts=self.config.prompts)

    def _encoder_window(self, stage: int) -> Window:
        last = self.config.last_window if stage == self.config.n_stages - 1 else None
        first = self.config.first_window if stage == 0 else None
        return last or first or self.config.window

    def _run_blocks(
        self,
        x_BLC: Tensor,
        blocks: Iterable[nn.Module],
        stage: int,
        window: Window,
        visible: VisibleTokens | None = None,
    ) -> Tensor:
        grid = (*self.token_grid.stages[stage].grid, self.config.frames)
        fixed = stage == self.config.n_stages - 1 and not self.config.last_shifted
        for number, block in enumerate(blocks):
            shifted = number % 2 == 1 and not fixed
            x, y, z, t = (w // 2 if shifted and g > w else 0 for w, g in zip(window, grid, strict=True))
            place = (stage, window, (x, y, z, t))
            redundancy = self.training and cast(Block, block).redundancy is not None
            prompts = self.config.prompts if cast(Block, block).prompt is not None else 0
            table = self._table(*place, x_BLC.device) if redundancy else None
            if visible is None:
                index = self._index(prompts, *place, x_BLC.device)
            else:
                index = visible.index(self._index(0, *place, torch.device("cpu")), prompts)
                table = table and visible.windows(table)
            if self.checkpoint_activations and torch.is_grad_enabled():
                # The generator's state is kept too, so that the same branches and tokens are dropped again.
                x_BLC = checkpoint(block, x_BLC, index, table, visible, use_reentrant=False)
            else:
                x_BLC = block(x_BLC, index, table, visible)
        return x_BLC

    def _index(self, prompts: int, stage: int, window: Window, shift: Window, device: torch.device) -> ScanIndex:
        key = (prompts, stage, window, shift, device)
        if key not in self._indexes:
            keep = torch.from_numpy(self._keep(stage))
            index = window_index(keep.shape, window, shift, mode=self.config.scan_mode, keep=keep, prompts=prompts)
            self._indexes[key] = index.to(device)
        return self._indexes[key]

    def _table(self, stage: int, window: Window, shift: Window, device: torch.device) -> WindowTable:
        key = (stage, window, shift, device)
        if key not in self._tables:
            keep, restarts = self._keep(stage), self.config.scan_mode == "region"
            self._tables[key] = window_table(keep.shape, window, shift, keep, restarts).to(device)
        return self._tables[key]

    def _keep(self, stage: int) -> np.ndarray:
        """Bool [x, y, z, t]: the tokens of a stage that exist."""
        keep = self.token_grid.stages[stage].keep
        return np.repeat(keep[..., None], self.config.frames, axis=-1)

    def _check(self, values_BTV: Tensor) -> None:
        expected = (self.config.frames, self.token_grid.n_voxels)
        if values_BTV.ndim != 3 or tuple(values_BTV.shape[1:]) != expected:
            raise ValueError(
                f"expected clips [B, {expected[0]} frames, {expected[1]} brain voxels], got {list(values_BTV.shape)}"
            )
