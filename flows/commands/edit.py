"""`staple constitution edit`: a person reviews a constitution as a YAML file in an editor."""

from __future__ import annotations

import getpass
import os
import shlex
import subprocess
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from pathlib import Path

from constitutions.constitution import Constitution, Draft, diff, load, load_draft, save
from constitutions.errors import UserError
from constitutions.parse import whole
from constitutions.review import decisions_between, described
from constitutions.untrusted import clean
from flows.experiment import (
    check_discovers,
    home,
    newest,
    open_experiment,
    recorded_settings,
    writing,
)
from flows.review import record_review
from tasks.record.progress import say
from tasks.record.record import Attempt
from tasks.review import ReviewDecision, recorded_review
from tasks.rows import Labelled

FILE = "constitution.yaml"


@dataclass(frozen=True)
class Edited:
    """The recorded review, and what it changed in the clustered constitution, a line each."""

    reviewed: Attempt
    verdict: ReviewDecision
    changes: list[str]


def edit(
    experiment: str,
    iteration: int | None = None,
    file: Path | None = None,
    by: str | None = None,
    note: str = "",
) -> Edited:
    """Let a person edit the constitution of an iteration, and record their decisions.

    The file shows the constitution of the last review, else the clustered one. An unchanged file
    approves it. From now on the iteration has a review.

    Args:
        iteration: None is the newest with a constitution.
        file: an edited constitution; None opens $VISUAL or $EDITOR on one.
        by: the reviewer; None is the user's login name.

    Raises:
        UserError: there is no constitution or no editor; the edit is not valid (the file is kept).
    """
    opened = open_experiment(recorded_settings(experiment))
    check_discovers(opened.settings)
    clustered = newest(opened.settings, "cluster", iteration)
    t = clustered.iteration
    decided_by, note = whole(by or login_name(), "--by"), whole(note, "--note")
    command = f"staple constitution edit {experiment} --iteration {t}"
    standing = (recorded_review(opened.record, t, clustered) or clustered).path(FILE)
    draft = home() / "edits" / f"{experiment}-{t}-{clustered.digest[:12]}.yaml"
    if file is None:
        _begin(draft, standing, clustered)
        _open_editor(draft, command)
    source = file or draft
    with writing(experiment, f"staple constitution edit {experiment}"):
        try:
            old, shown = load(clustered.path(FILE)), load(standing)
            edited = load_draft(source)
            if shown.tail and edited.tail is None:
                say(f"{source} has no 'tail:': the tail is kept (write 'tail: drop' to drop it)")
            verdict = decided(old, shown, edited, decided_by, note)
            reviewed = record_review(opened, t, clustered, verdict)
        except UserError as error:
            again = f"{command} --file {file}" if file else command
            raise UserError(str(error), fix=f"correct {source}, then: {again}") from None
        if not opened.settings_at(t).review.enabled:
            opened.record.change(t, {"review.enabled": True})
    if source.absolute() == draft.absolute():
        draft.unlink()
    before, after = (load(attempt.path(FILE)) for attempt in (clustered, reviewed))
    return Edited(reviewed, verdict, described(diff(before, after)))


def decided(
    old: Constitution, shown: Constitution, edited: Draft, by: str, note: str
) -> ReviewDecision:
    """The decisions that lead from the clustered constitution to the edited file.

    A file that does not name the tail leaves it as it stands.

    Args:
        shown: what the person saw in the file; see `decisions_between`.
    """
    decisions, added = decisions_between(old, edited, shown)
    stands = "drop" if shown.tail is None else "keep"
    return ReviewDecision(
        decisions=tuple(decisions),
        added=tuple(added),
        drop_tail=old.tail is not None and (edited.tail or stands) == "drop",
        by=by,
        note=note,
    )


def _begin(draft: Path, standing: Path, clustered: Attempt) -> None:
    """Write the file to edit; an unfinished edit of the same constitution is continued."""
    if draft.exists():
        say(f"continuing the unfinished edit {draft} (delete it to start again)")
        return
    draft.parent.mkdir(parents=True, exist_ok=True)
    save(load(standing), draft)
    wanted = {p.example for p in load(standing).principles}
    rows = clustered.rows("labelled", Labelled)
    draft.write_text(_with_examples(draft.read_text("utf-8"), rows, wanted), "utf-8")


def _with_examples(text: str, rows: Iterable[Labelled], wanted: Collection[str]) -> str:
    """A constitution's YAML with the example itself in comments below each example's digest.

    Args:
        rows: the trajectories, of which the one that a principle improved most is shown.
        wanted: the `prompt_id` of the examples.
    """
    best: dict[str, Labelled] = {}
    for row in rows:
        known = best.get(row.prompt_id)
        if row.prompt_id in wanted and (known is None or row.score > known.score):
            best[row.prompt_id] = row
    lines = []
    for line in text.splitlines(keepends=True):
        lines.append(line)
        indent, _, example = line.rstrip().partition("example: ")
        if not indent.strip() and (shown := best.get(example)):
            prompt = shown.prompt[-1]["content"]
            parts = {"prompt": prompt, "first": shown.initial, "refined": shown.refined}
            lines += [f"{indent}# {name}: {_one_line(part)}\n" for name, part in parts.items()]
    return "".join(lines)


def _one_line(text: str) -> str:
    """At most 200 characters, without line breaks or controls: a comment cannot become YAML."""
    line = clean(" ".join(text.split()))
    return line if len(line) <= 200 else f"{line[:200]} …"


def _open_editor(path: Path, command: str) -> None:
    editor = os.environ.get("VISUAL") or os.environ.get("EDITOR")
    if not editor:
        raise UserError(
            "no editor is set",
            where="$VISUAL, $EDITOR",
            fix=f"edit {path} yourself, then: {command} --file {path}",
        )
    try:
        ended = subprocess.run([*shlex.split(editor), str(path)]).returncode
    except OSError as error:
        raise UserError(f"the editor cannot be started: {error}", where=editor) from None
    if ended:
        raise UserError(
            f"the editor ended with code {ended}; nothing was recorded",
            where=editor,
            fix=f"{command} continues with {path}",
        )


def login_name() -> str:
    """The user's login name.

    Raises:
        UserError: the system does not know it.
    """
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        raise UserError("your login name is unknown", fix="give it: --by NAME") from None
