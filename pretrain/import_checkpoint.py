"""Read a Lightning checkpoint of somebody else's: tensors and plain values, and nothing that could run."""

import errno
import hashlib
import pickle
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import torch
from torch import Tensor

from boldforge.configs import BoldForgeError

_DAMAGED = (RuntimeError, EOFError, ValueError, KeyError, IndexError, AttributeError, TypeError, BadZipFile, OSError)


class ImportCheckpointError(BoldForgeError):
    """A checkpoint cannot be taken over."""


@dataclass(frozen=True)
class LightningCheckpoint:
    """What a Lightning ``.ckpt`` holds of interest.

    Attributes
    ----------
    path
        The file.
    sha256
        Of the file, hex.
    weights
        ``state_dict``: every tensor under its key.
    settings
        ``hyper_parameters``.
    """

    path: Path
    sha256: str
    weights: dict[str, Tensor]
    settings: dict[str, Any]


def read_lightning(path: str | Path) -> LightningCheckpoint:
    """Read a Lightning checkpoint without unpickling anything but tensors, numbers, strings and containers of them.

    Raises
    ------
    ImportCheckpointError
        If the file is missing, is no checkpoint, holds any other object, or lacks ``state_dict`` or
        ``hyper_parameters``.
    """
    path = Path(path)
    if not path.is_file():
        raise ImportCheckpointError(f"{path}: no such file; give the .ckpt file of a Lightning checkpoint.")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch warns of every foreign pickle, and then refuses it
            content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise ImportCheckpointError(_not_plain(path)) from None
    except _DAMAGED as error:
        if isinstance(error, OSError) and error.errno != errno.EINVAL:  # torch's for an archive cut short
            raise
        reason = " ".join(str(error).split()[:20])
        raise ImportCheckpointError(
            f"{path}: is no checkpoint that torch can read, or is damaged ({reason}); fetch it again."
        ) from None
    found = type(content).__name__
    if isinstance(content, Mapping):
        keys = sorted(map(str, content))
        found = ", ".join(keys[:5]) + (f" and {len(keys) - 5} more keys" if len(keys) > 5 else "")
    for name in ("state_dict", "hyper_parameters"):
        if not isinstance(content, Mapping) or not isinstance(content.get(name), Mapping):
            raise ImportCheckpointError(
                f"{path}: has no {name!r} (found {found}); a Lightning checkpoint holds state_dict and "
                "hyper_parameters, give that file."
            )
    weights = {str(key): value for key, value in content["state_dict"].items() if isinstance(value, Tensor)}
    if len(weights) != len(content["state_dict"]) or not weights:
        raise ImportCheckpointError(f"{path}: its state_dict is empty or holds something other than tensors.")
    with path.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    return LightningCheckpoint(path, digest, weights, dict(content["hyper_parameters"]))


def _not_plain(path: Path) -> str:
    """Say which object a refused file holds, as far as it can be told without loading it."""
    try:
        names = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    except (RuntimeError, ValueError, EOFError, pickle.UnpicklingError, BadZipFile, OSError):
        names = []
    held = f"holds {', '.join(sorted(names)[:3])}" if names else "is no plain checkpoint"
    return (
        f"{path}: {held}, and loading that could run any program, so nothing of it was loaded; if you trust its "
        "author, save its state_dict and hyper_parameters alone, as tensors and plain values, and import that."
    )
