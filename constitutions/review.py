"""A person's decisions on a constitution, and their effect.

`flows.review` gets decisions from a form, `flows.commands.edit` from an edited file; `tasks.review`
applies them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from constitutions.constitution import (
    Changes,
    Constitution,
    Draft,
    Entry,
    Principle,
    Tail,
    principle_id,
    principle_key,
)
from constitutions.errors import UserError, UserErrors
from constitutions.parse import whole

Action = Literal["approve", "reword", "merge", "drop"]
Places = Mapping[str, str | None]
"""The id of each old principle → the id under which it continues, or None where it was dropped."""


class Decision(BaseModel):
    """A person's decision on one principle."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    id: Annotated[str, Field(min_length=1)]
    action: Action = "approve"
    text: str = ""
    """The new text of a principle that is reworded. Its id stays."""
    antithesis: str | None = None
    """The antithesis of a reworded principle. None: it loses its antithesis, unless its text stays
    as it was."""
    into: str = ""
    """The id of the principle into which this one is merged."""


def apply(
    constitution: Constitution, decisions: Iterable[Decision], added: Iterable[str] = ()
) -> tuple[Constitution, Places]:
    """The constitution after the decisions, and the place of each old principle in it.

    A principle without a decision is approved. A merged one adds its support, share and wordings to
    its target, which may be approved or reworded, but not merged or dropped. An added one has no
    trajectories, so nothing is trained on it.

    Args:
        added: texts of new principles.

    Raises:
        UserErrors: decisions that cannot be followed, two principles with the same wording, or no
            principle left; all of these at once.
    """
    decided = list(decisions)
    new = [" ".join(text.split()) for text in added]
    by_id = {decision.id: decision for decision in decided}
    old = {p.id: p for p in constitution.principles}
    if mistakes := [*_mistakes(old, decided, by_id), *_wording_mistakes(old, by_id, new)]:
        raise UserErrors(mistakes)
    places = {id: _place(id, by_id.get(id)) for id in old}
    kept = [
        _combined(
            p.model_copy(update={"antithesis": _antithesis(p, by_id)}),
            _wording(p, by_id),
            [old[o] for o, n in places.items() if n == p.id != o],
        )
        for p in constitution.principles
        if places[p.id] == p.id
    ]
    approved = Constitution(
        experiment=constitution.experiment,
        iteration=constitution.iteration,
        tail=constitution.tail,
        principles=(*kept, *(Principle(text=text) for text in new)),
    )
    return approved, places


def decisions_between(
    old: Constitution, edited: Draft, shown: Constitution | None = None
) -> tuple[list[Decision], list[str]]:
    """What a person changed in a file with `old`: decisions, without approvals, and added texts.

    A principle whose text differs under the same id was reworded. One with `into` was merged, and
    so was a missing one whose text is among the members of another; any other missing one was
    dropped. An entry without an id, or with the id of its own text, was added. Antitheses are as
    the file says, whether their principle was reworded or not.

    Args:
        shown: the constitution that the person saw, where that was an earlier review of `old`.

    Raises:
        UserErrors: entries whose id is neither in `old` nor in `shown`, and added ones that are
            merged or have an antithesis, which a review does not keep; all of these at once.
    """
    entries = {entry.id: entry for entry in edited.principles}
    before = {p.id for p in old.principles}
    known = before | {p.id for p in shown.principles} if shown else before
    added = [entry for entry in edited.principles if entry.id not in before]
    if mistakes := list(_addition_mistakes(added, known)):
        raise UserErrors(mistakes)
    found = [_decision(p, entries.get(p.id), edited.principles) for p in old.principles]
    return [d for d in found if d], [entry.text for entry in added]


def effective(decisions: Iterable[Decision]) -> list[Decision]:
    """The decisions that change something, sorted by id, with only the fields that matter.

    People who decide the same have equal effective decisions.
    """
    needs = {"reword": {"text", "antithesis"}, "merge": {"into"}, "drop": set[str]()}
    return [
        Decision(**decision.model_dump(include={"id", "action"} | needs[decision.action]))
        for decision in sorted(decisions, key=lambda d: d.id)
        if decision.action in needs
    ]


def described(changes: Changes) -> list[str]:
    """The changes between two constitutions, a line each."""
    return [
        *(f"added: {p.text}" for p in changes.added),
        *(f"dropped: {p.text}" for p in changes.dropped),
        *(f"reworded: {was.text} → {now.text}" for was, now in changes.reworded),
        *(f"merged: {part.text} → {whole.text}" for part, whole in changes.merged),
        *(_opposed(was, now) for was, now in changes.opposed),
        *_tail_dropped(*changes.tail),
    ]


def _tail_dropped(was: Tail | None, now: Tail | None) -> list[str]:
    if was is None or now is not None:
        return []
    return [f"dropped: the tail, {was.principles:,} principles of {was.support:,} trajectories"]


def _opposed(was: Principle, now: Principle) -> str:
    wordings = (principle.antithesis or "none" for principle in (was, now))
    return f"antithesis of {now.text}: {' → '.join(wordings)}"


def _decision(
    principle: Principle, entry: Entry | None, entries: Sequence[Entry]
) -> Decision | None:
    if entry is None:
        whole = next((e for e in entries if _became_part(principle, e)), None)
        if whole:
            return Decision(id=principle.id, action="merge", into=whole.id)
        return Decision(id=principle.id, action="drop")
    if entry.into:
        return Decision(id=principle.id, action="merge", into=entry.into)
    if (entry.text, entry.antithesis) != (principle.text, principle.antithesis):
        reword = Decision(id=principle.id, action="reword", text=entry.text)
        if entry.antithesis == _antithesis(principle, {principle.id: reword}):
            return reword
        return reword.model_copy(update={"antithesis": entry.antithesis})
    return None


def _became_part(principle: Principle, entry: Entry) -> bool:
    return principle_key(principle.text) in map(principle_key, entry.members)


def _mistakes(
    old: Mapping[str, Principle], decided: Sequence[Decision], by_id: Mapping[str, Decision]
) -> Iterator[UserError]:
    """What is wrong with the decisions, their wordings apart."""
    for id, times in Counter(decision.id for decision in decided).items():
        if id not in old:
            yield UserError(
                "there is no such principle", where=f"decision on '{id}'", expected=_ids(old)
            )
        elif times > 1:
            yield UserError("decided more than once", where=_named(old[id]), expected="once")
    for decision in decided:
        if decision.id in old and decision.action == "merge":
            yield from _merge_mistakes(old, decision, by_id)


def _merge_mistakes(
    old: Mapping[str, Principle], decision: Decision, by_id: Mapping[str, Decision]
) -> Iterator[UserError]:
    where, target = _named(old[decision.id]), old.get(decision.into)
    if target is None:
        said = f"merged into '{decision.into}', which is not there"
        yield UserError(said, where=where, expected=_ids(old))
        return
    if target.id == decision.id:
        yield UserError("merged into itself", where=where, expected="another principle")
        return
    fate = by_id.get(target.id)
    if fate and fate.action == "drop":
        yield UserError(f"merged into “{target.text}”, which is dropped", where=where)
    if fate and fate.action == "merge":
        end = old.get(fate.into)
        fix = f"merge both into “{end.text}”" if end and end.id != decision.id else ""
        said = f"merged into “{target.text}”, which is itself merged"
        yield UserError(said, where=where, expected="a principle that stays", fix=fix)


def _wording_mistakes(
    old: Mapping[str, Principle], by_id: Mapping[str, Decision], added: Sequence[str]
) -> Iterator[UserError]:
    """Empty wordings, repeated ones, and a constitution without any."""
    stays = [p for p in old.values() if _place(p.id, by_id.get(p.id)) == p.id]
    final = [(_named(p), _wording(p, by_id)) for p in stays]
    final += [("an added principle", text) for text in added]
    merge, oppose = "merge one into the other", "word the opposite of its text"
    opposed = [(f"the antithesis of {_named(p)}", _antithesis(p, by_id)) for p in stays]
    worded = [(*said, merge) for said in final] + [(*said, oppose) for said in opposed if said[1]]
    first: dict[str, str] = {}
    for where, text, fix in worded:
        key = principle_key(text)
        try:
            whole(text, where)
        except UserError as error:
            yield error
            continue
        if not key:
            yield UserError("the wording is empty", where=where, expected="a text")
        elif key in first:
            said = f"the same wording, “{text}”, as {first[key]}"
            yield UserError(said, where=where, fix=fix)
        else:
            first[key] = where
    for text in added:  # it would get the id of the principle that had this text
        was = old.get(principle_id(text))
        if was and first[principle_key(text)] == "an added principle":
            yield UserError("changed and added again", where=_named(was), fix="approve it instead")
    if not final:
        yield UserError("every principle is dropped", expected="at least one that stays")


def _place(id: str, decision: Decision | None) -> str | None:
    action = decision.action if decision else "approve"
    return None if action == "drop" else decision.into if decision and action == "merge" else id


def _wording(principle: Principle, by_id: Mapping[str, Decision]) -> str:
    decision = by_id.get(principle.id)
    reworded = decision and decision.action == "reword"
    return " ".join(decision.text.split()) if decision and reworded else principle.text


def _antithesis(principle: Principle, by_id: Mapping[str, Decision]) -> str:
    """The antithesis of the new wording: an old one opposes the old text only."""
    decision = by_id.get(principle.id)
    if decision and decision.action == "reword" and decision.antithesis is not None:
        return " ".join(decision.antithesis.split())
    return principle.antithesis if _wording(principle, by_id) == principle.text else ""


def _combined(principle: Principle, text: str, parts: Sequence[Principle]) -> Principle:
    """The principle with its new text, and with the principles that were merged into it."""
    if text == principle.text and not parts:
        return principle
    wordings: dict[str, str] = {}
    whole_of = (principle, *parts)
    for wording in (w for p in whole_of for w in (*p.members, p.text)):
        wordings.setdefault(principle_key(wording), wording)
    return principle.model_copy(
        update={
            "text": text,
            "support": sum(p.support for p in whole_of),
            "share": round(min(sum(p.share for p in whole_of), 1.0), 6),
            "wordings": len(wordings) + sum(p.wordings - len(p.members) for p in whole_of),
            "members": tuple(wordings.values()),
        }
    )


def _named(principle: Principle) -> str:
    return f"“{principle.text}” ({principle.id})"


def _ids(old: Mapping[str, Principle]) -> str:
    return f"one of {', '.join(old)}"


def _addition_mistakes(added: Iterable[Entry], known: Collection[str]) -> Iterator[UserError]:
    """Entries that are new and cannot be added; `known` are the ids that a person may have seen."""
    for entry in added:
        where = f"“{entry.text}”"
        if entry.id not in known and entry.id != principle_id(entry.text):
            yield UserError(
                f"the id '{entry.id}' belongs to no principle",
                where=where,
                fix="restore the id of a reworded principle, or leave it out to add a new one",
            )
            continue
        if entry.into:
            said, fix = "an added principle cannot be merged", "delete the entry"
            yield UserError(said, where=where, fix=fix)
        if entry.antithesis:
            yield UserError(
                "a review does not keep the antithesis of an added principle",
                where=where,
                fix="leave it out: staple constitution write --from EXPERIMENT words those that "
                "lack one",
            )
