"""The scan through mamba-ssm's own CUDA kernel, where that package imports: a peer to compare with.

It knows neither an index nor restarts, so every segment of the path becomes a padded sequence of its own, copied there
and back. Its backward adds with atomics: two runs may differ in the last bits.

Shape suffixes: b clips · L tokens · D inner channels · N states · Q padded sequences · M longest segment.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from boldforge.kernels.index import ScanIndex
from boldforge.kernels.torch_backend import ScanGradients


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
    """Return the selective scan along ``index``; shapes and formula as in ``scan_oracle``."""
    from mamba_ssm.ops.selective_scan_interface import selective_scan_fn

    b, n_tokens, n_channels = u.shape
    rows_QM, place = _padded_rows(index, b)

    def sequences(tensor: Tensor) -> Tensor:
        return pad(tensor.flatten(0, 1), (0, 0, 0, 1))[rows_QM].mT.contiguous()

    y_QDM = selective_scan_fn(
        sequences(u),
        sequences(dt).to(u.dtype),
        A.float(),
        sequences(B).to(u.dtype),
        sequences(C).to(u.dtype),
        None if D is None else D.float(),
        z=None if z is None else sequences(z).to(u.dtype),
        delta_bias=None if dt_bias is None else dt_bias.float(),
        delta_softplus=True,
    )
    return y_QDM.mT.reshape(-1, n_channels)[place].view(b, n_tokens, n_channels).to(u.dtype)


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
    """Return the gradient of every argument of ``scan_forward``, by running it again under autograd."""
    with torch.enable_grad():
        tensors = [None if t is None else t.detach().requires_grad_() for t in (u, dt, A, B, C, D, z, dt_bias)]
        y = scan_forward(*tensors, index)  # type: ignore[arg-type, call-arg]
        found = iter(torch.autograd.grad(y, [t for t in tensors if t is not None], dout))
    return ScanGradients(*(None if t is None else next(found) for t in tensors))  # type: ignore[arg-type]


def _padded_rows(index: ScanIndex, b: int) -> tuple[Tensor, Tensor]:
    """Return the flat token row at every padded place (``b * L`` where there is none), and every token's place."""
    first, length = (table.to(index.rows.device) for table in index.segments)
    step = torch.arange(int(length.max()), device=first.device)
    inside = step < length[:, None]
    tokens = index.tokens[(first[:, None] + step).clamp_max(index.n_tokens - 1)]
    clip = torch.arange(b, device=first.device)[:, None, None]
    rows = torch.where(inside, tokens + clip * index.n_tokens, b * index.n_tokens).flatten(0, 1)
    place = torch.empty(b * index.n_tokens, dtype=torch.int64, device=first.device)
    places = torch.arange(rows.numel(), device=first.device)
    exists = rows.flatten() < b * index.n_tokens
    place[rows.flatten()[exists]] = places[exists]
    return rows, place
