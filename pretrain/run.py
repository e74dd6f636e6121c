"""Set a pretraining run up: take its folder, build the model and the DeepSpeed engine."""

import math
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import cast

import deepspeed
import torch
import torch.distributed as dist
import yaml
from torch import Tensor

from boldforge.configs import BoldForgeError, folder_lock
from boldforge.configs.durable import write_atomic
from boldforge.data_shards import Atlas, ClipStream, Manifest
from boldforge.pretrain.checks import Checked, Standing, check_folder, check_place, check_scales
from boldforge.pretrain.config import PretrainConfig
from boldforge.pretrain.draws import ClipKey
from boldforge.pretrain.evaluate import HeldoutClips, HeldoutError
from boldforge.pretrain.loss import Objective
from boldforge.pretrain.masking import MaskSampler
from boldforge.pretrain.model import NeuroStorm
from boldforge.pretrain.regions import RegionTokens, RegionVoxels
from boldforge.pretrain.run_folder import Checkpoint, read_finished
from boldforge.pretrain.tokens import TokenGrid
from boldforge.pretrain.training_state import read_weights


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
        """Measure the model on the held-out clips.

        Raises
        ------
        BoldForgeError
            If the error is not a finite number, naming the run that holds NaN, or the learning rate.
        """
        self.engine.eval()
        measured = self.heldout.measure(self.predict, self.patch_voxels, self.token_grid.n_voxels)
        self.engine.train()
        if not math.isfinite(measured.error + measured.baseline):
            raise self._heldout_lost()
        return measured

    def _heldout_lost(self) -> BoldForgeError:
        for number, (dataset, run, _) in enumerate(self.heldout.clips):
            clip = self.heldout.read(number)
            if not (clip.values_TV.isfinite().all() and clip.mean_V.isfinite().all()):
                return not_finite("the held-out error", self.manifests[dataset], run)
        return diverged("the held-out error", self.config)

    def total(self, values: Tensor) -> Tensor:
        """Sum a tensor over the ranks, in rank order so that its bits repeat; float64 on the CPU."""
        parts = [torch.zeros_like(values) for _ in range(self.world_size)]
        dist.all_gather(parts, values)
        return torch.stack(parts).double().sum(0).cpu()


def not_finite(figure: str, manifest: Manifest, run: int) -> BoldForgeError:
    """Say that a figure is no number because of a run's data."""
    return BoldForgeError(
        f"{figure} is not a finite number, because run {manifest.runs[run].key} of {manifest.place} holds NaN or "
        "infinity; mend the file and shard it again."
    )


def diverged(figure: str, config: PretrainConfig) -> BoldForgeError:
    """Say that a figure is no number though the data are."""
    return BoldForgeError(
        f"{figure} is not a finite number, though the data are; lower optimizer.lr (now {config.optimizer.lr:g}), set "
        "optimizer.gradient_clipping, or use precision fp32, in a new out folder."
    )


def start_run(config: PretrainConfig, checked: Checked, standing: Standing, rank: int, world_size: int) -> Run:
    """Build the model and the DeepSpeed engine of a run that is not finished; called by every rank."""
    data, prepared = checked.data, checked.prepared
    torch.manual_seed(config.seed)
    model = NeuroStorm(config.model, prepared.token_grid)
    model.checkpoint_activations = config.checkpoint_activations
    if standing.checkpoint:
        model.load_state_dict(read_weights(standing.checkpoint.folder))
    engine, _, _, _ = deepspeed.initialize(
        model=model, model_parameters=list(model.parameters()), config=config.deepspeed(world_size)
    )
    device = engine.device if isinstance(engine.device, torch.device) else torch.device(engine.device)
    patch_voxels = torch.from_numpy(prepared.token_grid.patch_voxels).to(device)
    return Run(
        config=config,
        rank=rank,
        world_size=world_size,
        device=device,
        manifests=data.manifests,
        atlas=prepared.atlas,
        regions=prepared.regions,
        region_voxels=checked.voxels,
        sampler=prepared.sampler,
        objective=Objective(config.loss, config.model.frames, checked.voxels, patch_voxels),
        stream=checked.stream,
        heldout=checked.heldout,
        engine=engine,
        token_grid=prepared.token_grid,
        patch_voxels=patch_voxels,
        resumed=standing.checkpoint,
    )


def claim_folder(config: PretrainConfig, checked: Checked, stack: ExitStack) -> Standing:
    """Take the run folder and write the recipe into it, unless the run there is finished; for the first rank.

    Parameters
    ----------
    config, checked
        The recipe, and what `check_recipe` returned.
    stack
        Keeps the folder locked until it is closed.

    Raises
    ------
    BoldForgeError
        If runs hold NaN, or the folder is refused, in use or cannot be written.
    """
    if read_finished(config.out):
        return check_folder(config, checked)
    check_place(config.out)
    check_scales(checked)
    content = checked.record(config)
    try:
        stack.enter_context(folder_lock(config.out, "pretraining"))
        standing = check_folder(config, checked)
        # A kill while it is written must not leave half of it beside whole checkpoints.
        write_atomic(config.out / "config.yaml", yaml.safe_dump(content, sort_keys=False).encode())
    except OSError as error:
        raise BoldForgeError(f"{config.out}: cannot write the run folder ({error.strerror}).") from None
    return standing
