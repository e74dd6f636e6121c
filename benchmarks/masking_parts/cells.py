"""One cell of the comparison: an encoder pretrained by the real loop with one strategy and one seed.

What a cell found lies in one JSON file, beside the settings that it was found with: a run that was stopped goes on
where it stopped, and what was found with other settings is computed anew.
"""

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from boldforge.configs import load_config
from boldforge.pretrain import PretrainConfig

Cell = dict[str, Any]

STRATEGIES = ("random", "window", "region", "group")
RECIPE: dict[str, Any] = {
    "model": {
        "frames": 2,
        "position": "mm",
        "bidirectional": True,
        "expand": 1,
        "embed_dim": 16,
        "depths": [2, 2],
        "decoder_depths": [2],
        "window": [2, 2, 2, 4],
        "first_window": [4, 4, 4, 4],
        "last_window": [4, 4, 4, 4],
        "d_state": 4,
        "mlp_ratio": 2.0,
    },
    "loss": {"voxel": 1.0, "targets": "values"},
    "optimizer": {"lr": 4e-3, "warmup_steps": 10, "weight_decay": 0.01, "gradient_clipping": 1.0},
    "batch_size": 2,
    "zero_stage": 0,
    "precision": "fp32",
}
"""Two stages, 41 thousand parameters. Every strategy hides half of the tokens; nothing else differs between cells."""


def kept(path: Path, settings: Cell, make: Callable[[], Cell]) -> Cell:
    """Return what a file holds if it was made with these settings; else make it, and write it in one piece."""
    settings = json.loads(json.dumps(settings))
    if path.is_file():
        before: Cell = json.loads(path.read_text())
        if before["settings"] == settings:
            return before
    found = {"settings": settings, **make()}
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(found))
    partial.replace(path)
    print(f"  {path.stem}", flush=True)
    return found


def pretrain(
    shards: Path, out: Path, strategy: str, seed: int, steps: int, holdout: Cell, lr: float | None = None
) -> Path:
    """Pretrain one cell in this process; a run folder that was left half-way goes on from its checkpoint.

    Parameters
    ----------
    lr
        Learning rate, if not that of `RECIPE`.

    Returns
    -------
    Path
        The run folder; the caller removes it when it has measured the encoder.
    """
    from boldforge.pretrain.train import train  # imports DeepSpeed, which takes seconds

    logging.getLogger("boldforge").setLevel(logging.WARNING)
    recipe = {
        **RECIPE,
        "optimizer": {**RECIPE["optimizer"], **({} if lr is None else {"lr": lr})},
        "shards": str(shards),
        "out": str(out),
        "holdout": holdout,
        "mask": {"strategy": strategy, "ratio": 0.5, "atlas": "aal3"},
        "steps": steps,
        "seed": seed,
        "checkpoint_every": max(1, steps // 4),
        "evaluate_every": steps,
        "evaluation_clips": 6,
    }
    return train(load_config(PretrainConfig, recipe))


def remove(folder: Path) -> None:
    """Remove a run folder that has been measured."""
    shutil.rmtree(folder, ignore_errors=True)
