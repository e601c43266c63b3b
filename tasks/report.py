"""Pictures of an experiment, drawn from the figures that `evaluate` recorded for each iteration.

Drawn with matplotlib's own objects, without `pyplot`'s global state, so that worker threads may
draw at the same time. The colours are Okabe and Ito's, which any colour vision tells apart; the
markers differ too.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

History = Mapping[int, Mapping[str, float]]
"""Iteration → its metrics, under the names that `tasks.evaluate` gives them."""


class _Curve(NamedTuple):
    metric: str
    label: str
    colour: str
    marker: str
    line: str = "-"


_BLUE, _ORANGE, _GREEN, _INK, _FAINT = "#0072B2", "#D55E00", "#009E73", "#333333", "#e3e3e3"

_WIN_RATES = (
    _Curve("win_rate/refined_vs_0", "refined, against iteration 0 refined", _BLUE, "o"),
    _Curve("win_rate/refined_vs_initial_0", "refined, against iteration 0 plain", _ORANGE, "s"),
    _Curve("win_rate/initial_vs_0", "plain, against iteration 0 plain", _GREEN, "^", "--"),
)
_SHARES = (
    _Curve("refinement_rate", "refinement rate", _BLUE, "o"),
    _Curve("discovery_rate", "discovery rate", _ORANGE, "s"),
)


def win_rate_figure(history: History, title: str = "Win rate on held-out prompts") -> Figure:
    """Win rates against iteration 0 by iteration, with 95 % intervals and the line of parity.

    A curve is drawn where `history` has its metric; intervals from `<metric>_low` and `_high`.
    """
    figure = _figure(width=6.4)
    axes = figure.subplots()
    axes.axhline(0.5, color=_INK, linewidth=1, linestyle=(0, (1, 2)), zorder=1)
    axes.text(1.01, 0.5, "parity", transform=axes.get_yaxis_transform(), va="center", color=_INK)
    drawn = [curve for curve in _WIN_RATES if any(curve.metric in m for m in history.values())]
    for number, curve in enumerate(drawn):
        _curve(axes, history, curve, nudge=0.05 * (number - (len(drawn) - 1) / 2))
    _share_axis(axes)
    _dress(axes, history, title, "win rate")
    _legend(axes)
    return figure


def constitution_figure(history: History, title: str = "What was mined") -> Figure:
    """Refinement and discovery rates beside the constitution's size, by iteration."""
    figure = _figure(width=9)
    rates, sizes = figure.subplots(1, 2)
    for curve in _SHARES:
        _curve(rates, history, curve)
    _share_axis(rates)
    size = {i: m["constitution_size"] for i, m in history.items() if "constitution_size" in m}
    bars = sizes.bar(list(size), list(size.values()), width=0.55, color=_BLUE, zorder=2)
    sizes.bar_label(bars, fmt="%d", padding=2, color=_INK)
    sizes.set_ylim(0, 1.15 * max(size.values(), default=1))
    _dress(rates, size, title, "share")
    _dress(sizes, size, "The constitution", "principles")
    _legend(rates)
    return figure


def _figure(width: float) -> Figure:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, 4), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _curve(axes: Axes, history: History, curve: _Curve, nudge: float = 0.0) -> None:
    """One metric over the iterations; `nudge` moves it sideways, so that intervals stay apart."""
    points = [(i, m[curve.metric], m) for i, m in sorted(history.items()) if curve.metric in m]
    style: dict[str, Any] = {"color": curve.colour, "marker": curve.marker, "linestyle": curve.line}
    low, high = f"{curve.metric}_low", f"{curve.metric}_high"
    known = any(low in m for _, _, m in points)
    below = [max(0.0, y - m.get(low, y)) for _, y, m in points]
    above = [max(0.0, m.get(high, y) - y) for _, y, m in points]
    axes.errorbar(
        [i + nudge for i, _, _ in points],
        [y for _, y, _ in points],
        yerr=[below, above] if known else None,
        label=curve.label,
        linewidth=1.8,
        elinewidth=1.2,
        capsize=2.5,
        markersize=5.5,
        zorder=3,
        **style,
    )


def _share_axis(axes: Axes) -> None:
    from matplotlib.ticker import PercentFormatter

    axes.set_ylim(-0.02, 1.02)
    axes.set_yticks([0, 0.25, 0.5, 0.75, 1])
    axes.yaxis.set_major_formatter(PercentFormatter(xmax=1))


def _dress(axes: Axes, iterations: Iterable[int], title: str, measure: str) -> None:
    axes.set_title(title, loc="left", fontweight="bold", color=_INK, pad=10)
    axes.set_xlabel("iteration")
    axes.set_ylabel(measure)
    ticks = sorted(iterations)
    axes.set_xticks(ticks)
    axes.set_xlim(min(ticks, default=0) - 0.5, max(ticks, default=0) + 0.5)
    axes.grid(axis="y", color=_FAINT, linewidth=0.8, zorder=0)
    axes.set_axisbelow(True)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(length=0, colors=_INK)


def _legend(axes: Axes) -> None:
    if axes.get_legend_handles_labels()[0]:
        axes.legend(loc="upper left", bbox_to_anchor=(0, -0.16), ncols=2, frameon=False)
