"""Pictures of an experiment, drawn from the figures that its stages recorded for each iteration.

`flows.publish` keeps them in MLflow, `tasks.report.document` puts them on its page.

Drawn with matplotlib's own objects, without `pyplot`'s global state, so that worker threads may
draw at the same time. The colours are Okabe and Ito's, which people with any colour vision can
distinguish; the markers differ too.
"""

from __future__ import annotations

import io
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from tasks.stages import BLUE, GREEN, ORANGE, STAGES

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

History = Mapping[int, Mapping[str, float]]
"""Iteration → its metrics, under the names that the stages give them, and `seconds/<stage>`."""


class _Curve(NamedTuple):
    metric: str
    label: str
    colour: str
    marker: str
    line: str = "-"


_INK, _FAINT = "#333333", "#e3e3e3"
MOST_TICKS = 12
"""Iterations that an axis names; of more, every second one, or third."""
LONG_LABEL = 22
"""Letters of a label beside which a second one does not fit."""

_WIN_RATES = (
    _Curve("win_rate/refined_vs_0", "refined vs iteration 0's refined", BLUE, "o"),
    _Curve("win_rate/refined_vs_initial_0", "refined vs iteration 0's first", ORANGE, "s"),
    _Curve("win_rate/initial_vs_0", "first vs iteration 0's first", GREEN, "^", "--"),
)
_AGAINST_PREVIOUS = (
    _Curve("win_rate/refined_vs_previous", "refined vs previous refined", BLUE, "o"),
    _Curve("win_rate/initial_vs_previous", "first vs previous first", GREEN, "^", "--"),
)
_SHARES = (
    _Curve("refinement_rate", "refinement rate", BLUE, "o"),
    _Curve("discovery_rate", "discovery rate", ORANGE, "s"),
)
ARMS = {
    "principles": "with principles",
    "antitheses": "with antitheses",
    "held_out_principles": "with held-out principles",
    "held_out_antitheses": "with held-out antitheses",
    "plain": "without constitution",
}
"""The kinds of constitutions that SAMI's responses are sampled under, `tasks.sami.evaluate.ARMS`,
as labels."""
_SAME_CONSTITUTION = (
    _Curve("win_rate/principles_vs_0", ARMS["principles"], BLUE, "o"),
    _Curve("win_rate/antitheses_vs_0", ARMS["antitheses"], ORANGE, "s"),
    _Curve("win_rate/held_out_vs_0", "with held-out principles or antitheses", GREEN, "^", "--"),
)
_MARKS = (
    (BLUE, "o", "-"),
    (ORANGE, "s", "-"),
    (GREEN, "^", "--"),
    ("#CC79A7", "v", "--"),
    (_INK, "D", ":"),
)
_LENGTHS = tuple(
    _Curve(f"answers/{arm}_characters", label, *mark)
    for (arm, label), mark in zip(ARMS.items(), _MARKS, strict=True)
)
_INFORMATION = _Curve("mi/per_token", "estimate ± standard error", BLUE, "o")


def figures(history: History, *, constitutional: bool = False) -> dict[str, Figure]:
    """Every figure of an experiment by its name; each draws the metrics that `history` has.

    Iteration 0 has costs, but no win rates: the other iterations are compared with it.

    Args:
        constitutional: whether the policies answer with a constitution in the prompt (SAMI);
            otherwise they name principles themselves.
    """
    measured = {t: metrics for t, metrics in history.items() if t > 0}
    if constitutional:
        return {
            "win_rate": _rates(measured, _SAME_CONSTITUTION, "Win rate with the same constitution"),
            "information": _information(history),
            "lengths": _lengths(history),
            **_costs(history),
        }
    return {
        "win_rate": _rates(measured, _WIN_RATES, "Win rate on held-out prompts"),
        "previous": _rates(measured, _AGAINST_PREVIOUS, "Win rate against the one before"),
        "mined": _mined(measured),
        **_constitution(measured),
        **_costs(history),
    }


def _mined(history: History) -> Figure:
    """Refinement and discovery rates, by iteration."""
    figure, axes = _one_panel()
    drawn = _known(history, _SHARES)
    for curve in drawn:
        _curve(axes, history, curve)
    _share_axis(axes)
    mined = {i for i, m in history.items() if any(curve.metric in m for curve in drawn)}
    _dress(axes, mined, "What was mined", "share")
    _legend(axes)
    return figure


def _constitution(history: History) -> dict[str, Figure]:
    """The constitution's size, by iteration; nothing of a method that names no principle."""
    size = {i: m["constitution_size"] for i, m in history.items() if "constitution_size" in m}
    if not size:
        return {}
    from matplotlib.ticker import MaxNLocator

    figure, axes = _one_panel()
    bars = axes.bar(list(size), list(size.values()), width=0.55, color=BLUE, zorder=2)
    axes.bar_label(bars, fmt="%d", padding=2, color=_INK)
    axes.set_ylim(0, 1.15 * max(1, *size.values()))
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    _dress(axes, size, "The constitution", "principles")
    return {"constitution": figure}


def _information(history: History) -> Figure:
    """The estimate of I(Y; C | X) by iteration, in nats, ± its standard error.

    With its upper limit, log C, where any iteration sampled under C constitutions.
    """
    figure, axes = _one_panel()
    known = {t: {**m, **_error(m)} for t, m in history.items() if _INFORMATION.metric in m}
    if known:
        _curve(axes, known, _INFORMATION)
    if (limit := information_limit(history)) is not None:
        axes.axhline(limit, color=_INK, linewidth=1, linestyle=(0, (1, 2)), zorder=1)
        across = axes.get_yaxis_transform()
        axes.text(1.01, limit, "limit: log C", transform=across, va="center", color=_INK)
    top = max([limit or 0.0, *(m[f"{_INFORMATION.metric}_high"] for m in known.values())])
    axes.set_ylim(min([0.0, *(m[f"{_INFORMATION.metric}_low"] for m in known.values())]))
    axes.set_ylim(top=1.06 * top or 1.0)
    _dress(axes, history, "Information about the constitution", "nats")
    _legend(axes)
    return figure


def information_limit(history: History) -> float | None:
    """log C, in nats: no estimate with C constitutions a query is above it; None: not sampled."""
    sampled = [m for m in history.values() if "sampled_responses" in m and m.get("prompts")]
    most = max((round(m["sampled_responses"] / m["prompts"]) for m in sampled), default=0)
    return math.log(most) if most else None


def _error(metrics: Mapping[str, float]) -> dict[str, float]:
    """The ends of ± one standard error, as `_curve` reads an interval."""
    value, error = (metrics.get(name, 0.0) for name in ("mi/per_token", "mi/per_token_error"))
    return {"mi/per_token_low": value - error, "mi/per_token_high": value + error}


def _lengths(history: History) -> Figure:
    """Mean characters of the held-out responses under each kind of constitution."""
    figure, axes = _one_panel()
    for curve in _known(history, _LENGTHS):
        _curve(axes, history, curve)
    axes.set_ylim(bottom=0)
    _dress(axes, history, "Length of the responses", "characters")
    _legend(axes)
    return figure


def _costs(history: History) -> dict[str, Figure]:
    """Seconds and tokens by iteration, a part of the bar for each stage."""
    from matplotlib.ticker import EngFormatter

    found = {}
    spent = {"seconds": stage_seconds(history), "tokens": stage_tokens(history)}
    for measure, costs in spent.items():
        found[measure], axes = _one_panel()
        _stacks(axes, costs)
        _dress(axes, history, {"seconds": "Time", "tokens": "Tokens"}[measure], measure)
        axes.yaxis.set_major_formatter(EngFormatter(sep=""))
        _legend(axes)
    return found


def stage_seconds(history: History) -> dict[int, dict[str, float]]:
    """Iteration → stage → the seconds that it took when it was computed."""
    prefix = "seconds/"
    return {
        t: {k.removeprefix(prefix): v for k, v in m.items() if k.startswith(prefix)}
        for t, m in history.items()
    }


def stage_tokens(history: History) -> dict[int, dict[str, float]]:
    """Iteration → stage → tokens: generated (mine, sample, evaluate), or read in training (train,
    teach).

    What was generated for the held-out prompts was recorded as tokens a prompt. The tokens of a
    judge, of a principle writer and of an estimate of the information were not recorded.
    """
    held_out = history.get(0, {}).get("prompts", 0)
    found: dict[int, dict[str, float]] = {}
    for t, m in history.items():
        answered = round(held_out * m.get("answers/tokens", 0))
        made = "sample" if "sampled_responses" in m else "mine"
        counts = {made: m.get("generated_tokens")}
        counts |= {name: m.get(f"{name}/tokens") for name in ("train", "teach")}
        found[t] = {k: v for k, v in counts.items() if v is not None}
        if answered:
            found[t]["evaluate"] = answered
    return found


def svg(figure: Figure) -> bytes:
    """The figure on a transparent ground; the same bytes for the same figure."""
    import matplotlib

    image = io.BytesIO()
    with matplotlib.rc_context({"svg.hashsalt": "staple"}):
        figure.savefig(image, format="svg", transparent=True, metadata={"Date": None})
    return image.getvalue()


def _rates(history: History, curves: Sequence[_Curve], title: str) -> Figure:
    """Win rates by iteration, with 95 % intervals and the line of parity.

    A curve is drawn where `history` has its metric; intervals from `<metric>_low` and `_high`.
    """
    figure, axes = _one_panel()
    axes.axhline(0.5, color=_INK, linewidth=1, linestyle=(0, (1, 2)), zorder=1)
    axes.text(1.01, 0.5, "parity", transform=axes.get_yaxis_transform(), va="center", color=_INK)
    drawn = _known(history, curves)
    for number, curve in enumerate(drawn):
        _curve(axes, history, curve, nudge=0.05 * (number - (len(drawn) - 1) / 2))
    _share_axis(axes)
    _dress(axes, history, title, "win rate")
    _legend(axes)
    return figure


def _known(history: History, curves: Sequence[_Curve]) -> list[_Curve]:
    """The curves that have a point."""
    return [curve for curve in curves if any(curve.metric in m for m in history.values())]


def _stacks(axes: Axes, costs: Mapping[int, Mapping[str, float]]) -> None:
    """A bar an iteration; stages that took a share too small to see stay out of the legend."""
    total = max((sum(parts.values()) for parts in costs.values()), default=0)
    seen = {s for parts in costs.values() for s, cost in parts.items() if cost > total / 100}
    iterations, floor = list(costs), [0.0] * len(costs)
    for name, stage in STAGES.items():
        heights = [costs[t].get(name, 0.0) for t in iterations]
        axes.bar(
            iterations,
            heights,
            0.55,
            bottom=floor,
            label=name if name in seen else None,
            color=stage.colour,
            hatch=stage.hatch,
            edgecolor="white",
            linewidth=0.8,
            zorder=2,
        )
        floor = [a + b for a, b in zip(floor, heights, strict=True)]


def _one_panel() -> tuple[Figure, Axes]:
    """As wide as a telephone shows it without making the text small."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.2, 4), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots()


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
    axes.set_xticks(ticks[:: 1 + len(ticks) // MOST_TICKS])
    axes.set_xlim(min(ticks, default=0) - 0.5, max(ticks, default=0) + 0.5)
    axes.grid(axis="y", color=_FAINT, linewidth=0.8, zorder=0)
    axes.set_axisbelow(True)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(length=0, colors=_INK)


def _legend(axes: Axes) -> None:
    if labels := axes.get_legend_handles_labels()[1]:
        columns = 1 if max(map(len, labels)) > LONG_LABEL else 2
        axes.legend(loc="upper left", bbox_to_anchor=(0, -0.16), ncols=columns, frameon=False)
