"""LoRA on linear layers against peft's own layer: outputs and every gradient, and where it steps aside."""

import peft
import pytest
import torch
from torch import nn

from boldforge.finetune.linear_lora import LinearLora, _LowRank


def _layers(rank=3, bias=True, dropout=0.0, dtype=torch.float64, **settings):
    """Ours and peft's, with the same weights and an update that is not zero."""
    found = []
    for custom in (True, False):
        torch.manual_seed(0)
        network = nn.Sequential(nn.Linear(7, 5, bias=bias)).to(dtype)
        config = peft.LoraConfig(r=rank, lora_alpha=5, lora_dropout=dropout, target_modules=["0"], **settings)
        if custom:
            config._register_custom_module({nn.Linear: LinearLora})
        peft.inject_adapter_in_model(config, network)
        torch.manual_seed(1)
        for name, parameter in network.named_parameters():
            if "lora_" in name and "magnitude" not in name:
                nn.init.normal_(parameter)
        found.append(network)
    assert isinstance(found[0][0], LinearLora) and not isinstance(found[1][0], LinearLora)
    return found


def _gradients(network, x, seed=2):
    x = x.clone().requires_grad_(True)
    torch.manual_seed(seed)
    y = network(x)
    y.square().sum().backward()
    named = {name: p.grad for name, p in network.named_parameters() if p.grad is not None}
    return y.detach(), x.grad, named


@pytest.mark.parametrize("shape", [(7,), (1, 7), (2, 11, 7), (2, 0, 7)])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("rank", [1, 3, 9])
def test_outputs_and_gradients_are_those_of_two_products(shape, bias, rank):
    ours, theirs = _layers(rank, bias)
    x = torch.randn(shape, dtype=torch.float64)
    for mine, wanted in zip(_gradients(ours, x)[:2], _gradients(theirs, x)[:2], strict=True):
        torch.testing.assert_close(mine, wanted)
    mine, wanted = _gradients(ours, x)[2], _gradients(theirs, x)[2]
    assert mine.keys() == wanted.keys() and len(mine) == 2
    for name, gradient in wanted.items():
        torch.testing.assert_close(mine[name], gradient)


@pytest.mark.parametrize(
    "settings", [{"dropout": 0.4}, {"use_dora": True}, {"use_rslora": True}], ids=["dropout", "DoRA", "root of rank"]
)
def test_with_dropout_dora_and_other_scaling_it_is_peft_s(settings):
    ours, theirs = _layers(**settings)
    x = torch.randn(4, 7, dtype=torch.float64)
    for training in (True, False):
        for network in (ours, theirs):
            network.train(training)
        torch.testing.assert_close(_gradients(ours, x), _gradients(theirs, x))


def test_merged_or_switched_off_it_is_the_plain_layer():
    ours, _ = _layers()
    x = torch.randn(4, 7, dtype=torch.float64)
    wanted = ours(x)
    ours[0].merge()
    torch.testing.assert_close(ours(x), wanted)
    ours[0].unmerge()
    ours[0].enable_adapters(False)
    torch.testing.assert_close(ours(x), ours[0].get_base_layer()(x))


def test_what_is_frozen_gets_no_gradient():
    ours, _ = _layers()
    x = torch.randn(4, 7, dtype=torch.float64)
    ours(x).sum().backward()
    assert ours[0].get_base_layer().weight.grad is None
    assert all(p.grad.abs().sum() > 0 for n, p in ours.named_parameters() if "lora_" in n)


def test_under_autocast_it_leaves_the_types_to_peft(monkeypatch):
    ours, theirs = _layers(dtype=torch.float32)
    monkeypatch.setattr(_LowRank, "apply", None)
    x = torch.randn(4, 7)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(ours(x), theirs(x))
