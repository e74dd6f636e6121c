"""The quality page's figures: distributions, brain slices, carpet plots."""

import base64
import io
from collections.abc import Sequence
from typing import Any, NamedTuple

import matplotlib as mpl
import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

from boldforge.data_shards import Grid
from boldforge.data_shards.carpet import TISSUES, Carpet
from boldforge.launch.figures import BLUE, GREY, INK, ORANGE, inline_svg, plot_axes, style_axes

CARPET_Z = 2.0
"""Grey runs from minus this to plus this."""
_TISSUE_COLOURS = dict(zip(TISSUES, (BLUE, ORANGE, "#0fa37f", GREY), strict=True))
_ZOOM = 3  # pixels per voxel: a browser then keeps voxels square
_POINTS = 1200  # of a line: more cannot be told apart
_MOST_BINS, _FEWEST_BINS = 40, 8


class Look(NamedTuple):
    """How an image is drawn: a colour map, and the values at its ends."""

    colours: str
    limits: tuple[float, float]


class Slice(NamedTuple):
    """An axial slice, RGBA [Y, X, 4] with the front on top, and its height in mm."""

    z_mm: float
    rgba: npt.NDArray[np.uint8]


def histogram(
    values: Sequence[float], label: str, name: str, flagged: Sequence[float] = (), least: float = 1e-6
) -> str:
    """Draw how many runs have which value, the median as a dashed line, flagged runs as marks on the axis.

    Values that are not numbers are left out. The axis spans at least `least`, so that equal values look equal.
    """
    known = np.array([value for value in values if np.isfinite(value)])
    figure, axes = plot_axes(3.5, 2.2)
    low, high = float(known.min()), float(known.max())
    missing = max(least - (high - low), 0) / 2
    margin = missing + 0.03 * (high - low)  # or the lowest and the highest value lie on a bar's edge
    bins = int(np.clip(np.ceil(2 * len(known) ** (1 / 3)), _FEWEST_BINS, _MOST_BINS)) + (missing > 0)
    counts, edges = np.histogram(known, bins, (low - margin, high + margin))
    _bars(axes, counts, edges)
    axes.axvline(float(np.median(known)), color=INK, lw=1, ls=(0, (4, 3)))
    _marks(axes, flagged)
    axes.set(xlabel=label, ylabel="runs")
    return inline_svg(figure, name)


def binned(counts: npt.NDArray[np.int64], edges: npt.NDArray[np.float64], label: str, name: str, unit: str) -> str:
    """Draw counts in given bins; the last one takes all that is larger."""
    figure, axes = plot_axes(3.5, 2.2)
    _bars(axes, counts, edges)
    filled = np.flatnonzero(counts)
    last = min(int(filled[-1]) + 2, len(counts)) if len(filled) else len(counts)
    axes.set(xlabel=label, ylabel=unit, xlim=(0, edges[last]))
    return inline_svg(figure, name)


def bars(names: Sequence[str], counts: Sequence[int], label: str, name: str, unit: str = "runs") -> str:
    """Draw a bar per name."""
    figure, axes = plot_axes(3.5, 2.2)
    axes.bar(range(len(names)), counts, width=0.6, color=BLUE, alpha=0.85)
    axes.set_xticks(range(len(names)), names)
    if len(names) > 6:
        axes.tick_params(axis="x", rotation=60)
    axes.set(
        xlabel=label,
        ylabel=unit,
        xlim=(-0.5 - max(0, 3 - len(names)) / 2, len(names) - 0.5 + max(0, 3 - len(names)) / 2),
    )
    _whole_counts(axes, max(counts, default=1))
    return inline_svg(figure, name)


def slices(
    values_V: npt.NDArray[Any],
    brain: npt.NDArray[np.bool_],
    mask: npt.NDArray[np.bool_],
    grid: Grid,
    count: int,
    look: Look,
) -> list[Slice]:
    """Draw axial slices at equal distances, from the bottom up; seen from above, the brain's left on the left.

    Parameters
    ----------
    values_V
        What is drawn; nothing where it is not a number.
    brain
        bool [X, Y, Z], what the pictures are cut to and the heights are chosen by: the same for all that are compared.
    mask
        bool [X, Y, Z], the places of `values_V`.
    grid
        With an axis-aligned affine.
    """
    volume = np.full(grid.shape, np.nan)
    volume[mask] = values_V
    flips = tuple(axis for axis in (0, 1, 2) if grid.affine[axis, axis] < 0)
    heights = grid.affine[2, 2] * np.arange(grid.shape[2]) + grid.affine[2, 3]
    volume, brain = np.flip(volume, flips), np.flip(brain, flips)
    places = [np.flatnonzero(brain.any(axis=tuple({0, 1, 2} - {axis}))) for axis in (0, 1, 2)]
    x, y, z = (slice(inside[0], inside[-1] + 1) for inside in places)
    length = z.stop - z.start
    chosen = z.start + np.linspace(0.12 * length, 0.9 * length, count).round().astype(int).clip(0, length - 1)
    return [Slice(float(np.sort(heights)[k]), _coloured(volume[x, y, k], look)) for k in chosen]


def data_uri(*pictures: Slice) -> str:
    """Return slices side by side as a PNG in a data URI."""
    rgba = np.concatenate([picture.rgba for picture in pictures], axis=1)
    stream = io.BytesIO()
    mpl.image.imsave(stream, np.ascontiguousarray(rgba), format="png", metadata={"Software": ""})
    return "data:image/png;base64," + base64.b64encode(stream.getvalue()).decode()


def gradient(colours: str) -> str:
    """Return a colour map as a CSS gradient, from low to high."""
    stops = [mpl.colors.to_hex(mpl.colormaps[colours](place)) for place in np.linspace(0, 1, 11)]
    return f"linear-gradient(90deg, {', '.join(stops)})"


def carpet_figure(carpet: Carpet, dvars: npt.NDArray[np.float64], spike: float, tr: float, name: str) -> str:
    """Draw a run's DVARS above its carpet, over the same seconds; the dashed line is the height of a spike."""
    rows, columns = carpet.values.shape
    figure = Figure(figsize=(7.2, 3.0), layout="constrained")
    FigureCanvasSVG(figure)
    above, below = _carpet_axes(figure)
    seconds, heights = _thinned((1 + np.arange(len(dvars))) * tr, dvars)
    above.plot(seconds, heights, color=BLUE, lw=1)
    if np.isfinite(spike):
        above.axhline(spike, color=INK, lw=0.8, ls=(0, (4, 3)))
    highest = max(float(np.max(dvars, initial=0)), spike if np.isfinite(spike) else 0)
    above.set(ylim=(0, max(1.0, 1.08 * highest)), ylabel="DVARS")
    end = (len(dvars) + 1) * tr
    below.imshow(
        np.clip(np.round(carpet.values * 8) / 8, -CARPET_Z, CARPET_Z),  # 33 greys: what more would cost, none could see
        cmap="gray", vmin=-CARPET_Z, vmax=CARPET_Z, aspect="auto", interpolation="none",
        extent=(0, columns * carpet.frames_per_column * tr, rows, 0),
    )  # fmt: skip
    below.set(xlim=(0, end), xlabel="seconds")
    top = 0
    beside = below.get_yaxis_transform()  # across in parts of the plot's width, down in rows
    for tissue, count in carpet.tissues:
        colour = _TISSUE_COLOURS[tissue]
        below.add_patch(
            mpl.patches.Rectangle((-0.02, top), 0.012, count, color=colour, lw=0, transform=beside, clip_on=False)
        )
        below.text(-0.03, top + count / 2, tissue, ha="right", va="center", fontsize=9, color=INK, transform=beside)
        top += count
    return inline_svg(figure, name)


def _carpet_axes(figure: Figure) -> tuple[Axes, Axes]:
    places = figure.add_gridspec(2, 1, height_ratios=(1, 2.2), hspace=0.02)
    below = figure.add_subplot(places[1])
    above = figure.add_subplot(places[0], sharex=below)
    for axes in (above, below):
        style_axes(axes)
    above.tick_params(labelbottom=False)
    below.grid(False)
    below.set_yticks([])
    below.spines[["left", "bottom"]].set_visible(False)
    return above, below


def _thinned(seconds: npt.NDArray[Any], values: npt.NDArray[Any]) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
    """Keep the highest of neighbouring frames, so that no spike is lost."""
    at_once = -(-len(values) // _POINTS) if len(values) else 1
    starts = np.arange(0, len(values), at_once)
    return seconds[starts], np.maximum.reduceat(values, starts) if len(values) else values


def _bars(axes: Axes, counts: npt.NDArray[np.int64], edges: npt.NDArray[np.float64]) -> None:
    axes.bar((edges[:-1] + edges[1:]) / 2, counts, width=np.diff(edges) * 0.94, color=BLUE, alpha=0.85)
    _whole_counts(axes, int(counts.max(initial=1)))


def _whole_counts(axes: Axes, largest: int) -> None:
    axes.yaxis.set_major_locator(mpl.ticker.MaxNLocator(nbins=4, integer=True))
    axes.set_ylim(0, 1.12 * max(largest, 1))


def _marks(axes: Axes, values: Sequence[float]) -> None:
    if len(values):
        places = np.array(values)
        axes.plot(places, np.zeros(len(places)), "^", color=ORANGE, ms=7, clip_on=False, zorder=5)


def _coloured(values_XY: npt.NDArray[Any], look: Look) -> npt.NDArray[np.uint8]:
    """Return RGBA [Y, X, 4], the front on top, clear where there is no value, with a margin of one voxel."""
    low, high = look.limits
    scaled = np.clip((values_XY - low) / max(high - low, 1e-9), 0, 1)
    rgba = (255 * mpl.colormaps[look.colours](np.nan_to_num(scaled))).round().astype(np.uint8)
    rgba[~np.isfinite(values_XY)] = 0
    rgba = np.pad(rgba, ((1, 1), (1, 1), (0, 0)))
    return rgba.transpose(1, 0, 2)[::-1].repeat(_ZOOM, axis=0).repeat(_ZOOM, axis=1)
