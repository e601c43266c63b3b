"""The champion: the newest policy of an experiment that beat the champion before it.

`flows.loop` has each iteration decided about, once it is evaluated, by `tasks.judging.champion`.
The decision is a tag of the attempt at evaluate, and the alias "champion" in MLflow's registry
follows from it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import TypeVar

from flows.experiment import Experiment
from flows.methods import method_of
from tasks.judging.champion import (
    ERROR_RATE,
    ChampionDecision,
    Drawn,
    decide,
    draw,
    sides,
    sign_test,
)
from tasks.record.record import DECISION, Attempt
from tasks.rows import Comparison, Prompt
from tasks.sami.evaluate import CONDITIONED, Estimate, together

Attempts = dict[str, Attempt]
Value = TypeVar("Value")


def decided(e: Experiment, t: int, attempts: Attempts) -> Attempts:
    """The attempts of an iteration, with the decision whether it is the champion now.

    It decides if nobody has decided about these answers and this champion. Iteration 0, and one
    that waits for a review, are as they were.
    """
    evaluated, champion = attempts.get("evaluate"), e.champion(t)
    if t == 0 or evaluated is None or e.decision(t, champion):
        return attempts
    decision = _decide(e, t, attempts, champion)
    e.record.client.set_tag(evaluated.run_id, DECISION, decision.tag)
    return attempts | {"evaluate": replace(evaluated, decision=decision.tag)}


def _decide(e: Experiment, t: int, attempts: Attempts, champion: int) -> ChampionDecision:
    evaluated, trained = attempts["evaluate"], attempts["train"]
    reference = e.needs("train", champion) if champion else e.taught()
    policies = f"{trained.digest}:{reference.digest if reference else ''}"
    held_out = [row.prompt_id for row in e.needs("prompts", 0).rows("prompts", Prompt)]
    drawn = draw(held_out, _recorded(e), e.settings.decisions or e.settings.last, policies)
    method = method_of(e.settings)
    rows = [row for row in evaluated.rows("comparisons", Comparison) if row.against == champion]
    against = list[str]()
    if method.constitutional:
        rows = together(rows, method.answer, CONDITIONED)
        against = list(_lost(e, evaluated, champion, drawn))
    alike = (row for row in rows if row.answer == row.reference == method.answer)
    outcomes = {row.prompt_id: row.outcome for row in alike}
    return decide(outcomes, drawn, champion=champion, policies=policies, against=against)


def _recorded(e: Experiment) -> list[ChampionDecision]:
    """All decisions of the experiment, also about attempts that are not current any more."""
    runs = e.record.runs(kind="stage", stage="evaluate")
    found = (ChampionDecision.read(run.tags.get(DECISION, "")) for run in runs)
    return [decision for decision in found if decision]


def _lost(e: Experiment, evaluated: Attempt, champion: int, drawn: Drawn) -> Iterator[str]:
    """What SAMI's policy has lost against the champion, although it may follow constitutions.

    Its answers without a constitution, by the judge; or its information, on the drawn prompts.
    Each is a sign test at `ERROR_RATE`. They only reject, so that they accept nothing by chance.
    """
    plain = {
        row.prompt_id: row.outcome
        for row in evaluated.rows("plain-comparisons", Comparison)
        if row.against == champion
    }
    wins, losses = sides(_drawn(plain, drawn).values())
    if sign_test(losses, wins) <= ERROR_RATE:
        yield "answers without a constitution are worse"
    if "mi/per_token" not in evaluated.metrics:  # behind an endpoint
        return
    theirs = _information(e.needs("evaluate", champion))
    pairs = [
        (value, before)
        for i, value in _drawn(_information(evaluated), drawn).items()
        if value is not None and (before := theirs.get(i)) is not None
    ]
    more, less = sum(a > b for a, b in pairs), sum(a < b for a, b in pairs)
    if sign_test(less, more) <= ERROR_RATE:
        yield "answers say less about their constitution"


def _information(evaluated: Attempt) -> dict[str, float | None]:
    rows = evaluated.rows("information", Estimate)
    return {row.prompt_id: row.per_token for row in rows}


def _drawn(found: Mapping[str, Value], drawn: Drawn) -> dict[str, Value]:
    return {i: value for i, value in found.items() if i in drawn.ids}
