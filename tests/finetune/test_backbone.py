import pytest
import torch

from boldforge.configs import BoldForgeError
from boldforge.finetune import load_backbone


@pytest.mark.parametrize(("pool", "dim"), [("mean", 16), ("mean_std", 16 + 16), ("multiscale", 16 + 8 + 16 + 16)])
def test_running_in_two_parts_gives_the_same_embedding_at_every_stage(encoder, values_BTV, pool, dim):
    backbone = load_backbone(encoder, pool)
    whole = backbone.embed(values_BTV)
    assert whole.shape == (3, backbone.dim) == (3, dim)
    for stage in range(backbone.n_stages + 1):
        assert torch.equal(backbone.embed_from(backbone.encode_until(values_BTV, stage), stage), whole)


def test_mean_std_sees_fluctuations_that_the_mean_does_not(encoder, values_BTV):
    steady = values_BTV.mean(dim=1, keepdim=True).expand_as(values_BTV)
    deviation = load_backbone(encoder, "mean_std").embed(steady)[:, 16:]
    moving = load_backbone(encoder, "mean_std").embed(values_BTV)[:, 16:]
    assert (moving.mean(dim=1) > 2 * deviation.mean(dim=1)).all()
    mean = load_backbone(encoder, "mean")
    assert mean.dim == 16
    assert torch.equal(mean.embed(values_BTV), load_backbone(encoder, "mean_std").embed(values_BTV)[:, :16])


def test_multiscale_keeps_the_amplitude_that_merging_takes_away(encoder, values_BTV):
    """Twice the amplitude is seen at the patches, and hardly above the first merging's LayerNorm."""
    backbone = load_backbone(encoder, "multiscale")
    once, twice = (backbone.embed(values_BTV * factor)[:, 16:] for factor in (1.0, 2.0))
    ratio = twice.mean(dim=0) / once.mean(dim=0)
    assert torch.allclose(ratio[:8], torch.full((8,), 2.0), atol=0.01)
    assert ratio[8:].mean() < 1.8


def test_a_run_folder_stands_for_its_export(encoder, tmp_path, values_BTV):
    (tmp_path / "export").symlink_to(encoder)
    assert torch.equal(load_backbone(tmp_path).embed(values_BTV), load_backbone(encoder).embed(values_BTV))


def test_a_folder_without_a_model_is_named(tmp_path):
    with pytest.raises(BoldForgeError, match=str(tmp_path)):
        load_backbone(tmp_path)
