"""The pictures hold the numbers that they were given."""

from __future__ import annotations

import io
import math
from typing import Any

import pytest
from matplotlib.figure import Figure

from tasks.report.figures import MOST_TICKS, History, figures, stage_tokens, svg

HISTORY = {
    0: {"win_rate/refined_vs_initial_0": 0.4},
    1: {
        "win_rate/refined_vs_0": 0.6,
        "win_rate/refined_vs_0_low": 0.5,
        "win_rate/refined_vs_0_high": 0.65,
        "win_rate/refined_vs_initial_0": 0.7,
        "refinement_rate": 0.3,
        "discovery_rate": 1.0,
        "constitution_size": 21.0,
    },
    2: {
        "win_rate/refined_vs_0": 0.8,
        "win_rate/refined_vs_0_low": 0.7,
        "win_rate/refined_vs_0_high": 0.9,
        "refinement_rate": 0.5,
        "discovery_rate": 0.2,
        "constitution_size": 17.0,
    },
}


def curves(figure: Figure) -> dict[str, list[float]]:
    """Label → the y values of every curve of the figure's first panel."""
    drawn: Any = figure.axes[0].get_legend_handles_labels()
    handles, labels = drawn
    return {
        label: [float(y) for y in handle.lines[0].get_ydata()]
        for label, handle in zip(labels, handles, strict=True)
    }


def test_win_rates_are_drawn_with_their_intervals_and_only_where_known() -> None:
    figure = figures(HISTORY)["win_rate"]
    assert curves(figure) == {
        "refined vs iteration 0's refined": [0.6, 0.8],
        "refined vs iteration 0's first": [0.7],
    }
    containers: list[Any] = figure.axes[0].containers
    (bars,) = (c for c in containers if "0's refined" in c.get_label())
    spans = [[float(y) for _, y in segment] for segment in bars.lines[2][0].get_segments()]
    assert spans == [pytest.approx([0.5, 0.65]), pytest.approx([0.7, 0.9])]
    assert list(figure.axes[0].get_xticks()) == [1, 2], "iteration 0 is what is compared with"


def test_the_constitution_is_drawn_from_the_first_iteration_on() -> None:
    drawn = figures(HISTORY)
    assert curves(drawn["mined"]) == {"refinement rate": [0.3, 0.5], "discovery rate": [1.0, 0.2]}
    (axes,) = drawn["constitution"].axes
    bars: list[Any] = list(axes.patches)
    assert [bar.get_height() for bar in bars] == [21, 17]
    assert [text.get_text() for text in axes.texts] == ["21", "17"]


@pytest.mark.parametrize("last", [1, 3, 100])
def test_axes_count_in_whole_numbers(last: int) -> None:
    drawn = figures({t: {"constitution_size": 2.0, "seconds/mine": 1.0} for t in range(last + 1)})
    for axes in (figure.axes[0] for figure in drawn.values()):
        named = [float(t) for t in axes.get_xticks()]
        assert all(t.is_integer() for t in named) and len(named) <= MOST_TICKS + 1
    assert all(float(y).is_integer() for y in drawn["constitution"].axes[0].get_yticks())


@pytest.mark.parametrize("history", [{}, {0: {}}, {1: HISTORY[1]}])
def test_little_or_nothing_can_be_drawn_too(history: dict[int, dict[str, float]]) -> None:
    for figure in figures(history).values():
        image = io.BytesIO()
        figure.savefig(image, format="png")
        assert image.getvalue().startswith(b"\x89PNG")


def test_a_method_without_principles_has_its_rates_alone() -> None:
    rates = {1: {"refinement_rate": 0.3}, 2: {"refinement_rate": 0.5}}
    drawn = figures(rates)
    assert "constitution" not in drawn
    figure = drawn["mined"]
    assert curves(figure) == {"refinement rate": [0.3, 0.5]}
    assert list(figure.axes[0].get_xticks()) == [1, 2]


def test_the_previous_policy_is_met_too() -> None:
    history = {t: {"win_rate/refined_vs_previous": t / 4} for t in (1, 2)}
    assert curves(figures(history)["previous"]) == {"refined vs previous refined": [0.25, 0.5]}


COSTS = {
    0: {"seconds/evaluate": 2.0, "prompts": 50.0, "answers/tokens": 20.5},
    1: {
        "seconds/mine": 6.0,
        "seconds/train": 7.0,
        "seconds/filter": 0.01,
        "generated_tokens": 9000.0,
        "train/tokens": 4000.0,
        "prompts": 400.0,  # mined ones: the answers are to the 50 that are held out
        "answers/tokens": 30.0,
    },
}


def test_costs_are_stacked_by_stage() -> None:
    assert stage_tokens(COSTS) == {
        0: {"evaluate": 1025},
        1: {"mine": 9000, "train": 4000, "evaluate": 1500},
    }
    drawn = figures(COSTS)
    (seconds,), (tokens,) = drawn["seconds"].axes, drawn["tokens"].axes
    top = {round(float(bar.get_x() + 0.275)): 0.0 for bar in seconds.patches}  # type: ignore[attr-defined]
    for bar in seconds.patches:
        at = round(float(bar.get_x() + 0.275))  # type: ignore[attr-defined]
        top[at] = max(top[at], float(bar.get_y() + bar.get_height()))  # type: ignore[attr-defined]
    assert top == {0: 2.0, 1: pytest.approx(13.01)}
    named = {text.get_text() for text in seconds.get_legend().get_texts()}  # type: ignore[union-attr]
    assert named == {"mine", "train", "evaluate"}, "what cannot be seen is not named"
    assert {t.get_text() for t in tokens.get_legend().get_texts()} == named  # type: ignore[union-attr]


def test_the_same_figure_has_the_same_bytes() -> None:
    image, again = (svg(figures(HISTORY)["win_rate"]) for _ in range(2))
    assert image == again
    assert b"<svg" in image and b"background" not in image


SAMI = {
    0: {"mi/per_token": 0.1, "mi/per_token_error": 0.02, "answers/plain_characters": 40.0},
    1: {
        "prompts": 30.0,
        "sampled_responses": 120.0,
        "generated_tokens": 900.0,
        "train/tokens": 5000.0,
        "mi/per_token": 0.4,
        "mi/per_token_error": 0.05,
        "win_rate/principles_vs_0": 0.8,
        "win_rate/principles_vs_0_low": 0.7,
        "win_rate/principles_vs_0_high": 0.9,
        "win_rate/held_out_vs_0": 0.6,
        "answers/plain_characters": 50.0,
        "answers/principles_characters": 70.0,
    },
}


def test_sami_has_pictures_of_its_own() -> None:
    assert [*figures(SAMI, constitutional=True)] == [
        "win_rate",
        "information",
        "lengths",
        "seconds",
        "tokens",
    ]
    assert "constitution" in figures(HISTORY) and "information" not in figures(HISTORY)
    drawn = figures(SAMI, constitutional=True)
    assert curves(drawn["win_rate"]) == {
        "with principles": [0.8],
        "with held-out principles or antitheses": [0.6],
    }
    lengths = curves(drawn["lengths"])
    assert lengths == {"with principles": [70.0], "without constitution": [40.0, 50.0]}
    assert stage_tokens(SAMI)[1] == {"sample": 900.0, "train": 5000.0}


def test_information_has_its_error_and_its_limit() -> None:
    figure = figures(SAMI, constitutional=True)["information"]
    assert curves(figure) == {"estimate ± standard error": [0.1, 0.4]}
    axes: Any = figure.axes[0]
    ((_, (segments,)),) = [(c, c.lines[2]) for c in axes.containers]
    ends = [sorted(float(y) for _, y in segment) for segment in segments.get_segments()]
    assert ends == [pytest.approx([0.08, 0.12]), pytest.approx([0.35, 0.45])]
    (limit,) = [text for text in axes.texts if "log C" in text.get_text()]
    assert limit.get_position()[1] == pytest.approx(math.log(4)), "120 responses to 30 prompts"
    assert axes.get_ylim()[1] > math.log(4)
    untrained = figures({0: SAMI[0]}, constitutional=True)["information"]
    assert not untrained.axes[0].texts, "C is not known before anything was sampled"


def test_what_is_not_there_is_not_drawn() -> None:
    histories: tuple[History, ...] = ({}, {0: {}, 1: {}})
    for history in histories:
        for figure in figures(history, constitutional=True).values():
            assert svg(figure).startswith(b"<?xml")
