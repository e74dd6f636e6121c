"""Everything that a recipe can be refused for before its first step: shards, split, masks, atlas, ranks, run folder.

`check_run` asks all of it. ``boldforge pretrain`` does so before it starts a rank, ``--dry-run`` in place of a run; the
ranks themselves go the same way, `check_recipe` all of them, `check_scales` and `check_folder` the first.
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from safetensors import safe_open

from boldforge.configs import ConfigError, check_free, check_out
from boldforge.data_shards import (
    Atlas,
    ClipStream,
    Grid,
    Manifest,
    Segments,
    ShardReader,
    Source,
    brain_mask,
    load_atlas,
    load_groups,
    split_segments,
)
from boldforge.kernels import available_backends
from boldforge.pretrain.config import PretrainConfig
from boldforge.pretrain.datasets import atlas_identity, check_lengths, identity, open_datasets
from boldforge.pretrain.evaluate import HeldoutClips
from boldforge.pretrain.masking import MaskSampler
from boldforge.pretrain.model import NeuroStorm
from boldforge.pretrain.regions import RegionTokens, RegionVoxels, region_tokens, region_voxels
from boldforge.pretrain.run_folder import (
    Checkpoint,
    check_not_foreign,
    check_same_run,
    read_finished,
    read_newest,
    record,
)
from boldforge.pretrain.tokens import TokenGrid

_RUNS_LOOKED_AT = 256
"""Of a dataset with no more runs to train on, the scales are read ahead; of a larger one that would take minutes."""


@dataclass(frozen=True)
class Prepared:
    """What a recipe makes of a grid: its tokens, the atlas's regions in them, and its masks."""

    grid: Grid
    token_grid: TokenGrid
    atlas: Atlas
    regions: RegionTokens
    sampler: MaskSampler
    groups: Mapping[str, Sequence[int]] | None = None

    @property
    def identity(self) -> dict[str, Any]:
        """What a run records of its atlas."""
        return atlas_identity(self.atlas, self.groups)


@dataclass(frozen=True)
class RunData:
    """The datasets of a recipe, and of each the frames to train on and those held out.

    `clip_length` is T; a segment that is shorter holds no clip.
    """

    manifests: tuple[Manifest, ...]
    train: tuple[Segments, ...]
    held: tuple[Segments, ...]
    clip_length: int

    @property
    def frames(self) -> int:
        """Frames to train on, of segments that hold a clip."""
        return sum(int(np.diff(self.usable(segments)[:, 1:]).sum()) for segments in self.train)

    def usable(self, segments: Segments) -> npt.NDArray[np.int64]:
        """Return the rows of a table of segments that hold a clip."""
        _, start, stop = segments.table.T
        return segments.table[stop - start >= self.clip_length]


@dataclass(frozen=True)
class Checked:
    """A recipe's data, tokens, masks, stream and held-out clips, none of which was refused."""

    data: RunData
    prepared: Prepared
    voxels: RegionVoxels
    stream: ClipStream
    heldout: HeldoutClips

    def record(self, config: PretrainConfig) -> dict[str, Any]:
        """Return what the run folder's ``config.yaml`` says of a run of this recipe."""
        return record(config, identity(config.shards, self.data.manifests) | self.prepared.identity)


@dataclass(frozen=True)
class Standing:
    """Where the run in a folder stands.

    Attributes
    ----------
    checkpoint
        That it goes on from; None where there is none, or nothing left to do.
    finished
        Its summary, if it is finished.
    """

    checkpoint: Checkpoint | None
    finished: dict[str, Any] | None


def prepare_masks(config: PretrainConfig, grid: Grid, manifest: Manifest | None = None) -> Prepared:
    """Cut a grid into tokens and lay the recipe's masks over them.

    Parameters
    ----------
    config
        The recipe.
    grid
        Of the shards.
    manifest
        Holds the brain mask; None: the one that shards of this grid are made with.

    Raises
    ------
    BoldForgeError
        If a patch is no whole number of voxels, the ratio hides every token, the atlas misses the brain, or background
        is to be counted where there is none.
    """
    mask = brain_mask(grid) if manifest is None else manifest.brain_mask()
    patch_size = config.model.patch_size(grid.voxel_size)
    token_grid = TokenGrid(mask, patch_size, config.model.frames, config.model.n_stages, grid.affine)
    check_background(config, token_grid)
    atlas = load_atlas(config.mask.atlas, config.mask.labels)
    groups = load_groups(atlas, config.mask.groups) if config.mask.strategy == "group" else None
    regions = region_tokens(atlas, grid, token_grid)
    sampler = MaskSampler(token_grid, config.mask, regions, config.model.window, groups)
    return Prepared(grid, token_grid, atlas, regions, sampler, groups)


def check_batch(config: PretrainConfig, world_size: int) -> None:
    """Refuse a batch that the ranks cannot share equally.

    Raises
    ------
    ConfigError
        Naming the number that batch_size must be a multiple of.
    """
    share = config.batch_size // world_size
    if config.batch_size % world_size or share % (config.micro_batch_size or share):
        raise ConfigError(
            f"batch_size is {config.batch_size}, which {world_size} ranks cannot share in micro-batches of "
            f"{config.micro_batch_size or 'any size'}; set batch_size to a multiple of "
            f"{world_size * (config.micro_batch_size or 1)}."
        )


def check_backend(config: PretrainConfig) -> None:
    """Refuse a scan backend that does not exist or does not run here.

    Raises
    ------
    ConfigError
        Naming those that do.
    """
    found = available_backends()
    name = config.model.backend
    if name == "auto" or not found.get(name, "no such backend"):
        return
    working = ", ".join(["auto", *(each for each, reason in found.items() if not reason)])
    raise ConfigError(
        f"model.backend is {name}, which cannot be used here ({found.get(name, 'there is none of that name')}); use "
        f"one of {working}."
    )


def check_background(config: PretrainConfig, token_grid: TokenGrid) -> None:
    """Refuse to count background where the grid stores none: the loss would count a field of view's rim and no more.

    Raises
    ------
    ConfigError
        Naming what to set.
    """
    if config.loss.background and not token_grid.mask.all():
        raise ConfigError(
            "loss.background is true, but these shards store brain voxels only, so there is no background to count; "
            "set loss.background to false, or make shards on the grid neurostorm, which stores every voxel."
        )


def open_data(config: PretrainConfig) -> RunData:
    """Open the datasets and part them into frames to train on and frames held out.

    Raises
    ------
    BoldForgeError
        Naming what is wrong with the datasets or the split, or a dataset with no clip of the recipe's length to train
        on or to measure on.
    """
    manifests = open_datasets(config.shards, config.shard_cache)
    train, held = zip(*(split_segments(each, config.holdout) for each in manifests), strict=True)
    check_lengths(config.model.frames, manifests, train, held)
    return RunData(tuple(manifests), train, held, config.model.frames)


def check_recipe(config: PretrainConfig, world_size: int, rank: int = 0) -> Checked:
    """Ask what recipe, data and machine can be refused for, the data's values aside; return what was made on the way.

    Parameters
    ----------
    config
        The recipe.
    world_size, rank
        Ranks of the run, and which of them the stream is for.

    Raises
    ------
    BoldForgeError
        In one sentence, with the mend.
    """
    check_batch(config, world_size)
    check_backend(config)
    data = open_data(config)
    stream = ClipStream(
        [Source(*parts) for parts in zip(data.manifests, data.train, config.weights, strict=True)],
        clip_length=config.model.frames,
        batch_size=config.batch_size,
        seed=config.seed,
        rank=rank,
        world_size=world_size,
        num_workers=config.num_workers,
    )
    first = data.manifests[0]
    prepared = prepare_masks(config, first.grid, first)
    voxels = region_voxels(prepared.atlas, first.grid, prepared.token_grid.mask)
    readers = [ShardReader(each) for each in data.manifests]
    frames, limit = config.model.frames, config.evaluation_clips
    heldout = HeldoutClips(readers, data.held, prepared.sampler, frames, limit, config.loss)
    return Checked(data, prepared, voxels, stream, heldout)


def check_folder(config: PretrainConfig, checked: Checked) -> Standing:
    """Ask everything that a run folder can be refused for; nothing is written.

    Returns
    -------
    Standing
        Where the run in the folder stands.

    Raises
    ------
    BoldForgeError
        If something else or another recipe's run is in the folder, its record or all its checkpoints are damaged, or
        the newest whole one holds weights of another shape or a place in another stream.
    """
    check_out(config.out, "a pretraining run")
    finished = read_finished(config.out)
    checkpoint = None if finished else read_newest(config.out / "checkpoints")
    if finished or checkpoint:
        check_same_run(config, identity(config.shards, checked.data.manifests) | checked.prepared.identity)
    else:
        check_not_foreign(config.out)
    if checkpoint:
        _check_shapes(checkpoint.folder, parameter_shapes(config, checked.prepared.token_grid))
        checked.stream.load_state_dict(checkpoint.state["stream"])
    return Standing(checkpoint, finished)


def check_run(config: PretrainConfig, world_size: int) -> tuple[Checked, Standing]:
    """Ask everything that can be refused before the first step, without a rank and without writing anything.

    Raises
    ------
    BoldForgeError
        In one sentence, with the mend.
    """
    finished = read_finished(config.out)
    if not finished:
        check_place(config.out)
    check_free(config.out)
    checked = check_recipe(config, world_size)
    if not finished:
        check_scales(checked)
    return checked, check_folder(config, checked)


def parameter_shapes(config: PretrainConfig, token_grid: TokenGrid) -> dict[str, tuple[int, ...]]:
    """Return the shape of every parameter by name; nothing of the network's size is allocated."""
    with torch.device("meta"):
        model = NeuroStorm(config.model, token_grid)
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}


def check_place(out: Path) -> None:
    """Refuse a run folder that cannot be made or written.

    Raises
    ------
    ConfigError
        Naming the file or folder that is in the way.
    """
    there = next(folder for folder in (out, *out.absolute().parents) if folder.exists())
    if not there.is_dir():
        raise ConfigError(f"out is {out}, but {there} is a file; choose another folder.")
    if not os.access(there, os.W_OK | os.X_OK):
        raise ConfigError(f"out is {out}, but {there} cannot be written to; choose another folder.")


def check_scales(checked: Checked) -> None:
    """Refuse runs that hold NaN: those of the held-out clips, and those to train on where they are few.

    Stored frames are whole numbers, so that NaN can only be in a run's means and scales. What lies at an address is
    not fetched for it; the loop names such a run when it meets it.

    Raises
    ------
    ConfigError
        Naming the run.
    """
    data = checked.data
    measured = {(dataset, run) for dataset, run, _ in checked.heldout.clips}
    for dataset, (manifest, segments) in enumerate(zip(data.manifests, data.train, strict=True)):
        if manifest.remote is not None:
            continue
        trained = set(np.unique(data.usable(segments)[:, 0]).tolist())
        looked_at = {run for each, run in measured if each == dataset}
        looked_at |= trained if len(trained) <= _RUNS_LOOKED_AT else set()
        reader = ShardReader(manifest)
        for run in sorted(looked_at):
            if not np.isfinite(reader.scales(run)).all():
                raise ConfigError(holds_nan(manifest, run))
        reader.close()


def holds_nan(manifest: Manifest, run: int) -> str:
    """Say of a run that it holds NaN, and the mend."""
    return (
        f"{manifest.place}: run {manifest.runs[run].key} holds NaN or infinity; mend the file that it was made from "
        "and shard it again."
    )


def _check_shapes(checkpoint: Path, shapes: Mapping[str, Sequence[int]]) -> None:
    """Refuse a checkpoint whose weights have other shapes; only headers are read."""
    wanted, found = {name: list(shape) for name, shape in shapes.items()}, _weight_shapes(checkpoint)
    for name in (*wanted, *found):
        if wanted.get(name) != found.get(name):
            raise ConfigError(
                f"{checkpoint}: {name} is {found.get(name, 'missing')} there and {wanted.get(name, 'missing')} in this "
                "recipe's model; use another out folder, or the recipe that the checkpoint was written with."
            )


def _weight_shapes(checkpoint: Path) -> dict[str, list[int]]:
    """Return the shapes of the weights in a checkpoint."""
    shapes = {}
    for path in sorted(checkpoint.glob("*.safetensors")):
        with safe_open(path, framework="pt") as stream:
            for key in stream.keys():  # noqa: SIM118  (it is no dict)
                kind, parameter = key.split(":", 1)
                if kind == "weight":
                    shapes[parameter] = list(stream.get_slice(key).get_shape())
    return shapes
