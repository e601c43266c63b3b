"""The review of a constitution in Prefect's UI: a suspended run whose form lists the principles.

`flows.loop` calls `ask` after `cluster` if `review.enabled` is set. `flows.commands.edit` does the
same in an editor.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import copy
from itertools import count
from typing import Any

from prefect.context import FlowRunContext
from prefect.flow_runs import suspend_flow_run
from prefect.input import RunInput
from pydantic import BaseModel, ConfigDict, Field, create_model

from constitutions.constitution import Constitution, Principle, covered, load, markdown_text
from constitutions.errors import UserError
from constitutions.review import Decision
from flows.experiment import Experiment
from tasks.record.record import Attempt
from tasks.record.slot import Slot
from tasks.review import ReviewDecision, ReviewSettings, review, review_stage
from tasks.rows import Labelled

SHOWN = 300
"""Characters of an example that are shown."""

PAGE = 60
"""Principles on one page of the form: about 150 kB."""

Examples = Mapping[str, Labelled]
"""The id of a principle → the trajectory that it improved most."""


class PrincipleForm(BaseModel):
    """A person's decision on one principle; unchanged, the form approves it.

    No drop-downs: those of Prefect 3.8's UI close at once in the dialogue that resumes a run.
    """

    text: str
    into: int = 0
    """The number of the principle that it is merged into; 0 is none."""
    drop: bool = False


class ReviewForm(RunInput):
    """The whole form: the person's name, and a `PrincipleForm` for each principle, by number."""

    by: str = Field(title="Your name", pattern=r"\S")
    note: str = Field("", title="Note", description="The reason, if you want to give one.")
    added: list[str] = Field(
        [],
        title="Principles to add",
        description="Nothing is trained on them, unless trajectories of the tail have these words.",
    )


def can_ask() -> bool:
    """Whether this is a deployment's own run: Prefect can suspend no other."""
    context = FlowRunContext.get()
    run = context.flow_run if context else None
    return bool(run and run.deployment_id and not run.parent_task_run_id)


def ask(experiment: Experiment, t: int, clustered: Attempt) -> Attempt:
    """Let a person decide on a constitution, and record the review.

    Call it only if `can_ask`. It suspends the run and ends its process. After the person sent the
    form, it returns in the process that resumes the run. If the decisions contradict one another,
    it shows the form again, with the contradictions and the person's entries. A large constitution
    has several pages, which are shown one after the other.
    """
    constitution = load(clustered.path("constitution.yaml"))
    labelled = clustered.read("labelled", Labelled)
    examples = examples_of(constitution, labelled)
    key = f"review-{t}-{clustered.digest[:12]}"
    answers: list[RunInput | None] = [None] * len(pages_of(constitution))
    paged = len(answers) > 1
    mistakes = ""
    for times in count(1):
        answers = [
            suspend_flow_run(
                wait_for_input=form_of(constitution, examples, t, answer, mistakes, page),
                key=f"{key}-{times}" + (f"-page-{page + 1}" if paged else ""),
            )
            for page, answer in enumerate(answers)
        ]
        verdict = verdict_of([answer for answer in answers if answer], constitution)
        try:
            review(labelled, constitution, verdict)
            break
        except UserError as error:
            mistakes = str(error)
    return record_review(experiment, t, clustered, verdict)


def record_review(
    experiment: Experiment, t: int, clustered: Attempt, verdict: ReviewDecision
) -> Attempt:
    """Apply and record a review, whichever stage the command runs.

    Raises:
        UserError: the decisions contradict one another, or leave nothing to train on.
    """
    at = Slot(experiment.record, t, experiment.settings.seed)
    if experiment.settings.review.which == "last":  # more iterations may follow
        experiment.record.change(t, {"review.which": "each"})
    return review_stage(at, ReviewSettings(enabled=True), clustered, verdict)


def examples_of(constitution: Constitution, labelled: Sequence[Labelled]) -> Examples:
    """For each principle, the trajectory of its example prompt with the largest gain."""
    best: dict[tuple[int, str], Labelled] = {}
    for row in labelled:
        place = row.cluster, row.prompt_id
        if place not in best or _gain(row) > _gain(best[place]):
            best[place] = row
    found = ((p.id, best.get((n, p.example))) for n, p in enumerate(constitution.principles))
    return {id: row for id, row in found if row}


def pages_of(constitution: Constitution) -> list[range]:
    """The numbers, from 1, of the principles on each page of the form: one page at least."""
    last = len(constitution.principles)
    pages = [range(n, min(n + PAGE, last + 1)) for n in range(1, last + 1, PAGE)]
    return pages or [range(1, 1)]


def form_of(
    constitution: Constitution,
    examples: Examples,
    t: int,
    filled_in: RunInput | None = None,
    mistakes: str = "",
    page: int = 0,
) -> type[RunInput]:
    """A page of the form, with earlier entries and their mistakes, if there are any.

    The first page, a `ReviewForm`, asks for the person; the last one for the tail, if there is one.
    An entry's schema says what is valid: Prefect's server refuses to resume the run with a mistake.
    """
    fields: dict[str, Any] = {}
    pages = pages_of(constitution)
    for number in pages[page]:
        principle = constitution.principles[number - 1]
        before = _entry(filled_in, number) if filled_in else PrincipleForm(text=principle.text)
        entry = _entry_model(number, constitution, examples, before)
        title = f"{number}. {principle.text}"
        fields[_field(number)] = entry, Field(entry(), title=title)
    if page == len(pages) - 1 and constitution.tail:
        drop = getattr(filled_in, "drop_tail", False)
        title = "Drop the tail, with its trajectories"
        fields["drop_tail"] = bool, Field(drop, title=title, description=covered(constitution))
    who: dict[str, Any] = {}
    if not page:
        asked = {name: copy(field) for name, field in ReviewForm.model_fields.items()}
        # Prefect's UI squeezes the form's own description to nothing above a long form.
        asked["by"].description = _mistakes_text(mistakes) + "Who decides; kept in the record."
        if isinstance(filled_in, ReviewForm):
            asked["note"].default, asked["added"].default = filled_in.note, filled_in.added
        who = {name: (field.annotation, field) for name, field in asked.items()}
    base: type[RunInput] = RunInput if page else ReviewForm
    form = create_model("Review", __base__=base, **who, **fields)
    form._description = _mistakes_text(mistakes) + _description(constitution, examples, t, page)
    return form


def verdict_of(answers: Sequence[RunInput], constitution: Constitution) -> ReviewDecision:
    """The decisions in the pages of the form that a person sent, in their order."""
    decisions = []
    entries = [
        _entry(answer, number)
        for answer, numbers in zip(answers, pages_of(constitution), strict=True)
        for number in numbers
    ]
    for entry, principle in zip(entries, constitution.principles, strict=True):
        if entry.drop:
            decisions.append(Decision(id=principle.id, action="drop"))
        elif entry.into:
            whole = constitution.principles[entry.into - 1]
            decisions.append(Decision(id=principle.id, action="merge", into=whole.id))
        elif entry.text != principle.text:
            decisions.append(Decision(id=principle.id, action="reword", text=entry.text))
    first, last = answers[0], answers[-1]
    assert isinstance(first, ReviewForm)
    return ReviewDecision(
        decisions=tuple(decisions),
        added=tuple(first.added),
        drop_tail=getattr(last, "drop_tail", False),
        by=first.by,
        note=first.note,
    )


def _entry_model(
    number: int, constitution: Constitution, examples: Examples, before: PrincipleForm
) -> type[BaseModel]:
    """The `PrincipleForm` of one principle, with a schema that checks it."""
    principle = constitution.principles[number - 1]
    rule: dict[str, Any] = {
        "properties": {"into": {"not": {"const": number}}},
        "if": {"properties": {"drop": {"const": True}}, "required": ["drop"]},
        "then": {"properties": {"into": {"const": 0}}},
    }
    return create_model(
        f"Principle{number}",
        __config__=ConfigDict(extra="forbid", json_schema_extra={"allOf": [rule]}),
        __doc__=_facts(principle, examples.get(principle.id)),
        text=(str, Field(before.text, title="Wording", min_length=1, pattern=r"\S")),
        into=(
            int,
            Field(
                before.into,
                title="Merge into principle no. (0: none)",
                ge=0,
                le=len(constitution.principles),
            ),
        ),
        drop=(bool, Field(before.drop, title="Drop it, with its trajectories")),
    )


def _field(number: int) -> str:
    return f"principle_{number}"


def _entry(answer: RunInput, number: int) -> PrincipleForm:
    return PrincipleForm(**getattr(answer, _field(number)).model_dump())


def _mistakes_text(mistakes: str) -> str:
    """The mistakes as Markdown paragraphs: Prefect's UI joins single lines."""
    lines = "".join(f"• {markdown_text(line)}\n\n" for line in mistakes.splitlines())
    return f"**These decisions cannot be applied:**\n\n{lines}" if mistakes else ""


def _description(constitution: Constitution, examples: Examples, t: int, page: int) -> str:
    """The text above a page of the form, in Markdown."""
    pages = pages_of(constitution)
    sent = (
        "the form" if len(pages) == 1 else f"the last page; this is page {page + 1} of {len(pages)}"
    )
    head = (
        f"**{markdown_text(constitution.experiment)}**, iteration {t}: reword, merge or drop "
        "principles. You approve what you do not change. Training starts when you send "
        f"{sent}. {covered(constitution)}"
    )
    table = ["| # | principle | trajectories | share | example |", "|--:|---|--:|--:|---|"]
    for number in pages[page]:
        p = constitution.principles[number - 1]
        example = examples.get(p.id)
        texts = (example.initial, example.refined) if example else ()
        shown = " → ".join(_short(text, SHOWN // 3) for text in texts)
        table.append(
            f"| {number} | {markdown_text(p.text)} | {p.support:,} | {p.share:.1%} "
            f"| {markdown_text(shown)} |"
        )
    return "\n".join([head, "", *table])


def _facts(principle: Principle, example: Labelled | None) -> str:
    """A principle's support, and an answer before and after its refinement."""
    support = f"{principle.support:,} trajectories, {principle.share:.1%} of the weight."
    if principle.antithesis:
        opposite = markdown_text(principle.antithesis)
        support += f"\n\nAntithesis, dropped where the principle is reworded: {opposite}"
    if example is None:
        return support
    shown = (example.prompt[-1]["content"], example.initial, example.refined)
    prompt, before, after = (markdown_text(_short(text)) for text in shown)
    return f"{support}\n\nPrompt: {prompt}\n\nBefore: {before}\n\nAfter: {after}"


def _short(text: str, limit: int = SHOWN) -> str:
    line = " ".join(text.split())
    return line if len(line) <= limit else line[: limit - 1] + "…"


def _gain(row: Labelled) -> float:
    return row.score - row.initial_score
