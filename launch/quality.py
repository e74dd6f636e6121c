"""The quality page of a dataset: one HTML file that makes no request to anywhere."""

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import numpy.typing as npt
from markupsafe import Markup

import boldforge
from boldforge.configs import ConfigError
from boldforge.configs.durable import write_atomic
from boldforge.data_shards import ShardReader, load_manifest
from boldforge.data_shards.carpet import draw_carpet, tissues_of
from boldforge.data_shards.manifest import REJECTED_FILE
from boldforge.data_shards.quality import (
    DVARS_EDGES,
    FLAG_Z,
    LEAST_RUNS,
    RULES,
    SPIKE,
    DatasetQuality,
    MeasureName,
    RunQuality,
    measure_quality,
    measure_run,
    run_image,
)
from boldforge.launch import quality_figures as draw
from boldforge.launch.progress import progress
from boldforge.launch.report import page_template
from boldforge.launch.sharding import count_repetition_times, files_left_out, hours_of

# What a page shows of a large dataset, so that it stays a page.
MOST_CHOSEN, MOST_FLAGGED, MOST_FLAGS, MOST_SITES, MOST_RUNS = 8, 16, 100, 40, 500
_SLICES, _RUN_SLICES = 8, 6

MEASURES = {
    "tsnr": ("tSNR", 1),
    "tsnr_db": ("storage SNR (dB)", 1),
    "dvars": ("DVARS", 3),
    "spikes": ("spikes", 3),
    "coverage": ("coverage", 3),
    "frames": ("frames", 0),
}
"""What the page calls a measure, and how many digits it gets."""


class Names:
    """What runs and sites are called on a page: as in the dataset, or by number."""

    def __init__(self, runs: Sequence[RunQuality], anonymous: bool) -> None:
        sites = sorted({run.site for run in runs if run.site is not None})
        self._sites = {site: f"site {i}" if anonymous else site for i, site in enumerate(sites, start=1)}
        self._anonymous = anonymous

    def run(self, run: RunQuality) -> str:
        """Return a run's key, or its number in the manifest, from 1."""
        return f"run {run.number + 1}" if self._anonymous else run.key

    def site(self, site: str | None) -> str:
        """Return a site's name or number; a dash where none is known."""
        return "–" if site is None else self._sites[site]


def write_quality_page(path: Path, out: Path, anonymous: bool = False) -> Path:
    """Measure a dataset under a progress bar and write its page, whole or not at all.

    Parameters
    ----------
    path
        The folder of shards.
    out
        The page; its name ends in ``.html``.
    anonymous
        Call runs and sites by number, and the dataset not at all.

    Raises
    ------
    ConfigError
        If `out` cannot be a page.
    ShardError
        If the dataset is missing or damaged.
    """
    manifest = load_manifest(path)
    _check_target(out)
    with progress(f"inspect {path}", "frames") as on_progress:
        quality = measure_quality(manifest, on_progress)
    with progress("draw", "runs") as on_progress:
        page = render_quality(quality, anonymous, on_progress)
    partial = out.with_name(f".{out.name}.partial")
    try:
        write_atomic(out, page.encode())
    finally:
        partial.unlink(missing_ok=True)
    return out


def render_quality(
    quality: DatasetQuality, anonymous: bool = False, on_progress: Callable[[int, int], None] | None = None
) -> str:
    """Render a dataset's figures as one HTML page; every text is escaped, figures are inline."""
    manifest, runs = quality.manifest, quality.runs
    names = Names(runs, anonymous)
    flagged = {flag.number for flag in quality.flags}
    return page_template("quality.html.j2").render(
        dataset=None if anonymous else manifest.folder.resolve().name,
        anonymous=anonymous,
        manifest=manifest,
        simulated=sum(run.simulated for run in runs),
        numbers=_numbers(quality, flagged),
        distributions=_distributions(quality),
        rules=_rules(),
        flag_z=FLAG_Z,
        least_runs=LEAST_RUNS,
        spike=SPIKE,
        # A measure that no run has would be a column of dashes.
        measures={
            name: about for name, about in MEASURES.items() if any(np.isfinite(getattr(run, name)) for run in runs)
        },
        flags=_flag_rows(quality, names),
        n_flagged=len(flagged),
        n_flags=len(quality.flags),
        images=_images(quality),
        sites=_site_rows(quality, names, flagged),
        n_sites=len({run.site for run in runs}),
        views=_views(quality, names, on_progress or (lambda done, total: None)),
        rows=[_run_row(run, names, flagged) for run in runs[:MOST_RUNS]],
        version=boldforge.__version__,
    )


def chosen_runs(quality: DatasetQuality) -> list[int]:
    """Return which runs are shown: the furthest flagged first, then some at equal distances through the dataset."""
    flagged = list(dict.fromkeys(flag.number for flag in quality.flags))[:MOST_FLAGGED]
    count = min(MOST_CHOSEN, len(quality.runs))
    spread = np.linspace(0, len(quality.runs) - 1, count).round().astype(int).tolist()
    return flagged + [number for number in spread if number not in flagged]


def _check_target(out: Path) -> None:
    """Refuse before hours of reading what could not be written after them."""
    if out.suffix.lower() not in (".html", ".htm"):
        raise ConfigError(f"{out}: --html writes a page; give a name that ends in .html.")
    if out.is_dir():
        raise ConfigError(f"{out}: is a folder; give --html the name of a file.")
    out.parent.mkdir(parents=True, exist_ok=True)
    if not os.access(out.parent, os.W_OK):
        raise ConfigError(f"{out.parent}: cannot be written to; choose another folder for the page.")


def _spaced(number: int) -> str:
    return f"{number:,}".replace(",", " ")


def _numbers(quality: DatasetQuality, flagged: set[int]) -> list[tuple[str, str]]:
    manifest, runs = quality.manifest, quality.runs
    sites = {run.site for run in runs} - {None}
    hours = hours_of(manifest.n_frames, manifest)
    left_out = files_left_out(manifest)
    rejected = [(_spaced(left_out), f"file{'s' * (left_out != 1)} left out, see {REJECTED_FILE}")] if left_out else []
    return [
        (_spaced(len(runs)), "runs"),
        (_spaced(len({run.subject for run in runs})), "subjects"),
        (_spaced(len(sites)) if sites else "–", "sites" if sites else "sites: none named"),
        (_spaced(manifest.n_frames), f"frames, one every {manifest.recipe.tr:g} s"),
        (f"{hours:.2f}" if hours < 100 else _spaced(round(hours)), "hours"),
        (_spaced(len(flagged)), "runs flagged"),
        *rejected,
    ]


def _distributions(quality: DatasetQuality) -> list[Markup]:
    runs = quality.runs
    figures = [_repetition_figure([run.source_tr for run in runs])]
    labels = {
        "frames": "stored frames",
        "coverage": "coverage (share of the brain's voxels)",
        "tsnr": "tSNR (median over the brain)",
        "tsnr_db": "SNR of the stored integers (dB)",
        "dvars": "DVARS (median over frames)",
        "spikes": "share of frames that are spikes",
    }
    for measure, label in labels.items():
        values = [getattr(run, measure) for run in runs]
        if not np.isfinite(values).any():
            continue
        marks = [flag.value for flag in quality.flags if flag.measure == measure]
        rule = RULES[cast(MeasureName, measure)]
        least = rule.least * abs(float(np.nanmedian(values))) if rule.relative else rule.least
        figures.append(draw.histogram(values, label, measure, marks, least))
    if quality.dvars_counts.any():
        figures.append(draw.binned(quality.dvars_counts, DVARS_EDGES, "DVARS of each frame", "frame-dvars", "frames"))
    return [Markup(figure) for figure in figures]  # noqa: S704  (drawn from numbers; texts escaped by matplotlib)


def _repetition_figure(times: Sequence[float]) -> str:
    counted = count_repetition_times(times)
    if len(counted) > 12:
        return draw.histogram(times, "TR of the source (s)", "tr")
    return draw.bars([f"{tr:g}" for tr, _ in counted], [n for _, n in counted], "TR of the source (s)", "tr")


def _rules() -> list[dict[str, str]]:
    sides = {"low": "lower", "high": "higher", "both": "lower or higher"}
    return [
        {
            "measure": MEASURES[measure][0],
            "side": sides[rule.side],
            "least": f"{100 * rule.least:g} % of the median" if rule.relative else f"{rule.least:g}",
        }
        for measure, rule in RULES.items()
    ]


def _flag_rows(quality: DatasetQuality, names: Names) -> list[dict[str, Any]]:
    rows = []
    for flag in quality.flags[:MOST_FLAGS]:
        run = quality.runs[flag.number]
        title, digits = MEASURES[flag.measure]
        rows.append(
            flag._asdict() | {"run": names.run(run), "site": names.site(run.site), "measure": title, "digits": digits}
        )
    return rows


def _look(quality: DatasetQuality) -> draw.Look:
    known = quality.image_V[np.isfinite(quality.image_V)]
    low, high = (float(np.percentile(known, share)) for share in (1, 98)) if known.size else (0.0, 1.0)
    return draw.Look("gray", (low, high)) if quality.image_kind == "mean" else draw.Look("viridis", (0.0, high))


def _brain(quality: DatasetQuality) -> npt.NDArray[np.bool_]:
    """Return where any run has signal, bool [X, Y, Z]; on the grid ``neurostorm`` the mask is the whole cube."""
    mask = quality.manifest.brain_mask()
    brain = np.zeros_like(mask)
    brain[mask] = quality.share_V > 0
    return brain if brain.any() else mask


def _images(quality: DatasetQuality) -> dict[str, Any]:
    manifest, share = quality.manifest, quality.share_V
    look, overlap = _look(quality), draw.Look("viridis", (0.0, 1.0))
    mask, brain = manifest.brain_mask(), _brain(quality)

    def row(values_V: npt.NDArray[Any], look: draw.Look) -> dict[str, Any]:
        pictures = draw.slices(values_V, brain, mask, manifest.grid, _SLICES, look)
        drawn = [(picture.z_mm, draw.data_uri(picture)) for picture in pictures]
        return {"slices": drawn, "limits": look.limits, "bar": Markup(draw.gradient(look.colours))}  # noqa: S704  (ours)

    return {
        "kind": quality.image_kind,
        "average": row(quality.image_V, look),
        "overlap": row(np.where(share > 0, share, np.nan), overlap),
        "everywhere": float((share == 1).mean()),
        "most": float((share >= 0.9).mean()),
        "nowhere": float((share == 0).mean()),
    }


def _site_rows(quality: DatasetQuality, names: Names, flagged: set[int]) -> list[dict[str, Any]]:
    by_site: dict[str | None, list[RunQuality]] = {}
    for run in quality.runs:
        by_site.setdefault(run.site, []).append(run)
    largest = sorted(by_site.items(), key=lambda item: (-len(item[1]), str(item[0])))[:MOST_SITES]
    return [
        {
            "site": names.site(site),
            "runs": len(runs),
            "subjects": len({run.subject for run in runs}),
            "hours": hours_of(sum(run.frames for run in runs), quality.manifest),
            "tr": ", ".join(f"{tr:g}" for tr, _ in count_repetition_times([run.source_tr for run in runs])),
            "flagged": sum(run.number in flagged for run in runs),
            **{measure: _median([getattr(run, measure) for run in runs]) for measure in MEASURES},
        }
        for site, runs in largest
    ]


def _median(values: Sequence[float]) -> float:
    known = [value for value in values if np.isfinite(value)]
    return float(np.median(known)) if known else float("nan")


def _run_row(run: RunQuality, names: Names, flagged: set[int]) -> Mapping[str, Any]:
    row = run._asdict()
    return row | {"name": names.run(run), "site": names.site(run.site), "flagged": run.number in flagged}


def _views(quality: DatasetQuality, names: Names, report: Callable[[int, int], None]) -> list[dict[str, Any]]:
    manifest, look = quality.manifest, _look(quality)
    mask, brain = manifest.brain_mask(), _brain(quality)
    reader = ShardReader(manifest, look=False)
    chosen, tissue_V = chosen_runs(quality), tissues_of(manifest)
    views = []
    report(0, len(chosen))
    for done, number in enumerate(chosen, start=1):
        run = quality.runs[number]
        moments = measure_run(reader, number)
        carpet = draw_carpet(reader, number, moments, tissue_V)
        image = run_image(moments, manifest.runs[number].normalisation, quality.image_kind)
        pictures = draw.slices(image, brain, mask, manifest.grid, _RUN_SLICES, look)
        drawn = draw.carpet_figure(carpet, moments.dvars, SPIKE * run.dvars, manifest.recipe.tr, f"carpet-{number}")
        views.append(
            {
                "name": names.run(run),
                "site": names.site(run.site),
                "run": run,
                "mosaic": draw.data_uri(*pictures),
                "carpet": Markup(drawn),  # noqa: S704  (drawn from numbers; texts escaped by matplotlib)
                "frames_per_column": carpet.frames_per_column,
                "flags": [flag for flag in quality.flags if flag.number == number],
            }
        )
        report(done, len(chosen))
    return views
