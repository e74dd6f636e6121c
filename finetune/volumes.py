"""3D volumes for backbones that read cubes: CT, structural MRI and diffusion maps, placed through their affines."""

import math
from pathlib import Path
from typing import Any, Literal

import nibabel as nib
import numpy as np
import numpy.typing as npt
from nibabel.filebasedimages import ImageFileError
from pydantic import Field
from scipy import ndimage

from boldforge.configs import StrictModel
from boldforge.finetune.errors import FinetuneError

Kind = Literal["ct", "mri", "fa", "md"]
Volume = npt.NDArray[np.float32]

_AIR_HU, _SPAN_HU = -1024, 3072
_WATER_MD = 3e-3  # mm²/s, free water at body temperature: the most a brain voxel holds
# What the 99th percentile reaches in any brain; below it the map is empty, of another unit or of another kind.
_LEAST = {"fa": 0.05, "md": 1e-4}


class CubeRecipe(StrictModel):
    """How a volume becomes the cube a backbone reads; the defaults are FMCIB's."""

    kind: Kind = Field(
        description="ct: Hounsfield units, (HU + 1024) / 3072. mri: the 0.5th to 99.5th percentile of the voxels that "
        "are not zero go to 0 to 1. fa: fractional anisotropy, as it is. md: mean diffusivity in mm²/s, over water's."
    )
    size: int = Field(50, ge=1, description="Voxels along each axis.")
    spacing: float = Field(
        1.0, gt=0, description="Millimetres between voxels; 1 as published sees 50 mm, 4 sees a whole brain."
    )
    centre: tuple[float, float, float] | None = Field(
        None,
        description="World position of the cube's centre, mm; none takes the centre of the volume's field of view.",
    )


def read_cube(path: str | Path, recipe: CubeRecipe) -> Volume:
    """Read a volume into a cube in the array order of FMCIB's publication.

    Parameters
    ----------
    path
        A 3D NIfTI file; its orientation and spacing do not matter. A fourth axis of length 1 is dropped.
    recipe
        What it holds, and where the cube lies.

    Returns
    -------
    ndarray of float32, [size, size, size]
        Axes z, y, x; z grows towards superior, y towards posterior, x towards left (LPS). What lies outside the field
        of view is air for CT and 0 for the others.

    Raises
    ------
    FinetuneError
        If the file cannot be read, is no 3D volume, has no affine, or its values cannot be of that kind.
    """
    path = Path(path)
    values, affine = _load(path)
    values = _standardise(path, values, recipe.kind)
    native = np.sqrt((affine[:3, :3] ** 2).sum(axis=0))
    # A coarser grid would alias what it cannot hold; below half a step more there is nothing to speak of.
    ratio = recipe.spacing / native
    sigma = [0.5 * math.sqrt(r * r - 1) if r > 1.5 else 0.0 for r in ratio]
    if any(sigma):
        values = ndimage.gaussian_filter(values, sigma, mode="nearest")
    middle = affine @ np.array([*((np.array(values.shape) - 1) / 2), 1.0])
    centre = np.array(recipe.centre if recipe.centre is not None else middle[:3])
    half = (recipe.size - 1) / 2
    to_world = np.eye(4)
    to_world[:3, :3] = recipe.spacing * np.array([[0, 0, -1], [0, -1, 0], [1, 0, 0]])  # columns: z, y, x
    to_world[:3, 3] = centre - to_world[:3, :3] @ np.full(3, half)
    to_voxel = np.linalg.inv(affine) @ to_world
    return ndimage.affine_transform(
        values, to_voxel[:3, :3], to_voxel[:3, 3], (recipe.size,) * 3, np.float32, order=1, mode="constant", cval=0.0
    )


def _load(path: Path) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    try:
        image: Any = nib.load(path)
        shape = image.shape
        affine = np.asarray(image.affine, dtype=np.float64)
    except FileNotFoundError:
        raise FinetuneError(f"{path}: no such file; correct the table's path.") from None
    except (ImageFileError, OSError, ValueError) as error:
        raise FinetuneError(f"{path}: is not a NIfTI file ({error}); convert it with dcm2niix or the like.") from None
    if len(shape) != 3 and not (len(shape) == 4 and shape[3] == 1):
        raise FinetuneError(f"{path}: has shape {shape}, expected three axes; give one volume per file.")
    codes = (
        (int(image.header["sform_code"]), int(image.header["qform_code"])) if "sform_code" in image.header else (1, 1)
    )
    if codes == (0, 0) or not np.isfinite(affine).all() or abs(np.linalg.det(affine[:3, :3])) < 1e-9:
        raise FinetuneError(
            f"{path}: has no usable affine (sform and qform codes {codes}), so where its voxels lie is unknown; "
            "convert it again from DICOM."
        )
    try:
        values = np.asarray(image.dataobj, dtype=np.float64)
    except (OSError, EOFError, ValueError) as error:
        raise FinetuneError(f"{path}: its voxels cannot be read ({error}); copy the file again.") from None
    values = values.reshape(shape[:3])
    finite = np.isfinite(values)
    if not finite.any():
        raise FinetuneError(f"{path}: holds no finite value; leave it out of the table.")
    return np.where(finite, values, values[finite].min()), affine


def _standardise(path: Path, values: npt.NDArray[np.float64], kind: Kind) -> npt.NDArray[np.float64]:
    low, high = float(values.min()), float(values.max())
    if kind == "ct":
        if low > -200:
            raise FinetuneError(
                f"{path}: the lowest value is {low:g}, but a CT in Hounsfield units holds air near -1000; set kind to "
                "mri, or apply the rescale slope and intercept."
            )
        return (values - _AIR_HU) / _SPAN_HU
    if kind == "mri":
        inside = values[values != 0]
        floor, top = np.percentile(inside, [0.5, 99.5]) if inside.size else (0.0, 0.0)
        if top <= floor:
            raise FinetuneError(f"{path}: all of its voxels hold one value; leave it out of the table.")
        return np.where(values != 0, np.clip((values - floor) / (top - floor), 0, 1), 0.0)
    limit, unit = (1.25, "between 0 and 1") if kind == "fa" else (0.05, "mm²/s, below 0.004 in the brain")
    if low < -0.01 * limit or high > limit:
        raise FinetuneError(
            f"{path}: values reach from {low:g} to {high:g}, expected {kind.upper()} {unit}; rescale it or correct "
            "kind."
        )
    inside = values[values != 0]
    top = float(np.percentile(inside, 99)) if inside.size else 0.0
    if top < _LEAST[kind]:
        raise FinetuneError(
            f"{path}: 99 % of its voxels that are not zero lie below {top:.2g}, expected {kind.upper()} {unit}, that "
            f"reaches {_LEAST[kind]:g}; rescale it, correct kind, or leave it out of the table."
        )
    return np.clip(values, 0, 1) if kind == "fa" else np.clip(values / _WATER_MD, 0, 1)
