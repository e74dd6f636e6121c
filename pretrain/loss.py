"""Reconstruction error on hidden brain voxels.

Shape suffixes: B clips · L tokens · P voxels in a patch.
"""

from torch import Tensor


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
        float32 scalar.
    """
    return ((predicted_BLP.float() - target_BLP.float()).square() * counted_BLP).sum()


def reconstruction_loss(predicted_BLP: Tensor, target_BLP: Tensor, counted_BLP: Tensor) -> Tensor:
    """Mean squared error over counted voxels; background and uncovered voxels never count.

    See `squared_error` for the parameters. Returns a float32 scalar, zero when nothing is counted.
    """
    return squared_error(predicted_BLP, target_BLP, counted_BLP) / counted_BLP.sum().clamp(min=1)
