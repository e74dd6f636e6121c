"""What a tensor must be before a kernel starts; one sentence names the argument, what was found and what was wanted."""

from __future__ import annotations

import torch
from torch import Tensor

from boldforge.kernels.index import ScanIndex

MAX_STATES = 64
MAX_TAPS = 16
# The clips are the third axis of a launch, and CUDA counts that one in 16 bits.
MAX_CLIPS = 65_535
_TYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def check_tensor(name: str, tensor: Tensor, shape: tuple[int | str, ...], like: Tensor) -> None:
    """Raise ValueError unless the tensor has this shape, a real floating type and the device of ``like``.

    A size given as a word (``"D"``) is free, but not zero.
    """
    if not isinstance(tensor, Tensor):
        raise ValueError(f"{name} must be a tensor, found {type(tensor).__name__}.")
    wanted = ", ".join(map(str, shape))
    fits = tensor.ndim == len(shape) and all(
        isinstance(size, str) or size == found for size, found in zip(shape, tensor.shape, strict=True)
    )
    if not fits:
        raise ValueError(f"{name} must have shape [{wanted}], found {list(tensor.shape)}.")
    if 0 in tensor.shape:
        raise ValueError(f"{name} must have shape [{wanted}] with no empty axis, found {list(tensor.shape)}.")
    if tensor.dtype not in _TYPES:
        raise ValueError(f"{name} must be float32, bfloat16, float16 or float64, found {tensor.dtype}.")
    if tensor.device != like.device:
        raise ValueError(f"{name} must be on {like.device} like the first argument, found {tensor.device}.")


def check_clips(name: str, tensor: Tensor, backend: str) -> None:
    """Raise ValueError if a [b, L, D] tensor on a device holds more clips than one launch of a kernel can take."""
    if len(tensor) > MAX_CLIPS and tensor.device.type != "cpu" and backend in ("auto", "triton"):
        raise ValueError(
            f"{name} must hold at most {MAX_CLIPS} clips (first axis), found {list(tensor.shape)}; split the batch, or "
            "use backend torch."
        )


def check_rows(name: str, tensor: Tensor) -> None:
    """Raise ValueError unless the rows of a [b, L, D] tensor are contiguous and evenly spaced.

    So a slice of the last axis (``chunk``, ``split`` of a projection) is accepted as it is; a transposed or expanded
    tensor would have to be copied, which the caller should see.
    """
    b, n_rows, n_columns = tensor.shape
    per_clip, per_row, per_column = tensor.stride()
    contiguous = n_columns == 1 or per_column == 1
    spaced = (n_rows == 1 or per_row >= n_columns) and (b == 1 or n_rows == 1 or per_clip == n_rows * per_row)
    if not (contiguous and spaced and (b == 1 or n_rows > 1 or per_clip >= n_columns)):
        raise ValueError(
            f"{name} must be contiguous, or a slice of the last axis of a contiguous tensor; found shape "
            f"{list(tensor.shape)} with strides {list(tensor.stride())}. Call .contiguous() on it."
        )


def check_contiguous(name: str, tensor: Tensor) -> None:
    """Raise ValueError unless the tensor is contiguous."""
    if not tensor.is_contiguous():
        raise ValueError(
            f"{name} must be contiguous; found shape {list(tensor.shape)} with strides {list(tensor.stride())}. "
            "Call .contiguous() on it."
        )


def check_states(name: str, A: Tensor) -> int:
    """Return the number of states N of [D, N] rates; raise ValueError if there are too many."""
    if A.shape[1] > MAX_STATES:
        raise ValueError(f"{name} must have 1 to {MAX_STATES} states (second axis), found {list(A.shape)}.")
    return A.shape[1]


def check_index(index: ScanIndex, name: str, tensor: Tensor) -> None:
    """Raise ValueError unless the index lists as many tokens as this [b, L, D] tensor has."""
    if not isinstance(index, ScanIndex):
        raise ValueError(f"index must be a ScanIndex (see window_index), found {type(index).__name__}.")
    if tensor.shape[1] != index.n_tokens:
        raise ValueError(
            f"index lists {index.n_tokens} tokens, so {name} must have shape [b, {index.n_tokens}, D]; "
            f"found {list(tensor.shape)}."
        )
