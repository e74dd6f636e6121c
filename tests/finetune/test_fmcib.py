import numpy as np
import pytest
import torch

from boldforge.finetune import AdapterConfig, FinetuneError, attach_adapter, merge_adapter
from boldforge.finetune.classifier import Head
from boldforge.finetune.fmcib import TRUNK, FmcibBackbone, build_fmcib, load_fmcib


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
