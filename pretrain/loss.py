"""Reconstruction error on hidden brain voxels.

Shape suffixes: B clips · L tokens · P voxels in a patch · V brain voxels.
"""

from torch import Tensor


def squared_error(predicted_BLP: Tensor, target_BLP: Tensor, counted_BLP: Tensor) -> tuple[Tensor, Tensor]:
    """Sum the squared error over counted voxels.

    Parameters
    ----------
    predicted_BLP, target_BLP
        Patches in units of the recipe's normalisation.
    counted_BLP
        bool; true for voxels of hidden tokens that are brain and carry signal.

    Returns
    -------
    tuple of Tensor
        Sum of squared errors and number of voxels counted, both float32 scalars.
    """
    error = (predicted_BLP.float() - target_BLP.float()).square()
    return (error * counted_BLP).sum(), counted_BLP.sum().float()


def reconstruction_loss(predicted_BLP: Tensor, target_BLP: Tensor, counted_BLP: Tensor) -> Tensor:
    """Mean squared error over counted voxels; background and uncovered voxels never count.

    See `squared_error` for the parameters. Returns a float32 scalar, zero when nothing is counted.
    """
    total, count = squared_error(predicted_BLP, target_BLP, counted_BLP)
    return total / count.clamp(min=1)
