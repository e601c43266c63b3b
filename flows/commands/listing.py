"""`staple list`: every experiment of the record, what it found, and whether it still holds."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

from constitutions.errors import UserError
from constitutions.terminal import console
from flows.commands.tables import next_commands, table
from flows.experiment import open_experiment, recorded_names, recorded_settings
from flows.methods import method_of
from flows.publish import iteration_metrics
from flows.schema import ExperimentSettings
from flows.settings import about, presets
from flows.states import State, stage_states
from tasks.record.record import Attempt
from tasks.record.work import Metrics
from tasks.report.headline import Headline

Place = tuple[str, int]
"""(stage, iteration)"""


@dataclass(frozen=True)
class Overview:
    """An experiment in one line. Where its states cannot be checked, `problem` says why."""

    settings: ExperimentSettings
    states: Mapping[Place, State]
    problem: str = ""

    @cached_property
    def history(self) -> dict[int, Metrics]:
        """Iteration → its figures."""
        attempts: dict[int, dict[str, Attempt]] = {}
        for (stage, t), state in self.states.items():
            if state.attempt:
                attempts.setdefault(t, {})[stage] = state.attempt
        return {t: iteration_metrics(found) for t, found in attempts.items()}

    @cached_property
    def headline(self) -> Headline | None:
        """What it found."""
        return method_of(self.settings).found(self.settings, self.history)

    @property
    def last(self) -> int | None:
        """The last iteration that was trained, or 0 once that was evaluated."""
        done = [t for (s, t), state in self.states.items() if state.attempt and s == "evaluate"]
        return max(done, default=None)

    @property
    def standing(self) -> str:
        """ "finished"; else how many stages are not, by their state: "2 stale, 1 missing"."""
        if self.problem:
            return "not checked"
        counts = Counter(state.standing for state in self.states.values())
        others = {name: count for name, count in counts.items() if name != "finished"}
        return ", ".join(f"{count} {name}" for name, count in others.items()) or "finished"

    @property
    def outdated(self) -> str:
        """A sentence where not every stage is as the settings ask for; else ""."""
        return "" if self.standing == "finished" else f"Not all of it is current: {self.standing}."

    def facts(self) -> dict[str, object]:
        """The same for a program."""
        return {
            "experiment": self.settings.experiment,
            "method": self.settings.method,
            "model": self.settings.policy.model,
            "iterations": self.settings.iterations,
            "last_iteration": self.last,
            "headline": self.headline and self.headline.facts(),
            "standing": self.standing,
            "problem": self.problem,
        }


def overview(settings: ExperimentSettings) -> Overview:
    """What an experiment found, and how its stages stand."""
    try:
        return Overview(settings, stage_states(settings))
    except UserError as error:  # its base model is gone, say
        opened = open_experiment(settings)
        found = {
            (stage, t): State("finished", attempt)
            for t in range(settings.last + 1)
            for stage, attempt in opened.current(t).items()
        }
        return Overview(settings, found, str(error))


def experiments() -> list[Overview]:
    """Every experiment of the record, the newest last; damaged settings are an error."""
    return [overview(recorded_settings(name)) for name in recorded_names()]


def show_choices() -> None:
    """Print what `staple run` can run: the presets, and the recorded experiments."""
    console.print("Presets:")
    next_commands(*((f"staple run {name}", about(name)) for name in presets()))
    if names := recorded_names():
        console.print("\nRecorded experiments, continued where they are stale or not finished:")
        next_commands(*((f"staple run {name} --resume", "") for name in names))


def show_experiments(found: list[Overview]) -> None:
    """Print a line for each."""
    if not found:
        console.print("No experiment is recorded here.\n\nNext:")
        next_commands(("staple run planted", "a small one, on this machine, without a network"))
        return
    rows = [
        [
            one.settings.experiment,
            f"{'–' if one.last is None else one.last} of {one.settings.last}",
            str(one.headline.rate) if one.headline else "–",
            one.headline.judge if one.headline else "–",
            one.standing,
        ]
        for one in found
    ]
    columns = ("experiment", "iteration", "win rate", "judge", "stages")
    title = "experiments; win rates against the initial policy, 95 % intervals"
    console.print(table(title, columns, rows, texts=(0, 3, 4)))
    for one in found:
        if one.problem:
            console.print(f"{one.settings.experiment} is not checked: {one.problem}")
