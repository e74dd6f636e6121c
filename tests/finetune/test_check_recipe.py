from pathlib import Path
from types import SimpleNamespace

import pytest

from boldforge.data_shards import DataRecipe
from boldforge.finetune import FinetuneError
from boldforge.finetune.cohort import check_recipe

CLEANED = DataRecipe(grid="mni4mm", tr=2.0, confounds=("motion-6",), scrub_fd=0.5, time_filter="sinc")
PLAIN = DataRecipe(grid="mni4mm", tr=2.0)


def checked(pretrained, shards):
    """As the two meet: the encoder's recipe comes from a model's config.json, the shards' from a manifest."""
    data = {**pretrained.model_dump(mode="json"), "clip_length": 20, "mask_sha256": "0"}
    check_recipe(SimpleNamespace(data=data), SimpleNamespace(recipe=shards, mask_sha256="0", folder=Path("x")))


@pytest.mark.parametrize("recipe", [CLEANED, PLAIN])
def test_the_same_recipe_fits_whatever_the_precision(recipe):
    checked(recipe, recipe)
    checked(recipe, recipe.model_copy(update={"dtype": "int8"}))


def test_shards_cleaned_otherwise_are_refused_with_the_command_that_mends_it():
    with pytest.raises(FinetuneError, match=r"confounds \(\) instead of \('motion-6',\)") as caught:
        checked(CLEANED, PLAIN)
    assert "--confounds motion-6 --scrub-fd 0.5 --time-filter sinc" in str(caught.value)
    with pytest.raises(FinetuneError, match=r"scrub_fd 0\.5 instead of None"):
        checked(PLAIN, CLEANED)
