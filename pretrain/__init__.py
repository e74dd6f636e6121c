"""The NeuroSTORM-style masked autoencoder, its masks, its objective and its training loop on DeepSpeed.

The loop itself is imported from `boldforge.pretrain.train`, which imports DeepSpeed; everything here does not.
"""

from boldforge.pretrain.config import OptimizerConfig, PretrainConfig
from boldforge.pretrain.evaluate import HeldoutClips, HeldoutError
from boldforge.pretrain.export import ExportError, Pretrained, build_model, load_pretrained, write_export
from boldforge.pretrain.loss import LossConfig, Objective, make_targets, reconstruction_loss
from boldforge.pretrain.masking import MaskConfig, MaskSampler
from boldforge.pretrain.metrics import read_metrics
from boldforge.pretrain.model import NeuroStorm
from boldforge.pretrain.model_config import ModelConfig
from boldforge.pretrain.regions import RegionTokens, RegionVoxels, region_tokens, region_voxels
from boldforge.pretrain.tokens import TokenGrid, gather_patches, scatter_patches
from boldforge.pretrain.transfer import move_to_grid

__all__ = [
    "ExportError",
    "HeldoutClips",
    "HeldoutError",
    "LossConfig",
    "MaskConfig",
    "MaskSampler",
    "ModelConfig",
    "NeuroStorm",
    "Objective",
    "OptimizerConfig",
    "PretrainConfig",
    "Pretrained",
    "RegionTokens",
    "RegionVoxels",
    "TokenGrid",
    "build_model",
    "gather_patches",
    "load_pretrained",
    "make_targets",
    "move_to_grid",
    "read_metrics",
    "reconstruction_loss",
    "region_tokens",
    "region_voxels",
    "scatter_patches",
    "write_export",
]
