"""Count the kills that sweeps survive; what was counted stays in a file, and a later run goes on from there."""

import json
import random
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

from finetune_parts import kills, made

_KILLS_PER_SWEEP = 10


def count(
    driver: str, scratch: Path, kinds: tuple[str, ...], n_kills: int, seed: int, log: Path | None, quick: bool = False
) -> tuple[int, int, Counter[str]]:
    """Kill sweeps until there were `n_kills` kills.

    Parameters
    ----------
    driver
        Of the sweeps: ``ray`` or ``serial``.
    scratch
        An empty folder for cohort, encoder and sweeps.
    kinds
        What is killed, see `kills.KINDS`.
    n_kills
        Kills in all, those in `log` included.
    seed
        Decides the moments.
    log
        One line of JSON per sweep that was counted. A sweep that the benchmark's own end cut short is not.
    quick
        Fewer subjects, trials and epochs.

    Returns
    -------
    tuple
        Kills after which the sweep ended as one that nobody disturbed, epochs begun again, kills by kind.
    """
    outcomes = _read(log, driver, seed)
    recipe = _recipe(driver, scratch, quick)
    wanted = None
    while (left := n_kills - sum(outcome.kills.total() for outcome in outcomes)) > 0:
        wanted = wanted or kills.undisturbed(recipe, scratch / "undisturbed")
        number = len(outcomes)
        # Its settings name the folder and are compared, so every sweep has the same.
        shutil.rmtree(scratch / "out", ignore_errors=True)
        chance = random.Random(f"{driver}{number}{seed}")
        n = min(_KILLS_PER_SWEEP, left)
        outcome = kills.sweep_under_fire(recipe, scratch / f"fire{number}", wanted, kinds, n, chance)
        for complaint in outcome.complaints:
            print(f"  {driver} sweep {number}: {complaint}", flush=True)
        again = f"{outcome.redone} epochs again, same: {outcome.same}"
        print(f"  {driver} sweep {number}: {dict(outcome.kills)}, {again}", flush=True)
        outcomes.append(outcome)
        if log is not None:
            with log.open("a") as stream:
                stream.write(json.dumps({"driver": driver, "seed": seed, **vars(outcome)}) + "\n")
    survived = sum(outcome.kills.total() for outcome in outcomes if outcome.same)
    counts = sum((outcome.kills for outcome in outcomes), Counter[str]())
    return survived, sum(outcome.redone for outcome in outcomes), counts


def _read(log: Path | None, driver: str, seed: int) -> list[kills.Outcome]:
    if log is None or not log.is_file():
        return []
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    mine = [line for line in lines if (line.pop("driver"), line.pop("seed")) == (driver, seed)]
    return [kills.Outcome(**{**line, "kills": Counter(line["kills"])}) for line in mine]


def _recipe(driver: str, scratch: Path, quick: bool) -> dict[str, Any]:
    return {
        "shards": made.write_cohort(scratch / "cohort", 16 if quick else 24, 12),
        "backbone": made.write_encoder(scratch / "encoder"),
        "clips": 1 if quick else 2,
        "folds": 3,
        "ranks": [0, 1] if quick else [0, 1, 2, 4],
        "space": {"lr": [1e-3, 1e-2]},
        "grace": 2,
        "adapter": {"first_stage": 1, "dropout": 0.1},
        "training": {"epochs": 4 if quick else 8},
        # One plain model keeps that part of a sweep in; the others cost time and add nothing that could be killed.
        "baselines": ["site"],
        "concurrency": 2,
        "driver": driver,
        "out": scratch / "out",
    }
