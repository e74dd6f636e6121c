"""LoRA on linear layers in one large product forward and one backward, where no dropout asks for two.

W + s·B·A is as small as W, so it is formed in every pass; what is large are the tokens, and they are read once for it.
peft's own layer multiplies the tokens by W, A and B, and scales and adds two results of full size.
"""

from typing import Any

import torch
from peft.tuners.lora.layer import Linear as PeftLinear
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


class LinearLora(PeftLinear):
    """A frozen `torch.nn.Linear` and its low-rank update; tensors, merging and file format are peft's."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """[…, C_in] to […, C_out]."""
        name = self._plain_adapter(x)
        if name is None or args or kwargs:
            return super().forward(x, *args, **kwargs)
        base: Any = self.get_base_layer()
        down: Any = self.lora_A[name]
        up: Any = self.lora_B[name]
        return _low_rank(x, base.weight, base.bias, down.weight, up.weight, self.scaling[name])

    def _plain_adapter(self, x: Tensor) -> str | None:
        """Name the adapter if it is the only one and nothing but W + s·B·A is asked for."""
        active = [name for name in self.active_adapters if name in self.lora_A]
        if self.disable_adapters or self.merged or len(active) != 1 or active[0] in self.lora_variant:
            return None
        base: Any = self.get_base_layer()
        dropout = self.lora_dropout[active[0]]
        plain = isinstance(dropout, nn.Identity) or not dropout.training
        same_type = x.dtype == base.weight.dtype == self.lora_A[active[0]].weight.dtype
        frozen = not base.weight.requires_grad and (base.bias is None or not base.bias.requires_grad)
        plain = plain and same_type and frozen and not torch.is_autocast_enabled(x.device.type)
        return active[0] if plain else None


class _LowRank(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scaling: float
    ) -> Tensor:
        """Return x·(W + s·B·A)ᵀ + bias."""
        ctx.save_for_backward(x, weight, a, b)
        ctx.scaling = scaling
        return nn.functional.linear(x, torch.addmm(weight, b, a, alpha=scaling), bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of x, A and B; n tokens are read in rows.

        W + s·B·A is formed again: kept, it would take as much room as the weights.
        """
        x, weight, a, b = ctx.saved_tensors
        dy_nO, x_nI = dy.reshape(-1, dy.shape[-1]), x.reshape(-1, x.shape[-1])
        dx = da = db = None
        if ctx.needs_input_grad[0]:
            dx = (dy_nO @ torch.addmm(weight, b, a, alpha=ctx.scaling)).view(x.shape)
        # With the few rows of the rank first: the other way round the same products take up to four times as long.
        if ctx.needs_input_grad[3]:
            da = ((b.T @ dy_nO.T) @ x_nI).mul_(ctx.scaling)
        if ctx.needs_input_grad[4]:
            db = ((a @ x_nI.T) @ dy_nO).mul_(ctx.scaling).T
        return dx, None, None, da, db, None


def _low_rank(x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scaling: float) -> Tensor:
    return _LowRank.apply(x, weight, bias, a, b, scaling)  # type: ignore[no-untyped-call]
