"""Set a pretraining run up: check the recipe against the data, build the model and the DeepSpeed engine."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import deepspeed
import torch
import torch.distributed as dist
import yaml
from torch import Tensor

from boldforge.configs import BoldForgeError, ConfigError, load_config
from boldforge.configs.durable import write_atomic
from boldforge.data_shards import (
    Atlas,
    ClipStream,
    Manifest,
    ShardReader,
    Source,
    load_atlas,
    load_groups,
    split_segments,
)
from boldforge.pretrain.checkpoint import Checkpoint, find_checkpoint, newest_checkpoint
from boldforge.pretrain.checks import check_batch, check_checkpoint
from boldforge.pretrain.config import PretrainConfig
from boldforge.pretrain.datasets import check_lengths, identity, open_datasets, split_record
from boldforge.pretrain.draws import ClipKey
from boldforge.pretrain.evaluate import HeldoutClips, HeldoutError
from boldforge.pretrain.loss import Objective
from boldforge.pretrain.masking import MaskSampler
from boldforge.pretrain.model import NeuroStorm
from boldforge.pretrain.regions import RegionTokens, RegionVoxels, region_tokens, region_voxels
from boldforge.pretrain.tokens import TokenGrid
from boldforge.pretrain.training_state import read_weights

logger = logging.getLogger(__name__)

# Keys that may change between the parts of one run without making it another run.
_FREE_KEYS = {"shards", "shard_cache", "out", "num_workers", "checkpoint_every", "keep_checkpoints", "evaluate_every"}
_FREE_KEYS |= {"zero_stage", "micro_batch_size", "checkpoint_activations"}


@dataclass(frozen=True)
class Run:
    """Everything the training loop uses; `Run.measure` and `Run.total` are collective calls."""

    config: PretrainConfig
    rank: int
    world_size: int
    device: torch.device
    manifests: tuple[Manifest, ...]
    atlas: Atlas
    regions: RegionTokens
    region_voxels: RegionVoxels
    sampler: MaskSampler
    objective: Objective
    stream: ClipStream
    heldout: HeldoutClips
    engine: deepspeed.DeepSpeedEngine
    token_grid: TokenGrid
    patch_voxels: Tensor
    resumed: Checkpoint | None

    def predict(self, values_BTV: Tensor, mask_BL: Tensor, keys: Sequence[ClipKey] | None = None) -> Tensor:
        """Reconstruct clips of these shards, patches [B, L, P]; see `NeuroStorm.forward`."""
        return cast(Tensor, self.engine(values_BTV, mask_BL, self.manifest.recipe.tr, keys))

    @property
    def manifest(self) -> Manifest:
        """The first dataset, which has the grid and the mask of all."""
        return self.manifests[0]

    def measure(self) -> HeldoutError:
        """Measure the model on the held-out clips."""
        self.engine.eval()
        measured = self.heldout.measure(self.predict, self.patch_voxels, self.token_grid.n_voxels)
        self.engine.train()
        return measured

    def total(self, values: Tensor) -> Tensor:
        """Sum a tensor over the ranks, in rank order so that its bits repeat; float64 on the CPU."""
        parts = [torch.zeros_like(values) for _ in range(self.world_size)]
        dist.all_gather(parts, values)
        return torch.stack(parts).double().sum(0).cpu()


def start_run(config: PretrainConfig, rank: int, world_size: int) -> Run:
    """Check the recipe against the data, build the model and the DeepSpeed engine; called by every rank."""
    check_batch(config, world_size)
    manifests = open_datasets(config.shards, config.shard_cache)
    manifest = manifests[0]
    train, held = zip(*(split_segments(each, config.holdout) for each in manifests), strict=True)
    check_lengths(config.model.frames, manifests, held)
    stream = ClipStream(
        [Source(*parts) for parts in zip(manifests, train, config.weights, strict=True)],
        clip_length=config.model.frames,
        batch_size=config.batch_size,
        seed=config.seed,
        rank=rank,
        world_size=world_size,
        num_workers=config.num_workers,
    )
    if rank == 0:
        _claim_folder(config, identity(config.shards, manifests))
    mask = manifest.brain_mask()
    patch_size = config.model.patch_size(manifest.grid.voxel_size)
    token_grid = TokenGrid(mask, patch_size, config.model.frames, config.model.n_stages, manifest.grid.affine)
    atlas = load_atlas(config.mask.atlas, config.mask.labels)
    groups = load_groups(atlas, config.mask.groups) if config.mask.strategy == "group" else None
    regions = region_tokens(atlas, manifest.grid, token_grid)
    voxels = region_voxels(atlas, manifest.grid, mask)
    sampler = MaskSampler(token_grid, config.mask, regions, config.model.window, groups)
    torch.manual_seed(config.seed)
    model = NeuroStorm(config.model, token_grid)
    model.checkpoint_activations = config.checkpoint_activations
    resumed = find_checkpoint(config.out / "checkpoints")
    if resumed:
        check_checkpoint(config, {name: weight.shape for name, weight in model.named_parameters()}, resumed.folder)
        model.load_state_dict(read_weights(resumed.folder))
    engine, _, _, _ = deepspeed.initialize(
        model=model, model_parameters=list(model.parameters()), config=config.deepspeed(world_size)
    )
    frames, limit = config.model.frames, config.evaluation_clips
    heldout = HeldoutClips([ShardReader(each) for each in manifests], held, sampler, frames, limit, config.loss)
    device = engine.device if isinstance(engine.device, torch.device) else torch.device(engine.device)
    patch_voxels = torch.from_numpy(token_grid.patch_voxels).to(device)
    return Run(
        config=config,
        rank=rank,
        world_size=world_size,
        device=device,
        manifests=tuple(manifests),
        atlas=atlas,
        regions=regions,
        region_voxels=voxels,
        sampler=sampler,
        objective=Objective(config.loss, frames, voxels, patch_voxels),
        stream=stream,
        heldout=heldout,
        engine=engine,
        token_grid=token_grid,
        patch_voxels=patch_voxels,
        resumed=resumed,
    )


def _claim_folder(config: PretrainConfig, datasets: dict[str, Any]) -> None:
    """Write the recipe into a new run folder, or check that an old one belongs to the same run."""
    path = config.out / "config.yaml"
    content = {**config.model_dump(mode="json"), **datasets}
    if path.is_file() and newest_checkpoint(config.out / "checkpoints"):
        before = _as_of_today(_read_record(path))
        now = {key: value for key, value in content.items() if key not in _FREE_KEYS}
        now |= dict.fromkeys(before.keys() - content.keys())  # weights of a mixture that is none any more
        changed = changes(before, now)
        if changed:
            key, old, new = changed[0]
            raise ConfigError(
                f"{path}: this run was started with {key} = {old}, now it is {new}; use another out folder, or the old "
                "value."
            )
    try:
        config.out.mkdir(parents=True, exist_ok=True)
        # A kill while it is written must not leave half of it beside whole checkpoints.
        write_atomic(path, yaml.safe_dump(content, sort_keys=False).encode())
    except OSError as error:
        raise BoldForgeError(f"{config.out}: cannot write the run folder ({error.strerror}).") from None


def _read_record(path: Path) -> dict[str, Any]:
    try:
        content = yaml.safe_load(path.read_text())
    except (UnicodeDecodeError, yaml.YAMLError):
        content = None
    if not isinstance(content, dict):
        raise ConfigError(
            f"{path}: is damaged, so it cannot be told whether this is the same run; put the recipe back there, or use "
            "another out folder."
        )
    return content


def changes(before: Mapping[str, Any], now: Mapping[str, Any], section: str = "") -> list[tuple[str, Any, Any]]:
    """List the keys whose value is another one, as (section.key, old, new)."""
    found: list[tuple[str, Any, Any]] = []
    for key, value in now.items():
        old = before.get(key)
        if isinstance(old, Mapping) and isinstance(value, Mapping):
            found += changes(old, value, f"{section}{key}.")
        elif old != value:
            found.append((f"{section}{key}", old, value))
    return found


def _as_of_today(content: dict[str, Any]) -> dict[str, Any]:
    """Fill an older run's recipe up with the defaults of keys that it did not have yet."""
    recipe, datasets = split_record(content)
    return load_config(PretrainConfig, recipe).model_dump(mode="json") | datasets
