import peft
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from boldforge.finetune.conv_lora import Conv3dLora
from boldforge.finetune.errors import FinetuneError


def _adapted(conv, rank=3, **settings):
    config = peft.LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=["0"], **settings)
    config._register_custom_module({nn.Conv3d: Conv3dLora})
    network = nn.Sequential(conv)
    peft.inject_adapter_in_model(config, network)
    layer = network[0]
    assert isinstance(layer, Conv3dLora)
    return network, layer


def _trained(layer):
    with torch.no_grad():
        for parameter in (*layer.lora_A.parameters(), *layer.lora_B.parameters()):
            parameter.copy_(torch.randn(parameter.shape, dtype=parameter.dtype))


@st.composite
def convolutions(draw):
    groups = draw(st.sampled_from([1, 1, 2, 3]))
    kernel = tuple(draw(st.lists(st.integers(1, 3), min_size=3, max_size=3)))
    return nn.Conv3d(
        groups * draw(st.integers(1, 3)),
        groups * draw(st.integers(1, 3)),
        kernel,
        stride=draw(st.integers(1, 2)),
        padding=draw(st.integers(0, 2)),
        dilation=draw(st.integers(1, 2)),
        groups=groups,
        bias=draw(st.booleans()),
        padding_mode=draw(st.sampled_from(["zeros", "circular", "replicate"])),
        dtype=torch.float64,
    )


@settings(max_examples=60, deadline=None)
@given(convolutions(), st.integers(1, 5), st.booleans())
def test_the_update_is_a_product_of_two_matrices_on_any_convolution(conv, rank, rank_stabilised):
    torch.manual_seed(0)
    x = torch.randn(2, conv.in_channels, 6, 7, 5, dtype=torch.float64)
    plain, kernel = conv(x), conv.weight.detach().clone()
    network, layer = _adapted(conv, rank, use_rslora=rank_stabilised)
    layer.lora_A.double(), layer.lora_B.double()
    assert torch.equal(network(x), plain), "a new adapter changes nothing"
    _trained(layer)
    a = layer.lora_A["default"].weight.flatten(1)
    b = layer.lora_B["default"].weight.flatten(1)
    scale = 2 * rank / (rank**0.5 if rank_stabilised else rank)
    assert a.shape == (rank, kernel[0].numel()) and b.shape == (conv.out_channels, rank)
    reference = conv._conv_forward(x, kernel + scale * (b @ a).view_as(kernel), conv.bias)
    adapted = network(x)
    torch.testing.assert_close(adapted, reference, rtol=1e-10, atol=1e-10)
    layer.merge()
    torch.testing.assert_close(network(x), adapted, rtol=1e-10, atol=1e-10)
    layer.unmerge()
    torch.testing.assert_close(conv.weight, kernel, rtol=1e-12, atol=1e-12)
    assert conv.groups * conv.weight.shape[1] == conv.in_channels


@pytest.mark.parametrize("kernel", [1, 3, 7])
def test_merging_in_float32_is_exact_to_a_millionth(kernel):
    torch.manual_seed(0)
    conv = nn.Conv3d(8, 12, kernel, padding=kernel // 2)
    before = conv.weight.detach().clone()
    network, layer = _adapted(conv)
    _trained(layer)
    with torch.no_grad():  # an update as large as the kernel, which is more than training ever learns
        layer.lora_B["default"].weight.mul_(before.norm() / layer.get_delta_weight("default").norm())
    x = torch.randn(1, 8, 7, 7, 7)
    apart = network(x)
    layer.merge()
    assert (network(x) - apart).norm() / apart.norm() < 1e-6
    layer.unmerge()
    assert (conv.weight - before).norm() / before.norm() < 1e-6


def test_peft_s_own_layer_loads_the_tensors_and_agrees():
    torch.manual_seed(0)
    conv = nn.Conv3d(4, 6, 3, stride=2, padding=1)
    network, layer = _adapted(conv)
    _trained(layer)
    state = peft.get_peft_model_state_dict(network)
    theirs = nn.Sequential(nn.Conv3d(4, 6, 3, stride=2, padding=1))
    theirs[0].load_state_dict(conv.state_dict())
    peft.inject_adapter_in_model(peft.LoraConfig(r=3, lora_alpha=6, target_modules=["0"]), theirs)
    peft.set_peft_model_state_dict(theirs, state)
    x = torch.randn(2, 4, 9, 9, 9)
    torch.testing.assert_close(theirs(x), network(x))


@pytest.mark.parametrize("kernel", [1, 3])
def test_dora_learns_a_magnitude_and_merges(kernel):
    torch.manual_seed(0)
    conv = nn.Conv3d(4, 6, kernel, padding="same", dilation=2)
    x = torch.randn(2, 4, 6, 6, 6)
    plain = conv(x)
    network, layer = _adapted(conv, use_dora=True)
    torch.testing.assert_close(network(x), plain, rtol=1e-5, atol=1e-5)
    _trained(layer)
    apart = network(x)
    apart.square().sum().backward()
    magnitude = layer.lora_magnitude_vector["default"].weight
    assert magnitude.grad is not None and magnitude.grad.abs().max() > 0
    layer.merge()
    torch.testing.assert_close(network(x), apart, rtol=1e-4, atol=1e-4)


def test_dora_on_a_grouped_convolution_is_refused():
    with pytest.raises(FinetuneError, match=r"adapter.dora is on.*2 groups"):
        _adapted(nn.Conv3d(4, 4, 3, groups=2), use_dora=True)
