"""The scan and the convolution as operators of torch: the dispatcher knows their shapes and gradients.

So ``torch.compile`` puts them into its graph as they are, and checkpointing, autocast and ZeRO treat them like its own.
An operator takes tensors only; the tables that follow from an index are found again through its ``rows``.

Shape suffixes: b clips · L tokens · D inner channels · N states · K taps.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from boldforge.kernels.backends import TORCH, choose
from boldforge.kernels.index import index_of

_N_SCAN_TENSORS = 8


@torch.library.custom_op("boldforge::scan", mutates_args=())
def scan(
    u: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    rows: Tensor,
    cu_seqlens: Tensor,
    backend: str,
    delta_softplus: bool,
) -> Tensor:
    """Return the selective scan; see ``ops.shifted_scan``, which checks the arguments."""
    arguments = (u, dt, A, B, C, D, z, dt_bias, index_of(rows, cu_seqlens))
    chosen = choose(backend, u)
    with torch.autocast(u.device.type, enabled=False):
        if delta_softplus:
            return chosen.scan_forward(*arguments)
        return TORCH.scan_forward(*arguments, delta_softplus=False)


@torch.library.custom_op("boldforge::scan_keeping", mutates_args=())
def scan_keeping(
    u: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    rows: Tensor,
    cu_seqlens: Tensor,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """Return the selective scan and the states its backward starts from, empty where it computes them itself."""
    arguments = (u, dt, A, B, C, D, z, dt_bias, index_of(rows, cu_seqlens))
    chosen = choose(backend, u)
    with torch.autocast(u.device.type, enabled=False):
        if chosen.scan_keeping is None:
            return chosen.scan_forward(*arguments), u.new_empty(len(u), 0, *A.T.shape, dtype=torch.float32)
        return chosen.scan_keeping(*arguments)


@torch.library.custom_op("boldforge::scan_backward", mutates_args=())
def scan_backward(
    dout: Tensor,
    u: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    rows: Tensor,
    cu_seqlens: Tensor,
    backend: str,
    delta_softplus: bool,
    states: Tensor | None = None,
) -> list[Tensor]:
    """Return the gradients of the first eight arguments of ``scan``, an empty tensor where there is no argument."""
    arguments = (dout, u, dt, A, B, C, D, z, dt_bias, index_of(rows, cu_seqlens))
    chosen = choose(backend, u)
    with torch.autocast(u.device.type, enabled=False):
        if states is not None and states.numel():
            found = chosen.scan_backward(*arguments, states=states)
        elif delta_softplus:
            found = chosen.scan_backward(*arguments)
        else:
            found = TORCH.scan_backward(*arguments, delta_softplus=False)
        return [u.new_empty(0) if gradient is None else gradient.contiguous() for gradient in found]


@torch.library.custom_op("boldforge::conv", mutates_args=())
def conv(x: Tensor, weight: Tensor, bias: Tensor | None, rows: Tensor, cu_seqlens: Tensor, backend: str) -> Tensor:
    """Return the convolution and SiLU; see ``ops.shifted_conv``, which checks the arguments."""
    with torch.autocast(x.device.type, enabled=False):
        return choose(backend, x).conv_forward(x, weight, bias, index_of(rows, cu_seqlens))


@torch.library.custom_op("boldforge::conv_backward", mutates_args=())
def conv_backward(
    dout: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, rows: Tensor, cu_seqlens: Tensor, backend: str
) -> list[Tensor]:
    """Return the gradients of x, weight and bias, an empty tensor where there is no bias."""
    with torch.autocast(x.device.type, enabled=False):
        found = choose(backend, x).conv_backward(dout, x, weight, bias, index_of(rows, cu_seqlens))
        return [x.new_empty(0) if gradient is None else gradient.contiguous() for gradient in found]


def _output_like(first: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(first, memory_format=torch.contiguous_format)


def _gradients_like(tensors: Sequence[Tensor | None]) -> list[Tensor]:
    like = next(tensor for tensor in tensors if tensor is not None)
    return [
        like.new_empty(0) if tensor is None else torch.empty_like(tensor, memory_format=torch.contiguous_format)
        for tensor in tensors
    ]


def _output_and_states_like(u: Tensor, dt: Tensor, A: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    # How many spans there are follows from the restarts in the index, which a fake tensor does not know.
    n_spans = torch.library.get_ctx().new_dynamic_size()
    return _output_like(u), u.new_empty(len(u), n_spans, *A.T.shape, dtype=torch.float32)


scan.register_fake(_output_like)
scan_keeping.register_fake(_output_and_states_like)
conv.register_fake(_output_like)
scan_backward.register_fake(lambda dout, *arguments: _gradients_like(arguments[:_N_SCAN_TENSORS]))
conv_backward.register_fake(lambda dout, *arguments: _gradients_like(arguments[:3]))


def _keep_inputs(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    """Keep the inputs only; the backward computes states again."""
    tensors = [value for value in inputs if value is None or isinstance(value, Tensor)]
    ctx.options = inputs[len(tensors) :]
    ctx.save_for_backward(*tensors)


def _scan_gradients(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
    tensors = ctx.saved_tensors
    found = scan_backward(dout, *tensors, *ctx.options)
    return (*_present(found, tensors[:_N_SCAN_TENSORS]), None, None, None, None)


def _keep_states(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.backend = inputs
    ctx.save_for_backward(*tensors, output[1])


def _kept_scan_gradients(ctx: Any, dout: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
    *tensors, states = ctx.saved_tensors
    found = scan_backward(dout, *tensors, ctx.backend, True, states)
    return (*_present(found, tensors[:_N_SCAN_TENSORS]), None, None, None)


def _conv_gradients(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
    tensors = ctx.saved_tensors
    found = conv_backward(dout, *tensors, *ctx.options)
    return (*_present(found, tensors[:3]), None, None, None)


def _present(found: Sequence[Tensor], tensors: Sequence[Tensor | None]) -> list[Tensor | None]:
    return [None if tensor is None else gradient for gradient, tensor in zip(found, tensors, strict=True)]


scan.register_autograd(_scan_gradients, setup_context=_keep_inputs)
scan_keeping.register_autograd(_kept_scan_gradients, setup_context=_keep_states)
conv.register_autograd(_conv_gradients, setup_context=_keep_inputs)
