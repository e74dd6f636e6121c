"""The scan and the convolution in plain torch: vectorised over windows and clips, a loop only over time inside them.

Forward and backward are written out (no autograd graph), so only the inputs are kept and states are computed again in
blocks of steps. The layout [lane, state, channel] keeps channels contiguous in every operation of the inner loop, and
the decay goes through ``exp2``, which torch vectorises far better than ``exp`` on the CPU. Both directions are
deterministic: every token is read and written by a permutation, and sums run in a fixed order.

Shape suffixes: b clips · L tokens · D inner channels · N states · R rows of a pack · K taps.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad, silu, softplus

from boldforge.kernels.index import ScanIndex
from boldforge.kernels.packing import Block, packs

_CACHE_ELEMENTS = (
    1 << 17
)  # state elements [lane, N, D] worked on at once on a CPU: the inner loop stays in its L2 cache
_DEVICE_ELEMENTS = 1 << 22  # on an accelerator: enough work per launch, half a gigabyte of states in the backward
_FORWARD_STEPS = 32  # steps gathered at once in the forward: few calls, still in cache
_BACKWARD_STEPS = 8  # steps whose states are held at once in the backward


class ScanGradients(NamedTuple):
    """Gradients in the order of the scan's arguments; None where the argument was None."""

    u: Tensor
    dt: Tensor
    A: Tensor
    B: Tensor
    C: Tensor
    D: Tensor | None
    z: Tensor | None
    dt_bias: Tensor | None


def scan_forward(
    u: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    index: ScanIndex,
) -> Tensor:
    """Return the selective scan along ``index``; shapes and formula as in ``scan_oracle``.

    The state is float32, or float64 where ``u`` is float64; the output has the type of ``u``.
    """
    work = _work_dtype(u)
    log2_A_ND = _log2_decay(A.to(work).T)
    out = _like_rows(u)
    for blocks in packs(index, u.shape[0], _lanes(log2_A_ND), _FORWARD_STEPS):
        h = log2_A_ND.new_zeros(blocks[0].sizes[0], *log2_A_ND.shape)
        for block in blocks:
            u_RD, B_RN, C_RN = (_take(tensor, block, work) for tensor in (u, B, C))
            delta_RD = _softplus(_step_size(dt, dt_bias, block, work))
            y_RD = _scan_block(u_RD, delta_RD, log2_A_ND, B_RN, C_RN, block.sizes, h)
            if D is not None:
                y_RD.addcmul_(u_RD, D.to(work))
            if z is not None:
                y_RD.mul_(silu(_take(z, block, work)))
            out.index_copy_(0, block.rows, y_RD.to(out.dtype))
    return out.view(u.shape)


def _scan_block(
    u_RD: Tensor, delta_RD: Tensor, log2_A_ND: Tensor, B_RN: Tensor, C_RN: Tensor, sizes: list[int], h: Tensor
) -> Tensor:
    """Return one block of the recurrence, without skip and gate; ``h`` is carried on in place."""
    y_RD = torch.empty_like(u_RD)
    decay = torch.empty_like(h)
    steps = zip(
        delta_RD.unsqueeze(1).split(sizes),
        (delta_RD * u_RD).unsqueeze(1).split(sizes),
        B_RN.unsqueeze(2).split(sizes),
        C_RN.unsqueeze(1).split(sizes),
        y_RD.unsqueeze(1).split(sizes),
        strict=True,
    )
    for delta, x, B, C, y in steps:
        if len(h) != len(x):
            h, decay = h[: len(x)], decay[: len(x)]
        _advance(h, h, decay, delta, x, B, log2_A_ND)
        torch.bmm(C, h, out=y)
    return y_RD


def _advance(h: Tensor, out: Tensor, decay: Tensor, delta: Tensor, x: Tensor, B: Tensor, log2_A_ND: Tensor) -> None:
    """One step of the recurrence: ``out = 2 ** (delta log2_A) h + B x``; leaves the decay in ``decay``."""
    torch.mul(delta, log2_A_ND, out=decay).exp2_()
    torch.mul(decay, h, out=out).addcmul_(B, x)


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
    index: ScanIndex,
) -> ScanGradients:
    """Return the gradient of every argument of ``scan_forward``, each in the type of its argument.

    Reverse in time, with ``dy`` the gradient of the ungated output and ``g = dh + dy C``: dC = sum_D dy h;
    dB = sum_D g delta u; du = D dy + delta sum_N g B; ddelta = sum_N g (A a h_before + B u); dA += delta g a h_before;
    dh <- a g, where ``a`` is the decay of the step.
    """
    work = _work_dtype(u)
    A_ND = A.to(work).T.contiguous()
    skip = A_ND.new_zeros(len(A)) if D is None else D.to(work)
    du, ddt, dB, dC = (_like_rows(tensor) for tensor in (u, dt, B, C))
    dz = None if z is None else _like_rows(z)
    dA_ND, dD, dbias = torch.zeros_like(A_ND), A_ND.new_zeros(len(A)), A_ND.new_zeros(len(A))
    all_packs = packs(index, u.shape[0], _lanes(A_ND), _BACKWARD_STEPS)
    workspace = A_ND.new_empty(2, max(len(pack[0].rows) for pack in all_packs), *A_ND.shape)
    for blocks in all_packs:
        entering = _states_entering(u, dt, A_ND, B, dt_bias, blocks)
        dh, dA = torch.zeros_like(entering[0]), torch.zeros_like(entering[0])
        for block in reversed(blocks):
            u_RD, B_RN, C_RN, dy_RD = (_take(tensor, block, work) for tensor in (u, B, C, dout))
            step_RD = _step_size(dt, dt_bias, block, work)
            delta_RD = _softplus(step_RD)
            if z is not None and dz is not None:
                z_RD = _take(z, block, work)
                gate_RD = torch.sigmoid(z_RD)
                dgate_RD = dy_RD * gate_RD * (1 + z_RD * (1 - gate_RD))
                dy_RD *= z_RD * gate_RD
            sums = _reverse_block(
                dy_RD, u_RD, delta_RD, A_ND, B_RN, C_RN, block.sizes, entering.pop(), dh, dA, workspace
            )
            if dz is not None:
                dz.index_copy_(0, block.rows, dgate_RD.mul_(sums.y_RD.addcmul_(u_RD, skip)).to(dz.dtype))
            ddt_RD = (sums.gB_RD * u_RD).add_(sums.pA_RD).mul_(torch.sigmoid(step_RD))
            dD += (dy_RD * u_RD).sum(0)
            dbias += ddt_RD.sum(0)
            du.index_copy_(0, block.rows, sums.gB_RD.mul_(delta_RD).addcmul_(dy_RD, skip).to(du.dtype))
            ddt.index_copy_(0, block.rows, ddt_RD.to(ddt.dtype))
            dB.index_copy_(0, block.rows, sums.dB_RN.to(dB.dtype))
            dC.index_copy_(0, block.rows, sums.dC_RN.to(dC.dtype))
        dA_ND += dA.sum(0)
    return ScanGradients(
        du.view(u.shape),
        ddt.view(dt.shape),
        dA_ND.T.to(A.dtype),
        dB.view(B.shape),
        dC.view(C.shape),
        None if D is None else dD.to(D.dtype),
        None if dz is None else dz.view(u.shape),
        None if dt_bias is None else dbias.to(dt_bias.dtype),
    )


def _states_entering(
    u: Tensor, dt: Tensor, A_ND: Tensor, B: Tensor, dt_bias: Tensor | None, blocks: list[Block]
) -> list[Tensor]:
    """Return the state before every block of a pack, each [lane, N, D]."""
    log2_A_ND = _log2_decay(A_ND)
    running = h = A_ND.new_zeros(blocks[0].sizes[0], *A_ND.shape)
    decay = torch.empty_like(h)
    entering = [h.clone()]
    for block in blocks[:-1]:
        u_RD, B_RN = (_take(tensor, block, A_ND.dtype) for tensor in (u, B))
        delta_RD = _softplus(_step_size(dt, dt_bias, block, A_ND.dtype))
        delta, x = (t.unsqueeze(1).split(block.sizes) for t in (delta_RD, delta_RD * u_RD))
        for t, B_column in enumerate(B_RN.unsqueeze(2).split(block.sizes)):
            if len(running) != len(B_column):
                running, decay = running[: len(B_column)], decay[: len(B_column)]
            _advance(running, running, decay, delta[t], x[t], B_column, log2_A_ND)
        entering.append(h.clone())
    return entering


class _BlockSums(NamedTuple):
    """What the reverse loop leaves per row: the ungated output and the sums over states or channels."""

    y_RD: Tensor  # sum_N C h
    gB_RD: Tensor  # sum_N g B
    pA_RD: Tensor  # sum_N A g a h_before
    dB_RN: Tensor
    dC_RN: Tensor


def _reverse_block(
    dy_RD: Tensor,
    u_RD: Tensor,
    delta_RD: Tensor,
    A_ND: Tensor,
    B_RN: Tensor,
    C_RN: Tensor,
    sizes: list[int],
    h: Tensor,
    dh: Tensor,
    dA: Tensor,
    workspace: Tensor,
) -> _BlockSums:
    """Compute the states of one block again from the entering ``h``, then go back; ``dh`` and ``dA`` are carried on."""
    log2_A_ND = _log2_decay(A_ND)
    sums = _BlockSums(*(torch.empty_like(t) for t in (u_RD, u_RD, u_RD, B_RN, C_RN)))
    delta, x, dy = (t.unsqueeze(1).split(sizes) for t in (delta_RD, delta_RD * u_RD, dy_RD))
    y, gB, pA, dB, dC = (t.unsqueeze(1).split(sizes) for t in sums)
    (B_row, C_row), (B_column, C_column) = ([t.unsqueeze(i).split(sizes) for t in (B_RN, C_RN)] for i in (1, 2))
    after, decays = (buffer[: len(u_RD)].split(sizes) for buffer in workspace)
    before = [h, *after[:-1]]
    for t, n in enumerate(sizes):
        if len(before[t]) != n:
            before[t] = before[t][:n]
        _advance(before[t], after[t], decays[t], delta[t], x[t], B_column[t], log2_A_ND)
    for t in reversed(range(len(sizes))):
        if t == len(sizes) - 1 or sizes[t] != sizes[t + 1]:
            g, dA_lanes = dh[: sizes[t]], dA[: sizes[t]]
        torch.bmm(C_row[t], after[t], out=y[t])
        torch.bmm(dy[t], after[t].mT, out=dC[t])
        g.addcmul_(C_column[t], dy[t])
        torch.bmm(x[t], g.mT, out=dB[t])
        torch.bmm(B_row[t], g, out=gB[t])
        p = torch.mul(g.mul_(decays[t]), before[t], out=decays[t])
        dA_lanes.addcmul_(p, delta[t])
        torch.sum(p.mul_(A_ND), 1, keepdim=True, out=pA[t])
    return sums


def conv_forward(x: Tensor, weight: Tensor, bias: Tensor | None, index: ScanIndex) -> Tensor:
    """Return the causal depthwise convolution along ``index``, then SiLU; shapes as in ``conv_oracle``."""
    return silu(_convolve(x, weight, bias, index)).to(x.dtype)


def conv_backward(
    dout: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, index: ScanIndex
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return the gradients of ``x``, ``weight`` and ``bias`` (None where there is none), each in its type."""
    work = _work_dtype(x)
    total = _convolve(x, weight, bias, index)
    gate = torch.sigmoid(total)
    dtotal = dout.to(work) * gate * (1 + total * (1 - gate))
    taps, reach = weight.to(work), weight.shape[1] - 1
    dx = dtotal * taps[:, reach]
    dtaps = [(dtotal * x).sum((0, 1))]
    dtotal_padded, after = _with_zero_row(dtotal), index.neighbours(-reach)
    for ahead in range(reach):
        # What each token did to the total of the one ahead of it: serves its own gradient and the tap's.
        dtotal_ahead = dtotal_padded.index_select(1, after[ahead])
        dx.addcmul_(dtotal_ahead, taps[:, reach - 1 - ahead])
        dtaps.append(dtotal_ahead.mul_(x).sum((0, 1)))
    dweight = torch.stack(dtaps[::-1], dim=1).to(weight.dtype)
    return dx.to(x.dtype), dweight, None if bias is None else dtotal.sum((0, 1)).to(bias.dtype)


def _convolve(x: Tensor, weight: Tensor, bias: Tensor | None, index: ScanIndex) -> Tensor:
    work = _work_dtype(x)
    taps, reach = weight.to(work), weight.shape[1] - 1
    total = x.to(work) * taps[:, reach]
    if bias is not None:
        total += bias.to(work)
    x_padded, before = _with_zero_row(x.to(work)), index.neighbours(reach)
    for back in range(reach):
        total.addcmul_(x_padded.index_select(1, before[back]), taps[:, reach - 1 - back])
    return total


def _with_zero_row(tensor: Tensor) -> Tensor:
    """Add a row of zeros after the last token: what ``neighbours`` points at where there is none."""
    return pad(tensor, (0, 0, 0, 1))


def _work_dtype(u: Tensor) -> torch.dtype:
    return torch.float64 if u.dtype == torch.float64 else torch.float32


def _log2_decay(A_ND: Tensor) -> Tensor:
    return (A_ND * math.log2(math.e)).contiguous()


def _lanes(A_ND: Tensor) -> int:
    elements = _CACHE_ELEMENTS if A_ND.device.type == "cpu" else _DEVICE_ELEMENTS
    return max(1, elements // A_ND.numel())


def _like_rows(tensor: Tensor) -> Tensor:
    """Return an empty contiguous tensor of the rows ``[b * L, ...]`` of this one."""
    return torch.empty_like(tensor, memory_format=torch.contiguous_format).flatten(0, 1)


def _take(tensor: Tensor, block: Block, dtype: torch.dtype) -> Tensor:
    return tensor.flatten(0, 1).index_select(0, block.rows).to(dtype)


def _step_size(dt: Tensor, dt_bias: Tensor | None, block: Block, dtype: torch.dtype) -> Tensor:
    step_RD = _take(dt, block, dtype)
    return step_RD if dt_bias is None else step_RD.add_(dt_bias.to(dtype))


def _softplus(step: Tensor) -> Tensor:
    """log1p(e^x), which keeps its digits where the step is tiny; beyond 40 it equals x even in float64."""
    return softplus(step, threshold=40)
