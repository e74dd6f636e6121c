"""The NeuroSTORM-style masked autoencoder on brain-only tokens.

Structure after Wang et al. 2025 (arXiv 2506.11167): patch embedding, stages of shifted-window Mamba blocks with 2×2×2
merging between them, and a decoder that expands back to patches. Time is merged only where `ModelConfig.merge_time`
says so; a stage's T is then smaller than the clip's.

Shape suffixes: B clips · T frames · V brain voxels · S spatial tokens · L = S·T tokens · C channels · P voxels in a
patch.
"""

from collections.abc import Iterable, Sequence
from math import prod
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from boldforge.pretrain.draws import ClipKey, Draws, draw
from boldforge.pretrain.embeddings import PositionInMillimetres, TimeInSeconds, seconds_per_frame
from boldforge.pretrain.mamba import Block, ShiftedMamba
from boldforge.pretrain.merging import PatchExpanding, PatchMerging, frames_at
from boldforge.pretrain.model_config import MaskToken, ModelConfig, Window
from boldforge.pretrain.neurostorm_dropout import RedundancyDropout
from boldforge.pretrain.patch_lattice import PatchLattice
from boldforge.pretrain.scan_paths import ScanPaths
from boldforge.pretrain.tokens import TokenGrid, gather_patches, window_places
from boldforge.pretrain.visible import VisibleTokens, visible_tokens

MASK_TOKEN_NAMES: dict[MaskToken, str] = {
    "random": "mask_token",
    "window": "window_mask_token",
    "atlas": "atlas_mask_token",
}
"""The parameter of each mask token."""


class EncoderStage(nn.Module):
    """Position and time embeddings, then blocks; odd blocks scan shifted windows.

    Parameters
    ----------
    config, token_grid
        Of the network.
    number
        Of the stage, counted from 0.
    dim
        C.
    blocks
        The stage's blocks.
    """

    position: nn.Parameter | PositionInMillimetres
    time: nn.Parameter | TimeInSeconds

    def __init__(self, config: ModelConfig, token_grid: TokenGrid, number: int, dim: int, blocks: list[Block]) -> None:
        super().__init__()
        frames = frames_at(number, config.frames, config.frames_joined)
        if config.position == "mm":
            edge = config.patch_mm * 2**number
            self.position = PositionInMillimetres(token_grid.centres(number), edge, dim)
        else:
            self.position = nn.Parameter(torch.empty(token_grid.stages[number].n_tokens, 1, dim))
            nn.init.trunc_normal_(self.position, std=0.02)
        if config.time == "seconds":
            self.time = TimeInSeconds(dim, prod(config.frames_joined[:number]))
        else:
            self.time = nn.Parameter(torch.empty(1, frames, dim))
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
        self._paths = ScanPaths(config, token_grid)
        patch_voxels = torch.from_numpy(token_grid.patch_voxels)
        patch, lattice = patch_voxels.shape[1], config.patch_points
        self.lattice: PatchLattice | None = None
        if lattice is not None and lattice**3 != patch:
            self.lattice = PatchLattice(token_grid.patch_voxels, token_grid.n_voxels, lattice)
            patch = lattice**3
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
        for number, (dim, depth) in enumerate(zip(dims, config.depths, strict=True)):
            blocks = [self._encoder_block(dim, rate) for rate in rates[used : used + depth]]
            stages.append(EncoderStage(config, token_grid, number, dim, blocks))
            used += depth
        self.stages = nn.ModuleList(stages)
        joined = config.frames_joined
        self.merging = nn.ModuleList(PatchMerging(dim, times) for dim, times in zip(dims[:-1], joined, strict=True))
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
            # One window's worth of frames: any clip repeats them.
            places = window_places(self.token_grid, self.config.window, self.config.window[3])
            self.register_buffer("window_places", torch.from_numpy(places), persistent=False)
        if "atlas" in names:
            self.atlas_mask_token = nn.Parameter(torch.empty(dim))

    def _make_decoder(self, dims: list[int], patch: int) -> None:
        joined = self.config.frames_joined[::-1]
        self.expanding = nn.ModuleList(
            PatchExpanding(dim, times) for dim, times in zip(dims[:0:-1], joined, strict=True)
        )
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

    def encode(
        self,
        values_BTV: Tensor,
        mask_BL: Tensor | None = None,
        tr: float | Tensor | None = None,
        keys: Sequence[ClipKey] | None = None,
    ) -> Tensor:
        """Encode clips.

        Parameters
        ----------
        values_BTV
            Normalised brain-voxel values [B, T, V]. T is ``config.frames``; with ``time: seconds`` it may be another.
        mask_BL
            bool [B, L], true where a token is hidden: replaced by the mask token, or where ``encoder_sees: visible``
            not computed at all. None hides nothing.
        tr
            Seconds per frame, one number or [B]; only a model with ``time: seconds`` looks at it, and needs it.
        keys
            What names each clip, so that while training stochastic depth and redundancy dropout drop the same of it
            in whatever batch it is. None: they draw from torch's global generator.

        Returns
        -------
        Tensor
            [B, S·T, C] tokens of the last stage, row = s·T + t. With ``encoder_sees: visible`` those without any
            visible voxel are the mask token plus the last stage's embeddings.

        Raises
        ------
        ValueError
            If the clips are of another shape than the model reads, or `tr` is missing where it is needed.
        """
        if mask_BL is not None and self.config.encoder_sees == "visible":
            return self._encode_visible(values_BTV, mask_BL, tr, keys)
        x_BLC = self.embed_patches(values_BTV, mask_BL)
        for stage in range(self.config.n_stages):
            x_BLC = self.encode_stage(x_BLC, stage, tr, keys=keys)
        return x_BLC

    def _encode_visible(
        self, values_BTV: Tensor, mask_BL: Tensor, tr: float | Tensor | None, keys: Sequence[ClipKey] | None
    ) -> Tensor:
        self._check(values_BTV)
        # Kept until the next batch: the backward pass asks for the paths again, and makes anew those that are gone.
        stages = visible_tokens(mask_BL, self.token_grid, values_BTV.device, self.config.frames_joined)
        self._visible = stages
        if mask_BL.shape[1] != values_BTV.shape[1] * self.token_grid.stages[0].n_tokens:
            raise ValueError(f"the mask {list(mask_BL.shape)} has other frames than the clips {list(values_BTV.shape)}")
        x_BLC = self.patch_embed(stages[0].pick(self._patches(values_BTV)))
        for i, visible in enumerate(stages):
            x_BLC = self.encode_stage(x_BLC, i, tr, visible, keys)
        last = len(stages) - 1
        T = frames_at(last, values_BTV.shape[1], self.config.frames_joined)
        hidden_BLC = self._mask_token(T) + self._embedding(last, T, len(values_BTV), tr).flatten(1, 2)
        return stages[last].fill(x_BLC, hidden_BLC)

    def embed_patches(self, values_BTV: Tensor, mask_BL: Tensor | None = None) -> Tensor:
        """Turn clips [B, T, V] into first-stage tokens [B, L, C], hidden ones replaced; see `encode`."""
        self._check(values_BTV)
        x_BLC = self.patch_embed(self._patches(values_BTV))
        if mask_BL is not None:
            token = self._mask_token(values_BTV.shape[1]).to(x_BLC.dtype)
            x_BLC = torch.where(mask_BL.to(x_BLC.device).unsqueeze(-1), token, x_BLC)
        return x_BLC

    def _patches(self, values_BTV: Tensor) -> Tensor:
        """Cut clips into patches, on the points where the weights live: [B, L, Q]."""
        patches_BLP = gather_patches(values_BTV, self.patch_voxels)
        return patches_BLP if self.lattice is None else self.lattice.read(patches_BLP)

    def encode_stage(
        self,
        x_BLC: Tensor,
        i: int,
        tr: float | Tensor | None = None,
        visible: VisibleTokens | None = None,
        keys: Sequence[ClipKey] | None = None,
    ) -> Tensor:
        """Run stage i: its embeddings, its blocks, and (but for the last) the merging into the next stage's tokens.

        With `visible`, tokens are those alone, [1, N, C]; for `keys` see `encode`.
        """
        clips, n_tokens = x_BLC.shape[:2] if visible is None else visible.visible_BL.shape
        T = n_tokens // self.token_grid.stages[i].n_tokens
        embedding_BLC = self._embedding(i, T, clips, tr).flatten(1, 2)
        x_BLC = x_BLC + (embedding_BLC if visible is None else visible.pick(embedding_BLC))
        blocks = cast(EncoderStage, self.stages[i]).blocks
        x_BLC = self._run_blocks(x_BLC, blocks, i, T, self._encoder_window(i), visible, keys)
        if i == len(self.merging):
            return x_BLC
        merging = cast(PatchMerging, self.merging[i])
        if visible is not None:
            assert visible.children_NK is not None, "only the last stage has no children table"
            return merging.merge_visible(x_BLC, visible.children_NK)
        return merging(x_BLC.unflatten(1, (-1, T)), self.get_buffer(f"children_{i}")).flatten(1, 2)

    def _embedding(self, i: int, frames: int, clips: int, tr: float | Tensor | None) -> Tensor:
        """Return what stage i adds to its tokens: [1, S, T, C], or [B, S, T, C] where time is in seconds."""
        stage = cast(EncoderStage, self.stages[i])
        position = stage.position() if isinstance(stage.position, PositionInMillimetres) else stage.position
        if not isinstance(stage.time, TimeInSeconds):
            return (position + stage.time).unsqueeze(0)
        return position + stage.time(frames, seconds_per_frame(tr, clips, position.device))

    def decode(self, x_BLC: Tensor, frames: int | None = None) -> Tensor:
        """Expand last-stage tokens [B, L', C'] to patches of voxels [B, L, P].

        The clips had `frames` frames, ``config.frames`` unless given: an odd number cannot be told from the tokens.

        Raises
        ------
        ValueError
            If the model is an encoder alone.
        """
        if not self.config.decoder:
            raise ValueError("this model is an encoder alone (decoder: false): it embeds clips, it cannot rebuild them")
        frames = frames or self.config.frames
        for step, (expanding, blocks) in enumerate(zip(self.expanding, self.decoder, strict=True)):
            i = self.config.n_stages - 2 - step
            parent, slot = self.get_buffer(f"parent_{i}"), self.get_buffer(f"slot_{i}")
            T = frames_at(i, frames, self.config.frames_joined)
            coarse = x_BLC.unflatten(1, (self.token_grid.stages[i + 1].n_tokens, -1))
            x_BLC = expanding(coarse, parent, slot, T).flatten(1, 2)
            x_BLC = self._run_blocks(x_BLC, cast(nn.ModuleList, blocks), i, T, self.config.window)
        patches_BLQ = self.decoder_pred(self.norm_up(x_BLC))
        return patches_BLQ if self.lattice is None else self.lattice.write(patches_BLQ)

    def forward(
        self,
        values_BTV: Tensor,
        mask_BL: Tensor | None = None,
        tr: float | Tensor | None = None,
        keys: Sequence[ClipKey] | None = None,
    ) -> Tensor:
        """Reconstruct clips from their visible tokens: [B, T, V] and bool [B, L] to patches [B, L, P]; see `encode`."""
        return self.decode(self.encode(values_BTV, mask_BL, tr, keys), values_BTV.shape[1])

    def _mask_token(self, frames: int | None = None) -> Tensor:
        """Return what replaces hidden tokens: [C], or [L, C] where it depends on the place in the window."""
        frames = frames or self.config.frames
        if not self.config.mask_tokens:
            raise ValueError("this model has no mask token (mask_tokens is empty): nothing can be hidden from it")
        first = self.config.mask_tokens[0]
        token: Tensor = getattr(self, MASK_TOKEN_NAMES[first])
        if first != "window":
            return token
        period = self.config.window[3]
        frame_T = torch.arange(frames, device=token.device) % period
        return token[self.window_places.view(-1, period)[:, frame_T].flatten()]

    def _block(self, dim: int, drop_path: float, **extras: Any) -> Block:
        config = self.config
        sizes = (config.d_state, config.d_conv, config.expand)
        mixer = ShiftedMamba(dim, *sizes, config.backend, config.bidirectional)
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
        frames: int,
        window: Window,
        visible: VisibleTokens | None = None,
        keys: Sequence[ClipKey] | None = None,
    ) -> Tensor:
        clips, n_tokens = x_BLC.shape[:2] if visible is None else visible.visible_BL.shape
        fixed = stage == self.config.n_stages - 1 and not self.config.last_shifted
        for number, block in enumerate(blocks):
            place = self._paths.place(stage, frames, window, shifted=number % 2 == 1 and not fixed)
            redundancy = self.training and cast(Block, block).redundancy is not None
            draws: Draws | None = None
            if redundancy or (self.training and cast(Block, block).drop_path):
                draws = draw(clips, n_tokens if redundancy else 0, x_BLC.device, (stage, number), keys)
            prompts = self.config.prompts if cast(Block, block).prompt is not None else 0
            table = self._paths.table(place, x_BLC.device) if redundancy else None
            if visible is None:
                index = self._paths.index(place, x_BLC.device, prompts)
            else:
                index = visible.index(self._paths.index(place, torch.device("cpu")), prompts)
                table = table and visible.windows(table)
            if self.checkpoint_activations and torch.is_grad_enabled():
                # What is dropped is drawn outside, so that it is dropped again.
                x_BLC = checkpoint(block, x_BLC, index, table, visible, draws, use_reentrant=False)
            else:
                x_BLC = block(x_BLC, index, table, visible, draws)
        return x_BLC

    def _check(self, values_BTV: Tensor) -> None:
        frames, V = self.config.frames, self.token_grid.n_voxels
        found = list(values_BTV.shape)
        if self.config.time == "seconds":
            fewest = self.config.fewest_frames
            if len(found) != 3 or found[1] < fewest or found[2] != V:
                raise ValueError(f"expected clips [B, {fewest} frames or more, {V} brain voxels], got {found}")
        elif len(found) != 3 or found[1:] != [frames, V]:
            raise ValueError(f"expected clips [B, {frames} frames, {V} brain voxels], got {found}")
