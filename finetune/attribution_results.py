"""The files of an attribution: a table and a brain map per method, the subjects' own attributions, and what they say.

Shape suffixes: N subjects · V brain voxels · R regions, then groups of them.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from boldforge.data_shards import Manifest
from boldforge.finetune.attribution import Parts
from boldforge.finetune.attribution_null import Association, associate, slope_intervals
from boldforge.finetune.results import write_json, write_table
from boldforge.finetune.sweep_journal import checksum
from boldforge.finetune.tasks import Task
from boldforge.pretrain.region_errors import write_map, write_voxels

Method = Literal["integrated-gradients", "occlusion"]
COLUMNS = ("kind", "name", "attribution", "low", "high", "correlation", "p", "p_within_sites", "mean")
# Of one model about subjects new to it, p is what it says. Models of folds have trained on each other's test subjects:
# without an effect every seventh cohort had a region with p <= 0.05, and one in thirty with p <= 0.01 (tested).
_LEVEL, _LEVEL_OF_FOLDS = 0.05, 0.01
_OUTSIDE = "outside the atlas"


@dataclass(frozen=True, eq=False)
class Attributed:
    """What was measured: by method one row per subject and one column per part, and what stands beside it."""

    config: Any
    manifest: Manifest
    task: Task
    asked: str
    model_hash: str
    simulated: bool
    parts: Parts
    mask: npt.NDArray[np.bool_]
    called_N: list[str]
    label_N: npt.NDArray[np.float64]
    fold_N: list[int]
    site_N: list[str | None]
    rows: dict[str, npt.NDArray[np.float64]]
    score_N: npt.NDArray[np.float64]
    change_N: npt.NDArray[np.float64]
    gap_N: npt.NDArray[np.float64]
    voxels_V: npt.NDArray[np.float64]
    pool: str | None = None


def write_attribution(found: Attributed, out: Path) -> dict[str, Any]:
    """Write everything, ``attribution.json`` last.

    Returns
    -------
    dict
        The content of ``attribution.json``.
    """
    (out / "attribution.json").unlink(missing_ok=True)
    n_regions = len(found.parts.regions.ids)
    methods: dict[str, Any] = {}
    level = _LEVEL if len(set(found.fold_N)) == 1 else _LEVEL_OF_FOLDS
    for method, rows_NR in found.rows.items():
        table = _table(found, method, rows_NR)
        write_table(out / f"{method}.tsv", COLUMNS, [[_cell(row[name]) for name in COLUMNS] for row in table])
        _write_subjects(out / f"{method}-subjects.tsv", found, rows_NR)
        slopes = {row["name"]: row["attribution"] for row in table if row["kind"] == "region"}
        values = {
            label: slopes[name] for label, name in zip(found.parts.regions.ids, found.parts.regions.names, strict=True)
        }
        write_map(out / f"{method}.nii.gz", values, found.parts.regions, found.manifest.grid, found.mask)
        methods[method] = {"verdict": _verdict(method, table, n_regions, level, found.pool), "table": table}
    if "integrated-gradients" in found.rows:
        grid = found.manifest.grid
        write_voxels(out / "integrated-gradients-voxels.nii.gz", found.voxels_V, grid, found.mask)
        # Against the spread of what is shared out: one subject's own change may be near nothing.
        spread = float(np.sqrt(np.mean(found.change_N**2)))
        methods["integrated-gradients"]["gap"] = float(np.abs(found.gap_N).max()) / spread if spread > 0 else 0.0
    separation = associate(
        found.score_N[:, None], found.label_N, found.fold_N, found.config.permutations, found.config.seed
    )
    content = {
        "task": found.task.name,
        "target": found.config.target or (found.task.classes[1] if found.task.kind == "binary" else None),
        "unit": _unit(found.task),
        "asked": found.asked,
        "simulated": found.simulated,
        "n_subjects": len(found.label_N),
        "n_folds": len(set(found.fold_N)),
        "n_regions": n_regions,
        "level": level,
        "score": {"separation": float(separation.slope[0]), "p": float(separation.p[0])},
        "methods": methods,
        "model_hash": found.model_hash,
        "shards_hash": found.manifest.content_hash,
        "settings": found.config.model_dump(mode="json"),
    }
    write_json(out / "attribution.json", content)
    return content


def hash_model(model: Path) -> str:
    """Return what tells a fine-tuning, or an adapter, from one that was made in the same folder later."""
    path = model / "metrics.json"
    return checksum((path if path.is_file() else model / "task.json").read_bytes())


def same_model(results: Mapping[str, Any], model: Path) -> bool:
    """Whether an attribution (its ``attribution.json``) is of the fine-tuning or adapter that is in a folder now."""
    return results.get("model_hash") == hash_model(model)


def _table(found: Attributed, method: str, rows_NR: npt.NDArray[np.float64]) -> list[dict[str, Any]]:
    """Return regions by size of their attribution, then groups likewise, then what lies in no region."""
    kinds, names = np.array(found.parts.kinds), found.parts.names
    table = []
    for kind in ("region", "group"):
        columns = np.flatnonzero(kinds == kind)
        if len(columns):
            rows = _rows(found, kind, [names[i] for i in columns], rows_NR[:, columns])
            table += sorted(rows, key=lambda row: -abs(row["attribution"]))
    if method == "integrated-gradients":
        # Regions and the rest make up the whole, as groups, which may overlap, do not.
        outside_N = found.change_N + found.gap_N - rows_NR[:, kinds == "region"].sum(axis=1)
        table += _rows(found, "rest", [_OUTSIDE], outside_N[:, None])
    return table


def _rows(found: Attributed, kind: str, names: list[str], values_NR: npt.NDArray[np.float64]) -> list[dict[str, Any]]:
    config, label_N = found.config, found.label_N
    whole = associate(values_NR, label_N, found.fold_N, config.permutations, config.seed)
    low_R, high_R = slope_intervals(values_NR, label_N, found.fold_N, config.resamples, config.seed)
    within = _within_sites(found, values_NR)
    return [
        {
            "kind": kind,
            "name": name,
            "attribution": float(whole.slope[i]),
            "low": _finite(low_R[i]),
            "high": _finite(high_R[i]),
            "correlation": float(whole.correlation[i]),
            "p": float(whole.p[i]),
            "p_within_sites": float(within.p[i]) if within else None,
            "mean": float(values_NR[:, i].mean()),
        }
        for i, name in enumerate(names)
    ]


def _within_sites(found: Attributed, values_NR: npt.NDArray[np.float64]) -> Association | None:
    """Compare inside fold × site; None without sites, or where no label differs inside any."""
    if None in found.site_N or len(set(found.site_N)) < 2:
        return None
    strata = list(zip(found.fold_N, found.site_N, strict=True))
    within = associate(values_NR, found.label_N, strata, found.config.permutations, found.config.seed)
    return within if within.slope.any() else None


def _verdict(method: str, table: list[dict[str, Any]], n_regions: int, level: float, pool: str | None) -> str:
    regions = [row for row in table if row["kind"] == "region"]
    sure = [row["name"] for row in regions if row["p"] <= level]
    if not sure:
        return (
            f"By {method}, no region of {n_regions} goes with the label beyond chance (family-wise p, lowest "
            f"{min(row['p'] for row in regions):.3f}).{_blurred(pool)}"
        )
    shown = ", ".join(sure[:5]) + (", …" if len(sure) > 5 else "")
    sites = [row["p_within_sites"] for row in regions if row["p"] <= level]
    lost = sum(p is not None and p > level for p in sites)
    said = f"By {method}, {len(sure)} of {n_regions} regions go with the label (family-wise p ≤ {level:g}): {shown}."
    return said + (f" {lost} of them not inside sites." if lost else "") + _blurred(pool)


def _blurred(pool: str | None) -> str:
    """Say that a head which reads means and deviations over the whole brain does not look at places."""
    if pool is None or pool in ("tokens", "tokens_std"):
        return ""
    return (
        f" The model's pooling, {pool}, averages over the brain: this says what the model reads and cannot say where "
        "an effect lies; to ask where, fine-tune with pool tokens or tokens_std."
    )


def _unit(task: Task) -> str:
    return "predicted value per unit of the label" if task.kind == "regression" else "logit, difference between classes"


def _write_subjects(path: Path, found: Attributed, rows_NR: npt.NDArray[np.float64]) -> None:
    """Write one line per subject, by pseudonym: those of ``predictions.tsv`` where the subjects are the same."""
    lines = []
    for i in np.argsort(found.called_N):
        about = (found.called_N[i], found.fold_N[i], f"{found.label_N[i]:g}", f"{found.score_N[i]:.6g}")
        lines.append((*about, *(f"{value:.6g}" for value in rows_NR[i])))
    write_table(path, ("subject", "fold", "label", "score", *found.parts.names), lines)


def _cell(value: object) -> object:
    return f"{value:.6g}" if isinstance(value, float) else value


def _finite(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None
