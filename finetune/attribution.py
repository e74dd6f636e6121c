"""Which brain regions a classifier reads: integrated gradients and occlusion, for clips of one subject.

Shape suffixes: B clips · T frames · V brain voxels · R regions or groups of regions.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from boldforge.finetune.classifier import Classifier
from boldforge.pretrain import RegionVoxels

Score = Callable[[Tensor], Tensor]
Figures = npt.NDArray[np.float64]


def class_score(classifier: Classifier, target: int | None = None) -> Score:
    """Return what is attributed: a function from clips [B, T, V] to one number per clip, [B].

    For two classes the logit of the second, for a regression the prediction, for several classes the logit of `target`
    minus the mean of the others'. Logits, because a probability near 0 or 1 hardly moves whatever is changed.
    """

    def score(values_BTV: Tensor) -> Tensor:
        outputs_BK = classifier(values_BTV)
        if outputs_BK.shape[1] == 1:
            return outputs_BK[:, 0]
        own = outputs_BK[:, target]
        return own - (outputs_BK.sum(dim=1) - own) / (outputs_BK.shape[1] - 1)

    return score


def integrated_gradients(score: Score, values_BTV: Tensor, baseline_V: Tensor, steps: int, batch_size: int) -> Figures:
    """Attribute a score to voxels along the straight path from the baseline to the clip.

    IG_v = Σ_t (x_tv − b_v) ∫₀¹ ∂f(b + α(x − b)) / ∂x_tv dα (Sundararajan et al. 2017, arXiv 1703.01365). Summed over
    voxels it is f(x) − f(b). A network that divides by an amplitude bends most where there is little of it, so the
    quadrature is Gauss-Legendre's in √α, which lays more nodes near the baseline.

    Parameters
    ----------
    score
        See `class_score`.
    values_BTV
        Clips.
    baseline_V
        The frame that stands for nothing; it is repeated over time.
    steps
        Nodes of the quadrature.
    batch_size
        Nodes that are run at a time.

    Returns
    -------
    ndarray of float64, [B, V]
        Summed over frames.
    """
    nodes, weights = np.polynomial.legendre.leggauss(steps)
    root = (nodes + 1) / 2
    alpha, weight = root**2, weights * root  # dα = 2√α d√α, and [0, 1] is half as long as [-1, 1]
    attributed = []
    for values_TV in values_BTV:
        change_TV = values_TV - baseline_V
        gradient_TV = torch.zeros_like(change_TV, dtype=torch.float64)
        for chunk in np.array_split(np.arange(steps), -(-steps // batch_size)):
            at_A = torch.as_tensor(alpha[chunk], dtype=values_TV.dtype, device=values_TV.device)
            path_ATV = (baseline_V + at_A[:, None, None] * change_TV).requires_grad_(True)
            (gradient_ATV,) = torch.autograd.grad(score(path_ATV).sum(), path_ATV)
            share_A = torch.as_tensor(weight[chunk], device=values_TV.device)
            gradient_TV += torch.einsum("a,atv->tv", share_A, gradient_ATV.double())
        attributed.append((change_TV.double() * gradient_TV).sum(dim=0).cpu().numpy())
    return np.stack(attributed)


@torch.no_grad()
def occlusion(
    score: Score, values_BTV: Tensor, baseline_V: Tensor, parts: "Parts", batch_size: int, unhidden_B: Figures
) -> Figures:
    """Measure by how much the score falls when a part of the brain shows the baseline only.

    A voxel that belongs to the part in a share is moved towards the baseline by that share.

    Parameters
    ----------
    score, values_BTV, baseline_V
        As for `integrated_gradients`.
    parts
        What is hidden, one after the other.
    batch_size
        Parts that are hidden at a time, each in a copy of the clip.
    unhidden_B
        Score of every clip as it is.

    Returns
    -------
    ndarray of float64, [B, R]
        Score of the clip as it is minus the score without the part.
    """
    fall_BR = np.empty((len(values_BTV), len(parts)))
    for start in range(0, len(parts), batch_size):
        share_RV = parts.shares(range(start, min(start + batch_size, len(parts)))).to(values_BTV.device)
        for clip, values_TV in enumerate(values_BTV):
            hidden_RTV = values_TV + share_RV[:, None] * (baseline_V - values_TV)
            left_R = score(hidden_RTV).double().cpu().numpy()
            fall_BR[clip, start : start + len(left_R)] = unhidden_B[clip] - left_R
    return fall_BR


class Parts:
    """Regions of an atlas and groups of them, as shares of voxels.

    Parameters
    ----------
    regions
        Where the regions lie on the shards' grid.
    groups
        Ids of each group's regions; a group without a region on the grid is left out.
    n_voxels
        V.
    """

    def __init__(self, regions: RegionVoxels, groups: dict[str, tuple[int, ...]], n_voxels: int) -> None:
        self.regions = regions
        self._n_voxels = n_voxels
        place = {label: number for number, label in enumerate(regions.ids)}
        members = {name: [place[label] for label in ids if label in place] for name, ids in groups.items()}
        self.group_names = tuple(name for name, found in members.items() if found)
        self._members = [[number] for number in range(len(regions.ids))] + [m for m in members.values() if m]

    def __len__(self) -> int:
        return len(self._members)

    @property
    def kinds(self) -> list[str]:
        """``region`` or ``group``, for each part: regions first."""
        return ["region"] * len(self.regions.ids) + ["group"] * len(self.group_names)

    @property
    def names(self) -> list[str]:
        """Of each part."""
        return [*self.regions.names, *self.group_names]

    def shares(self, numbers: Sequence[int]) -> Tensor:
        """Return the share of every voxel that these parts fill, float32 [R, V]."""
        shares_RV = np.zeros((len(numbers), self._n_voxels))
        for row, number in enumerate(numbers):
            found = np.isin(self.regions.region, self._members[number])
            np.add.at(shares_RV[row], self.regions.voxel[found], self.regions.share[found])
        return torch.from_numpy(np.minimum(shares_RV, 1).astype(np.float32))

    def sums(self, values_V: Figures) -> Figures:
        """Sum over the voxels of every part, each in its share: [V] to [R]."""
        regions_R = self.regions.sums(values_V)
        return np.array([regions_R[members].sum() for members in self._members])


@contextmanager
def gradients_through(network: nn.Module) -> Iterator[None]:
    """Let gradients flow to the input of a network that stays in evaluation mode, and to nothing else."""
    wanted = [parameter for parameter in network.parameters() if parameter.requires_grad]
    for parameter in wanted:
        parameter.requires_grad_(False)
    # cuDNN's recurrent layers have a backward pass in training mode only.
    recurrent = any(isinstance(module, nn.RNNBase) for module in network.modules())
    try:
        with torch.backends.cudnn.flags(enabled=torch.backends.cudnn.enabled and not recurrent), torch.enable_grad():
            yield
    finally:
        for parameter in wanted:
            parameter.requires_grad_(True)
