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
from torch.nn.functional import pad

from boldforge.kernels.index import ScanIndex
from boldforge.kernels.packing import Block, packs

# State elements [lane, N, D] of one step and of one block. On a CPU a step stays in the L2 cache and a block in the L3;
# on an accelerator they are enough work per launch, and the two buffers of a block take half a gigabyte.
_STEP_ELEMENTS = {"cpu": 1 << 17}
_BLOCK_ELEMENTS = {"cpu": 1 << 20}
_DEVICE_STEP_ELEMENTS, _DEVICE_BLOCK_ELEMENTS = 1 << 22, 1 << 26


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
    delta_softplus: bool = True,
) -> Tensor:
    """Return the selective scan along ``index``; shapes and formula as in ``scan_oracle``.

    The state is float32, or float64 where ``u`` is float64; the output has the type of ``u``. Without
    ``delta_softplus`` the step is dt + dt_bias as it is, of any sign.
    """
    work = _work_dtype(u)
    log2_A_ND = _log2_decay(A.to(work).T)
    out = _like_rows(u)
    all_packs, decay, states = _plan(index, u.shape[0], log2_A_ND)
    for blocks in all_packs:
        h = log2_A_ND.new_zeros(blocks[0].sizes[0], *log2_A_ND.shape)
        for block in blocks:
            u_RD, B_RN, C_RN = (_take(tensor, block, work) for tensor in (u, B, C))
            step_RD = _step_size(dt, dt_bias, block, work)
            delta_RD = _softplus(step_RD) if delta_softplus else step_RD
            h = _advance(h, delta_RD, u_RD, B_RN, log2_A_ND, block.sizes, decay, states)
            y_RD = torch.bmm(C_RN.unsqueeze(1), states[: len(u_RD)]).squeeze(1)
            if D is not None:
                y_RD.addcmul_(u_RD, D.to(work))
            if z is not None:
                y_RD.mul_(_silu(_take(z, block, work)))
            out.index_copy_(0, block.rows, y_RD.to(out.dtype))
    return out.view(u.shape)


def _advance(
    h: Tensor,
    delta_RD: Tensor,
    u_RD: Tensor,
    B_RN: Tensor,
    log2_A_ND: Tensor,
    sizes: list[int],
    decay: Tensor,
    states: Tensor,
) -> Tensor:
    """Fill ``decay`` and ``states`` [R, N, D] of one block and return the last state; ``h`` is the one before it."""
    decay, states = decay[: len(u_RD)], states[: len(u_RD)]
    torch.mul(delta_RD.unsqueeze(1), log2_A_ND, out=decay)
    _exp2_(decay)
    torch.mul(B_RN.unsqueeze(2), (delta_RD * u_RD).unsqueeze(1), out=states)
    for step_decay, state in zip(decay.split(sizes), states.split(sizes), strict=True):
        h = state.addcmul_(step_decay, h if len(h) == len(state) else h[: len(state)])
    return h.clone()


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
    delta_softplus: bool = True,
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
    all_packs, decay, states = _plan(index, u.shape[0], A_ND)
    for blocks in all_packs:
        entering = _states_entering(u, dt, A_ND, B, dt_bias, blocks, decay, states, delta_softplus)
        dh = torch.zeros_like(entering[0])
        for block in reversed(blocks):
            u_RD, B_RN, C_RN, dy_RD = (_take(tensor, block, work) for tensor in (u, B, C, dout))
            step_RD = _step_size(dt, dt_bias, block, work)
            delta_RD = _softplus(step_RD) if delta_softplus else step_RD
            if z is not None and dz is not None:
                z_RD = _take(z, block, work)
                gate_RD = _sigmoid(z_RD)
                dgate_RD = dy_RD * gate_RD * (1 + z_RD * (1 - gate_RD))
                dy_RD *= z_RD * gate_RD
            h = entering.pop()
            _advance(h, delta_RD, u_RD, B_RN, _log2_decay(A_ND), block.sizes, decay, states)
            sums = _reverse(h, dh, dy_RD, delta_RD, u_RD, B_RN, C_RN, A_ND, block.sizes, decay, states)
            dA_ND += sums.dA_ND
            if dz is not None:
                dz.index_copy_(0, block.rows, dgate_RD.mul_(sums.y_RD.addcmul_(u_RD, skip)).to(dz.dtype))
            ddt_RD = (sums.gB_RD * u_RD).add_(sums.pA_RD)
            if delta_softplus:
                ddt_RD.mul_(_sigmoid(step_RD))
            dD += (dy_RD * u_RD).sum(0)
            dbias += ddt_RD.sum(0)
            du.index_copy_(0, block.rows, sums.gB_RD.mul_(delta_RD).addcmul_(dy_RD, skip).to(du.dtype))
            ddt.index_copy_(0, block.rows, ddt_RD.to(ddt.dtype))
            dB.index_copy_(0, block.rows, sums.dB_RN.to(dB.dtype))
            dC.index_copy_(0, block.rows, sums.dC_RN.to(dC.dtype))
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
    u: Tensor,
    dt: Tensor,
    A_ND: Tensor,
    B: Tensor,
    dt_bias: Tensor | None,
    blocks: list[Block],
    decay: Tensor,
    states: Tensor,
    delta_softplus: bool,
) -> list[Tensor]:
    """Return the state before every block of a pack, each [lane, N, D]."""
    log2_A_ND = _log2_decay(A_ND)
    entering = [A_ND.new_zeros(blocks[0].sizes[0], *A_ND.shape)]
    for block in blocks[:-1]:
        u_RD, B_RN = (_take(tensor, block, A_ND.dtype) for tensor in (u, B))
        step_RD = _step_size(dt, dt_bias, block, A_ND.dtype)
        delta_RD = _softplus(step_RD) if delta_softplus else step_RD
        entering.append(_advance(entering[-1], delta_RD, u_RD, B_RN, log2_A_ND, block.sizes, decay, states))
    return entering


class _BlockSums(NamedTuple):
    """What the reverse loop leaves: the ungated output and the sums over states, channels or rows."""

    y_RD: Tensor  # sum_N C h
    gB_RD: Tensor  # sum_N g B
    pA_RD: Tensor  # sum_N A g a h_before
    dB_RN: Tensor
    dC_RN: Tensor
    dA_ND: Tensor


def _reverse(
    h: Tensor,
    dh: Tensor,
    dy_RD: Tensor,
    delta_RD: Tensor,
    u_RD: Tensor,
    B_RN: Tensor,
    C_RN: Tensor,
    A_ND: Tensor,
    sizes: list[int],
    decay: Tensor,
    states: Tensor,
) -> _BlockSums:
    """Go back through one block from its decays and states, both overwritten; ``dh`` is carried on in place.

    Once a state has served the output and dC, its place takes ``g``; a decay's place takes ``p = a g h_before``.
    """
    decay, states = decay[: len(u_RD)], states[: len(u_RD)]
    y_RD = torch.bmm(C_RN.unsqueeze(1), states).squeeze(1)
    dC_RN = torch.bmm(dy_RD.unsqueeze(1), states.mT).squeeze(1)
    dy, C = dy_RD.unsqueeze(1).split(sizes), C_RN.unsqueeze(2).split(sizes)
    step_decay, state = decay.split(sizes), states.split(sizes)
    for t in reversed(range(len(sizes))):
        running = dh[: sizes[t]]
        before = h if t == 0 else state[t - 1]
        torch.addcmul(running, C[t], dy[t], out=state[t])
        torch.mul(state[t], step_decay[t], out=running)
        torch.mul(running, before[: sizes[t]], out=step_decay[t])
    gB_RD = torch.bmm(B_RN.unsqueeze(1), states).squeeze(1)
    dB_RN = torch.bmm((delta_RD * u_RD).unsqueeze(1), states.mT).squeeze(1)
    pA_RD = torch.mul(decay, A_ND, out=states).sum(1)
    dA_ND = decay.mul_(delta_RD.unsqueeze(1)).sum(0)
    return _BlockSums(y_RD, gB_RD, pA_RD, dB_RN, dC_RN, dA_ND)


def conv_forward(x: Tensor, weight: Tensor, bias: Tensor | None, index: ScanIndex) -> Tensor:
    """Return the causal depthwise convolution along ``index``, then SiLU; shapes as in ``conv_oracle``."""
    return _silu(_convolve(x, weight, bias, index)).to(x.dtype)


def conv_backward(
    dout: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, index: ScanIndex
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return the gradients of ``x``, ``weight`` and ``bias`` (None where there is none), each in its type."""
    work = _work_dtype(x)
    total = _convolve(x, weight, bias, index)
    gate = _sigmoid(total)
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


def _plan(index: ScanIndex, batch: int, A_ND: Tensor) -> tuple[list[list[Block]], Tensor, Tensor]:
    """Return the packs, and two empty buffers [R, N, D] that hold any of their blocks."""
    kind = A_ND.device.type
    lanes = max(1, _STEP_ELEMENTS.get(kind, _DEVICE_STEP_ELEMENTS) // A_ND.numel())
    rows = max(1, _BLOCK_ELEMENTS.get(kind, _DEVICE_BLOCK_ELEMENTS) // A_ND.numel())
    found = packs(index, batch, lanes, rows)
    most = max(len(block.rows) for blocks in found for block in blocks)
    room = A_ND.new_empty(2, most * A_ND.numel() + _EXP2_SLACK)
    decay, states = room[:, : most * A_ND.numel()].unflatten(1, (most, *A_ND.shape))
    return found, decay, states


def _like_rows(tensor: Tensor) -> Tensor:
    """Return an empty contiguous tensor of the rows ``[b * L, ...]`` of this one."""
    return torch.empty_like(tensor, memory_format=torch.contiguous_format).flatten(0, 1)


def _take(tensor: Tensor, block: Block, dtype: torch.dtype) -> Tensor:
    return tensor.flatten(0, 1).index_select(0, block.rows).to(dtype)


def _step_size(dt: Tensor, dt_bias: Tensor | None, block: Block, dtype: torch.dtype) -> Tensor:
    step_RD = _take(dt, block, dtype)
    return step_RD if dt_bias is None else step_RD.add_(dt_bias.to(dtype))


def _softplus(step: Tensor) -> Tensor:
    """max(x, 0) + log1p(e^-|x|), which keeps its digits where the step is tiny."""
    return step.abs().neg_().exp_().log1p_().add_(step.clamp_min(0))


# torch's own softplus, sigmoid and exp2 round the last few numbers of every thread's share in another way than the
# rest, so their bits would depend on the number of threads; exp and log1p do not.


def _sigmoid(x: Tensor) -> Tensor:
    return x.neg().exp_().add_(1).reciprocal_()


def _silu(x: Tensor) -> Tensor:
    return _sigmoid(x).mul_(x)


_EXP2_SHARE, _EXP2_VECTOR, _EXP2_SLACK = 1 << 15, 64, 1 << 14


def _exp2_(decay: Tensor) -> None:
    """Take two to the power of every element in place, and of some of the room after them.

    torch cuts the elements evenly among threads, at most one for every 2^15. Here every share is a multiple of the
    vector length; exp2 takes a quarter of the time of exp, so going without it would be dear.
    """
    size = decay.numel()
    if decay.device.type == "cpu":
        for _ in range(2):  # once more where the first time made room for another share
            shares = min(torch.get_num_threads(), -(-size // _EXP2_SHARE), _EXP2_SLACK // _EXP2_VECTOR // 2)
            size += -size % (_EXP2_VECTOR * shares)
    decay.as_strided((size,), (1,)).exp2_()
