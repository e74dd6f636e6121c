"""Sweeps over heads on a frozen encoder, with the embedding cache and without."""

import time
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

from boldforge.configs import load_config
from boldforge.finetune import SweepConfig, rank_sweep, sweep
from boldforge.finetune.sweep_clips import SeenClips, gather_seen
from boldforge.pretrain import ModelConfig
from finetune_parts.made import write_cohort, write_encoder

# NeuroSTORM's depths and width on the 4 mm grid: what a lab runs on CPUs.
ENCODER = ModelConfig(frames=8, embed_dim=36, depths=(2, 2, 6, 2), decoder=False, backend="auto")


def measure(scratch: Path, subjects: int, clips: int, trials: tuple[int, int]) -> dict[str, float]:
    """Return trials per second ``without`` the cache, ``with`` an empty one, and ``again`` with a filled one.

    Parameters
    ----------
    scratch
        An empty folder.
    subjects, clips
        Of the cohort, and clips of each.
    trials
        How many without and how many with the cache; per trial, so that they can differ.
    """
    shards, encoder = write_cohort(scratch / "cohort", subjects, 16), write_encoder(scratch / "encoder", ENCODER)

    def rate(name: str, n: int) -> float:
        settings = {"shards": shards, "backbone": encoder, "out": scratch / name, "clips": clips, "folds": 4}
        settings |= {"ranks": [0], "sampler": "random", "trials": n, "driver": "serial", "cache": scratch / "cache"}
        settings |= {"space": {"head_lr": {"low": 1e-4, "high": 1e-1, "log": True}}, "training": {"epochs": 20}}
        settings |= {"baselines": []}  # what they take has nothing to do with the trials
        config = load_config(SweepConfig, settings)
        start = time.perf_counter()
        sweep(config)
        return n / (time.perf_counter() - start)

    # Without: each trial loads the encoder and embeds its own clips.
    def plain(*arguments: object) -> SeenClips:
        study, seen, _, *others = arguments
        return replace(gather_seen(study, seen, (False, True), *others), embedded=None)  # type: ignore[arg-type]

    with patch.object(rank_sweep, "gather_seen", plain):
        without = rate("without", trials[0])
    return {"without": without, "with": rate("with", trials[1]), "again": rate("again", trials[1])}
