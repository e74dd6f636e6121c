import numpy as np
import pytest
import torch
from torch import nn

from boldforge.configs import load_config, recipe_path
from boldforge.data_shards import brain_mask, get_grid
from boldforge.finetune import (
    AdapterConfig,
    AdapterError,
    AdhdDiagnosis,
    Classifier,
    FinetuneConfig,
    FinetuneError,
    finetune,
    load_backbone,
    load_classifier,
    save_adapter,
)
from boldforge.finetune.resnet_rnn import DEPTHS, ResnetRnn, ResnetRnnBackbone, ResnetRnnConfig

MASK = brain_mask(get_grid("mni4mm"))


def _network(**changes):
    torch.manual_seed(0)
    return ResnetRnn(ResnetRnnConfig(kind="resnet-rnn", **{"width": 4, "hidden": 5, "clip_length": 3, **changes}), MASK)


@pytest.mark.parametrize(("depth", "convolutions"), [("A", 7), ("B", 13), ("C", 21), ("D", 35)])
def test_the_ladder_has_the_depth_it_says(depth, convolutions):
    network = _network(depth=depth)
    deep = [m for m in network.modules() if isinstance(m, nn.Conv3d) and m.kernel_size == (3, 3, 3)]
    assert len(deep) == convolutions == 1 + 2 * sum(DEPTHS[depth])
    sizes = []
    for block in network.blocks:
        block.register_forward_hook(lambda _m, _i, out: sizes.append(tuple(out.shape[2:])))
    network(torch.randn(1, 1, MASK.sum()))
    assert sorted(set(sizes), reverse=True) == [(17, 17, 17), (9, 9, 9), (5, 5, 5)]


@pytest.mark.parametrize("rnn", ["lstm", "gru"])
def test_both_directions_of_time_are_read_and_clips_do_not_mix(rnn):
    network = _network(depth="A", rnn=rnn)
    clips = torch.randn(2, 3, int(MASK.sum()))
    with torch.no_grad():
        vector = network(clips)
        assert vector.shape == (2, 10)
        torch.testing.assert_close(network(clips[1:]), vector[1:], rtol=1e-4, atol=1e-5)
        turned = network(clips.flip(1))
    assert not torch.allclose(turned, vector, atol=1e-4), "the order of frames must matter"


def test_every_frame_is_34_voxels_wide_with_the_brain_where_it_is():
    network = _network(depth="A")
    place = np.argwhere(MASK)
    right = torch.from_numpy((place[:, 0] > 24).astype(np.float32))
    frame = network.frames(right.view(1, 1, -1))
    assert frame.shape == (1, 1, 34, 34, 34)
    assert frame[0, 0, :16].abs().max() == 0 and frame[0, 0, 20:].max() == 1


@pytest.mark.parametrize("depth", "abcd")
@pytest.mark.parametrize("rnn", ["lstm", "gru"])
def test_the_eight_recipes_are_valid(depth, rnn):
    config = load_config(FinetuneConfig, recipe_path(f"finetune/resnet-{depth}-{rnn}.yaml"))
    assert (config.backbone.depth, config.backbone.rnn) == (depth.upper(), rnn)
    assert (config.training.lr, config.training.patience, config.adapter.kind) == (1e-4, 5, "full")


def test_a_network_is_trained_from_nothing_and_loads_without_an_encoder(cohort, tmp_path):
    settings = {
        "shards": cohort,
        "backbone": {"kind": "resnet-rnn", "depth": "A", "width": 4, "hidden": 4, "clip_length": 4},
        "out": tmp_path,
        "clips": 1,
        "folds": 2,
        "adapter": {"kind": "full"},
        "training": {"epochs": 1, "batch_size": 4},
        "baselines": [],
    }
    results = finetune(load_config(FinetuneConfig, settings))
    assert results["trainable_parameters"] == results["total_parameters"]
    classifier = load_classifier(None, tmp_path / "adapter")
    assert (tmp_path / "adapter" / "tuned.safetensors").exists()
    assert classifier.predict(torch.randn(1, 4, int(MASK.sum()))).shape == (1,)
    with pytest.raises(AdapterError, match="trained from nothing; give no encoder"):
        load_classifier(tmp_path, tmp_path / "adapter")
    with pytest.raises(FinetuneError, match=r"has no pretrained weights to adapt; set adapter\.kind to full"):
        finetune(load_config(FinetuneConfig, {**settings, "adapter": {"rank": 2}}))


def _classifier(rnn):
    torch.manual_seed(0)
    config = ResnetRnnConfig(kind="resnet-rnn", depth="A", rnn=rnn, width=4, hidden=5, clip_length=3)
    backbone = ResnetRnnBackbone(config, MASK, {"grid": "mni4mm"}, seed=0)
    return Classifier(backbone, AdhdDiagnosis(), AdapterConfig(kind="full"))


@pytest.mark.parametrize("rnn", ["lstm", "gru"])
def test_only_the_recurrent_layer_is_in_training_mode_and_it_does_the_same_in_both(rnn):
    """cuDNN has no backward pass of recurrent layers in evaluation mode."""
    classifier = _classifier(rnn)
    clips = torch.randn(2, 3, int(MASK.sum()))
    outputs = {}
    for training in (True, False):
        classifier.train(training)
        found = [name for name, module in classifier.network.named_modules() if module.training]
        assert found == (["rnn"] if training else [])
        outputs[training] = classifier(clips)
    assert torch.equal(outputs[True], outputs[False])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
@pytest.mark.parametrize("rnn", ["lstm", "gru"])
def test_a_step_on_a_gpu_moves_every_tensor(rnn):
    classifier = _classifier(rnn).to("cuda").train()
    parameters = dict(classifier.named_parameters())
    before = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    optimizer = torch.optim.Adam(parameters.values(), lr=1e-3)
    logits = classifier(torch.randn(2, 3, int(MASK.sum())).to("cuda"))
    classifier.task.criterion([0, 1])(logits, torch.tensor([0.0, 1.0], device="cuda")).backward()
    optimizer.step()
    assert [name for name, tensor in parameters.items() if torch.equal(tensor, before[name])] == []


def test_full_and_partial_training_of_an_encoder(encoder, values_BTV, tmp_path):
    plain = {name: tensor.clone() for name, tensor in load_backbone(encoder).network.named_parameters()}
    for stage in (0, 1):
        classifier = Classifier(load_backbone(encoder), AdhdDiagnosis(), AdapterConfig(kind="full", first_stage=stage))
        parameters = [p for p in classifier.parameters() if p.requires_grad]
        optimizer = torch.optim.Adam(parameters, lr=1e-3)
        for _ in range(2):
            optimizer.zero_grad()
            classifier(values_BTV).square().sum().backward()
            optimizer.step()
        moved = {n for n, p in classifier.network.named_parameters() if not torch.equal(p, plain[n])}
        assert moved == set(classifier.info.layers)
        assert any(name.startswith("stages.0") for name in moved) == (stage == 0)
        assert not any(name.startswith("decoder") for name in moved)
        loaded = load_classifier(encoder, save_adapter(classifier, tmp_path / str(stage)))
        assert torch.equal(loaded(values_BTV), classifier(values_BTV))
