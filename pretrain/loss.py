"""What training minimises: reconstruction error on hidden brain voxels, counted in up to four ways.

Every term is a sum over this micro-batch divided by a count over the whole step, all ranks and micro-batches; so the
sum of all micro-batches' losses is the step's loss, however the step was cut.

Shape suffixes: B clips · S spatial tokens · T frames · L = S·T tokens · P voxels in a patch · K regions of a patch · R
regions.
"""

from typing import Literal

import numpy as np
import torch
from pydantic import Field, model_validator
from torch import Tensor

from boldforge.configs import StrictModel
from boldforge.pretrain.regions import RegionVoxels
from boldforge.pretrain.tokens import gather_patches

Targets = Literal["values", "clip", "frame"]

# Added to a patch's variance (He et al. 2022 do so, arXiv 2111.06377), so that one without contrast is not blown up.
_SMALLEST_VARIANCE = 1e-6


class LossConfig(StrictModel):
    """What the reconstruction error counts; the loss is the sum of the four terms, each times its weight."""

    voxel: float = Field(1.0, ge=0, description="Weight of the mean squared error over hidden voxels.")
    region: float = Field(
        0.0,
        ge=0,
        description="Weight of the mean over regions of each region's own mean: every region weighs the same, whatever "
        "its size.",
    )
    parcel: float = Field(
        0.0,
        ge=0,
        description="Weight of the mean squared error of regions' mean time courses, taken over their hidden voxels.",
    )
    gradient: float = Field(
        0.0,
        ge=0,
        description="Weight of the mean squared error of the change from one frame to the next, where both are hidden.",
    )
    targets: Targets = Field(
        "values",
        description="What is predicted. values: the data as normalised in the shards; clip: each patch to mean 0 and "
        "standard deviation 1 over its voxels and frames; frame: the same in every frame alone.",
    )
    background: bool = Field(
        False,
        description="Also count hidden voxels without signal (background, outside the field of view), as NeuroSTORM "
        "does; needs shards that store them, on the grid neurostorm.",
    )

    @model_validator(mode="after")
    def _terms_fit_together(self) -> "LossConfig":
        extra = [name for name in ("region", "parcel", "gradient") if getattr(self, name)]
        if not self.voxel and not extra:
            raise ValueError("loss: all four weights are 0, so nothing would be learned; set loss.voxel to 1")
        if self.background and (extra or self.targets != "values"):
            raise ValueError(
                f"loss.background counts background, which loss.{extra[0] if extra else 'targets'} never does; set "
                "loss.background to false"
            )
        if self.targets == "frame" and (self.parcel or self.gradient):
            raise ValueError(
                f"loss.targets is frame, which takes each patch's time course away, and loss.{extra[-1]} is its error; "
                "set loss.targets to clip"
            )
        return self


def squared_error(predicted_BLP: Tensor, target_BLP: Tensor, counted_BLP: Tensor) -> Tensor:
    """Sum the squared error over counted voxels.

    Parameters
    ----------
    predicted_BLP, target_BLP
        Patches in units of the recipe's normalisation.
    counted_BLP
        bool; true for voxels of hidden tokens that are brain and carry signal.

    Returns
    -------
    Tensor
        Scalar; float32, or float64 if both are.
    """
    return _difference(predicted_BLP, target_BLP, counted_BLP).square().sum()


def reconstruction_loss(predicted_BLP: Tensor, target_BLP: Tensor, counted_BLP: Tensor) -> Tensor:
    """Mean squared error over counted voxels; background and uncovered voxels never count.

    See `squared_error` for the parameters. Returns a scalar, zero when nothing is counted.
    """
    return squared_error(predicted_BLP, target_BLP, counted_BLP) / counted_BLP.sum().clamp(min=1)


def make_targets(values_BTV: Tensor, signal_BV: Tensor, patch_voxels: Tensor, targets: Targets) -> Tensor:
    """Cut clips into the patches to predict, [B, L, P], normalised as `LossConfig.targets` says."""
    patches_BLP = gather_patches(values_BTV, patch_voxels)
    mean_BL1, deviation_BL1 = patch_statistics(values_BTV, signal_BV, patch_voxels, targets)
    return patches_BLP if targets == "values" else (patches_BLP - mean_BL1) / deviation_BL1


def patch_statistics(
    values_BTV: Tensor, signal_BV: Tensor, patch_voxels: Tensor, targets: Targets
) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation that patches are normalised with, over their voxels with signal alone.

    Parameters
    ----------
    values_BTV
        Clips as the shards hold them.
    signal_BV
        bool; which voxels carry signal.
    patch_voxels
        int64 [S, P].
    targets
        ``frame`` takes them in each frame, ``clip`` over all frames; ``values`` gives 0 and 1.

    Returns
    -------
    mean_BL1, deviation_BL1
    """
    if targets == "values":
        zero = values_BTV.new_zeros(1, 1, 1)
        return zero, zero + 1
    B, T, _ = values_BTV.shape
    x_BSTP = gather_patches(values_BTV, patch_voxels).unflatten(1, (-1, T))
    used_BSTP = gather_patches(signal_BV.unsqueeze(1).to(x_BSTP.dtype), patch_voxels).unsqueeze(2).expand(x_BSTP.shape)
    over = (-1,) if targets == "frame" else (-2, -1)
    count = used_BSTP.sum(over, keepdim=True).clamp(min=1)
    mean = (x_BSTP * used_BSTP).sum(over, keepdim=True) / count
    variance = ((x_BSTP - mean) * used_BSTP).square().sum(over, keepdim=True) / count
    deviation = (variance + _SMALLEST_VARIANCE).sqrt()
    shape = (B, x_BSTP.shape[1], T, 1)
    return mean.expand(shape).flatten(1, 2), deviation.expand(shape).flatten(1, 2)


class Objective:
    """The loss of a step, from parts of it.

    Parameters
    ----------
    config
        Weights of the terms.
    frames
        T.
    regions, patch_voxels
        Where the regions lie, and int64 [S, P] the voxels of each patch, on the device that computes; both are needed
        by the ``region`` and ``parcel`` terms alone.
    """

    def __init__(
        self, config: LossConfig, frames: int, regions: RegionVoxels | None = None, patch_voxels: Tensor | None = None
    ) -> None:
        self.config = config
        self._frames = frames
        self._regions: _PatchRegions | None = None
        if config.region or config.parcel:
            if regions is None or patch_voxels is None:
                raise ValueError("the region and parcel terms need the regions' voxels and the patches' voxels")
            self._regions = _PatchRegions(regions, patch_voxels, frames)

    def counts(self, counted_BLP: Tensor) -> Tensor:
        """Count what the terms divide by, in this part of the step; sum it over the parts and ranks.

        Returns
        -------
        Tensor
            float64 [3 + R]: voxels; points of regions' time courses; changes between frames; and for each region its
            voxels, each in the share that the region fills. What no term needs is 0.
        """
        points = changes = torch.zeros((), dtype=torch.int64, device=counted_BLP.device)
        held_R = torch.zeros(0, dtype=torch.float64, device=counted_BLP.device)
        if self._regions is not None:
            held_BTR = self._regions.sums(counted_BLP.double())
            points, held_R = (held_BTR > 0).sum(), held_BTR.sum((0, 1))
        if self.config.gradient:
            changes = self._changes(counted_BLP).sum()
        return torch.cat([torch.stack([counted_BLP.sum(), points, changes]).double(), held_R])

    def __call__(
        self, predicted_BLP: Tensor, target_BLP: Tensor, counted_BLP: Tensor, totals: Tensor
    ) -> dict[str, Tensor]:
        """Compute this part's share of every term that has a weight.

        Parameters
        ----------
        predicted_BLP, target_BLP, counted_BLP
            As in `squared_error`; whole clips.
        totals
            `counts` of the whole step, on the CPU.

        Returns
        -------
        dict
            ``loss``, the weighted sum, and the terms by name; scalars. A term of which the step holds nothing is 0.
        """
        difference_BLP = _difference(predicted_BLP, target_BLP, counted_BLP)
        weights = {name: getattr(self.config, name) for name in ("voxel", "region", "parcel", "gradient")}
        terms = {
            name: getattr(self, f"_{name}")(difference_BLP, counted_BLP, totals)
            for name, weight in weights.items()
            if weight
        }
        return {"loss": torch.stack([weights[name] * term for name, term in terms.items()]).sum(), **terms}

    def _voxel(self, difference_BLP: Tensor, counted_BLP: Tensor, totals: Tensor) -> Tensor:
        return difference_BLP.square().sum() / float(totals[0].clamp(min=1))

    def _region(self, difference_BLP: Tensor, counted_BLP: Tensor, totals: Tensor) -> Tensor:
        assert self._regions is not None
        error_R = self._regions.sums(difference_BLP.square()).sum((0, 1))
        # What is not hidden in this step has no error: dividing it by 1 leaves 0.
        held_R = totals[3:].where(totals[3:] > 0, 1).to(error_R)
        return (error_R / held_R).sum() / float((totals[3:] > 0).sum().clamp(min=1))

    def _parcel(self, difference_BLP: Tensor, counted_BLP: Tensor, totals: Tensor) -> Tensor:
        assert self._regions is not None
        held_BTR = self._regions.sums(counted_BLP.to(difference_BLP.dtype))
        error_BTR = self._regions.sums(difference_BLP) / held_BTR.where(held_BTR > 0, 1)
        return error_BTR.square().sum() / float(totals[1].clamp(min=1))

    def _gradient(self, difference_BLP: Tensor, counted_BLP: Tensor, totals: Tensor) -> Tensor:
        change = difference_BLP.unflatten(1, (-1, self._frames)).diff(dim=2)
        return (change * self._changes(counted_BLP)).square().sum() / float(totals[2].clamp(min=1))

    def _changes(self, counted_BLP: Tensor) -> Tensor:
        """Say where a voxel counts in a frame and in the one before: bool [B, S, T − 1, P]."""
        counted_BSTP = counted_BLP.unflatten(1, (-1, self._frames))
        return counted_BSTP[:, :, 1:] & counted_BSTP[:, :, :-1]


class _PatchRegions:
    """The regions' shares of patches' voxels, laid out so that sums over regions are matrix products.

    A patch meets few regions, K at most: [S, P, K] holds their shares, and [S·K, R] says which they are. Unlike a
    scattered addition, this gives the same bits every time on every device.
    """

    def __init__(self, regions: RegionVoxels, patch_voxels: Tensor, frames: int) -> None:
        self._frames = frames
        S, P = patch_voxels.shape
        R = len(regions.ids)
        flat = patch_voxels.cpu().numpy().reshape(-1)
        place = np.zeros(flat.max() + 1, dtype=np.int64)
        place[flat] = np.arange(S * P)
        patch, within = np.divmod(place[regions.voxel], P)
        pairs, pair = np.unique(patch * R + regions.region, return_inverse=True)
        first = np.searchsorted(pairs // R, np.arange(S))
        slot = np.arange(len(pairs)) - first[pairs // R]
        K = int(slot.max()) + 1
        share_SPK = np.zeros((S, P, K))
        share_SPK[patch, within, slot[pair]] = regions.share
        which = np.zeros((S * K, R))
        which[pairs // R * K + slot, pairs % R] = 1
        self._share_SPK = torch.from_numpy(share_SPK).to(patch_voxels.device)
        self._which_SKR = torch.from_numpy(which).to(patch_voxels.device)
        self._single = self._share_SPK.float(), self._which_SKR.float()

    def sums(self, x_BLP: Tensor) -> Tensor:
        """Sum over each region's voxels, in their shares: [B, S·T, P] to [B, T, R]."""
        share_SPK, which_SKR = self._single if x_BLP.dtype == torch.float32 else (self._share_SPK, self._which_SKR)
        B, S = len(x_BLP), len(share_SPK)
        x_SBTP = x_BLP.unflatten(1, (S, self._frames)).transpose(0, 1)
        parts_SBTK = torch.bmm(x_SBTP.flatten(1, 2), share_SPK).unflatten(1, (B, self._frames))
        return parts_SBTK.permute(1, 2, 0, 3).flatten(2) @ which_SKR


def _difference(predicted_BLP: Tensor, target_BLP: Tensor, counted_BLP: Tensor) -> Tensor:
    """Subtract in float32 at least; zero where nothing is counted, whatever stands there."""
    kind = torch.promote_types(torch.float32, torch.promote_types(predicted_BLP.dtype, target_BLP.dtype))
    return torch.where(counted_BLP, predicted_BLP.to(kind) - target_BLP.to(kind), 0)
