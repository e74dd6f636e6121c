"""Reconstruction of held-out frames, beside the simplest predictor there is: the run's mean frame.

The mean frame is taken over all frames of the run, as normalisation took it, held-out ones included: for a
normalisation that removes each voxel's mean it is zero. That gives the baseline an advantage over the model.

Errors are in units of the shards, whatever the model predicts. Where its targets are normalised patches, the model is
given each patch's true mean and standard deviation, and the baseline the true mean.

Shape suffixes: B clips · T frames · V brain voxels · S spatial tokens · L = S·T tokens · P voxels in a patch.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
from torch import Tensor

from boldforge.data_shards import Segment, ShardReader
from boldforge.pretrain.loss import LossConfig, patch_statistics
from boldforge.pretrain.masking import MaskSampler
from boldforge.pretrain.tokens import gather_patches, scatter_patches

Forward = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class HeldoutError:
    """Squared error on hidden voxels of held-out clips, per brain voxel.

    Attributes
    ----------
    error_V, baseline_V
        Sums of squared errors of the model and of the mean frame.
    count_V
        How often each voxel was hidden and measured.
    """

    error_V: np.ndarray
    baseline_V: np.ndarray
    count_V: np.ndarray

    @property
    def error(self) -> float:
        """Mean squared error of the model."""
        return float(self.error_V.sum() / max(1.0, self.count_V.sum()))

    @property
    def baseline(self) -> float:
        """Mean squared error of predicting the mean frame."""
        return float(self.baseline_V.sum() / max(1.0, self.count_V.sum()))


@dataclass(frozen=True, eq=False)
class HeldoutClip:
    """One held-out clip.

    Attributes
    ----------
    dataset, run, start
        Which dataset, place in its manifest, first frame.
    values_TV
        float32, normalised.
    mean_V
        float32, the run's mean frame in the same units.
    signal_V
        bool, voxels inside the run's field of view.
    """

    dataset: int
    run: int
    start: int
    values_TV: Tensor
    mean_V: Tensor
    signal_V: Tensor

    @property
    def key(self) -> tuple[int, ...]:
        """What its mask is drawn by; of the first dataset, what it was before there were mixtures."""
        return (1, self.run, self.start, *([self.dataset] if self.dataset else []))


def counted_voxels(mask_BL: Tensor, signal_BV: Tensor, patch_voxels: Tensor) -> Tensor:
    """Say which voxels a loss counts: hidden, brain, and with signal in this run; bool [B, L, P]."""
    patches_BSP = gather_patches(signal_BV.unsqueeze(1).float(), patch_voxels) > 0
    frames = mask_BL.shape[1] // patch_voxels.shape[0]
    return mask_BL.unsqueeze(-1) & patches_BSP.repeat_interleave(frames, dim=1)


class HeldoutClips:
    """The fixed set of held-out clips and masks that a run is measured on.

    Parameters
    ----------
    readers
        Read the shards, one per dataset.
    heldout
        Per dataset, segments as `boldforge.data_shards.split_segments` gives them.
    sampler
        Draws the masks; the keys depend on the clip alone, so every measurement hides the same tokens.
    clip_length
        T.
    limit
        Clips at most, spread evenly over all there are.
    loss
        Says what the model predicts, and whether voxels without signal are measured too.
    """

    def __init__(
        self,
        readers: Sequence[ShardReader],
        heldout: Sequence[Sequence[Segment]],
        sampler: MaskSampler,
        clip_length: int,
        limit: int,
        loss: LossConfig | None = None,
    ) -> None:
        self._readers = readers
        self._loss = loss or LossConfig()
        self._sampler = sampler
        self._length = clip_length
        every = [
            (dataset, segment.run, start)
            for dataset, segments in enumerate(heldout)
            for segment in segments
            for start in range(segment.start, segment.stop - clip_length + 1, clip_length)
        ]
        picked = np.linspace(0, len(every) - 1, min(limit, len(every))).round().astype(int)
        self.clips = [every[i] for i in sorted(set(picked.tolist()))]
        self._means: dict[tuple[int, int], npt.NDArray[np.float32]] = {}

    def measure(self, forward: Forward, patch_voxels: Tensor, n_voxels: int) -> HeldoutError:
        """Measure the model on every clip; called by every rank, each takes a share.

        Parameters
        ----------
        forward
            (values_BTV, mask_BL) to patches_BLP.
        patch_voxels
            int64 [S, P] on the model's device.
        n_voxels
            V.
        """
        rank, world, device = dist.get_rank(), dist.get_world_size(), patch_voxels.device
        totals = torch.zeros(3, n_voxels, dtype=torch.float64, device=device)
        for turn in range(-(-len(self.clips) // world)):
            # Under ZeRO-3 every rank must take part in every forward pass: a rank without a clip repeats the last.
            number = turn * world + rank
            clip = self.read(min(number, len(self.clips) - 1))
            _, counted_BLP, patches_BLP = self.reconstruct(forward, clip, patch_voxels)
            if number >= len(self.clips):
                continue
            target_BLP = gather_patches(clip.values_TV.unsqueeze(0).to(device), patch_voxels)
            mean_BLP = self._baseline(clip, patch_voxels)
            for row, predicted_BLP in enumerate((patches_BLP, mean_BLP)):
                error = (predicted_BLP - target_BLP).square() * counted_BLP
                totals[row] += scatter_patches(error, patch_voxels, n_voxels).sum((0, 1)).double()
            totals[2] += scatter_patches(counted_BLP, patch_voxels, n_voxels).sum((0, 1)).double()
        dist.all_reduce(totals)
        return HeldoutError(*totals.cpu().numpy())

    def reconstruct(self, forward: Forward, clip: HeldoutClip, patch_voxels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Hide and reconstruct a clip: mask [1, L], counted voxels and prediction (in the shards' units) [1, L, P]."""
        device = patch_voxels.device
        mask_BL = self._sampler.sample([clip.key]).to(device)
        signal_BV = clip.signal_V.unsqueeze(0).to(device) | self._loss.background
        counted_BLP = counted_voxels(mask_BL, signal_BV, patch_voxels)
        with torch.no_grad():
            patches_BLP = forward(clip.values_TV.unsqueeze(0).to(device), mask_BL).float()
        mean_BL1, deviation_BL1 = self._statistics(clip.values_TV, clip, patch_voxels)
        return mask_BL, counted_BLP, patches_BLP * deviation_BL1 + mean_BL1

    def _baseline(self, clip: HeldoutClip, patch_voxels: Tensor) -> Tensor:
        """Predict the mean frame [1, L, P], moved to each patch's true mean where the model is given that too."""
        frames_TV = clip.mean_V.expand(self._length, -1)
        mean_BLP = gather_patches(frames_TV.unsqueeze(0).to(patch_voxels.device), patch_voxels)
        own_BL1, _ = self._statistics(frames_TV, clip, patch_voxels)
        true_BL1, _ = self._statistics(clip.values_TV, clip, patch_voxels)
        return mean_BLP + (true_BL1 - own_BL1)

    def _statistics(self, values_TV: Tensor, clip: HeldoutClip, patch_voxels: Tensor) -> tuple[Tensor, Tensor]:
        values_BTV, signal_BV = (part.unsqueeze(0).to(patch_voxels.device) for part in (values_TV, clip.signal_V))
        return patch_statistics(values_BTV, signal_BV, patch_voxels, self._loss.targets)

    def read(self, number: int) -> HeldoutClip:
        """Read clip `number` of `clips`."""
        dataset, run, start = self.clips[number]
        stored = self._readers[dataset].read(run, start, self._length)
        values_TV = (stored.mean + stored.q.astype(np.float32) * stored.scale).astype(np.float32)
        return HeldoutClip(
            dataset=dataset,
            run=run,
            start=start,
            values_TV=torch.from_numpy(values_TV),
            mean_V=torch.from_numpy(self._mean(dataset, run)),
            signal_V=torch.from_numpy(stored.scale > 0),
        )

    def _mean(self, dataset: int, run: int) -> npt.NDArray[np.float32]:
        """Return the mean frame [V] over all frames of a run."""
        if (dataset, run) not in self._means:
            reader = self._readers[dataset]
            n_frames = int(reader.manifest.index["n_frames"][run])
            total = np.zeros(reader.manifest.n_voxels)
            for start in range(0, n_frames, self._length):
                part = reader.read(run, start, min(self._length, n_frames - start))
                total += part.q.sum(axis=0, dtype=np.float64)
            self._means[dataset, run] = (part.mean + total / n_frames * part.scale).astype(np.float32)
        return self._means[dataset, run]
