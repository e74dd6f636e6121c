import re
from fnmatch import fnmatchcase

import numpy as np
import pytest
import torch

from boldforge.finetune import (
    AdapterConfig,
    AdapterError,
    AdhdDiagnosis,
    Classifier,
    FinetuneError,
    attach_adapter,
    load_adapter,
    load_classifier,
    merge_adapter,
    save_adapter,
)
from boldforge.finetune.adapters import peft_description
from boldforge.finetune.classifier import Head
from boldforge.finetune.fmcib import TRUNK, FmcibBackbone, build_fmcib, load_fmcib
from boldforge.finetune.volumes import CubeRecipe


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """FMCIB's layout, 1/64 as wide as the published one."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("fmcib") / "weights.torch"
    torch.save({TRUNK: build_fmcib(1 / 32).state_dict(), "epoch": 1}, path)
    return path


def test_the_published_network_has_the_published_counts():
    with torch.device("meta"):
        backbone = FmcibBackbone(build_fmcib(), "none")
        assert sum(p.numel() for p in backbone.network.parameters()) == 184_477_824
        assert backbone.dim == 4096 and len(backbone.adaptable_layers(0)) == 53
        info = attach_adapter(backbone, AdapterConfig(rank=2, targets=("*",)))
        head = Head(backbone.dim, 1, hidden=256)
    trainable = info.trainable + sum(p.numel() for p in head.parameters())
    assert trainable == 1_638_831
    assert info.total - info.trainable + trainable == 184_477_824 + 1_638_831


def test_parts_and_the_whole_agree_with_the_network_itself(weights):
    backbone = load_fmcib(weights)
    cubes = torch.rand(2, 1, 50, 50, 50)
    with torch.no_grad():
        whole = backbone.embed(cubes)
        assert torch.equal(whole, backbone.network(cubes)) and whole.shape == (2, backbone.dim)
        for stage in range(backbone.n_stages + 1):
            assert torch.equal(backbone.embed_from(backbone.encode_until(cubes, stage), stage), whole)


def test_an_adapted_network_learns_and_merges(weights):
    backbone = load_fmcib(weights)
    kept = {name: tensor.clone() for name, tensor in backbone.network.state_dict().items()}
    info = attach_adapter(backbone, AdapterConfig(rank=2, targets=("conv?", "0")))
    assert len(info.layers) == 53
    cubes = torch.rand(2, 1, 50, 50, 50)
    parameters = [p for p in backbone.network.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-3)
    alive = [False] * len(parameters)
    for _ in range(2):
        optimizer.zero_grad()
        backbone.embed(cubes).mean().backward()
        alive = [was or bool(p.grad.abs().max() > 0) for was, p in zip(alive, parameters, strict=True)]
        optimizer.step()
    assert all(alive) and len(alive) == 106
    with torch.no_grad():
        apart = backbone.embed(cubes)
        merge_adapter(backbone)
        torch.testing.assert_close(backbone.embed(cubes), apart, rtol=1e-4, atol=1e-5)
    plain = load_fmcib(weights).network.state_dict()
    assert all(torch.equal(plain[name], kept[name]) for name in kept), "the file is never written to"
    assert backbone.weights_hash == load_fmcib(weights).weights_hash


@pytest.mark.parametrize(
    ("targets", "ranks"),
    [
        # Named as a layer of every block is, the first convolution must not stand for them too, nor they for it.
        (("*",), {"layer1.*": 0}),
        (("*",), {"conv1": 8}),
        (("*",), {"layer?.*.conv1": 2, "conv1": 8}),
        (("conv1",), {"layer?.*": 0}),
        (("layer2.0.*", "conv1"), {"layer[1-4].*.conv1": 1, "layer2.0.downsample.0": 5}),
    ],
)
def test_the_layers_that_are_asked_for_are_adapted_at_their_ranks_and_no_others(targets, ranks):
    with torch.device("meta"):
        backbone = FmcibBackbone(build_fmcib(1 / 32), "none")
        names = backbone.adaptable_layers(0)
        config = AdapterConfig(rank=3, targets=targets, ranks=ranks)
        info = attach_adapter(backbone, config)

    def fits(name, pattern):
        return fnmatchcase(name, pattern) or fnmatchcase(name.rsplit(".", 1)[-1], pattern)

    asked = {n: next((r for p, r in ranks.items() if fits(n, p)), 3) for n in names if any(fits(n, t) for t in targets)}
    asked = {name: rank for name, rank in asked.items() if rank}
    found = {
        name.removesuffix(".lora_A.default.weight"): len(tensor)
        for name, tensor in backbone.network.named_parameters()
        if name.endswith("lora_A.default.weight")
    }
    assert found == asked and sorted(info.layers) == sorted(asked)
    scales = {module.scaling["default"] for module in backbone.network.modules() if hasattr(module, "lora_A")}
    assert scales == {2.0}
    described = peft_description(backbone)
    # What peft itself reads from the file means the same layers.
    with torch.device("meta"):
        theirs = build_fmcib(1 / 32)
        matched = [n for n, _ in theirs.named_modules() if re.fullmatch(described["target_modules"], n)]
    assert sorted(matched) == sorted(asked)


def test_an_adapter_is_refused_where_cubes_are_read_in_another_way(weights, tmp_path):
    def read(**cube):
        backbone = load_fmcib(weights)
        recipe = CubeRecipe(**{"kind": "fa", "spacing": 4, **cube}).model_dump(mode="json")
        backbone.data = {**backbone.data, "cube": recipe}
        return backbone

    save_adapter(Classifier(read(), AdhdDiagnosis(), AdapterConfig(kind="probe")), tmp_path / "adapter")
    load_adapter(tmp_path / "adapter", read())
    assert load_classifier(weights, tmp_path / "adapter").backbone.data == read().data
    for changed, said in [
        ({"kind": "ct"}, r"cube\.kind ct instead of fa"),
        ({"spacing": 1}, r"cube\.spacing 1\.0 instead of 4\.0"),
        ({"centre": (0, -20, 10)}, r"cube\.centre \[0\.0, -20\.0, 10\.0\] instead of None"),
    ]:
        with pytest.raises(AdapterError, match=said):
            load_adapter(tmp_path / "adapter", read(**changed))
        load_adapter(tmp_path / "adapter", read(**changed), force=True)
    turned = read()
    turned.data = {**turned.data, "orientation": "RAS", "order": "xyz"}
    with pytest.raises(AdapterError, match="order xyz instead of zyx, orientation RAS instead of LPS"):
        load_adapter(tmp_path / "adapter", turned)


def test_other_files_are_refused(weights, tmp_path):
    state = torch.load(weights, weights_only=True)[TRUNK]
    wrong = {
        "missing": (
            {TRUNK: {k: v for k, v in state.items() if k != "layer1.0.conv1.weight"}},
            "1 parameters do not fit.*none",
        ),
        "left_over": ({TRUNK: state | {"fc.weight": torch.zeros(2)}}, "first is fc.weight"),
        "shape": ({TRUNK: state | {"bn1.bias": torch.zeros(7)}}, r"bn1.bias \(found \(7,\)"),
        "other": ({"state_dict": state}, "holds state_dict, expected a dictionary with trunk_state_dict"),
        "code": ({TRUNK: state, "scaler": np.random.default_rng(0)}, "not a torch file of tensors alone"),
    }
    for name, (content, message) in wrong.items():
        torch.save(content, tmp_path / name)
        with pytest.raises(FinetuneError, match=f"{name}.*{message}"):
            load_fmcib(tmp_path / name)
    with pytest.raises(FinetuneError, match="no such file"):
        load_fmcib(tmp_path / "none")
    (tmp_path / "text").write_text("weights")
    with pytest.raises(FinetuneError, match="text: is not a torch file"):
        load_fmcib(tmp_path / "text")
