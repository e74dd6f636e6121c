import pytest
import torch

from boldforge.configs import BoldForgeError
from boldforge.finetune import load_backbone


def test_running_in_two_parts_gives_the_same_embedding_at_every_stage(encoder, values_BTV):
    backbone = load_backbone(encoder)
    whole = backbone.embed(values_BTV)
    assert whole.shape == (3, backbone.dim) == (3, 32)
    for stage in range(backbone.n_stages + 1):
        assert torch.equal(backbone.embed_from(backbone.encode_until(values_BTV, stage), stage), whole)


def test_mean_std_sees_fluctuations_that_the_mean_does_not(encoder, values_BTV):
    steady = values_BTV.mean(dim=1, keepdim=True).expand_as(values_BTV)
    deviation = load_backbone(encoder, "mean_std").embed(steady)[:, 16:]
    moving = load_backbone(encoder, "mean_std").embed(values_BTV)[:, 16:]
    assert (moving.mean(dim=1) > 2 * deviation.mean(dim=1)).all()
    mean = load_backbone(encoder, "mean")
    assert mean.dim == 16
    assert torch.equal(mean.embed(values_BTV), load_backbone(encoder).embed(values_BTV)[:, :16])


def test_a_run_folder_stands_for_its_export(encoder, tmp_path, values_BTV):
    (tmp_path / "export").symlink_to(encoder)
    assert torch.equal(load_backbone(tmp_path).embed(values_BTV), load_backbone(encoder).embed(values_BTV))


def test_a_folder_without_a_model_is_named(tmp_path):
    with pytest.raises(BoldForgeError, match=str(tmp_path)):
        load_backbone(tmp_path)
