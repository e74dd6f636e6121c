"""Export a checkpoint as ``config.json`` + ``model.safetensors``, and read such a folder back."""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from boldforge.configs import BoldForgeError, load_config
from boldforge.data_shards import get_grid
from boldforge.pretrain.model import NeuroStorm
from boldforge.pretrain.model_config import ModelConfig
from boldforge.pretrain.tokens import TokenGrid

FORMAT_VERSION = 1


class ExportError(BoldForgeError):
    """A folder of weights is missing something or does not hold what it says."""


@dataclass(frozen=True)
class Pretrained:
    """A loaded model.

    Attributes
    ----------
    model
        In eval mode, float32, on the CPU.
    config
        The folder's ``config.json``.
    weights_hash
        SHA-256 of ``model.safetensors``.
    """

    model: NeuroStorm
    config: dict[str, Any]
    weights_hash: str


def build_model(config: ModelConfig, mask: np.ndarray, voxel_mm: float, affine: np.ndarray | None = None) -> NeuroStorm:
    """Build an untrained model for a brain mask [X, Y, Z], voxels of `voxel_mm`; position in mm needs the affine."""
    grid = TokenGrid(mask, config.patch_size(voxel_mm), config.frames, config.n_stages, affine)
    return NeuroStorm(config, grid)


def write_export(model_state: dict[str, torch.Tensor], config: dict[str, Any], out: Path) -> Path:
    """Write ``config.json`` and ``model.safetensors``; format version and weights hash are added to `config` here."""
    out.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.contiguous() for name, tensor in model_state.items()}, out / "model.safetensors")
    content = {
        "model_type": "boldforge",
        "format_version": FORMAT_VERSION,
        "weights_sha256": _sha256(out / "model.safetensors"),
        **config,
    }
    (out / "config.json").write_text(json.dumps(content, indent=1) + "\n")
    return out


def load_pretrained(folder: str | Path) -> Pretrained:
    """Load an export or a release.

    Parameters
    ----------
    folder
        Holds ``config.json`` and ``model.safetensors``.

    Raises
    ------
    ExportError
        If a file is missing or damaged, the format is newer than this version, or a weight is missing or left over.
    """
    folder = Path(folder)
    config = _read_config(folder)
    weights = folder / "model.safetensors"
    if not weights.is_file():
        raise ExportError(f"{weights}: no such file; an export or release holds config.json and model.safetensors.")
    digest = _sha256(weights)
    if digest != config.get("weights_sha256"):
        raise ExportError(
            f"{weights}: SHA-256 is {digest[:12]}…, config.json says {str(config.get('weights_sha256'))[:12]}…; "
            "the file is damaged or was exchanged, fetch it again."
        )
    try:
        state = load_file(weights)
    except SafetensorError as error:
        raise ExportError(f"{weights}: is not a safetensors file ({error}).") from None
    try:
        shape_config = load_config(ModelConfig, config["model"])
        grid = get_grid(config["data"]["grid"])
        bits = state["brain_mask_bits"].numpy()
        mask = np.unpackbits(bits, count=int(np.prod(grid.shape))).astype(bool).reshape(grid.shape)
        model = build_model(shape_config, mask, grid.voxel_size, grid.affine)
        problem = model.load_state_dict(state, strict=False)
    except KeyError as error:
        raise ExportError(f"{folder}: {error} is missing; config.json belongs to other weights.") from None
    except (BoldForgeError, RuntimeError, ValueError) as error:
        message = " ".join(str(error).split()[:40])
        raise ExportError(f"{folder}: config.json does not fit model.safetensors ({message}).") from None
    if problem.missing_keys or problem.unexpected_keys:
        raise ExportError(
            f"{weights}: missing {problem.missing_keys or 'nothing'}, left over "
            f"{problem.unexpected_keys or 'nothing'}; config.json belongs to other weights."
        )
    return Pretrained(model=model.eval(), config=config, weights_hash=digest)


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text())
    except FileNotFoundError:
        beside = folder / "export"
        mend = str(beside) if beside.is_dir() else "a folder with config.json and model.safetensors"
        raise ExportError(f"{path}: no such file; give {mend}.") from None
    except (ValueError, UnicodeDecodeError) as error:
        raise ExportError(f"{path}: is not valid JSON ({error}).") from None
    if not isinstance(config, dict) or config.get("model_type") != "boldforge":
        raise ExportError(f"{path}: is not a BoldForge config (model_type should be 'boldforge').")
    if config.get("format_version") != FORMAT_VERSION:
        raise ExportError(
            f"{path}: format_version is {config.get('format_version')}, this version reads {FORMAT_VERSION}; "
            "update boldforge."
        )
    return config


def _sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
