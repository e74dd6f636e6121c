import pytest

from boldforge.configs import ConfigError, load_config, recipe_names, recipe_path
from boldforge.finetune import FinetuneConfig, SweepConfig, TrainingConfig

RECIPES = [name for name in recipe_names() if name.split("/")[0] in {"finetune", "sweep"}]

SWEEPS = [name for name in RECIPES if name.startswith("sweep/")] + ["finetune/adhd_lora_sweep.yaml"]


def test_the_recipes_that_the_commands_name_exist():
    assert {"finetune/adhd.yaml", "sweep/adhd-rank.yaml", "sweep/demo.yaml"} <= set(RECIPES)


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_builds_its_config(name):
    kind = SweepConfig if name in SWEEPS else FinetuneConfig
    config = load_config(kind, name)
    assert (config.shards or config.images) and config.backbone and config.out


@pytest.mark.parametrize("name", SWEEPS)
def test_a_sweeps_recipe_is_sent_to_sweep(name):
    with pytest.raises(ConfigError) as refused:
        load_config(FinetuneConfig, name)
    said = str(refused.value)
    assert said.startswith(f"{recipe_path(name)}: sets ") and said.count(". ") == 0
    assert said.endswith("does, but finetune trains one adapter; run a sweep with boldforge sweep --config.")


@pytest.mark.parametrize("config", [FinetuneConfig, SweepConfig, TrainingConfig])
def test_every_key_says_what_it_is(config):
    assert all(field.description for field in config.model_fields.values())
