"""One self-contained HTML page about runs: no script, no request to anywhere, images inside."""

import csv
import json
import math
import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from jinja2 import Environment, PackageLoader, StrictUndefined, Template
from markupsafe import Markup

import boldforge
from boldforge.configs import BoldForgeError
from boldforge.data_shards import load_manifest
from boldforge.launch import figures, nested_figures, sweep_figures
from boldforge.launch.adapted_page import describe_adapted
from boldforge.launch.attribution_page import read_attribution
from boldforge.launch.figure_names import say_p, show_interval, show_number, show_p, true_minus

_MOST_EXAMPLES, _MOST_REGIONS = 2, 10
_RUN_LIKE = (
    "a pretraining run (metrics.csv), a finetuning (metrics.json), a sweep (sweep.json), an attribution "
    "(attribution.json) or a release (config.json)"
)


class ReportError(BoldForgeError):
    """A folder holds nothing that a report can show, or something damaged."""


@dataclass(frozen=True)
class Section:
    """One part of the page: which kind of block the template draws, what it draws, and from whom it comes.

    ``simulated`` is None where nothing says whether the subjects are people.
    """

    kind: str
    content: dict[str, Any]
    simulated: bool | None

    @property
    def title(self) -> str:
        """What the section is about, in words."""
        return {"sweep": "adapter sweep"}.get(self.kind, self.kind)


def write_report(folders: Sequence[str | Path], out: str | Path) -> Path:
    """Write the page.

    Parameters
    ----------
    folders
        Pretraining runs, finetunings (with their attribution, if there is one in the folder), sweeps, attributions and
        releases, in the order in which they shall appear.
    out
        The HTML file; folders above it are made.

    Raises
    ------
    ReportError
        If a folder is none of these, or a file in it is damaged.
    """
    sections = [read_section(Path(folder)) for folder in folders]
    out = Path(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(render_page(sections))
    return out


def read_section(folder: Path) -> Section:
    """Read what the report shows of one folder, telling its kind by the files in it."""
    readers: dict[str, Callable[[Path], Section]] = {
        "sweep.json": _read_sweep,
        "metrics.csv": _read_pretraining,
        "metrics.json": _read_finetuning,
        "attribution.json": _read_attribution,
        "config.json": _read_release,
    }
    for name, read in readers.items():
        if (folder / name).is_file():
            try:
                return read(folder)
            except (ValueError, KeyError, TypeError, OSError, yaml.YAMLError) as error:
                raise ReportError(
                    f"{folder}: its files cannot be shown ({type(error).__name__}: {' '.join(str(error).split())}); "
                    "were they written by another version, or is the run still going?"
                ) from error
    raise ReportError(f"{folder}: nothing here that a report can show; expected {_RUN_LIKE}.")


def render_page(sections: Sequence[Section]) -> str:
    """Render the sections as one HTML page; every text is escaped, figures are inline."""
    return page_template("report.html.j2").render(
        sections=sections,
        measured=[section for section in sections if section.kind != "release"],
        colour_bar=Markup(figures.colour_bar()),  # noqa: S704  (hex colours of our own)
        versions=_versions(),
    )


def page_template(name: str) -> Template:
    """Return a template of a page: texts escaped, unknown names an error; filters `figure`, `percent`, `value`, `p`."""
    environment = Environment(
        loader=PackageLoader("boldforge.launch"),
        undefined=StrictUndefined,
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(
        figure=show_number, percent=_show_percent, value=sweep_figures.say, p=show_p, say_p=say_p
    )
    environment.filters.update(interval=show_interval, minus=true_minus)
    return environment.get_template(name)


def _read_pretraining(folder: Path) -> Section:
    from boldforge.pretrain import read_metrics

    rows = read_metrics(folder)
    if not rows:
        raise ValueError("metrics.csv holds no step yet")
    config = yaml.safe_load((folder / "config.yaml").read_text())
    summary = _read_json(folder / "summary.json")
    export = _read_json(folder / "export" / "config.json")
    content = {
        "name": folder.resolve().name,
        "config": config,
        "hidden": describe_masks(config),
        "atlas": _atlas_name(config["mask"]),
        "summary": summary,
        "data": export.get("data", {}),
        "weights": export.get("weights_sha256", ""),
        "last": rows[-1],
        "steps_done": int(rows[-1]["step"]),
        "frames_per_second": float(np.median([row["frames_per_second"] for row in rows])),
        "loss": figures.inline(figures.loss_figure(rows)),
        "examples": _read_examples(folder / "reconstruction.npz"),
        "regions": _read_regions(folder / "regions.csv"),
    }
    return Section("pretraining", content, _is_simulated(config, summary, export.get("data", {})))


def describe_masks(config: Mapping[str, Any]) -> str:
    """Say in words what a pretraining recipe hides: how much of the brain, in what pieces, in which frames."""
    mask, model = config["mask"], config["model"]
    atlas, share = _atlas_name(mask), _show_percent(mask["ratio"])
    patches = f"patches of {model.get('patch_mm', 12.0):g} mm"
    x, y, z = model["window"][:3]
    t = min(model["window"][3], model["frames"])
    if mask["strategy"] == "atlas":
        return f"{share} of the {atlas} regions are hidden in all frames, however large they are"
    all_frames = mask.get("time", "random") == "tube"
    pieces = {
        "random": f"{patches} drawn at random" + (", in all frames" if all_frames else ", every frame by itself"),
        "tube": f"{patches} drawn at random, in all frames",
        "window": f"whole windows of {x} × {y} × {z} {patches}"
        + (", in all frames" if all_frames else f", {t} frames"),
        "region": f"whole {atlas} regions at a time, in all frames",
        "pair": f"whole {atlas} regions together with those of the other side, in all frames",
        "group": f"whole groups of {atlas} regions (lobes and the like) at a time, in all frames",
    }
    return f"{share} of the brain is hidden, {pieces[mask['strategy']]}"


def _atlas_name(mask: Mapping[str, Any]) -> str:
    """Return an atlas's name; of a file, its name without folder and endings."""
    name = Path(str(mask["atlas"])).name.removesuffix(".gz").removesuffix(".nii")
    return name.upper() if name == "aal3" else name


def _is_simulated(config: Mapping[str, Any], *written: Mapping[str, Any]) -> bool | None:
    """Return what a run wrote about its subjects; before it has, what its shards say; None if neither tells."""
    for content in written:
        if "simulated" in content:
            return bool(content["simulated"])
    shards, hashes = config["shards"], config.get("manifest_hash")
    if not isinstance(shards, str) or "://" in shards:
        return None  # a mixture, or far away: the run itself writes it when it ends
    try:
        manifest = load_manifest(shards)
    except BoldForgeError:
        return None
    # Other shards may lie in that folder by now.
    return manifest.simulated if manifest.content_hash == hashes else None


def _read_examples(path: Path) -> list[dict[str, Any]]:
    if not path.is_file():
        return []
    with np.load(path, allow_pickle=False) as arrays:
        stored = dict(arrays)
    examples = []
    for number in range(min(_MOST_EXAMPLES, len(stored["original"]))):
        original, reconstructed, hidden = (stored[name][number] for name in ("original", "reconstructed", "hidden"))
        example = figures.Example(original, reconstructed, hidden, stored["labels"], stored["affine"])
        inside = hidden & np.isfinite(original)
        correlation = np.corrcoef(original[inside], reconstructed[inside])[0, 1] if inside.sum() > 2 else math.nan
        examples.append(
            {
                "rows": figures.slice_rows(example),
                "regions": json.loads(str(stored["hidden_regions"][number])),
                "hidden_voxels": int(inside.sum()),
                "correlation": float(correlation),
            }
        )
    return examples


def _read_regions(path: Path) -> list[dict[str, Any]]:
    """Return the regions by how much better than the baseline they are reconstructed, best first."""
    if not path.is_file():
        return []
    rows = []
    with path.open(newline="") as stream:
        for row in csv.DictReader(stream):
            error, baseline = float(row["error"]), float(row["baseline"])
            gain = 1 - error / baseline if baseline else 0.0
            rows.append({"name": row["name"], "error": error, "baseline": baseline, "gain": gain})
    return sorted(rows, key=lambda row: -row["gain"])


def _read_finetuning(folder: Path) -> Section:
    results = _read_json(folder / "metrics.json")
    content = {"name": folder.resolve().name, "results": results, **describe_adapted(results)}
    content["attribution"] = read_attribution(folder / "attribution", folder, _MOST_REGIONS)
    nested = "outer_folds" in results.get("settings", {})
    content |= _draw_searches(folder, results, content) if nested else {}
    return Section("sweep" if nested else "finetuning", content, bool(results["simulated"]))


def _draw_searches(folder: Path, results: Mapping[str, Any], content: Mapping[str, Any]) -> dict[str, Any]:
    """Draw what the searches of a nested sweep tried; nothing where their folders are not at hand."""
    places = {fold["fold"]: folder / "outer" / str(fold["fold"]) / "sweep.json" for fold in results["folds"]}
    if not all(path.is_file() for path in places.values()):
        return {}
    searches = {number: _read_json(path) for number, path in places.items()}
    tried = [trial for search in searches.values() for trial in search["trials"]]
    axes = sweep_figures.searched({"settings": results["settings"], "trials": tried})
    by, called = content["selects_by"], content["compared_by"]
    return {
        "nested_rank": figures.inline(nested_figures.nested_rank_figure(searches, by, called, results)),
        "nested_parallel": figures.inline(nested_figures.nested_parallel_figure(searches, axes, by, called)),
    }


def _read_attribution(folder: Path) -> Section:
    found = read_attribution(folder, None, _MOST_REGIONS)
    assert found is not None
    return Section(
        "attribution", {"name": folder.resolve().name, "attribution": found}, bool(found["results"]["simulated"])
    )


def _read_sweep(folder: Path) -> Section:
    results = _read_json(folder / "sweep.json")
    content = {"name": folder.resolve().name, "results": results, **describe_adapted(results)}
    trials, by, called = results["trials"], content["selects_by"], content["compared_by"]
    searched = sweep_figures.searched(results)
    content["searched"] = {name: label for name, label in searched.items() if name != "rank"}
    content["rank_curve"] = figures.inline(sweep_figures.rank_figure(trials, by, called, results))
    drawn = sweep_figures.parallel_figure(trials, searched, by, called, results["best"])
    content["parallel"] = figures.inline(drawn)
    return Section("sweep", content, bool(results["simulated"]))


def _read_release(folder: Path) -> Section:
    config = _read_json(folder / "config.json")
    adapter = _read_json(folder / "adapter" / "task.json")
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    simulated = bool(config["data"].get("simulated", False) or adapter.get("figures", {}).get("simulated", False))
    content = {
        "name": folder.resolve().name,
        "config": config,
        "adapter": adapter,
        "megabytes": size / 1e6,
    }
    return Section("release", content, simulated)


def _read_json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text()) if path.is_file() else {}


def _show_percent(value: float) -> str:
    return f"{100 * value:.0f} %"


def _versions() -> dict[str, str]:
    packages = ("torch", "deepspeed", "ray", "peft", "nibabel", "nilearn", "webdataset")
    known = {"BoldForge": boldforge.__version__, "Python": platform.python_version()}
    return known | {name: metadata.version(name) for name in packages}
