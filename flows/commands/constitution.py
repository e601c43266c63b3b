"""What `staple constitution show` prints."""

from __future__ import annotations

from rich.text import Text

from constitutions.constitution import Principle, covered, load, other_wordings
from constitutions.errors import UserError
from constitutions.terminal import console
from flows.commands.tables import table
from flows.experiment import newest, open_experiment, recorded_settings
from flows.methods import method_of
from tasks.sami.draw import pool_of

PAGE = 60
"""Principles that are shown together."""


def show_constitution(experiment: str, iteration: int | None, page: int = 1) -> None:
    """Print the principles of an iteration's constitution; for SAMI, also which are held out.

    Args:
        page: from 1; a page holds `PAGE` principles, those with the most trajectories first.

    Raises:
        UserError: there is no such experiment, or it has no constitution yet, or no such page.
    """
    settings = recorded_settings(experiment)
    one = method_of(settings).constitutional  # one constitution for all iterations
    t = 0 if one else newest(settings, "cluster", iteration).iteration
    done = open_experiment(settings).constitution(t)
    found = load(done.path("constitution.yaml"))
    pages = max(-(-len(found.principles) // PAGE), 1)
    if page > pages:
        raise UserError(f"there is no page {page}", where="--page", expected=f"1 to {pages}")
    apart = {p.id for p in pool_of(done).held_out} if done.stage == "write" else set()
    texts = {
        "principle": [p.text for p in found.principles],
        "antithesis": [p.antithesis for p in found.principles],
        "also worded as": [_others(p) for p in found.principles],
        "": ["held out" if p.id in apart else "" for p in found.principles],
    }
    shown = {name: column for name, column in texts.items() if name == "principle" or any(column)}
    rows: list[list[str | Text]] = [
        [str(n + 1), str(entry.support or "–"), *(Text(column[n]) for column in shown.values())]
        for n, entry in list(enumerate(found.principles))[PAGE * (page - 1) : PAGE * page]
    ]
    columns = ("#", "trajectories", *shown)
    title = f"{found.experiment}, iteration {done.iteration}"
    console.print(table(title, columns, rows, texts=range(2, len(columns))))
    if pages > 1:
        console.print(f"Page {page} of {pages}: --page N shows another.")
    if found.tail:
        console.print(covered(found))


def _others(entry: Principle) -> str:
    """Two of a principle's other wordings, and how many more there are."""
    others, more = other_wordings(entry, 2)
    return "; ".join(others) + (f" … {more} more" if more else "")
