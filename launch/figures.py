"""The report's figures: curves as inline SVG that takes the page's text colour, brain slices as small PNG images."""

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import matplotlib as mpl
import numpy as np
import numpy.typing as npt
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from nilearn.datasets import load_mni152_template

from boldforge.finetune.intervals import share_interval

# Mid-tones that read on white and on near-black; blue and orange stay apart for colour-blind eyes.
BLUE, ORANGE, GREY = "#3d7fc1", "#d9822b", "#8a8f98"
# The outline of what was hidden: it must show on grey anatomy and on red and blue activity.
_OUTLINE = "#0fa37f"
# Stands for the page's text colour until the SVG is written; no series uses it.
INK = "#010203"
_SLICES = 3
_ACTIVITY = mpl.colormaps["RdBu_r"]


@dataclass(frozen=True)
class Example:
    """One held-out frame, on a grid with an axis-aligned affine to RAS+ mm.

    Attributes
    ----------
    original, reconstructed
        float32 [X, Y, Z], not-a-number outside the brain.
    hidden
        bool [X, Y, Z], the voxels that the model did not see and was measured on.
    labels
        Atlas regions, int [X, Y, Z], 0 outside.
    affine
        [4, 4].
    """

    original: npt.NDArray[np.float32]
    reconstructed: npt.NDArray[np.float32]
    hidden: npt.NDArray[np.bool_]
    labels: npt.NDArray[np.int16]
    affine: npt.NDArray[np.float64]


@dataclass(frozen=True)
class SliceRow:
    """Five images of one axial slice, as data URIs, and the slice's height in mm."""

    z_mm: float
    anatomy: str
    original: str
    seen: str
    reconstructed: str
    difference: str


def loss_figure(rows: Sequence[dict[str, float]]) -> str:
    """Draw training loss, held-out error and its baseline against the step; rows as `read_metrics` gives them."""
    figure, axes = plot_axes(6.4, 3.0)
    steps = [row["step"] for row in rows]
    losses = np.array([row["loss"] for row in rows])
    axes.plot(steps, losses, color=BLUE, lw=0.8, alpha=0.35)
    axes.plot(steps, _smooth(losses), color=BLUE, lw=1.8, label="training clips (hidden voxels)")
    held = [row for row in rows if "heldout_error" in row]
    if held:
        at = [row["step"] for row in held]
        axes.plot(at, [row["heldout_error"] for row in held], "o-", color=ORANGE, ms=4, lw=1.8, label="held-out frames")
        baseline = [row["heldout_baseline"] for row in held]
        axes.plot(at, baseline, color=INK, lw=1, ls=(0, (4, 3)), label="held-out: predicting the mean frame")
    axes.set_xlabel("optimiser step")
    axes.set_ylabel("mean squared error")
    add_legend(axes)
    return inline_svg(figure, "loss")


def roc_figure(fpr: Sequence[float], tpr: Sequence[float], auc: float, n: int) -> str:
    """Draw a ROC curve with its area and the number of subjects behind it."""
    figure, axes = plot_axes(3.6, 3.4)
    axes.plot([0, 1], [0, 1], color=INK, lw=1, ls=(0, (4, 3)), label="chance")
    axes.plot(fpr, tpr, color=ORANGE, lw=2, label=f"AUC {auc:.2f}, n = {n}")
    axes.set(xlim=(-0.02, 1.02), ylim=(-0.02, 1.02), xlabel="1 − specificity", ylabel="sensitivity", aspect="equal")
    legend_below(axes)
    return inline_svg(figure, "roc")


def calibration_figure(groups: Sequence[dict[str, float]]) -> str:
    """Draw what was so against what was predicted, with Wilson's intervals; groups as ``metrics.json`` holds them."""
    figure, axes = plot_axes(3.6, 3.4)
    predicted, observed = (np.array([group[name] for group in groups]) for name in ("predicted", "observed"))
    ends = np.array([share_interval(group["observed"], int(group["n"])) for group in groups])
    # Rounding may put an end on the wrong side of its point.
    far = np.maximum([observed - ends[:, 0], ends[:, 1] - observed], 0)
    axes.plot([0, 1], [0, 1], color=INK, lw=1, ls=(0, (4, 3)), label="well calibrated")
    label = f"groups of about {round(sum(group['n'] for group in groups) / len(groups))}"
    axes.errorbar(predicted, observed, far, fmt="o-", color=ORANGE, lw=1.4, ms=5, capsize=3, label=label)
    axes.set(xlim=(-0.02, 1.02), ylim=(-0.02, 1.02), xlabel="predicted", ylabel="observed", aspect="equal")
    legend_below(axes)
    return inline_svg(figure, "calibration")


def colour_bar() -> str:
    """Return the activity colours as a CSS gradient, from −2 to +2."""
    stops = [mpl.colors.to_hex(_ACTIVITY(place)) for place in np.linspace(0, 1, 11)]
    return f"linear-gradient(90deg, {', '.join(stops)})"


def slice_rows(example: Example) -> list[SliceRow]:
    """Draw axial slices where most voxels are hidden, seen from above: the brain's left on the picture's left."""
    example = _left_to_right(example)
    brain = np.isfinite(example.original)
    limits = _limits(brain, example.affine)
    anatomy, anatomy_affine = _template()
    brightest = float(anatomy.max())
    rows = []
    for k in _heights(example.hidden & brain):
        z_mm = float(example.affine[2, 2] * k + example.affine[2, 3])
        hidden, labels = example.hidden[:, :, k], example.labels[:, :, k]
        original, reconstructed = example.original[:, :, k], example.reconstructed[:, :, k]
        difference = np.where(hidden, reconstructed - original, np.nan)
        template_k = round((z_mm - anatomy_affine[2, 3]) / anatomy_affine[2, 2])

        def activity(values: Any, outline: bool, hidden: Any = hidden) -> str:
            figure, axes = _brain_axes(limits)
            _image(axes, values, example.affine, cmap=_ACTIVITY, vmin=-2, vmax=2)
            if outline:
                _outline(axes, hidden, example.affine)
            return _png(figure)

        figure, axes = _brain_axes(limits)
        below = anatomy[:, :, template_k]
        below = np.where(below > 0.15 * brightest, below, np.nan)
        _image(axes, below, anatomy_affine, cmap="gray", vmin=0, vmax=brightest)
        _region_borders(axes, np.where(hidden, labels, 0), example.affine)
        _outline(axes, hidden, example.affine)
        for x, name in ((0.03, "L"), (0.97, "R")):
            axes.text(x, 0.5, name, color=GREY, ha="center", va="center", transform=axes.transAxes, fontsize=11)
        rows.append(
            SliceRow(
                z_mm=z_mm,
                anatomy=_png(figure),
                original=activity(original, outline=False),
                seen=activity(np.where(hidden, np.nan, original), outline=True),
                reconstructed=activity(np.where(hidden, reconstructed, original), outline=True),
                difference=activity(difference, outline=True),
            )
        )
    return rows


def plot_axes(width: float, height: float) -> tuple[Figure, Axes]:
    """Return an empty plot of a size in inches, in the page's colours."""
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasSVG(figure)
    axes = figure.add_subplot()
    style_axes(axes)
    return figure, axes


def style_axes(axes: Axes) -> None:
    """Give axes the page's colours."""
    axes.set_facecolor("none")
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set(color=INK, alpha=0.4)
    axes.tick_params(colors=INK, labelsize=9, width=0.6)
    axes.xaxis.label.set(color=INK, size=10)
    axes.yaxis.label.set(color=INK, size=10)
    axes.grid(True, color=INK, alpha=0.08, lw=0.8)


def add_legend(axes: Axes, loc: Literal["best", "lower right"] = "best") -> None:
    """Add a plain legend."""
    axes.legend(frameon=False, fontsize=9, labelcolor=INK, loc=loc)


def legend_below(axes: Axes) -> None:
    """Add a plain legend below a plot whose lines reach everywhere."""
    axes.legend(frameon=False, fontsize=9, labelcolor=INK, loc="upper center", bbox_to_anchor=(0.5, -0.17), ncols=2)


def inline_svg(figure: Figure, name: str) -> str:
    """Write a figure as an inline SVG element: page font, page colour, no ids that another figure could share."""
    stream = io.StringIO()
    nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": name, "font.family": "sans-serif"}):
        figure.savefig(stream, format="svg", transparent=True, metadata=nothing)
    text = stream.getvalue()
    return text[text.index("<svg") :].replace(INK, "currentColor")


def inline(svg: str) -> Markup:
    """Let a figure of this module stand in a page as it is: drawn from numbers, its texts escaped by matplotlib."""
    return Markup(svg)  # noqa: S704


def _smooth(values: npt.NDArray[np.floating[Any]]) -> npt.NDArray[np.floating[Any]]:
    """Average over a centred tenth of the steps, with fewer at the ends."""
    half = max(1, len(values) // 20)
    return np.array([values[max(0, i - half) : i + half + 1].mean() for i in range(len(values))])


def _left_to_right(example: Example) -> Example:
    """Flip axes that run to the left, to the back or down."""
    flips = tuple(axis for axis in (0, 1, 2) if example.affine[axis, axis] < 0)
    affine = example.affine.copy()
    for axis in flips:
        affine[axis, 3] += affine[axis, axis] * (example.original.shape[axis] - 1)
        affine[axis, axis] *= -1
    return Example(
        original=np.flip(example.original, flips),
        reconstructed=np.flip(example.reconstructed, flips),
        hidden=np.flip(example.hidden, flips),
        labels=np.flip(example.labels, flips),
        affine=affine,
    )


def _heights(hidden: npt.NDArray[np.bool_]) -> list[int]:
    """Pick slices at equal shares of the hidden voxels, from the top down."""
    share = np.cumsum(hidden.sum(axis=(0, 1)))
    if share[-1] == 0:
        return [hidden.shape[2] // 2]
    wanted = (np.arange(_SLICES) + 0.7) / (_SLICES + 0.4) * share[-1]
    return sorted({int(np.searchsorted(share, place)) for place in wanted}, reverse=True)


def _limits(brain: npt.NDArray[np.bool_], affine: npt.NDArray[np.float64]) -> tuple[float, float, float, float]:
    """Bounding box of the brain in mm with a margin: x from, x to, y from, y to."""
    box = []
    for axis in (0, 1):
        places = np.flatnonzero(brain.any(axis=tuple({0, 1, 2} - {axis})))
        box += [affine[axis, axis] * place + affine[axis, 3] for place in (places[0] - 3, places[-1] + 3)]
    return box[0], box[1], box[2], box[3]


def _template() -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float64]]:
    image = load_mni152_template(resolution=2)
    return np.asarray(image.get_fdata(dtype=np.float32)), image.affine


def _brain_axes(limits: tuple[float, float, float, float]) -> tuple[Figure, Axes]:
    width, height = limits[1] - limits[0], limits[3] - limits[2]
    figure = Figure(figsize=(2.0, 2.0 * height / width), dpi=150)
    FigureCanvasAgg(figure)
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set_axis_off()
    axes.set(xlim=limits[:2], ylim=limits[2:])
    return figure, axes


def _extent(shape: tuple[int, ...], affine: npt.NDArray[np.float64]) -> tuple[float, float, float, float]:
    edges = [(affine[a, a] * (end - 0.5) + affine[a, 3]) for a in (0, 1) for end in (0, shape[a])]
    return edges[0], edges[1], edges[2], edges[3]


def _image(axes: Axes, values_XY: npt.NDArray[np.floating[Any]], affine: npt.NDArray[np.float64], **style: Any) -> None:
    limits = (axes.get_xlim(), axes.get_ylim())
    axes.imshow(values_XY.T, origin="lower", extent=_extent(values_XY.shape, affine), interpolation="nearest", **style)
    axes.set(xlim=limits[0], ylim=limits[1], aspect="auto")


def _centres(shape: tuple[int, ...], affine: npt.NDArray[np.float64]) -> tuple[Any, Any]:
    x, y = (affine[a, a] * np.arange(shape[a]) + affine[a, 3] for a in (0, 1))
    return x, y


def _outline(axes: Axes, hidden_XY: npt.NDArray[np.bool_], affine: npt.NDArray[np.float64]) -> None:
    if hidden_XY.any():
        x, y = _centres(hidden_XY.shape, affine)
        axes.contour(x, y, hidden_XY.T.astype(float), levels=[0.5], colors=[_OUTLINE], linewidths=1.5)


def _region_borders(axes: Axes, labels_XY: npt.NDArray[np.integer[Any]], affine: npt.NDArray[np.float64]) -> None:
    x, y = _centres(labels_XY.shape, affine)
    for label in np.unique(labels_XY[labels_XY > 0]):
        axes.contour(x, y, (labels_XY == label).T.astype(float), levels=[0.5], colors=[_OUTLINE], linewidths=0.4)


def _png(figure: Figure) -> str:
    stream = io.BytesIO()
    figure.savefig(stream, format="png", transparent=True, metadata={"Software": None})
    return "data:image/png;base64," + base64.b64encode(stream.getvalue()).decode()
