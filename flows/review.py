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

from constitutions.constitution import Constitution, Principle, load, markdown_text
from constitutions.errors import UserError
from constitutions.review import Decision
from flows.experiment import Experiment
from tasks.record.record import Attempt
from tasks.record.slot import Slot
from tasks.review import ReviewDecision, ReviewSettings, review, review_stage
from tasks.rows import Labelled

SHOWN = 300
"""Characters of an example that are shown."""

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
        description="No trajectory has them as its principle: nothing is trained on them.",
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
    it shows the form again, with the contradictions and the person's entries.
    """
    constitution = load(clustered.path("constitution.yaml"))
    labelled = clustered.read("labelled", Labelled)
    examples = examples_of(constitution, labelled)
    answer, mistakes = None, ""
    for times in count(1):
        answer = suspend_flow_run(
            wait_for_input=form_of(constitution, examples, t, answer, mistakes),
            key=f"review-{t}-{clustered.digest[:12]}-{times}",
        )
        verdict = verdict_of(answer, constitution)
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


def form_of(
    constitution: Constitution,
    examples: Examples,
    t: int,
    filled_in: ReviewForm | None = None,
    mistakes: str = "",
) -> type[ReviewForm]:
    """The form for a constitution, with earlier entries and their mistakes, if there are any.

    An entry's schema says what is valid: Prefect's server refuses to resume the run with a mistake.
    """
    fields: dict[str, Any] = {}
    for number, principle in enumerate(constitution.principles, start=1):
        before = _entry(filled_in, number) if filled_in else PrincipleForm(text=principle.text)
        entry = _entry_model(number, constitution, examples, before)
        title = f"{number}. {principle.text}"
        fields[_field(number)] = entry, Field(entry(), title=title)
    asked = {name: copy(field) for name, field in ReviewForm.model_fields.items()}
    # Prefect's UI squeezes the form's own description to nothing above a long form.
    asked["by"].description = _mistakes_text(mistakes) + "Who decides; kept in the record."
    if filled_in:
        asked["note"].default, asked["added"].default = filled_in.note, filled_in.added
    who: dict[str, Any] = {name: (field.annotation, field) for name, field in asked.items()}
    form = create_model("Review", __base__=ReviewForm, **who, **fields)
    form._description = _mistakes_text(mistakes) + _description(constitution, examples, t)
    return form


def verdict_of(answer: ReviewForm, constitution: Constitution) -> ReviewDecision:
    """The decisions in a form that a person sent."""
    decisions = []
    for number, principle in enumerate(constitution.principles, start=1):
        entry = _entry(answer, number)
        if entry.drop:
            decisions.append(Decision(id=principle.id, action="drop"))
        elif entry.into:
            whole = constitution.principles[entry.into - 1]
            decisions.append(Decision(id=principle.id, action="merge", into=whole.id))
        elif entry.text != principle.text:
            decisions.append(Decision(id=principle.id, action="reword", text=entry.text))
    return ReviewDecision(
        decisions=tuple(decisions), added=tuple(answer.added), by=answer.by, note=answer.note
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


def _entry(answer: ReviewForm, number: int) -> PrincipleForm:
    return PrincipleForm(**getattr(answer, _field(number)).model_dump())


def _mistakes_text(mistakes: str) -> str:
    """The mistakes as Markdown paragraphs: Prefect's UI joins single lines."""
    lines = "".join(f"• {markdown_text(line)}\n\n" for line in mistakes.splitlines())
    return f"**These decisions cannot be applied:**\n\n{lines}" if mistakes else ""


def _description(constitution: Constitution, examples: Examples, t: int) -> str:
    """The text above the form, in Markdown."""
    head = (
        f"**{markdown_text(constitution.experiment)}**, iteration {t}: reword, merge or drop "
        "principles. You approve what you do not change. Training starts when you send the form."
    )
    table = ["| # | principle | trajectories | share | example |", "|--:|---|--:|--:|---|"]
    for number, p in enumerate(constitution.principles, start=1):
        example = examples.get(p.id)
        shown = f"{_short(example.initial)} → {_short(example.refined)}" if example else ""
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
