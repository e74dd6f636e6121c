"""The verb ``attribute``: runs an attribution, prints its regions, and draws them on a glass brain and a page."""

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

from boldforge.configs import ConfigError, load_config
from boldforge.launch.attribution_page import TITLES, shown_methods
from boldforge.launch.figure_names import show_p
from boldforge.launch.progress import progress

_SHOWN = 12
_PAGE_ROWS = 40


def attribute_and_print(model: Path, overrides: Sequence[str], console: Console) -> Path:
    """Attribute a fine-tuning or an adapter, print the first regions of each method, and return the folder.

    Raises
    ------
    BoldForgeError
        If model, shards and atlas do not fit together.
    """
    from boldforge.finetune import AttributionConfig, attribute_regions

    if any(override.startswith("model=") for override in overrides):
        raise ConfigError("model= and the folder before it both say what to attribute; give the folder alone.")
    config = load_config(AttributionConfig, {"model": model}, overrides)
    with progress("attribute", "subjects") as on_progress:
        results = attribute_regions(config, on_progress)
    out = config.out or model / "attribution"
    for method in results["methods"]:
        draw_glass_brain(out, method, results)
    (out / "attribution.html").write_text(render_attribution(out, results))
    _print(results, console)
    _say(f"Tables, maps and figures: {out}", console)
    return out


def draw_glass_brain(out: Path, method: str, results: Mapping[str, Any]) -> Path:
    """Draw a method's map of regions, ``<method>.nii.gz``, as ``<method>.png``: seen from left, front, right, above."""
    from nilearn.plotting import plot_glass_brain

    image: Any = nib.load(out / f"{method}.nii.gz")
    values = np.nan_to_num(np.asarray(image.dataobj, dtype=np.float32))
    most = float(np.abs(values).max()) or 1.0
    figure = Figure(figsize=(11, 3.4), dpi=110, facecolor="white")
    FigureCanvasAgg(figure)
    plot_glass_brain(
        nib.Nifti1Image(values, image.affine),
        display_mode="lyrz",
        colorbar=True,
        cmap="RdBu_r",
        plot_abs=False,
        symmetric_cbar=True,
        vmax=most,
        # What is hardly anything would hide the rest: the brain is transparent.
        threshold=0.1 * most,
        figure=figure,
        axes=(0.0, 0.0, 1.0, 0.86),
    )
    figure.suptitle(_caption(method, results), fontsize=10, x=0.01, ha="left")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    path = out / f"{method}.png"
    path.write_bytes(buffer.getvalue())
    return path


def render_attribution(out: Path, results: Mapping[str, Any]) -> str:
    """Render ``attribution.html``: figure, first regions and groups of each method; nothing is fetched."""
    from boldforge.launch.report import page_template

    methods = shown_methods(out, results, _PAGE_ROWS)
    return page_template("attribution.html.j2").render(results=results, methods=methods)


def _caption(method: str, results: Mapping[str, Any]) -> str:
    subjects = "simulated subjects" if results["simulated"] else "subjects"
    what = f"{results['task']}{' (' + results['target'] + ')' if results['target'] else ''}"
    return (
        f"{TITLES[method]} · {what} · {results['n_subjects']} held-out {subjects} · {results['unit']}, sum per region"
    )


def _print(results: Mapping[str, Any], console: Console) -> None:
    of = "simulated subjects" if results["simulated"] else "subjects"
    _say(f"Asked {results['asked']}: {results['n_subjects']} {of}, {results['unit']}.", console)
    separation = results["score"]
    _say(f"Whole score: {separation['separation']:+.3f} (p {show_p(separation['p'])}).", console)
    for found in results["methods"].values():
        table = Table(box=None, pad_edge=False, header_style="dim")
        for title in ("region", "attribution", "95 % interval", "p"):
            table.add_column(title, justify="left" if title == "region" else "right", overflow="fold")
        for row in [row for row in found["table"] if row["kind"] == "region"][:_SHOWN]:
            interval = "" if row["low"] is None else f"{row['low']:+.4f} to {row['high']:+.4f}"
            table.add_row(row["name"], f"{row['attribution']:+.4f}", interval, show_p(row["p"]))
        console.print(table)
        _say(found["verdict"], console)
        if found.get("gap", 0) > 0.05:
            _say(
                f"Integrated gradients miss up to {100 * found['gap']:.0f} % of a score's typical change; raise steps "
                f"({results['settings']['steps']}).",
                console,
            )


def _say(text: str, console: Console) -> None:
    console.print(text, highlight=False, markup=False, soft_wrap=True)
