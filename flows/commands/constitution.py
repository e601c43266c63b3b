"""What `staple constitution show` prints."""

from __future__ import annotations

from typing import NamedTuple

from rich.text import Text

from constitutions.constitution import Constitution, Principle, covered, load, other_wordings
from constitutions.errors import UserError
from constitutions.terminal import console
from flows.commands.tables import table
from flows.experiment import newest, open_experiment, recorded_settings
from flows.methods import method_of
from flows.schema import ExperimentSettings
from flows.states import stage_states
from tasks.record.record import Attempt
from tasks.sami.draw import pool_of

PAGE = 60
"""Principles that are shown together."""


class Shown(NamedTuple):
    """A constitution, the attempt that wrote it, and which principles SAMI holds out, by id."""

    attempt: Attempt
    constitution: Constitution
    held_out: frozenset[str]
    stale: str
    """Why the record's constitution is not what a run would make now; "" where it is."""

    def facts(self) -> dict[str, object]:
        """All of it, for a program."""
        principles = [
            {**p.model_dump(mode="json"), "held_out": p.id in self.held_out}
            for p in self.constitution.principles
        ]
        known = self.constitution.model_dump(mode="json", exclude={"principles"})
        return {**known, "stale": self.stale, "principles": principles}


def find_constitution(experiment: str, iteration: int | None) -> Shown:
    """The constitution of an iteration, or of the newest.

    Raises:
        UserError: there is no such experiment, or it has no constitution yet.
    """
    settings = recorded_settings(experiment)
    one = method_of(settings).constitutional  # one constitution for all iterations
    t = 0 if one else newest(settings, "cluster", iteration).iteration
    done = open_experiment(settings).constitution(t)
    held_out = {p.id for p in pool_of(done).held_out} if done.stage == "write" else set()
    found = load(done.path("constitution.yaml"))
    return Shown(done, found, frozenset(held_out), _staleness(settings, done))


def _staleness(settings: ExperimentSettings, done: Attempt) -> str:
    try:
        state = stage_states(settings, done.iteration).get((done.stage, done.iteration))
    except UserError as error:  # its base model is gone, say
        return f"it is not known whether this is current: {error}"
    if state is None or state.standing == "finished":
        return ""
    return f"{done.stage} {done.iteration} is {state.standing}: {'; '.join(state.since)}"


def show_constitution(shown: Shown, page: int = 1) -> None:
    """Print the principles; for SAMI, also which are held out; and whether they are stale.

    Args:
        page: from 1; a page holds `PAGE` principles, those with the most trajectories first.

    Raises:
        UserError: there is no such page.
    """
    found = shown.constitution
    pages = max(-(-len(found.principles) // PAGE), 1)
    if page > pages:
        raise UserError(f"there is no page {page}", where="--page", expected=f"1 to {pages}")
    texts = {
        "principle": [p.text for p in found.principles],
        "antithesis": [p.antithesis for p in found.principles],
        "also worded as": [_others(p) for p in found.principles],
        "": ["held out" if p.id in shown.held_out else "" for p in found.principles],
    }
    there = {name: column for name, column in texts.items() if name == "principle" or any(column)}
    rows: list[list[str | Text]] = [
        [str(n + 1), str(entry.support or "–"), *(Text(column[n]) for column in there.values())]
        for n, entry in list(enumerate(found.principles))[PAGE * (page - 1) : PAGE * page]
    ]
    columns = ("#", "trajectories", *there)
    title = f"{found.experiment}, iteration {shown.attempt.iteration}"
    console.print(table(title, columns, rows, texts=range(2, len(columns))))
    if pages > 1:
        console.print(f"Page {page} of {pages}: --page N shows another.")
    if found.tail:
        console.print(covered(found))
    if shown.stale:
        console.print(Text(shown.stale, "yellow"))


def _others(entry: Principle) -> str:
    """Two of a principle's other wordings, and how many more there are."""
    others, more = other_wordings(entry, 2)
    return "; ".join(others) + (f" … {more} more" if more else "")
