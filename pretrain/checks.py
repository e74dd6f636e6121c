"""What can be known to be wrong with a recipe before its first step: shards, split, masks, atlas, ranks, run folder.

``boldforge pretrain --dry-run`` asks all of it; a run asks as it starts.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open

from boldforge.configs import ConfigError
from boldforge.data_shards import Atlas, Grid, Manifest, brain_mask, load_atlas, load_groups, split_segments
from boldforge.kernels import available_backends
from boldforge.pretrain.config import PretrainConfig
from boldforge.pretrain.datasets import check_lengths, open_datasets
from boldforge.pretrain.masking import MaskSampler
from boldforge.pretrain.regions import RegionTokens, region_tokens
from boldforge.pretrain.tokens import TokenGrid


@dataclass(frozen=True)
class Prepared:
    """What a recipe makes of a grid: its tokens, the atlas's regions in them, and its masks."""

    grid: Grid
    token_grid: TokenGrid
    atlas: Atlas
    regions: RegionTokens
    sampler: MaskSampler


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
        If a patch is no whole number of voxels, the ratio hides every token, or the atlas misses the brain.
    """
    mask = brain_mask(grid) if manifest is None else manifest.brain_mask()
    patch_size = config.model.patch_size(grid.voxel_size)
    token_grid = TokenGrid(mask, patch_size, config.model.frames, config.model.n_stages, grid.affine)
    atlas = load_atlas(config.mask.atlas, config.mask.labels)
    groups = load_groups(atlas, config.mask.groups) if config.mask.strategy == "group" else None
    regions = region_tokens(atlas, grid, token_grid)
    sampler = MaskSampler(token_grid, config.mask, regions, config.model.window, groups)
    return Prepared(grid, token_grid, atlas, regions, sampler)


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


def check_data(config: PretrainConfig) -> tuple[list[Manifest], int]:
    """Refuse shards that hold no clip of the recipe's length to train on or to measure on.

    Returns
    -------
    manifests, frames
        The datasets, and how many frames there are to train on.

    Raises
    ------
    BoldForgeError
        Naming the lengths, or what is wrong with the datasets or the split.
    """
    manifests = open_datasets(config.shards, config.shard_cache)
    train, held = zip(*(split_segments(each, config.holdout) for each in manifests), strict=True)
    check_lengths(config.model.frames, manifests, held)
    lengths = [segment.stop - segment.start for segments in train for segment in segments]
    if max(lengths, default=0) < config.model.frames:
        raise ConfigError(
            f"the longest stretch to train on has {max(lengths, default=0)} frames, a clip needs model.frames = "
            f"{config.model.frames}; lower model.frames, or holdout.fraction."
        )
    return list(manifests), sum(lengths)


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


def check_checkpoint(
    config: PretrainConfig, shapes: Mapping[str, Sequence[int]], checkpoint: Path | None = None
) -> Path | None:
    """Refuse a run folder whose newest checkpoint holds weights of another shape; only headers are read.

    Parameters
    ----------
    config
        The recipe.
    shapes
        Of every parameter of the recipe's model, by name.
    checkpoint
        Which one to look at, in place of the newest.

    Returns
    -------
    Path or None
        The checkpoint that the run would go on from.

    Raises
    ------
    ConfigError
        Naming the first weight that does not fit.
    """
    steps = [checkpoint] if checkpoint else sorted((config.out / "checkpoints").glob("step-*"))
    if not steps:
        return None
    wanted = {name: list(shape) for name, shape in shapes.items()}
    try:
        found = _weight_shapes(steps[-1])
    except (OSError, ValueError, KeyError, SafetensorError):
        return steps[-1]  # damaged: the run itself finds an older one, or says so
    for name in (*wanted, *found):
        if found and wanted.get(name) != found.get(name):
            raise ConfigError(
                f"{steps[-1]}: {name} is {found.get(name, 'missing')} there and {wanted.get(name, 'missing')} in this "
                "recipe's model; use another out folder, or the recipe that the checkpoint was written with."
            )
    return steps[-1]


def _weight_shapes(checkpoint: Path) -> dict[str, list[int]]:
    """Return the shapes of the weights in a checkpoint; none where its files are of another kind."""
    shapes = {}
    for name in json.loads((checkpoint / "checkpoint.json").read_text())["files"]:
        if not name.endswith(".safetensors"):
            continue
        with safe_open(checkpoint / name, framework="pt") as stream:
            for key in stream.keys():  # noqa: SIM118  (it is no dict)
                kind, parameter = key.split(":", 1)
                if kind == "weight":
                    shapes[parameter] = list(stream.get_slice(key).get_shape())
    return shapes
