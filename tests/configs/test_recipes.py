"""Every packaged recipe must build what it describes."""

import pytest
import torch

from boldforge.configs import StrictModel, load_config, recipe_names
from boldforge.data_shards import brain_mask, get_grid
from boldforge.finetune import FinetuneConfig, SweepConfig
from boldforge.pretrain import PretrainConfig, build_model

CLASSES = {"pretrain": PretrainConfig, "finetune": FinetuneConfig, "sweep": SweepConfig}


@pytest.mark.parametrize("name", recipe_names())
def test_every_recipe_is_valid(name):
    verb = "sweep" if name.endswith("_sweep.yaml") else name.split("/")[0]
    config = load_config(CLASSES[verb], f"configs/{name}")
    assert isinstance(config, StrictModel)


@pytest.mark.parametrize("name", [name for name in recipe_names() if name.startswith("pretrain/")])
@pytest.mark.parametrize("grid_name", ["mni4mm", "mni2mm"])
def test_every_pretraining_recipe_builds_its_model(name, grid_name):
    config = load_config(PretrainConfig, f"configs/{name}")
    grid = get_grid(grid_name)
    with torch.device("meta"):
        shape_only = build_model(config.model, brain_mask(grid), grid.voxel_size, grid.affine)
    assert sum(parameter.numel() for parameter in shape_only.parameters()) > 10_000


@pytest.mark.parametrize("name", [name for name in recipe_names() if name.startswith("pretrain/")])
def test_every_pretraining_recipe_gives_deepspeed_a_batch_that_adds_up(name):
    config = load_config(PretrainConfig, f"configs/{name}")
    settings = config.deepspeed(world_size=2)
    micro = settings["train_micro_batch_size_per_gpu"]
    assert isinstance(micro, int)
    assert settings["train_batch_size"] % (2 * micro) == 0
