"""Where and when a token is, as functions of millimetres and seconds, so that the weights know no grid and no TR.

Coordinates enter as sines and cosines of log-spaced wavelengths (Tancik et al. 2020, arXiv 2006.10739). The shortest
are four tokens long: between the tokens of the grid that was trained on, the function is then smooth, and so it means
something at the tokens of another.

Shape suffixes: B clips · S spatial tokens of a stage · T frames · C channels · K wavelengths.
"""

import math
from typing import cast

import numpy as np
import torch
from torch import Tensor, nn

_WAVELENGTHS = 8
_LONGEST_MM = 768.0
"""Four times the edge of the cube that the grids span, so that no two places look alike."""
_SHORTEST_S, _LONGEST_S = 4.0, 512.0
"""From two frames at a TR of 2 s to a whole run."""
_USUAL_TR = 2.0
"""The TR in seconds at which the term that says how fast frames follow each other is zero."""


def waves(x: Tensor, wavelengths_K: Tensor) -> Tensor:
    """Sines, then cosines, of coordinates: [...] and [K], in the same unit, to [..., 2K]."""
    angle = 2 * math.pi * x[..., None] / wavelengths_K
    return torch.cat([angle.sin(), angle.cos()], dim=-1)


def log_spaced(shortest: float, longest: float) -> Tensor:
    """Return the K wavelengths from `shortest` to `longest`, float32."""
    return torch.from_numpy(np.geomspace(shortest, longest, _WAVELENGTHS)).float()


class PositionInMillimetres(nn.Module):
    """A small MLP on the waves of a token's centre, for the tokens of one stage.

    Parameters
    ----------
    centres_S3
        Centres of the tokens in mm (RAS+), float64.
    edge
        Edge of the stage's tokens in mm; with it the wavelengths are a property of the recipe, not of the grid.
    dim
        C.
    """

    waves_SK: Tensor

    def __init__(self, centres_S3: np.ndarray, edge: float, dim: int) -> None:
        super().__init__()
        shortest = 4 * edge
        wavelengths_K = log_spaced(shortest, max(_LONGEST_MM, 2 * shortest))
        table = waves(torch.from_numpy(centres_S3), wavelengths_K.double()).flatten(1).float()
        self.register_buffer("waves_SK", table, persistent=False)
        self.hidden = nn.Linear(table.shape[1], dim)
        self.out = nn.Linear(dim, dim)
        # About as small as a learned embedding starts: the GELU's outputs are a quarter each.
        nn.init.trunc_normal_(self.out.weight, std=0.08 / math.sqrt(dim))
        nn.init.zeros_(self.out.bias)

    def forward(self) -> Tensor:
        """[S, 1, C]."""
        # Tiny, and in bf16 neighbours would be a few per cent off.
        with torch.autocast(self.waves_SK.device.type, enabled=False):
            table = self.waves_SK.to(self.hidden.weight.dtype)
            return cast(Tensor, self.out(nn.functional.gelu(self.hidden(table)))).unsqueeze(1)


class TimeInSeconds(nn.Module):
    """A linear map of the waves of a token's time since the clip's first frame, and of the logarithm of its TR.

    The TR's term starts at zero, and it is zero at 2 s whatever is learned.

    Parameters
    ----------
    dim
        C.
    joined
        Frames that a token of this stage spans; its time is their middle.
    """

    periods_K: Tensor

    def __init__(self, dim: int, joined: int = 1) -> None:
        super().__init__()
        self.joined = joined
        periods_K = log_spaced(_SHORTEST_S, _LONGEST_S)
        self.register_buffer("periods_K", periods_K, persistent=False)
        self.seconds = nn.Linear(2 * len(periods_K), dim)
        self.tr = nn.Linear(1, dim, bias=False)
        nn.init.trunc_normal_(self.seconds.weight, std=0.02 / math.sqrt(len(periods_K)))
        nn.init.zeros_(self.seconds.bias)
        nn.init.zeros_(self.tr.weight)

    def forward(self, frames: int, tr_B: Tensor) -> Tensor:
        """Embed T tokens of clips with these seconds per frame: [B, 1, T, C]."""
        with torch.autocast(tr_B.device.type, enabled=False):
            kind = self.seconds.weight.dtype
            place_T = (torch.arange(frames, device=tr_B.device) + 0.5) * self.joined - 0.5
            times_BTK = waves(tr_B.float()[:, None] * place_T, self.periods_K.float())
            rate_BK = torch.log2(tr_B.float() / _USUAL_TR)[:, None]
            embedded: Tensor = self.seconds(times_BTK.to(kind)) + self.tr(rate_BK.to(kind))[:, None]
            return embedded.unsqueeze(1)


def seconds_per_frame(tr: float | Tensor | None, clips: int, device: torch.device) -> Tensor:
    """Return the TR of every clip, float32 [B].

    Parameters
    ----------
    tr
        Seconds: one number for all clips, or [B].

    Raises
    ------
    ValueError
        If it is missing, of another shape, or (looked at on the CPU only) no positive number.
    """
    if tr is None:
        raise ValueError(
            "this model embeds time in seconds (model.time: seconds) and was not told the repetition time; pass tr, in "
            "seconds, one number or one per clip"
        )
    tr_B = torch.as_tensor(tr, dtype=torch.float32, device=device)
    if tr_B.ndim == 0:
        tr_B = tr_B.expand(clips)
    if tr_B.shape != (clips,):
        raise ValueError(f"tr must be one number or one per clip ({clips}), in seconds; got shape {list(tr_B.shape)}")
    if tr_B.device.type == "cpu" and not (tr_B.isfinite() & (tr_B > 0)).all():
        raise ValueError(f"tr must be seconds per frame, above 0; got {tr_B.tolist()}")
    return tr_B
