"""Checkpoints that are either whole or absent.

A checkpoint is written under a temporary name, listed with sizes and hashes, flushed to disk and only then renamed.
A kill at any moment leaves the last committed checkpoint as it was; a damaged one is noticed and passed over. What it
holds belongs to no number of ranks and to no ZeRO stage, see `boldforge.pretrain.training_state`.
"""

import json
import logging
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import deepspeed
import torch.distributed as dist
import xxhash
from safetensors import SafetensorError

from boldforge.configs import BoldForgeError
from boldforge.configs.durable import sync_folder, write_atomic
from boldforge.pretrain.training_state import write_state

logger = logging.getLogger(__name__)
_LISTING = "checkpoint.json"
_DAMAGED = "damaged"


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
        As given to `save_checkpoint`.
    world_size
        Ranks of the run that wrote it.
    """

    folder: Path
    step: int
    state: dict[str, Any]
    world_size: int


def save_checkpoint(
    engine: deepspeed.DeepSpeedEngine, folder: Path, step: int, state: dict[str, Any], keep: int
) -> None:
    """Write and commit ``folder/step-XXXXXXXX``; called by every rank.

    Parameters
    ----------
    engine
        The DeepSpeed engine.
    folder
        Where checkpoints live.
    step
        Optimiser steps done.
    state
        JSON-serialisable state of the data stream and the loop.
    keep
        Committed checkpoints to keep; older ones are removed after the commit.
    """
    partial, final = folder / f".writing-{step:08d}", folder / f"step-{step:08d}"

    def prepare() -> None:
        folder.mkdir(parents=True, exist_ok=True)
        for leftover in folder.glob(".writing-*"):
            shutil.rmtree(leftover)
        partial.mkdir()

    _on_rank_zero(prepare)
    try:
        write_state(engine, partial)
        problem = None
    except (OSError, SafetensorError) as error:
        problem = _line(error)
    problems: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(problems, problem)
    if any(problems):
        raise CheckpointError(
            f"{folder}: the checkpoint of step {step} could not be written ({next(filter(None, problems))}); free some "
            "space and run the same command again, it goes on from the last checkpoint."
        )

    def commit() -> None:
        files = {path.name: _hash_and_flush(path) for path in sorted(partial.iterdir())}
        listing = {"step": step, "world_size": dist.get_world_size(), "state": state, "files": files}
        write_atomic(partial / _LISTING, json.dumps(listing, indent=1).encode())
        if final.exists():
            shutil.rmtree(final)
        partial.rename(final)
        sync_folder(folder)
        # Later ones are damaged, or the run would have gone on from them: they must not outlive this one.
        steps = sorted(folder.glob("step-*"))
        place = steps.index(final) + 1
        for other in (*steps[: max(0, place - keep)], *steps[place:]):
            shutil.rmtree(other)

    _on_rank_zero(commit)


def newest_checkpoint(folder: Path) -> Path | None:
    """Return the newest checkpoint whose every file has the size and hash it was committed with, or None."""
    for candidate in sorted(folder.glob("step-*"), reverse=True):
        problem = _problem(candidate)
        if problem is None:
            return candidate
        logger.warning("%s is damaged (%s); going back to an older checkpoint", candidate, problem)
    return None


def find_checkpoint(folder: Path) -> Checkpoint | None:
    """Find the newest whole checkpoint; called by every rank.

    Returns
    -------
    Checkpoint or None
        None when there is nothing to continue from.

    Raises
    ------
    CheckpointError
        If every checkpoint is damaged, or this version cannot read the newest.
    """
    box: list[Any] = [None]
    if dist.get_rank() == 0:
        found = newest_checkpoint(folder)
        box = [found.name if found else _none_or_damaged(folder)]
    dist.broadcast_object_list(box, src=0)
    if box[0] is None:
        return None
    if box[0] == _DAMAGED:
        raise CheckpointError(
            f"{folder}: every checkpoint is damaged, so the run cannot go on; move the folder away to start anew."
        )
    listing = json.loads((folder / box[0] / _LISTING).read_text())
    if not any(name.endswith(".safetensors") for name in listing["files"]):
        raise CheckpointError(
            f"{folder / box[0]} was written by an older version of boldforge, in files of DeepSpeed's that belong to "
            "one number of ranks; finish the run with that version, or choose another out folder."
        )
    return Checkpoint(folder / box[0], listing["step"], listing["state"], listing["world_size"])


def _on_rank_zero(action: Callable[[], None]) -> None:
    """Run on rank 0 and make its failure everyone's, so that no rank waits for ever for one whose disk is full."""
    box: list[str | None] = [None]
    if dist.get_rank() == 0:
        try:
            action()
        except OSError as error:
            box = [f"{error.filename}: {error.strerror}; free some space or mend the permissions, then start again."]
    dist.broadcast_object_list(box, src=0)
    if box[0] is not None:
        raise CheckpointError(f"The checkpoint could not be written: {box[0]}")


def _none_or_damaged(folder: Path) -> str | None:
    return _DAMAGED if any(folder.glob("step-*")) else None


def _line(error: BaseException) -> str:
    return " ".join(str(error).split()[:30])


def _problem(folder: Path) -> str | None:
    try:
        files = json.loads((folder / _LISTING).read_text())["files"]
    except (OSError, ValueError, KeyError) as error:
        return f"{_LISTING}: {type(error).__name__}"
    for name, (size, digest) in files.items():
        path = folder / name
        if not path.is_file() or path.stat().st_size != size:
            return f"{name} is missing or has another size"
        if _hash(path) != digest:
            return f"{name} has another hash"
    return None


def _hash(path: Path) -> str:
    digest = xxhash.xxh3_128()
    with path.open("rb") as stream:
        while block := stream.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


def _hash_and_flush(path: Path) -> tuple[int, str]:
    with path.open("rb") as stream:
        os.fsync(stream.fileno())
    return path.stat().st_size, _hash(path)
