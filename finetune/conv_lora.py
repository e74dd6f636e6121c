"""LoRA on 3D convolutions: the kernel as a matrix, its update as a product of two thin ones.

A kernel [C_out, C_in / groups, k, k, k] is read as a matrix W [C_out, C_in / groups · k³]; what is learned is
ΔW = (alpha / rank) · B·A with A [rank, C_in / groups · k³] and B [C_out, rank] (Kao et al. 2025, arXiv 2511.06163).
peft has such a layer; this one differs where that one stops: it merges 1×1×1 kernels, follows dilation and padding
modes, and takes grouped convolutions at any rank. Without groups its tensors are those of peft's file format.
"""

import math
from typing import Any

import torch
from peft import LoraConfig
from peft.tuners.lora.layer import Conv3d as PeftConv3d
from peft.tuners.lora.layer import LoraLayer
from torch import Tensor, nn

from boldforge.finetune.errors import FinetuneError


class Conv3dLora(PeftConv3d):
    """A frozen `torch.nn.Conv3d` and the low-rank update of its kernel.

    Parameters
    ----------
    base_layer
        Any kernel, stride, padding, padding mode, dilation and groups.
    adapter_name
        peft's name of the adapter.
    config
        peft's settings: dropout, scaling, DoRA.
    r
        Rank, at least 1; at most min(C_out, C_in / groups · k³) is of use.
    lora_alpha
        Scale of the update times the rank (times its root with rank-stabilised scaling).

    Raises
    ------
    FinetuneError
        If DoRA is asked for on a grouped convolution.
    """

    def __init__(
        self,
        base_layer: nn.Module,
        adapter_name: str,
        config: LoraConfig,
        r: int = 0,
        lora_alpha: int = 1,
        **kwargs: Any,
    ) -> None:
        # Not the parent's constructor: it warns of groups and refuses ranks that they do not divide.
        nn.Module.__init__(self)
        LoraLayer.__init__(self, base_layer)
        self._active_adapter = adapter_name
        self._kernel_dim = 5
        self.conv_fn = nn.functional.conv3d
        self.update_layer(adapter_name, r, lora_alpha=lora_alpha, config=config)

    def update_layer(self, adapter_name: str, r: int, lora_alpha: int, config: LoraConfig, **kwargs: Any) -> None:
        """Add the tensors of one adapter, as peft's layers do."""
        base: Any = self.get_base_layer()
        if config.use_dora and base.groups > 1:
            raise FinetuneError(
                f"adapter.dora is on, but a target is a convolution with {base.groups} groups; turn it off, or leave "
                "grouped convolutions out of adapter.targets."
            )
        variant: Any = self.resolve_lora_variant(config=config)
        if variant is not None:
            self.lora_variant[adapter_name] = variant
        self.r[adapter_name] = r
        self.lora_alpha[adapter_name] = lora_alpha
        self.lora_dropout[adapter_name] = nn.Dropout(config.lora_dropout) if config.lora_dropout else nn.Identity()
        self.lora_A[adapter_name] = nn.Conv3d(
            base.in_channels // base.groups,
            r,
            base.kernel_size,
            base.stride,
            base.padding,
            base.dilation,
            bias=False,
            padding_mode=base.padding_mode,
        )
        self.lora_B[adapter_name] = nn.Conv3d(r, base.out_channels, 1, bias=False)
        self.lora_bias[adapter_name] = False
        self.use_rslora[adapter_name] = config.use_rslora
        self.use_dora[adapter_name] = config.use_dora
        self.scaling[adapter_name] = lora_alpha / (math.sqrt(r) if config.use_rslora else r)
        self.reset_lora_parameters(adapter_name, True)
        self._move_adapter_to_device_of_base_layer(adapter_name)
        if variant is not None:
            variant.init(self, adapter_name=adapter_name, config=config)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def get_delta_weight(self, adapter: str) -> Tensor:
        """Return the scaled update in the kernel's shape, [C_out, C_in / groups, k, k, k]."""
        base: Any = self.get_base_layer()
        a, b = _weight(self.lora_A, adapter), _weight(self.lora_B, adapter)
        # Half types are multiplied in float32: a sum over the rank in bfloat16 would lose what was learned.
        dtype = torch.promote_types(a.dtype, torch.float32)
        product = b.flatten(1).to(dtype) @ a.flatten(1).to(dtype)
        return (self.scaling[adapter] * product).to(a.dtype).view(base.weight.shape)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Add the update to the kernel; `unmerge` takes it off again."""
        base: Any = self.get_base_layer()
        groups, base.groups = base.groups, 1  # peft refuses groups, but the update has the kernel's own shape here
        try:
            super().merge(safe_merge, adapter_names)
        finally:
            base.groups = groups

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Convolve [B, C_in, X, Y, Z]; base and update in one pass each."""
        base: Any = self.get_base_layer()
        if base.groups == 1 or self.disable_adapters or self.merged:
            return super().forward(x, *args, **kwargs)
        result = base(x)
        for name in self.active_adapters:
            if name in self.lora_A:
                dropped = self.lora_dropout[name](x)
                result = result + base._conv_forward(dropped, self.get_delta_weight(name).to(x.dtype), None)
        return result


def _weight(layers: nn.ModuleDict, adapter: str) -> Tensor:
    weight = layers[adapter].weight
    assert isinstance(weight, Tensor)
    return weight
