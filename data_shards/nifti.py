"""Open 4D NIfTI files safely: the header is checked before a single voxel is decoded."""

import logging
import zlib
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import numpy.typing as npt

from boldforge.configs import BoldForgeError
from boldforge.data_shards.grid import Affine

igzip: Any = None
_DECODER_ERRORS: tuple[Any, ...] = (zlib.error,)
with suppress(ImportError):  # the same bytes and checks in half of gzip's time
    from isal import igzip as _igzip
    from isal import isal_zlib

    igzip, _DECODER_ERRORS = _igzip, (zlib.error, isal_zlib.error)

log = logging.getLogger(__name__)

MAX_BYTES = 32 * 2**30
# One frame is decoded at once, whatever else is done in pieces: 400³ voxels are more than any scanner takes.
MAX_VOXELS = 2**26
# Decoded at a time: a dozen frames at 2 mm, and never less than one frame.
BLOCK_BYTES = 64 * 2**20
_MOST_FRAMES = 64
# What follows the voxels is read to reach a gzip's checksum; a file with more than this behind them is no gzip of ours.
_TAIL_BYTES = 2**20
# Stands in the header of every file that `simulate_cohort` writes, wherever the file is moved to.
SIMULATED_MARK = b"simulated by BoldForge"
# Deflate cannot shrink data by more than this factor (zlib's technical notes), so a header that promises more lies.
_DEFLATE_LIMIT = 1032
_SECONDS = {"sec": 1.0, "msec": 1e-3, "usec": 1e-6}
# No scanner takes 100 s for a volume, and 2000 in a field labelled "sec" is the commonest wrong label there is.
LONGEST_TR = 100.0
SHORTEST_TR = 0.02
_NOT_READABLE: tuple[type[Exception], ...] = (
    OSError,
    EOFError,
    ValueError,
    *_DECODER_ERRORS,
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

    def blocks(self, n_bytes: int = BLOCK_BYTES) -> Iterator[npt.NDArray[Any]]:
        """Decode the recording a few frames at a time, in order, each file once from front to end.

        Parameters
        ----------
        n_bytes
            Memory for one block; at least one frame is decoded.

        Yields
        ------
        [X·Y·Z, n], first axis of space fastest, n frames, the header's slope and intercept applied: the stored type
        where there are none, else float64.

        Raises
        ------
        ReadError
            If the file is cut short or corrupt; a gzip's own checksum is looked at after the last frame.
        """
        stored = self.image.dataobj
        shape = (*self.shape, self.n_frames)
        frame_bytes = 8 * int(np.prod(self.shape))
        step = max(1, min(_MOST_FRAMES, n_bytes // frame_bytes))
        try:
            with _opened(self.image.file_map["image"].filename) as file:
                spec = (shape, stored.dtype, stored.offset, stored.slope, stored.inter)
                frames = nib.arrayproxy.ArrayProxy(file, spec)
                for start in range(0, self.n_frames, step):
                    block = np.asarray(frames[..., start : start + step])
                    yield block.reshape(-1, block.shape[3], order="F")
                self._check_tail(file)
        except _NOT_READABLE as error:
            raise ReadError(
                f"{self.path}: the voxels cannot be decoded, the file is cut short or corrupt ({_one_line(error)}); "
                "copy or download it again."
            ) from None

    def _check_tail(self, file: Any) -> None:
        if len(file.read(_TAIL_BYTES)) == _TAIL_BYTES:
            log.warning("%s: holds more than its header says; what follows the last frame is not read.", self.path)

    def read(self) -> npt.NDArray[np.float32]:
        """Decode the whole recording into memory, float32 [X, Y, Z, T]; raises as `blocks` does."""
        data = np.empty((*self.shape, self.n_frames), dtype=np.float32, order="F")
        frames = data.reshape(-1, self.n_frames, order="F")
        start = 0
        for block in self.blocks():
            frames[:, start : start + block.shape[1]] = block
            start += block.shape[1]
        return data


def _opened(filename: str) -> Any:
    """Open a file for reading from front to end, whatever it is compressed with."""
    if igzip is not None and filename.lower().endswith(".gz"):
        return igzip.open(filename)
    return nib.openers.ImageOpener(filename).fobj


def open_bold(path: str | Path, tr: float | None = None) -> Bold:
    """Open a 4D NIfTI file and check its header.

    Parameters
    ----------
    path
        A ``.nii``, ``.nii.gz`` or ``.hdr``/``.img`` file, NIfTI-1 or NIfTI-2. Axes beyond the fourth, or before the
        one of time, are accepted when they are singletons.
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
    elif not (np.isfinite(tr) and SHORTEST_TR <= tr <= LONGEST_TR):
        raise HeaderError(f"{path}: a repetition time of {tr} s was given; expected seconds, for example 2.0.")
    simulated = bytes(image.header["descrip"]).startswith(SIMULATED_MARK)
    return Bold(path, image, affine, float(tr), n_frames, simulated)


def read_volume(path: Path) -> tuple[npt.NDArray[Any], Affine]:
    """Read a 3D volume (a brain mask, an atlas), checked like a recording: values [X, Y, Z] and affine [4, 4].

    Raises
    ------
    HeaderError
        If it is not a readable 3D NIfTI file, its header promises absurd sizes, or its affine is zero or singular.
    """
    try:
        image = _load(path)
        shape = image.shape[:3]
        named = "×".join(map(str, image.shape))
        if len(shape) < 3 or min(image.shape) < 1 or max(image.shape[3:], default=1) > 1:
            raise HeaderError(f"{path}: has shape {named}, expected a 3D volume.")
        values = int(np.prod(shape, dtype=object))
        if values > MAX_VOXELS:
            raise HeaderError(f"{path}: has shape {named}, more than the {MAX_VOXELS} voxels that are read.")
        _check_size(path, image, values)
        affine = _check_affine(path, image)
        return np.asarray(image.dataobj).reshape(shape, order="F"), affine
    except _NOT_READABLE as error:
        if not _begins_as_nifti(path):
            raise HeaderError(f"{path}: is not a NIfTI file; expected a 3D volume in a .nii or .nii.gz file.") from None
        raise HeaderError(f"{path}: cannot be read as a NIfTI volume ({_one_line(error)}); copy it again.") from None


def _begins_as_nifti(path: Path) -> bool:
    """Look whether a file begins as NIfTI does, gzipped or not: with its header's size, 348 or 540."""
    try:
        with path.open("rb") as file:
            start = file.read(512)
        if start.startswith(b"\x1f\x8b"):
            start = zlib.decompressobj(wbits=zlib.MAX_WBITS | 16).decompress(start, 4)
    except (OSError, zlib.error):
        return True  # damaged rather than something else
    return any(int.from_bytes(start[:4], order) in (348, 540) for order in ("little", "big"))


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
    named = "×".join(map(str, shape))
    if min(shape, default=0) < 1:
        raise HeaderError(f"{path}: has shape {named or 'of no axes'}, every axis must be at least 1.")
    beyond = [size for size in shape[3:] if size != 1]
    if len(shape) < 4 or len(beyond) != 1:
        raise HeaderError(f"{path}: has shape {named}, expected 4D with at least two frames in time.")
    shape = (*shape[:3], beyond[0])
    if int(np.prod(shape[:3], dtype=object)) > MAX_VOXELS:
        raise HeaderError(
            f"{path}: has shape {named}, more than {MAX_VOXELS} voxels in a frame; resample it to the resolution of "
            "the recording, or mend its header."
        )
    values = int(np.prod(shape, dtype=object))
    if 4 * values > MAX_BYTES:
        raise HeaderError(
            f"{path}: its header promises {4 * values / 2**30:.0f} GiB of float32 values (shape {named}), more than "
            f"the {MAX_BYTES // 2**30} GiB that are read; cut the run into shorter files."
        )
    _check_size(path, image, values)
    return int(shape[3])


def _check_size(path: Path, image: Any, values: int) -> None:
    """Refuse a header that promises more values than the file beside it can hold."""
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
    # pixdim[4] is time in 4D; a file with singletons before the axis of time keeps its step with that axis.
    axis = next(number for number, size in enumerate(image.shape[3:], start=4) if size != 1)
    step = float(image.header["pixdim"][axis])
    code = int(image.header["xyzt_units"]) & 0x38
    unit = {8: "sec", 16: "msec", 24: "usec"}.get(code, "sec")
    tr = step * _SECONDS[unit]
    if unit == "sec" and tr > LONGEST_TR:
        log.warning("%s: a repetition time of %g s cannot be; read as milliseconds.", path, step)
        tr *= 1e-3
    if not np.isfinite(tr) or tr <= 0:
        raise HeaderError(f"{path}: its header gives no repetition time (found {step:g}); pass it with --source-tr.")
    if not SHORTEST_TR <= tr <= LONGEST_TR:
        raise HeaderError(
            f"{path}: its header gives an impossible repetition time ({step:g} {unit}); pass it with --source-tr."
        )
    # Headers keep float32: 1.16 arrives as 1.159999967.
    return round(tr, 6)


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__
