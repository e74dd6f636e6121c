"""Write checkpoints that are either whole or absent; `boldforge.pretrain.run_folder` finds them again.

A checkpoint is written under a temporary name, listed with sizes and hashes, flushed to disk and only then renamed.
A kill at any moment leaves the last committed checkpoint as it was; a damaged one is noticed and passed over. What it
holds belongs to no number of ranks and to no ZeRO stage, see `boldforge.pretrain.training_state`.
"""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import deepspeed
import torch.distributed as dist
from safetensors import SafetensorError

from boldforge.configs.durable import sync_folder, write_atomic
from boldforge.pretrain.run_folder import LISTING, CheckpointError, file_hash
from boldforge.pretrain.training_state import write_state


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
        write_atomic(partial / LISTING, json.dumps(listing, indent=1).encode())
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


def _line(error: BaseException) -> str:
    return " ".join(str(error).split()[:30])


def _hash_and_flush(path: Path) -> tuple[int, str]:
    with path.open("rb") as stream:
        os.fsync(stream.fileno())
    return path.stat().st_size, file_hash(path)
