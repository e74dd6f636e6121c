"""No model is asked about the subjects that it was trained on, wherever its adapter comes from."""

import json
import shutil

import pytest

from boldforge.configs import load_config
from boldforge.data_shards import load_manifest
from boldforge.finetune import AttributionConfig, FinetuneError, SweepConfig, attribute_regions, sweep

# The winner of a sweep is trained on what is in the sweep's shards, as a fine-tuning's adapter is on its own.
SETTINGS = {
    "driver": "serial",
    "clips": 1,
    "ranks": [0],
    "folds": 3,
    "training": {"epochs": 1},
    "grace": 1,
    "baselines": [],
}


@pytest.fixture(scope="module")
def winner(cohort, encoder, tmp_path_factory):
    out = tmp_path_factory.mktemp("sweep")
    sweep(load_config(SweepConfig, {"shards": str(cohort), "backbone": str(encoder), "out": out, **SETTINGS}))
    return out / "best" / "adapter"


def _attribute(model, cohort, encoder, out):
    config = {"model": model, "shards": str(cohort), "backbone": encoder, "out": out, "clips": 1}
    return attribute_regions(load_config(AttributionConfig, config))


def test_a_sweeps_adapter_is_refused_on_the_sweeps_own_shards(winner, cohort, encoder, tmp_path):
    with pytest.raises(FinetuneError, match="was trained on these very subjects; give shards of others"):
        _attribute(winner, cohort, encoder, tmp_path)
    recorded = json.loads((winner / "task.json").read_text())["figures"]
    assert recorded["shards_hash"] == load_manifest(cohort).content_hash


def test_an_adapter_that_does_not_say_whom_it_has_seen_is_refused(winner, cohort, encoder, tmp_path):
    copy = shutil.copytree(winner, tmp_path / "adapter")
    content = json.loads((copy / "task.json").read_text())
    del content["figures"]["shards_hash"]
    (copy / "task.json").write_text(json.dumps(content))
    with pytest.raises(FinetuneError, match=r"task\.json: does not say which shards it was trained on"):
        _attribute(copy, cohort, encoder, tmp_path / "out")
