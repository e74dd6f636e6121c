"""What pages show of an attribution: verdict, glass brain and first regions of each method."""

import base64
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from boldforge.finetune import same_model

TITLES = {"integrated-gradients": "Integrated gradients", "occlusion": "Occlusion"}


def shown_methods(out: Path, results: Mapping[str, Any], n_regions: int) -> list[dict[str, Any]]:
    """Return what a template draws of each method; pictures are those in the folder, inside the page.

    Parameters
    ----------
    out
        Folder of the attribution.
    results
        The content of its ``attribution.json``.
    n_regions
        Most regions to show; groups are shown all.
    """
    return [
        {
            "title": TITLES[name],
            "verdict": found["verdict"],
            "gap": found.get("gap"),
            "picture": _picture(out / f"{name}.png"),
            "regions": _with_lowest([row for row in found["table"] if row["kind"] == "region"], n_regions),
            "rest": [row for row in found["table"] if row["kind"] != "region"],
        }
        for name, found in results["methods"].items()
    ]


def _with_lowest(rows: Sequence[Mapping[str, Any]], n: int) -> list[Mapping[str, Any]]:
    """Return the first rows and, where none of them has it, that with the lowest p, of which the verdict speaks."""
    lowest = min(rows, key=lambda row: row["p"])
    first = list(rows[:n])
    return first if min(row["p"] for row in first) <= lowest["p"] else [*first, lowest]


def _picture(path: Path) -> str | None:
    """Return an image as text; None where the attribution was made in Python and never drawn."""
    return base64.b64encode(path.read_bytes()).decode() if path.is_file() else None


def read_attribution(out: Path, model: Path | None, n_regions: int) -> dict[str, Any] | None:
    """Return what a report shows of an attribution.

    Parameters
    ----------
    out
        Its folder.
    model
        The fine-tuning of which it must be; None takes any.
    n_regions
        Most regions to show.

    Returns
    -------
    dict or None
        ``results``, ``methods``, and ``stale``: whether the fine-tuning was made anew since, when there is nothing else
        to show. None if there is no attribution.
    """
    if not (out / "attribution.json").is_file():
        return None
    results = json.loads((out / "attribution.json").read_text())
    stale = model is not None and not same_model(results, model)
    return {"results": results, "methods": [] if stale else shown_methods(out, results, n_regions), "stale": stale}
