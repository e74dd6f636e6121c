"""A pretrained encoder behind one protocol: clips in, one vector per clip out.

Shape suffixes: B clips · T frames · V brain voxels · S spatial tokens · L = S·T tokens · C channels.
"""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from boldforge.data_shards import get_grid
from boldforge.finetune.errors import FinetuneError
from boldforge.pretrain import NeuroStorm, Pretrained, load_pretrained, move_to_grid
from boldforge.pretrain.neurostorm_prompts import add_prompts

Pool = Literal["mean", "mean_std", "multiscale", "tokens", "tokens_std"]

POOL_CHOICES = (
    "mean: mean over the last stage's tokens. mean_std: that, and the mean over space of their standard deviation over "
    "time. multiscale: mean, and that deviation at every stage, because the LayerNorm of each merging takes away how "
    "strongly a token fluctuates, which is most of what BOLD without its mean says about a person. tokens: every "
    "token of the last stage, mean over time, side by side: where something happens, for the conditions of a task. "
    "tokens_std: that, and every token's standard deviation over time, for who somebody is."
)


class Partway(NamedTuple):
    """A batch on its way through an encoder.

    ``x`` [B, …] enters the next stage; ``pooled`` [B, P] is what has been pooled from the stages behind it, P ≥ 0.
    """

    x: Tensor
    pooled: Tensor


class Backbone(Protocol):
    """An encoder that can be frozen, adapted, and run in two parts.

    ``embed(values)`` equals ``embed_from(encode_until(values, stage), stage)`` for every stage from 0 to ``n_stages``;
    what lies below the first adapted stage is then computed once per clip and kept.
    """

    network: nn.Module
    """The module whose layers are adapted; its parameter names are the adapter file's."""
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

    def encode_until(self, values_BTV: Tensor, stage: int) -> Partway:
        """Run what lies below `stage`; stage 0 gives the clips back."""

    def embed_from(self, partway: Partway, stage: int) -> Tensor:
        """Run `stage` and all above it, then pool, to [B, C]."""

    def adaptable_layers(self, first_stage: int) -> list[str]:
        """Name the linear layers and 3D convolutions of ``network`` that `embed` calls in `first_stage` and above."""

    def stage_parameters(self, first_stage: int) -> list[str]:
        """Name the parameters of ``network`` that `embed` uses in `first_stage` and above."""


def parameters_of(network: nn.Module, parts: list[str]) -> list[str]:
    """Name the parameters of the modules or parameters called `parts`, in the network's order."""
    return [name for name, _ in network.named_parameters() if any(f"{name}.".startswith(f"{part}.") for part in parts)]


class NeuroStormBackbone:
    """A pretrained `NeuroStorm` encoder whose last-stage tokens are pooled over the clip.

    Parameters
    ----------
    pretrained
        What `load_pretrained` returns.
    pool
        ``mean``: mean over tokens. ``mean_std``: that, and beside it the mean over space of the standard deviation
        over time. ``multiscale``: the mean, and that deviation of the tokens that enter every stage and leave the last.
        BOLD with its mean removed says little by its average; what tells people apart is how strongly it fluctuates,
        and the LayerNorm of every merging takes that away, so it is read at each stage before it is gone. ``tokens``:
        every last-stage token's mean over time, one after the other, S · C numbers. ``tokens_std``: that, and its
        standard deviation over time.
    """

    def __init__(self, pretrained: Pretrained, pool: Pool = "multiscale") -> None:
        self.network: nn.Module = pretrained.model
        self._encoder: NeuroStorm = pretrained.model
        self.pool: str = pool
        self.n_stages = self._encoder.config.n_stages
        dims = [self._encoder.config.embed_dim * 2**i for i in range(self.n_stages)]
        deviations = {"mean": 0, "mean_std": dims[-1], "multiscale": sum(dims) + dims[-1], "tokens": 0, "tokens_std": 0}
        last = self._encoder.token_grid.stages[-1].n_tokens
        per_token = {"tokens": 1, "tokens_std": 2}
        self.dim = per_token[pool] * last * dims[-1] if pool in per_token else dims[-1] + deviations[pool]
        self.any_length = self._encoder.config.time == "seconds"
        self.fewest_frames = self._encoder.config.fewest_frames
        self.data: Mapping[str, Any] = pretrained.config["data"]
        self.weights_hash = pretrained.weights_hash

    def embed(self, values_BTV: Tensor) -> Tensor:
        """Embed clips [B, T, V], normalised as `data` says, as [B, C]."""
        return self.embed_from(self.encode_until(values_BTV, 0), 0)

    def encode_until(self, values_BTV: Tensor, stage: int) -> Partway:
        """Return the clips [B, T, V] for stage 0, else the tokens [B, L, C] that enter `stage` (or leave the last)."""
        start = Partway(values_BTV, values_BTV.new_zeros(len(values_BTV), 0))
        return start if stage == 0 else self._run(start, 0, stage)

    def embed_from(self, partway: Partway, stage: int) -> Tensor:
        """Run `stage` and all above it on what `encode_until` gave, and pool to [B, C]."""
        tokens_BLC, pooled_BP = self._run(partway, stage, self.n_stages)
        if self.pool in ("tokens", "tokens_std"):
            tokens_BSTC = tokens_BLC.unflatten(1, (self._encoder.token_grid.stages[-1].n_tokens, -1))
            each = [tokens_BSTC.mean(dim=2).flatten(1)]
            if self.pool == "tokens_std":
                each.append((tokens_BSTC.var(dim=2, unbiased=False) + 1e-8).sqrt().flatten(1))
            return torch.cat(each, dim=-1)
        parts = [tokens_BLC.mean(dim=1)]
        if self.pool != "mean":
            parts += [pooled_BP, self._deviation(tokens_BLC, self.n_stages - 1)]
        return torch.cat(parts, dim=-1)

    def adaptable_layers(self, first_stage: int) -> list[str]:
        """Name the encoder's linear layers from `first_stage` on; the decoder is never called here, so never named."""
        parts = self._parts(first_stage)
        return [
            name
            for name, module in self.network.named_modules()
            if isinstance(module, nn.Linear) and any(f"{name}.".startswith(f"{part}.") for part in parts)
        ]

    def stage_parameters(self, first_stage: int) -> list[str]:
        """Name the encoder's parameters from `first_stage` on."""
        return parameters_of(self.network, self._parts(first_stage))

    def add_prompts(self, length: int, first_stage: int) -> list[str]:
        """Put learned tokens before every window of the blocks from `first_stage` on, and name them.

        Raises
        ------
        FinetuneError
            If the encoder was pretrained with prompts.
        """
        if self._encoder.config.prompts:
            raise FinetuneError(
                f"this encoder brings {self._encoder.config.prompts} prompts of its own; set adapter.kind to lora or "
                "partial."
            )
        prompted = add_prompts(self._encoder, length)
        for stage in range(first_stage):
            # What lies below the first adapted stage is computed without any.
            for block in prompted.stages[stage].blocks:  # type: ignore[union-attr]
                block.prompt = None
        prompted.requires_grad_(False)
        self.network = self._encoder = prompted
        return [name for name, _ in prompted.named_parameters() if name.endswith(".prompt")]

    def _parts(self, first_stage: int) -> list[str]:
        parts = ["patch_embed"] if first_stage == 0 else []
        return parts + [f"{kind}.{i}" for i in range(first_stage, self.n_stages) for kind in ("stages", "merging")]

    def _run(self, partway: Partway, start: int, stop: int) -> Partway:
        x, pooled_BP = partway
        if start == 0 and stop > 0:
            x = self._encoder.embed_patches(x)
        for stage in range(start, stop):
            if self.pool == "multiscale":
                pooled_BP = torch.cat([pooled_BP, self._deviation(x, stage)], dim=-1)
            x = self._encoder.encode_stage(x, stage, self.data.get("tr"))
        return Partway(x, pooled_BP)

    def _deviation(self, tokens_BLC: Tensor, stage: int) -> Tensor:
        tokens_BSTC = tokens_BLC.unflatten(1, (self._encoder.token_grid.stages[stage].n_tokens, -1))
        # The small constant keeps the gradient finite where a token does not change over time.
        return (tokens_BSTC.var(dim=2, unbiased=False) + 1e-8).sqrt().mean(dim=1)


def load_backbone(
    folder: str | Path, pool: Pool = "multiscale", data: Mapping[str, Any] | None = None
) -> NeuroStormBackbone:
    """Load a pretrained encoder, frozen and in evaluation mode.

    Parameters
    ----------
    folder
        An export or release folder (``config.json`` and ``model.safetensors``), or the run folder around ``export/``.
    pool
        See `NeuroStormBackbone`.
    data
        Of the shards it shall read: ``grid``, ``tr``, and ``clip_length`` if it shall not be the encoder's own. An
        encoder takes over what it can (another grid with ``position: mm``, another TR and length with ``time:
        seconds``) and its `data` says so; whether the rest fits, `check_recipe` says.

    Raises
    ------
    BoldForgeError
        If the folder does not hold a model of this format, or it cannot read clips of that length.
    """
    folder = Path(folder)
    inside = folder / "export"
    run_folder = inside.is_dir() and not (folder / "config.json").exists()
    pretrained = fit_to_data(load_pretrained(inside if run_folder else folder), data or {})
    config = pretrained.model.config
    if pool != "mean" and config.time == "seconds" and pretrained.config["data"]["clip_length"] == 1:
        raise FinetuneError(
            f"pool {pool} reads how tokens change over time, but clips of 1 frame were asked for; set pool to mean, or "
            "raise frames."
        )
    backbone = NeuroStormBackbone(pretrained, pool)
    backbone.network.requires_grad_(False).eval()
    return backbone


def fit_to_data(pretrained: Pretrained, data: Mapping[str, Any]) -> Pretrained:
    """Take an encoder as far as it goes towards other data; see `load_backbone`.

    Raises
    ------
    FinetuneError
        If it cannot read clips of the length asked for.
    """
    config, own = pretrained.model.config, pretrained.config["data"]
    frames = int(data.get("clip_length", own.get("clip_length", config.frames)))
    asked = f"clips of {frames} frames were asked for, but this encoder"
    if config.time == "learned" and frames != config.frames:
        raise FinetuneError(
            f"{asked} has a learned embedding for each of its {config.frames} frames (model.time: learned); leave "
            "frames out, or use an encoder that was pretrained with model.time=seconds."
        )
    if frames < config.fewest_frames:
        raise FinetuneError(f"{asked} halves time and needs {config.fewest_frames} at least; raise frames.")
    if config.position == "mm" and data.get("grid", own["grid"]) != own["grid"]:
        pretrained = move_to_grid(pretrained, get_grid(data["grid"]))
    changes: dict[str, Any] = {"clip_length": frames} if config.time == "seconds" else {}
    if config.time == "seconds" and "tr" in data:
        changes["tr"] = data["tr"]
    return replace(pretrained, config={**pretrained.config, "data": {**pretrained.config["data"], **changes}})
