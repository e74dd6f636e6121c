"""An encoder in millimetres and seconds reads shards of another grid, TR and clip length."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from boldforge.data_shards import DataRecipe, brain_mask, get_grid, mask_hash
from boldforge.finetune import (
    AdapterConfig,
    AdhdDiagnosis,
    Classifier,
    FinetuneError,
    load_backbone,
    load_classifier,
    save_adapter,
)
from boldforge.finetune.cohort import check_recipe
from boldforge.finetune.networks import make_backbone
from boldforge.finetune.resnet_rnn import ResnetRnnConfig
from boldforge.finetune.study import StudyConfig, open_study
from tests.finetune.conftest import TINY

FREE = TINY.model_copy(update={"position": "mm", "time": "seconds", "merge_time": (True,), "bidirectional": True})


def shards(grid: str = "mni4mm", tr: float = 2.0) -> dict[str, object]:
    return {"grid": grid, "tr": tr, "normalisation": "residual-z", "mask_sha256": mask_hash(brain_mask(get_grid(grid)))}


def clips(grid: str, frames: int) -> torch.Tensor:
    shape = (2, frames, int(brain_mask(get_grid(grid)).sum()))
    return torch.from_numpy(np.random.default_rng(1).standard_normal(shape, dtype=np.float32))


@pytest.fixture(scope="module")
def free(write_encoder) -> Path:
    return write_encoder(model=FREE)


@pytest.mark.parametrize("pool", ["mean", "mean_std", "multiscale"])
def test_clips_of_an_odd_length_in_two_parts_are_the_same_at_every_stage(free, pool):
    backbone = load_backbone(free, pool, shards(tr=0.8) | {"clip_length": 7})
    assert backbone.data["tr"] == 0.8 and backbone.data["clip_length"] == 7
    values_BTV = clips("mni4mm", 7)
    whole = backbone.embed(values_BTV)
    assert whole.shape == (2, backbone.dim)
    for stage in range(backbone.n_stages + 1):
        assert torch.equal(backbone.embed_from(backbone.encode_until(values_BTV, stage), stage), whole)
    slower = load_backbone(free, pool, shards(tr=2.5) | {"clip_length": 7})
    assert not torch.allclose(slower.embed(values_BTV), whole, atol=1e-4), "the TR is seen"


def test_shards_of_another_grid_and_tr_fit_and_of_another_normalisation_do_not(free):
    for grid, tr in (("mni2mm", 0.8), ("mni4mm", 1.5), ("mni4mm", 2.0)):
        data = shards(grid, tr)
        backbone = load_backbone(free, data=data)
        manifest = SimpleNamespace(
            recipe=DataRecipe(grid=grid, tr=tr), mask_sha256=data["mask_sha256"], folder=Path("x")
        )
        check_recipe(backbone, manifest)
        with torch.no_grad():
            assert backbone.embed(clips(grid, 4)).isfinite().all()
        manifest.recipe = DataRecipe(grid=grid, tr=tr, normalisation="voxel-z")
        with pytest.raises(FinetuneError, match="the shards have normalisation voxel-z instead of residual-z"):
            check_recipe(backbone, manifest)


def test_an_adapter_comes_back_with_the_data_that_it_was_trained_on(free, tmp_path):
    data = shards("mni2mm", 0.8) | {"clip_length": 6}
    classifier = Classifier(load_backbone(free, data=data), AdhdDiagnosis(), AdapterConfig(rank=2))
    names = classifier.info.layers
    assert any(".mamba.backwards.x_proj" in name for name in names), "both directions are adapted"
    assert not any("position" in name or "time" in name for name in names)
    again = load_classifier(free, save_adapter(classifier, tmp_path))
    assert {key: again.backbone.data[key] for key in data} == data
    values_BTV = clips("mni2mm", 6)
    with torch.no_grad():
        assert torch.equal(again(values_BTV), classifier(values_BTV))


def test_a_study_takes_clips_of_the_length_asked_for(free, cohort, tmp_path):
    config = StudyConfig(shards=cohort, backbone=free, out=tmp_path, frames=9)
    study = open_study(config)
    gathered = study.gather(study.cohort.subjects[:2], tmp_path / "clips")
    assert gathered.x.shape[1] == 9
    assert (
        open_study(config.model_copy(update={"frames": None}))
        .gather(study.cohort.subjects[:2], tmp_path / "own")
        .x.shape[1]
        == 4
    )


def test_what_an_encoder_cannot_read_is_one_sentence(free, encoder, cohort, tmp_path):
    with pytest.raises(FinetuneError, match=r"clips of 9 frames .* learned embedding for each of its 4 frames"):
        load_backbone(encoder, data={"clip_length": 9})
    with pytest.raises(FinetuneError, match=r"clips of 1 frames .* halves time and needs 2 at least; raise frames"):
        load_backbone(free, data={"clip_length": 1})
    with pytest.raises(FinetuneError, match=r"none of the .* have no run of 99 frames"):
        open_study(StudyConfig(shards=cohort, backbone=free, out=tmp_path, frames=99))
    with pytest.raises(FinetuneError, match=r"frames is 9, but backbone resnet-rnn has a clip_length of its own, 20"):
        make_backbone(ResnetRnnConfig(kind="resnet-rnn"), "mean", shards() | {"clip_length": 9}, 0)
    # A learned position keeps its grid: which is then said of the shards, with the mend.
    assert load_backbone(encoder, data=shards("mni2mm")).data["grid"] == "mni4mm"


def test_one_frame_has_no_change_to_pool(write_encoder):
    still = write_encoder(model=FREE.model_copy(update={"merge_time": ()}))
    with pytest.raises(FinetuneError, match="clips of 1 frame were asked for; set pool to mean, or raise frames"):
        load_backbone(still, "multiscale", {"clip_length": 1})
    assert load_backbone(still, "mean", {"clip_length": 1}).embed(clips("mni4mm", 1)).isfinite().all()
