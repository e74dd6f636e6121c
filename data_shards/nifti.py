"""Open 4D NIfTI files safely: the header is checked before a single voxel is decoded."""

import logging
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import numpy.typing as npt

from boldforge.configs import BoldForgeError
from boldforge.data_shards.grid import Affine

log = logging.getLogger(__name__)

MAX_BYTES = 32 * 2**30
# Stands in the header of every file that `simulate_cohort` writes, wherever the file is moved to.
SIMULATED_MARK = b"simulated by BoldForge"
# Deflate cannot shrink data by more than this factor (zlib's technical notes), so a header that promises more lies.
_DEFLATE_LIMIT = 1032
_SECONDS = {"sec": 1.0, "msec": 1e-3, "usec": 1e-6}
# No scanner takes 100 s for a volume, and 2000 in a field labelled "sec" is the commonest wrong label there is.
_LONGEST_TR = 100.0
_SHORTEST_TR = 0.02
_NOT_READABLE = (
    OSError,
    EOFError,
    ValueError,
    zlib.error,
    nib.filebasedimages.ImageFileError,
    nib.spatialimages.HeaderDataError,
)


class HeaderError(BoldForgeError):
    """A file's header does not describe a 4D recording that can be placed in space and time."""


class ReadError(BoldForgeError):
    """A file's header is fine but its voxels cannot be decoded."""


@dataclass(frozen=True, eq=False)
class Bold:
    """An opened recording, nothing decoded: affine [4, 4] to RAS+ mm, tr in seconds, n_frames, simulated or not."""

    path: Path
    image: Any
    affine: Affine
    tr: float
    n_frames: int
    simulated: bool

    @property
    def shape(self) -> tuple[int, int, int]:
        """Voxels along the three axes of space."""
        x, y, z = self.image.shape[:3]
        return (x, y, z)

    def read(self) -> npt.NDArray[np.float32]:
        """Decode the recording, float32 [X, Y, Z, T], the header's slope and intercept applied.

        Raises
        ------
        ReadError
            If the file is cut short or corrupt.
        """
        try:
            data = self.image.get_fdata(dtype=np.float32, caching="unchanged")
        except _NOT_READABLE as error:
            raise ReadError(
                f"{self.path}: the voxels cannot be decoded, the file is cut short or corrupt ({_one_line(error)}); "
                "copy or download it again."
            ) from None
        return data.reshape(*self.shape, self.n_frames)


def open_bold(path: str | Path, tr: float | None = None) -> Bold:
    """Open a 4D NIfTI file and check its header.

    Parameters
    ----------
    path
        A ``.nii``, ``.nii.gz`` or ``.hdr``/``.img`` file, NIfTI-1 or NIfTI-2. 5D is accepted when the fourth or
        the fifth axis is a singleton.
    tr
        Seconds between frames; given, it takes the place of what the header says.

    Raises
    ------
    HeaderError
        If the file is missing, empty, not NIfTI, not 4D, larger than `MAX_BYTES` or than its file can hold, has no
        usable affine, or no usable repetition time while `tr` is None.
    """
    path = Path(path)
    try:
        image = _load(path)
        n_frames = _check_shape(path, image)
        affine = _check_affine(path, image)
    except _NOT_READABLE as error:
        raise HeaderError(
            f"{path}: cannot be read as NIfTI ({_one_line(error)}); expected a .nii or .nii.gz file."
        ) from None
    if tr is None:
        tr = _read_tr(path, image)
    elif not (np.isfinite(tr) and _SHORTEST_TR <= tr <= _LONGEST_TR):
        raise HeaderError(f"{path}: a repetition time of {tr} s was given; expected seconds, for example 2.0.")
    simulated = bytes(image.header["descrip"]).startswith(SIMULATED_MARK)
    return Bold(path, image, affine, float(tr), n_frames, simulated)


def _load(path: Path) -> Any:
    if not path.is_file():
        raise HeaderError(f"{path}: no such file.")
    if path.stat().st_size == 0:
        raise HeaderError(f"{path}: the file is empty (0 bytes); copy or download it again.")
    image = nib.load(path)
    if not isinstance(image, nib.nifti1.Nifti1Pair):
        raise HeaderError(f"{path}: is a {type(image).__name__}, expected NIfTI; convert it, for example with nibabel.")
    if image.get_data_dtype().kind not in "iuf":
        raise HeaderError(f"{path}: holds values of type {image.get_data_dtype()}, expected whole or real numbers.")
    return image


def _check_shape(path: Path, image: Any) -> int:
    shape = image.shape
    if len(shape) == 5 and 1 in shape[3:]:
        shape = (*shape[:3], max(shape[3:]))
    if len(shape) != 4 or shape[3] < 2:
        raise HeaderError(
            f"{path}: has shape {'×'.join(map(str, image.shape))}, expected 4D with at least two frames in time."
        )
    if min(shape) < 1:
        raise HeaderError(f"{path}: has shape {shape}, every axis must be at least 1.")
    values = int(np.prod(shape, dtype=object))
    if 4 * values > MAX_BYTES:
        raise HeaderError(
            f"{path}: its header promises {4 * values / 2**30:.0f} GiB of float32 values (shape {shape}), more than "
            f"the {MAX_BYTES // 2**30} GiB that are read; cut the run into shorter files."
        )
    data_file = Path(image.file_map["image"].filename)
    if not data_file.is_file():
        raise HeaderError(
            f"{path}: its voxels should be in {data_file.name} beside it, which does not exist; copy both."
        )
    stored = image.dataobj.offset + values * image.get_data_dtype().itemsize
    size = data_file.stat().st_size
    limit = size * _DEFLATE_LIMIT if data_file.suffix == ".gz" else size
    if data_file.suffix in {".gz", ".nii", ".img"} and stored > limit:
        raise HeaderError(
            f"{path}: its header promises {stored} bytes but the file has only {size} bytes; it is cut short "
            "or its header is wrong: copy or download it again."
        )
    return int(shape[3])


def _check_affine(path: Path, image: Any) -> Affine:
    header = image.header
    if header["sform_code"] == 0 and header["qform_code"] == 0:
        raise HeaderError(
            f"{path}: has neither an sform nor a qform, so its place in the brain is unknown; write its affine into "
            "the header (nibabel: image.set_sform)."
        )
    affine = np.asarray(image.affine, dtype=np.float64)
    if not np.isfinite(affine).all() or abs(np.linalg.det(affine[:3, :3])) < 1e-6:
        raise HeaderError(
            f"{path}: its affine is zero or singular ({np.array2string(affine[:3].ravel(), precision=3)}), so its "
            "voxels have no place in space; write a valid one into the header (nibabel: image.set_sform)."
        )
    if header["sform_code"] and header["qform_code"]:
        try:
            qform = header.get_qform()
        except ValueError:  # not a rotation
            log.warning("%s: its qform is broken; the sform is used.", path)
            return affine
        if np.abs(qform - affine).max() > 0.1 * np.abs(affine[:3, :3]).max():
            log.warning("%s: sform and qform disagree; the sform is used.", path)
    return affine


def _read_tr(path: Path, image: Any) -> float:
    # pixdim[4] is time in 4D; a 5D file with a singleton fourth axis keeps its step in pixdim[5].
    pixdim = image.header["pixdim"]
    step = float(pixdim[5] if image.ndim == 5 and image.shape[3] == 1 else pixdim[4])
    code = int(image.header["xyzt_units"]) & 0x38
    unit = {8: "sec", 16: "msec", 24: "usec"}.get(code, "sec")
    tr = step * _SECONDS[unit]
    if unit == "sec" and tr > _LONGEST_TR:
        log.warning("%s: a repetition time of %g s cannot be; read as milliseconds.", path, step)
        tr *= 1e-3
    if not np.isfinite(tr) or tr <= 0:
        raise HeaderError(f"{path}: its header gives no repetition time (found {step:g}); pass it with --source-tr.")
    if not _SHORTEST_TR <= tr <= _LONGEST_TR:
        raise HeaderError(
            f"{path}: its header gives an impossible repetition time ({step:g} {unit}); pass it with --source-tr."
        )
    # Headers keep float32: 1.16 arrives as 1.159999967.
    return round(tr, 6)


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__
