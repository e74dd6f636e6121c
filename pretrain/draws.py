"""The random numbers that decide what is dropped while training: by stochastic depth, and as redundant.

Shape suffixes: B clips · L tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

ClipKey = tuple[int, ...]
"""Non-negative integers that name a clip of a run, as `boldforge.pretrain.masking.sample_keys` gives them."""

# Masks are drawn from the clip's key alone, so the numbers of a block must have longer ones that never equal it.
_DROPS = 1


@dataclass(frozen=True)
class Draws:
    """Uniform numbers in [0, 1) for one block.

    Attributes
    ----------
    branches_B2
        float32; one for the branch of Mamba, one for that of the MLP.
    tokens_BL
        float32; one for every token of a clip, hidden or not. None where the block drops no tokens.
    """

    branches_B2: Tensor
    tokens_BL: Tensor | None


def draw(
    clips: int, tokens: int, device: torch.device, block: tuple[int, int], keys: Sequence[ClipKey] | None = None
) -> Draws:
    """Draw a block's numbers.

    Parameters
    ----------
    clips, tokens
        B, and L or 0 where no tokens are dropped.
    device
        Where they are used.
    block
        The stage, and the block's number there.
    keys
        One per clip: its numbers are a pure function of its key and the block, so they depend neither on the other
        clips of the batch nor on the device. None draws from torch's global generator.

    Raises
    ------
    ValueError
        If there is not one key per clip.
    """
    if keys is None:
        numbers = torch.rand(clips, 2 + tokens, device=device)
    elif len(keys) == clips:
        rows = [np.random.default_rng([*key, _DROPS, *block]).random(2 + tokens, dtype=np.float32) for key in keys]
        numbers = torch.from_numpy(np.stack(rows)).to(device)
    else:
        raise ValueError(f"found {len(keys)} keys for {clips} clips; give one key per clip")
    return Draws(numbers[:, :2], numbers[:, 2:] if tokens else None)
