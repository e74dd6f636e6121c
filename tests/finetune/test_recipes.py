import pytest

from boldforge.configs import load_config, recipe_names
from boldforge.finetune import FinetuneConfig, SweepConfig, TrainingConfig

RECIPES = [name for name in recipe_names() if name.split("/")[0] in {"finetune", "sweep"}]


def test_the_recipes_that_the_commands_name_exist():
    assert {"finetune/adhd.yaml", "sweep/adhd-rank.yaml", "sweep/demo.yaml"} <= set(RECIPES)


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_builds_its_config(name):
    kind = FinetuneConfig if name.startswith("finetune/") else SweepConfig
    config = load_config(kind, name)
    assert (config.shards or config.images) and config.backbone and config.out


@pytest.mark.parametrize("config", [FinetuneConfig, SweepConfig, TrainingConfig])
def test_every_key_says_what_it_is(config):
    assert all(field.description for field in config.model_fields.values())
