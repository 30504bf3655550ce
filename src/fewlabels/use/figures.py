"""The report's figures as SVG text that fits a light and a dark page.

Drawn by matplotlib without pyplot or a backend. Colours of the page are drawn as placeholders and replaced by CSS
variables afterwards, so that one figure follows the reader's colour scheme. Text stays text: searchable, small, in
the page's font. Names are never parsed as mathematics.

Shapes: M points of the map, K classes, P points of a curve.
"""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
import numpy.typing as npt
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap, to_hex
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from fewlabels.use.facts import short

Floats = npt.NDArray[np.floating[Any]]

# Placeholder -> CSS variable. No figure draws these colours for their own sake.
INK, MUTED, RULE, ACCENT, WARM, PAPER = "#010203", "#010204", "#010205", "#010206", "#010207", "#010208"
VARIABLES = {INK: "ink", MUTED: "muted", RULE: "rule", ACCENT: "accent", WARM: "warm", PAPER: "paper"}

# Readable on white and on near-black; the first eight are told apart by most colour-blind people (Okabe and Ito 2008,
# black and yellow replaced because one of the two pages swallows them)
CATEGORIES = (
    "#0072b2", "#e69f00", "#009e73", "#cc79a7", "#d55e00", "#56b4e9", "#8c6bb1", "#a6a61f", "#7f7f7f", "#c23b5a",
    "#3f8f8f", "#b07aa1", "#5b8c2a", "#9c755f", "#4e79a7", "#f28e2b", "#76b7b2", "#e15759", "#59a14f", "#ff9da7",
)  # fmt: skip
MOST_NAMED = 20
CURVE_POINTS = 300

STYLE: Any = {
    "svg.fonttype": "none",
    "font.family": "DejaVu Sans",
    "font.size": 10,
    "axes.labelsize": 10,
    "axes.titlesize": 11,
    "axes.titlelocation": "left",
    "axes.titlepad": 10,
    "axes.linewidth": 1.0,
    "grid.linewidth": 0.6,
    "lines.linewidth": 1.8,
    "lines.solid_capstyle": "round",
    **dict.fromkeys(("text.color", "axes.titlecolor", "legend.labelcolor"), INK),
    **dict.fromkeys(("axes.labelcolor", "xtick.labelcolor", "ytick.labelcolor"), MUTED),
    **dict.fromkeys(("axes.edgecolor", "grid.color", "xtick.color", "ytick.color"), RULE),
    **dict.fromkeys(("axes.facecolor", "figure.facecolor"), "none"),
    **dict.fromkeys(("xtick.labelsize", "ytick.labelsize"), 9),
    **dict.fromkeys(("axes.grid", "axes.axisbelow"), True),
    **dict.fromkeys(("axes.spines.top", "axes.spines.right", "legend.frameon"), False),
    **dict.fromkeys(("text.parse_math", "text.usetex"), False),
}


@matplotlib.rc_context(STYLE)
def losses(stages: Mapping[str, Mapping[str, Sequence[float]]]) -> Markup:
    """One panel a stage. stages: title -> {"step": (P,), "loss": (P,)}."""
    figure = Figure(figsize=(9.0, 2.5), layout="constrained")
    panels = figure.subplots(1, len(stages), squeeze=False)[0]
    for axes, (title, curve) in zip(panels, stages.items(), strict=True):
        steps, values = _thinned(np.asarray(curve["step"], float), np.asarray(curve["loss"], float))
        axes.plot(steps, values, color=ACCENT)
        axes.set(title=title, xlabel="step")
        _quiet_axes(axes)
    panels[0].set_ylabel("loss")
    return _svg(figure, "losses")


@matplotlib.rc_context(STYLE)
def probes(curves: Mapping[str, tuple[Sequence[float], Sequence[float]]]) -> Markup:
    """Accuracy on frozen features while pretraining. curves: name -> (steps (P,), accuracies (P,) in [0, 1])."""
    figure = Figure(figsize=(9.0, 2.6), layout="constrained")
    axes = figure.subplots()
    for (name, (steps, values)), colour in zip(curves.items(), (ACCENT, WARM, MUTED), strict=False):
        axes.plot(steps, values, color=colour, marker="o", markersize=3.5, label=name)
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    axes.set_xlabel("step of pretraining")
    axes.legend(loc="lower right", ncols=3)
    _quiet_axes(axes)
    return _svg(figure, "probes")


@matplotlib.rc_context(STYLE)
def reliability(bins: Sequence[Mapping[str, Any]]) -> Markup:
    """Confidence against accuracy, as `measure` bins them; the size of a dot is its share of the images."""
    used = [b for b in bins if b["n"]]
    total = sum(b["n"] for b in used)
    figure = Figure(figsize=(4.6, 4.3), layout="constrained")
    axes = figure.subplots()
    axes.plot([0, 1], [0, 1], color=MUTED, linewidth=1.0, linestyle=(0, (4, 4)))
    for b in used:
        colour = ACCENT if b["accuracy"] >= b["confidence"] else WARM
        axes.plot([b["confidence"]] * 2, [b["confidence"], b["accuracy"]], color=colour, linewidth=1.5, alpha=0.7)
        axes.plot(b["confidence"], b["accuracy"], marker="o", color=colour, markersize=4 + 14 * (b["n"] / total) ** 0.5)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    axes.set(xlim=(-0.03, 1.03), ylim=(-0.03, 1.03), aspect="equal")
    axes.set(xlabel="how sure it says it is", ylabel="how often it is right")
    _quiet_axes(axes)
    return _svg(figure, "reliability")


@matplotlib.rc_context(STYLE)
def feature_map(points: Floats, labels: npt.NDArray[np.integer[Any]], classes: Sequence[str]) -> Markup:
    """Images as dots coloured by class. points: (M, 2); labels: (M,), -1 = unlabeled (gray)."""
    points, labels = np.asarray(points, float), np.asarray(labels)
    figure = Figure(figsize=(7.6, 5.6), layout="constrained")
    axes = figure.subplots()
    axes.set_axis_off()
    low, high = points.min(axis=0), points.max(axis=0)
    margin = 0.04 * (high - low) + 1e-6
    axes.set_xlim(low[0] - margin[0], high[0] + margin[0])
    axes.set_ylim(low[1] - margin[1], high[1] + margin[1])
    rest = labels < 0
    axes.plot(*points[rest].T, linestyle="", marker="o", markersize=3, color=MUTED, alpha=0.35, markeredgewidth=0)
    for number in np.unique(labels[~rest]):
        here = points[labels == number]
        axes.plot(
            *here.T, linestyle="", marker="o", markersize=4.5, color=_colour(number, len(classes)), alpha=0.8,
            markeredgewidth=0,
        )  # fmt: skip
        if len(classes) <= MOST_NAMED:
            x, y = np.median(here, axis=0)
            axes.text(
                x, y, short(classes[number], 26), ha="center", va="center", fontsize=10,
                fontweight="bold",
                bbox={"facecolor": PAPER, "edgecolor": "none", "alpha": 0.78, "boxstyle": "round,pad=0.25"},
            )  # fmt: skip
    return _svg(figure, "map")


@matplotlib.rc_context(STYLE | {"axes.grid": False})
def confusion(matrix: npt.NDArray[np.integer[Any]]) -> Markup:
    """A large confusion matrix (K, K) as a picture; rows are the truth, each row scaled to its own sum."""
    counts = np.asarray(matrix, float)
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    size = len(shares)
    bins = max(1, -(-size // 400))  # no more pixels than a screen shows
    if bins > 1:
        padded = np.pad(shares, (0, -size % bins))
        shares = padded.reshape(len(padded) // bins, bins, -1, bins).max(axis=(1, 3))
    figure = Figure(figsize=(5.6, 5.2), layout="constrained")
    axes = figure.subplots()
    blues = LinearSegmentedColormap.from_list("clear_to_blue", [(0.3, 0.45, 0.95, 0.04), (0.3, 0.45, 0.95, 1.0)])
    axes.imshow(shares**0.5, cmap=blues, vmin=0, vmax=1, extent=(0, size, size, 0), interpolation="nearest")
    axes.set(xlabel="predicted class, by number", ylabel="true class, by number")
    return _svg(figure, "confusion")


def _colour(number: int, num_classes: int) -> str:
    if num_classes <= len(CATEGORIES):
        return CATEGORIES[number]
    return to_hex(matplotlib.colormaps["hsv"](number / num_classes))


def _quiet_axes(axes: Axes) -> None:
    axes.tick_params(length=0)
    axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.yaxis.set_major_locator(MaxNLocator(5))


def _thinned(steps: Floats, values: Floats) -> tuple[Floats, Floats]:
    """Means over equal stretches, at most CURVE_POINTS of them."""
    if len(steps) <= CURVE_POINTS:
        return steps, values
    cuts = np.linspace(0, len(steps), CURVE_POINTS + 1).astype(int)[:-1]
    counts = np.diff(np.append(cuts, len(steps)))
    return np.add.reduceat(steps, cuts) / counts, np.add.reduceat(values, cuts) / counts


def _svg(figure: Figure, salt: str) -> Markup:
    """The figure as an <svg> element; salt keeps its ids apart from those of other figures on the page."""
    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": salt}), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a name in a script that DejaVu lacks: the browser has the glyphs
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r"<style.*?</style>", "", text, count=1, flags=re.DOTALL)  # it would restyle the whole page
    named = re.compile(r'\b(id="|xlink:href="#|clip-path="url\(#)')
    text = re.sub(r"<[^>]+>", lambda tag: named.sub(rf"\1{salt}-", tag[0]), text)
    for placeholder, name in VARIABLES.items():
        text = text.replace(placeholder, f"var(--{name})")
    head, rest = text.split(">", 1)
    head = re.sub(r' (?:width|height)="[^"]*"', "", head)  # as wide as the page lets it be
    return Markup(f"{head}>{rest}")  # markup, since matplotlib has escaped every text in it
