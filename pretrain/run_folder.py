"""What a run folder holds: which recipe it belongs to, the newest whole checkpoint, and whether the run is finished.

Nothing here needs a rank or writes anything, so that a dry run and a front end can ask before any rank is started.
"""

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import xxhash
import yaml

from boldforge.configs import BoldForgeError, ConfigError, load_config
from boldforge.pretrain.config import PretrainConfig
from boldforge.pretrain.datasets import split_record

logger = logging.getLogger(__name__)

LISTING = "checkpoint.json"
"""Of a checkpoint's files, with their sizes and hashes."""
# Keys that may change between the parts of one run without making it another run.
_FREE_KEYS = {"shards", "shard_cache", "out", "num_workers", "checkpoint_every", "keep_checkpoints", "evaluate_every"}
_FREE_KEYS |= {"zero_stage", "micro_batch_size", "checkpoint_activations", "model.backend"}
# Known by what the files hold, of which `atlas_hash` tells.
_ATLAS_FILES = {"mask.atlas", "mask.labels", "mask.groups"}


class CheckpointError(BoldForgeError):
    """A checkpoint cannot be continued from."""


@dataclass(frozen=True)
class Checkpoint:
    """A committed checkpoint.

    Attributes
    ----------
    folder
        ``step-XXXXXXXX``.
    step
        Optimiser steps done.
    state
        As given to `boldforge.pretrain.checkpoint.save_checkpoint`.
    world_size
        Ranks of the run that wrote it.
    """

    folder: Path
    step: int
    state: dict[str, Any]
    world_size: int


def newest_checkpoint(folder: Path) -> Path | None:
    """Return the newest checkpoint whose every file has the size and hash it was committed with, or None."""
    for candidate in sorted(folder.glob("step-*"), reverse=True):
        problem = _problem(candidate)
        if problem is None:
            return candidate
        logger.warning("%s is damaged (%s); going back to an older checkpoint", candidate, problem)
    return None


def read_newest(folder: Path) -> Checkpoint | None:
    """Read what the newest whole checkpoint says of itself; None where there is none to continue from.

    Raises
    ------
    CheckpointError
        If every checkpoint is damaged, or this version cannot read the newest.
    """
    newest = newest_checkpoint(folder)
    if newest is None:
        if any(folder.glob("step-*")):
            raise CheckpointError(
                f"{folder}: every checkpoint is damaged, so the run cannot go on; move the folder away to start anew."
            )
        return None
    listing = json.loads((newest / LISTING).read_text())
    if not any(name.endswith(".safetensors") for name in listing["files"]):
        raise CheckpointError(
            f"{newest} was written by an older version of boldforge, in files of DeepSpeed's that belong to "
            "one number of ranks; finish the run with that version, or choose another out folder."
        )
    return Checkpoint(newest, listing["step"], listing["state"], listing["world_size"])


def read_finished(folder: Path) -> dict[str, Any] | None:
    """Return the summary of a run that has written all it leaves behind; None of any other.

    Its checkpoints may all be gone. Where only the last was taken away, the run is to go on from the one before.
    """
    try:
        summary = json.loads((folder / "summary.json").read_text())
    except (OSError, ValueError):
        return None
    figures = ("heldout_error", "heldout_baseline")
    if not (isinstance(summary, dict) and all(figure in summary for figure in figures)):
        return None
    if not isinstance(summary.get("steps"), int):
        return None
    exported = (folder / "export" / name for name in ("config.json", "model.safetensors"))
    left = sorted(path.name for path in (folder / "checkpoints").glob("step-*"))
    at_its_end = not left or left[-1] == f"step-{summary['steps']:08d}"
    return summary if at_its_end and all(path.is_file() for path in exported) else None


def check_same_run(config: PretrainConfig, datasets: Mapping[str, Any]) -> None:
    """Refuse a recipe that is not the one which a run folder was begun with; what trained before must not be mixed up.

    Parameters
    ----------
    config
        The recipe; its ``out`` is the folder.
    datasets
        What `boldforge.pretrain.datasets` says of its datasets (`identity`) and its atlas (`atlas_identity`).

    Raises
    ------
    ConfigError
        Naming the first key that differs, or the record if it is damaged.
    """
    path = config.out / "config.yaml"
    if not path.is_file():
        raise ConfigError(
            f"{path}: is missing, so it cannot be told whether this is the same run; put the recipe back there, or use "
            "another out folder."
        )
    before = _as_of_today(_read_record(path))
    now = record(config, datasets)
    now |= dict.fromkeys(before.keys() - now.keys())  # weights of a mixture that is none any more
    free = _FREE_KEYS | ({"atlas_hash"} if "atlas_hash" not in before else _ATLAS_FILES)
    if changed := [change for change in changes(before, now) if change[0] not in free]:
        key, old, new = changed[0]
        raise ConfigError(
            f"{path}: this run was started with {key} = {old}, now it is {new}; use another out folder, or the old "
            "value."
        )


def check_not_foreign(out: Path) -> None:
    """Refuse a folder whose ``config.yaml`` is somebody else's: a run would replace it.

    Raises
    ------
    ConfigError
        If there is one that is no pretraining recipe.
    """
    path = out / "config.yaml"
    if path.is_file() and not {"shards", "steps", "model"} <= _read_record(path).keys():
        raise ConfigError(f"{path}: is no recipe of a pretraining run, which would replace it; choose another out.")


def record(config: PretrainConfig, datasets: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a run folder's ``config.yaml`` says: the recipe, its datasets and its atlas."""
    return {**config.model_dump(mode="json"), **datasets}


def changes(before: Mapping[str, Any], now: Mapping[str, Any], section: str = "") -> list[tuple[str, Any, Any]]:
    """List the keys whose value is another one, as (section.key, old, new)."""
    found: list[tuple[str, Any, Any]] = []
    for key, value in now.items():
        old = before.get(key)
        if isinstance(old, Mapping) and isinstance(value, Mapping):
            found += changes(old, value, f"{section}{key}.")
        elif old != value:
            found.append((f"{section}{key}", old, value))
    return found


def file_hash(path: Path) -> str:
    """Return the XXH3 hash of a file."""
    digest = xxhash.xxh3_128()
    with path.open("rb") as stream:
        while block := stream.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


def _read_record(path: Path) -> dict[str, Any]:
    try:
        content = yaml.safe_load(path.read_text())
    except (UnicodeDecodeError, yaml.YAMLError):
        content = None
    if not isinstance(content, dict):
        raise ConfigError(
            f"{path}: is damaged, so it cannot be told whether this is the same run; put the recipe back there, or use "
            "another out folder."
        )
    return content


def _as_of_today(content: dict[str, Any]) -> dict[str, Any]:
    """Fill an older run's recipe up with the defaults of keys that it did not have yet."""
    recipe, datasets = split_record(content)
    return load_config(PretrainConfig, recipe).model_dump(mode="json") | datasets


def _problem(folder: Path) -> str | None:
    try:
        listing = json.loads((folder / LISTING).read_text())
        files = [(name, int(size), digest) for name, (size, digest) in listing["files"].items()]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:  # no list of files, or none at all
        return f"{LISTING}: {type(error).__name__}"
    for name, size, digest in files:
        path = folder / name
        if not path.is_file() or path.stat().st_size != size:
            return f"{name} is missing or has another size"
        if file_hash(path) != digest:
            return f"{name} has another hash"
    return None
