import json
import shutil
from math import nan

import peft
import pytest
import torch

from boldforge.finetune import (
    AdapterConfig,
    AdapterError,
    AdhdDiagnosis,
    Classifier,
    adapter_state,
    attach_adapter,
    load_adapter,
    load_backbone,
    load_classifier,
    merge_adapter,
    save_adapter,
    unmerge_adapter,
)
from boldforge.pretrain import load_pretrained

LABELS = torch.tensor([0, 1, 1])


def _train(classifier, values_BTV, steps):
    parameters = [parameter for parameter in classifier.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-2)
    criterion = classifier.task.criterion(LABELS.tolist())
    for _ in range(steps):
        optimizer.zero_grad(set_to_none=True)
        criterion(classifier(values_BTV), LABELS).backward()
        optimizer.step()


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_a_new_adapter_changes_nothing(encoder, values_BTV, dropout):
    plain = load_backbone(encoder).embed(values_BTV)
    adapted = load_backbone(encoder)
    attach_adapter(adapted, AdapterConfig(rank=3, dropout=dropout))
    assert torch.equal(adapted.embed(values_BTV), plain)


def test_every_adapter_tensor_learns_within_two_steps_and_the_base_never_does(encoder, values_BTV):
    classifier = Classifier(load_backbone(encoder), AdhdDiagnosis(), AdapterConfig(rank=2))
    base = {n: p.clone() for n, p in classifier.network.named_parameters() if not p.requires_grad}
    alive = set()
    for _ in range(2):
        _train(classifier, values_BTV, steps=1)
        alive |= {n for n, p in classifier.named_parameters() if p.grad is not None and p.grad.abs().max() > 0}
    trainable = {n for n, p in classifier.named_parameters() if p.requires_grad}
    assert alive == trainable
    assert len(trainable) == 2 * len(classifier.info.layers) + 2
    for target in ("in_proj", "x_proj", "dt_proj", "out_proj", "fc1", "fc2"):
        # two stages of two blocks; the decoder has such layers too and must not be adapted
        assert sum(name.endswith(target) for name in classifier.info.layers) == 4
    for name, parameter in classifier.network.named_parameters():
        if name in base:
            assert torch.equal(parameter, base[name])


def test_counts_and_first_stage(encoder):
    backbone = load_backbone(encoder)
    total = sum(parameter.numel() for parameter in backbone.network.parameters())
    info = attach_adapter(backbone, AdapterConfig(rank=2, first_stage=1, targets=("in_proj",)))
    # Stage 1 has dim 16: in_proj is 16 -> 64 in each of two blocks, and rank 2 adds 2 · (16 + 64).
    assert info.layers == ("stages.1.blocks.0.mamba.in_proj", "stages.1.blocks.1.mamba.in_proj")
    assert info.trainable == 2 * 2 * (16 + 64)
    assert info.total == total + info.trainable


def test_rank_zero_trains_the_head_alone(encoder, values_BTV):
    classifier = Classifier(load_backbone(encoder), AdhdDiagnosis(), AdapterConfig(rank=0))
    assert classifier.trainable == 56 + 1
    _train(classifier, values_BTV, steps=1)
    assert torch.equal(classifier.backbone.embed(values_BTV), load_backbone(encoder).embed(values_BTV))


def test_ranks_by_layer(encoder):
    backbone = load_backbone(encoder)
    settings = {"rank": 2, "targets": ("in_proj", "stages.1.blocks.*.fc?"), "first_stage": 1}
    info = attach_adapter(backbone, AdapterConfig(**settings, ranks={"fc1": 0, "stages.1.blocks.1.*": 5}))
    names = {name: tensor for name, tensor in adapter_state(backbone).items() if "lora_A" in name}
    assert [name.split("stages.1.blocks.")[1] for name in info.layers] == [
        "0.mamba.in_proj", "0.mlp.fc2", "1.mamba.in_proj", "1.mlp.fc2",
    ]  # fmt: skip
    assert {len(tensor) for name, tensor in names.items() if "blocks.0" in name} == {2}
    assert {len(tensor) for name, tensor in names.items() if "blocks.1" in name} == {5}
    scaling = {module.scaling["default"] for module in backbone.network.modules() if hasattr(module, "lora_A")}
    assert scaling == {2.0}, "without alpha the scale is the same at every rank"
    for ranks, message in [
        ({"qkv": 3}, r"'qkv' fits none of .*in_proj"),
        ({"in_proj": -1}, r"'in_proj' is -1, expected 0 or more"),
        ({"*": 0}, "leaves no layer to adapt"),
    ]:
        with pytest.raises(AdapterError, match=message):
            attach_adapter(load_backbone(encoder), AdapterConfig(ranks=ranks))


@pytest.mark.parametrize("kind", [{}, {"rank_stabilised": True}, {"dora": True}])
def test_a_merged_adapter_predicts_the_same_and_comes_off_again(encoder, values_BTV, kind, tmp_path):
    classifier = Classifier(load_backbone(encoder), AdhdDiagnosis(), AdapterConfig(rank=2, **kind))
    plain = classifier.backbone.embed(values_BTV)
    _train(classifier, values_BTV, steps=4)
    apart = classifier.backbone.embed(values_BTV)
    assert not torch.allclose(plain, apart, rtol=1e-3)
    assert torch.equal(
        load_adapter(save_adapter(classifier, tmp_path), load_backbone(encoder))(values_BTV), classifier(values_BTV)
    )
    merge_adapter(classifier.backbone)
    torch.testing.assert_close(classifier.backbone.embed(values_BTV), apart, rtol=1e-5, atol=1e-5)
    unmerge_adapter(classifier.backbone)
    torch.testing.assert_close(classifier.backbone.embed(values_BTV), apart, rtol=1e-5, atol=1e-5)


def test_targets_that_name_nothing_and_a_missing_stage_are_refused(encoder):
    with pytest.raises(AdapterError, match=r"\['qkv'\] name no layer.*in_proj"):
        attach_adapter(load_backbone(encoder), AdapterConfig(targets=("qkv",)))
    with pytest.raises(AdapterError, match="first_stage is 2, but this encoder has 2 stages"):
        attach_adapter(load_backbone(encoder), AdapterConfig(first_stage=2))


def test_dropout_acts_in_training_and_only_in_the_adapter(encoder, values_BTV):
    classifier = Classifier(load_backbone(encoder), AdhdDiagnosis(), AdapterConfig(rank=2, dropout=0.5))
    _train(classifier, values_BTV, steps=2)
    once = classifier(values_BTV)
    assert torch.equal(classifier(values_BTV), once)
    classifier.train()
    assert not torch.equal(classifier(values_BTV), classifier(values_BTV))
    training = [name for name, module in classifier.network.named_modules() if module.training]
    assert training and all("lora_dropout" in name for name in training)


@pytest.mark.parametrize("rank", [0, 3])
def test_a_saved_adapter_predicts_the_same_bits(encoder, values_BTV, tmp_path, rank):
    classifier = Classifier(load_backbone(encoder, "mean"), AdhdDiagnosis(), AdapterConfig(rank=rank))
    classifier.head.fit_scale(classifier.backbone.embed(values_BTV).detach())
    _train(classifier, values_BTV, steps=3)
    save_adapter(classifier, tmp_path, {"figures": {"auc": 0.5}})
    loaded = load_classifier(encoder, tmp_path)
    assert torch.equal(loaded.predict(values_BTV), classifier.predict(values_BTV))
    assert (tmp_path / "adapter_model.safetensors").exists() == (rank > 0)
    assert json.loads((tmp_path / "task.json").read_text())["figures"] == {"figures": {"auc": 0.5}}


def test_two_saves_of_one_training_are_the_same_files(encoder, values_BTV, tmp_path):
    for name in ("a", "b"):
        classifier = Classifier(load_backbone(encoder), AdhdDiagnosis(), AdapterConfig(rank=2), seed=4)
        _train(classifier, values_BTV, steps=2)
        save_adapter(classifier, tmp_path / name)
    for path in (tmp_path / "a").iterdir():
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes(), path.name


def test_a_saved_head_leaves_nothing_of_an_older_adapter(encoder, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    for rank in (2, 0):
        save_adapter(Classifier(load_backbone(encoder), AdhdDiagnosis(), AdapterConfig(rank=rank)), tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"notes.txt", "task.json", "head.safetensors"}


def test_a_save_that_breaks_off_leaves_no_mixture(encoder, tmp_path):
    save_adapter(Classifier(load_backbone(encoder), AdhdDiagnosis(), AdapterConfig(rank=2)), tmp_path)
    with pytest.raises(ValueError, match="not JSON compliant"):
        save_adapter(Classifier(load_backbone(encoder), AdhdDiagnosis(), AdapterConfig(rank=2)), tmp_path, {"auc": nan})
    with pytest.raises(AdapterError, match=r"task\.json: no such file"):
        load_classifier(encoder, tmp_path)


def test_peft_itself_loads_the_folder(encoder, values_BTV, tmp_path):
    classifier = Classifier(load_backbone(encoder), AdhdDiagnosis(), AdapterConfig(rank=2))
    _train(classifier, values_BTV, steps=2)
    save_adapter(classifier, tmp_path)
    model = peft.PeftModel.from_pretrained(load_pretrained(encoder).model, tmp_path)
    # peft's own layers multiply by W and by the update in turn, which rounds elsewhere.
    torch.testing.assert_close(model.encode(values_BTV), classifier.network.encode(values_BTV))


def test_another_base_is_refused(encoder, write_encoder, tmp_path):
    classifier = Classifier(load_backbone(encoder), AdhdDiagnosis(), AdapterConfig(rank=2))
    save_adapter(classifier, tmp_path)
    other = load_backbone(write_encoder(seed=1))
    with pytest.raises(AdapterError, match=f"was trained on .* instead of {classifier.backbone.weights_hash}"):
        load_adapter(tmp_path, other)
    with pytest.raises(AdapterError, match="load it with pool='multiscale'"):
        load_adapter(tmp_path, load_backbone(encoder, "mean"))


def test_a_damaged_or_missing_folder_is_named(encoder, tmp_path):
    with pytest.raises(AdapterError, match=r"task\.json: no such file"):
        load_classifier(encoder, tmp_path)
    good = save_adapter(Classifier(load_backbone(encoder), AdhdDiagnosis(), AdapterConfig(rank=2)), tmp_path / "good")
    for name, content, message in [
        ("task.json", b"{", "is not valid JSON"),
        ("task.json", b'{"format_version": 9}', "has format version 9, this boldforge reads 1"),
        ("head.safetensors", b"short", r"head\.safetensors: cannot be read"),
        ("adapter_model.safetensors", None, r"adapter_model\.safetensors: cannot be read"),
    ]:
        bad = tmp_path / "bad"
        shutil.rmtree(bad, ignore_errors=True)
        shutil.copytree(good, bad)
        (bad / name).unlink() if content is None else (bad / name).write_bytes(content)
        with pytest.raises(AdapterError, match=message):
            load_classifier(encoder, bad)
