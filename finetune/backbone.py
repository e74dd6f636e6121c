"""A pretrained encoder behind one protocol: clips in, one vector per clip out.

Shape suffixes: B clips · T frames · V brain voxels · S spatial tokens · L = S·T tokens · C channels.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from boldforge.pretrain import NeuroStorm, Pretrained, load_pretrained

Pool = Literal["mean", "mean_std"]


class Backbone(Protocol):
    """An encoder that can be frozen, adapted, and run in two parts.

    ``embed(values)`` equals ``embed_from(encode_until(values, stage), stage)`` for every stage from 0 to ``n_stages``;
    what lies below the first adapted stage is then computed once per clip and kept.
    """

    network: nn.Module
    """The module whose linear layers are adapted; its parameter names are the adapter file's."""
    dim: int
    """C, length of an embedding."""
    n_stages: int
    """Number of stages."""
    data: Mapping[str, Any]
    """The recipe its input must follow: ``grid``, ``tr`` in seconds, ``normalisation``, ``clip_length`` in frames, …"""
    pool: str
    """How tokens become one vector; part of what a head was trained on."""
    weights_hash: str
    """Hash of the pretrained weights; an adapter fits this base and no other."""

    def embed(self, values_BTV: Tensor) -> Tensor:
        """Embed clips [B, T, V] as [B, C]."""

    def encode_until(self, values_BTV: Tensor, stage: int) -> Tensor:
        """Run what lies below `stage`, [B, …]; stage 0 gives the clips back."""

    def embed_from(self, x: Tensor, stage: int) -> Tensor:
        """Run `stage` and all above it, then pool: [B, …] to [B, C]."""

    def linear_layers(self, first_stage: int) -> list[str]:
        """Name the linear layers of ``network`` that `embed` calls in `first_stage` and above."""


class NeuroStormBackbone:
    """A pretrained `NeuroStorm` encoder whose last-stage tokens are pooled over the clip.

    Parameters
    ----------
    pretrained
        What `load_pretrained` returns.
    pool
        ``mean``: mean over tokens. ``mean_std``: that, and beside it the mean over space of the standard deviation
        over time, C = 2 × channels. BOLD with its mean removed says little by its average; what tells people apart is
        how strongly each region fluctuates, which only the second half sees directly.
    """

    def __init__(self, pretrained: Pretrained, pool: Pool = "mean_std") -> None:
        self.network: nn.Module = pretrained.model
        self._encoder: NeuroStorm = pretrained.model
        self.pool: str = pool
        self.n_stages = self._encoder.config.n_stages
        self.dim = self._encoder.dim * (2 if pool == "mean_std" else 1)
        self.data: Mapping[str, Any] = pretrained.config["data"]
        self.weights_hash = pretrained.weights_hash

    def embed(self, values_BTV: Tensor) -> Tensor:
        """Embed clips [B, T, V], normalised as `data` says, as [B, C]."""
        return self.embed_from(values_BTV, 0)

    def encode_until(self, values_BTV: Tensor, stage: int) -> Tensor:
        """Return the clips [B, T, V] for stage 0, else the tokens [B, L, C] that enter `stage` (or leave the last)."""
        if stage == 0:
            return values_BTV
        return self._run(values_BTV, 0, stage)

    def embed_from(self, x: Tensor, stage: int) -> Tensor:
        """Run `stage` and all above it on what `encode_until` gave, and pool over tokens to [B, C]."""
        tokens_BLC = self._run(x, stage, self.n_stages)
        tokens_BSTC = tokens_BLC.unflatten(1, (-1, self._encoder.config.frames))
        mean_BC = tokens_BSTC.mean(dim=(1, 2))
        if self.pool == "mean":
            return mean_BC
        # The small constant keeps the gradient finite where a token does not change over time.
        deviation_BSC = (tokens_BSTC.var(dim=2, unbiased=False) + 1e-8).sqrt()
        return torch.cat([mean_BC, deviation_BSC.mean(dim=1)], dim=-1)

    def linear_layers(self, first_stage: int) -> list[str]:
        """Name the encoder's linear layers from `first_stage` on; the decoder is never called here, so never named."""
        parts = ["patch_embed"] if first_stage == 0 else []
        parts += [f"{kind}.{i}" for i in range(first_stage, self.n_stages) for kind in ("stages", "merging")]
        return [
            name
            for name, module in self.network.named_modules()
            if isinstance(module, nn.Linear) and any(f"{name}.".startswith(f"{part}.") for part in parts)
        ]

    def _run(self, x: Tensor, start: int, stop: int) -> Tensor:
        if start == 0:
            x = self._encoder.embed_patches(x)
        for stage in range(start, stop):
            x = self._encoder.encode_stage(x, stage)
        return x


def load_backbone(folder: str | Path, pool: Pool = "mean_std") -> NeuroStormBackbone:
    """Load a pretrained encoder, frozen and in evaluation mode.

    Parameters
    ----------
    folder
        An export or release folder (``config.json`` and ``model.safetensors``), or the run folder around ``export/``.
    pool
        See `NeuroStormBackbone`.

    Raises
    ------
    BoldForgeError
        If the folder does not hold a model of this format.
    """
    folder = Path(folder)
    inside = folder / "export"
    run_folder = inside.is_dir() and not (folder / "config.json").exists()
    backbone = NeuroStormBackbone(load_pretrained(inside if run_folder else folder), pool)
    backbone.network.requires_grad_(False).eval()
    return backbone
