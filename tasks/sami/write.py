"""SAMI, step 1: a principle writer words principles and their antitheses.

The writer is any policy; it may be weaker than the policy that is trained. A constitution may also
be given, or be one that STaPLe discovered, which lacks only the antitheses. `flows.sami` and
`staple constitution write` call this; `tasks.sami.sample` reads the pairs.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import astuple, dataclass, replace
from typing import Annotated

from pydantic import Field
from rapidfuzz import fuzz

from constitutions.constitution import Constitution, Principle, load, principle_key, save
from constitutions.errors import UserError
from constitutions.reference import files_of, load_pairs
from models.files import file_sha256, text_sha256, write_text
from models.policy import (
    NO_ANSWER,
    Completion,
    Messages,
    Policy,
    PolicySettings,
    Progress,
    Request,
)
from models.prompts import ConstitutionWording, ask_antithesis, ask_principle
from models.settings import Settings
from tasks.policies.opening import PolicySource
from tasks.record.progress import progress
from tasks.record.record import Attempt
from tasks.record.slot import Slot
from tasks.record.stage import stage
from tasks.record.work import Metrics, Workspace
from tasks.rows import Rejected, prompt_id
from tasks.sami.draw import HELD_OUT

LONGEST = 300
"""Characters of the longest principle or antithesis that is accepted."""
FEWEST = 2
"""A constitution of fewer principles is not worth training on."""

Topic = Annotated[str, Field(pattern=r"\S")]


class WriteSettings(Settings):
    """Where the principles and antitheses come from, and how they are written."""

    constitution: str | None = None
    """The name of a constitution that comes with the project ("planted", "summaries"), a YAML
    file, a JSON file of SAMI's reference, or a folder of those. Unset: it is written."""
    topics: tuple[Topic, ...] = Field(("answering a user's request",), min_length=1)
    """What principles are asked for, in turn."""
    principles: int = Field(8, ge=FEWEST, le=1000)
    """Principles that are wanted, each with its antithesis."""
    writer: PolicySettings | None = None
    """The principle writer; it may be weaker than the policy. Unset: the policy itself."""
    temperature: float = Field(1.0, ge=0, le=2)
    """Sampling temperature of principles and antitheses."""
    max_tokens: int = Field(64, ge=1, le=1024)
    """Longest principle, and longest antithesis."""
    attempts: int = Field(4, ge=1, le=100)
    """A principle is asked for at most so many times as often as principles are wanted; the
    antithesis of a discovered one at most so many times."""
    similar: float = Field(0.9, gt=0, le=1)
    """Likeness of words, in any order, from which on two principles are one."""
    held_out: float = Field(0.0, ge=0, lt=1)
    """Share of the principles that no training constitution holds; they are evaluated apart."""


@dataclass(frozen=True, slots=True)
class Written:
    """The pairs that were written, and the texts that were rejected."""

    constitution: Constitution
    rejected: list[Rejected]


@dataclass(frozen=True, slots=True)
class _Refusal:
    """Why a text is rejected."""

    reason: str
    detail: str


@dataclass(frozen=True, slots=True)
class _Ask:
    """A request for the principle of this number on a topic, or for its antithesis."""

    number: int
    topic: str

    def rejected(self, wording: ConstitutionWording, refusal: _Refusal) -> Rejected:
        return Rejected(
            prompt_id=prompt_id(ask_principle(wording, self.topic)),
            sample=self.number,
            source=f"topic: {self.topic}",
            reason=refusal.reason,
            detail=refusal.detail,
        )


def write_pairs(
    policy: Policy,
    settings: WriteSettings,
    wording: ConstitutionWording,
    key: str,
    progress: Progress | None = None,
) -> Written:
    """Ask the writer for principles, then for their antitheses, until enough pairs are kept.

    It is asked for at most `attempts` times as many principles as are wanted; fewer pairs may come.

    Args:
        key: seeds the noise; with the same key the same policy writes the same constitution.
        progress: called with the number of requests that were just answered.

    Raises:
        UserError: fewer than two pairs could be written.
    """
    asker = _Asker(policy, settings, key, progress)
    kept: list[Principle] = []
    rejected: list[Rejected] = []
    asked, limit = 0, settings.attempts * settings.principles
    while (missing := min(settings.principles - len(kept), limit - asked)) > 0:
        asks = [_Ask(number, _topic(number, settings)) for number in range(asked, asked + missing)]
        asked += missing
        for ask, found in _round(asker, asks, wording, kept):
            if isinstance(found, Principle):
                kept.append(found)
            else:
                rejected.append(ask.rejected(wording, found))
    if len(kept) < FEWEST:
        raise _too_few(len(kept), rejected)
    return Written(Constitution(principles=tuple(kept)), rejected)


def oppose(
    policy: Policy,
    constitution: Constitution,
    settings: WriteSettings,
    wording: ConstitutionWording,
    key: str,
    progress: Progress | None = None,
) -> Written:
    """The constitution with the antitheses that it lacks, worded by the writer.

    A principle that has no antithesis after `settings.attempts` tries is rejected, for the reason
    that the last try failed.

    Args:
        key: seeds the noise, with the principle's id and the number of the try.

    Raises:
        UserError: fewer than two are left, or none.
    """
    asker = _Asker(policy, settings, key, progress)
    principles = list(constitution.principles)
    asks = [_Ask(n, _topic(n, settings)) for n in range(len(principles))]
    refusals: dict[int, _Refusal] = {}
    for attempt in range(settings.attempts):
        lacking = [ask for ask in asks if not principles[ask.number].antithesis]
        contexts = [
            (f"{p.id}/{attempt}", ask_antithesis(wording, ask.topic, p.text))
            for ask, p in ((ask, principles[ask.number]) for ask in lacking)
        ]
        for ask, completion in zip(lacking, asker("antithesis", contexts), strict=True):
            n = ask.number
            others = principles[:n] + principles[n + 1 :]
            found = _opposed(principles[n], completion, others, settings.similar)
            if isinstance(found, Principle):
                principles[n] = found
            else:
                refusals[n] = found
    kept = tuple(p for p in principles if p.antithesis)
    rejected = [
        ask.rejected(wording, refusals[ask.number])
        for ask in asks
        if not principles[ask.number].antithesis
    ]
    if len(kept) < min(FEWEST, max(1, len(principles))):
        raise _too_few(len(kept), rejected)
    return Written(constitution.model_copy(update={"principles": kept}), rejected)


def split_held_out(
    constitution: Constitution, share: float, seed: int
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The ids of the principles that are trained on, and of those that are held out, in order.

    At least one is trained on; of two or more at least one is held out where `share` is not 0.
    """
    ids = [p.id for p in constitution.principles]
    wanted = max(1, round(share * len(ids))) if share else 0
    drawn = sorted(ids, key=lambda id: text_sha256(f"{seed}/held out/{id}"))
    held = set(drawn[: min(wanted, len(ids) - 1)])
    return tuple(id for id in ids if id not in held), tuple(id for id in ids if id in held)


@stage("write")
def write_stage(
    at: Slot, settings: WriteSettings, writer: PolicySource, discovered: Attempt | None = None
) -> Attempt:
    """→ constitution (the pairs), the ids that are held out, the rejected texts.

    The writer is loaded only where something has to be worded: all of it, or (`discovered`) the
    antitheses of the constitution of a STaPLe experiment, a finished cluster or review attempt.

    Raises:
        UserError: a given constitution cannot be read, or is given beside a discovered one; the
            writer words too few pairs.
    """
    if settings.constitution and discovered:
        raise UserError(
            "two constitutions are given",
            where=f"setting 'write.constitution' = {settings.constitution}",
            expected="no other one beside the constitution that was discovered",
            fix="leave write.constitution unset",
        )

    def compute(work: Workspace) -> Metrics:
        found = _written(at, settings, writer, discovered)
        principles = found.constitution.principles
        constitution = Constitution(
            experiment=at.record.experiment, iteration=max(at.iteration, 0), principles=principles
        )
        _, held_out = split_held_out(constitution, settings.held_out, at.seed)
        save(constitution, work.outputs / "constitution.yaml")
        write_text(work.outputs / HELD_OUT, json.dumps(held_out))
        work.write("rejected", found.rejected, Rejected)
        return {
            "write/principles": float(len(principles)),
            "write/held_out": float(len(held_out)),
            "write/rejected": float(len(found.rejected)),
        }

    if settings.constitution:
        noted = replace(at, notes={**at.notes, **source_digests(settings.constitution)})
        return noted.attempt("write", settings, {}, compute)
    worded = hashlib.sha256("\0".join(astuple(writer.wording)).encode()).hexdigest()
    noted = replace(at, notes={**at.notes, "wording": worded})
    inputs = writer.inputs(**({"discovered": discovered} if discovered else {}))
    return writer.noted(noted).attempt("write", settings, inputs, compute)


def source_digests(source: str) -> dict[str, str]:
    """What a given constitution is read from: "constitution/<file>" → sha256.

    Raises:
        UserError: there is no such source.
    """
    return {f"constitution/{path.name}": file_sha256(path) for path in files_of(source)}


def _written(
    at: Slot, settings: WriteSettings, writer: PolicySource, discovered: Attempt | None
) -> Written:
    """The pairs, from the given constitution, the discovered one or the writer alone."""
    if settings.constitution:
        return Written(load_pairs(settings.constitution), [])
    key = f"{at.seed}/{at.iteration}/write"
    if discovered is None:
        with progress("write", 2 * settings.principles, "requests") as tick:
            return write_pairs(writer.load(), settings, writer.wording, key, tick)
    constitution = load(discovered.path("constitution.yaml"))
    if constitution.principles and all(p.antithesis for p in constitution.principles):
        return Written(constitution, [])  # a person worded them in the review
    with progress("write", len(constitution.principles), "requests") as tick:
        return oppose(writer.load(), constitution, settings, writer.wording, key, tick)


def _topic(number: int, settings: WriteSettings) -> str:
    return settings.topics[number % len(settings.topics)]


# Asking ------------------------------------------------------------------------------------------


class _Asker:
    """Asks the writer in one role for many contexts, each with a name."""

    def __init__(
        self, policy: Policy, settings: WriteSettings, key: str, advance: Progress | None
    ) -> None:
        self.policy, self.settings, self.key, self.advance = policy, settings, key, advance

    def __call__(self, role: str, contexts: Iterable[tuple[str, Messages]]) -> list[Completion]:
        requests = [
            Request(
                messages=messages,
                key=f"{self.key}/{name}/{role}",
                temperature=self.settings.temperature,
                max_tokens=self.settings.max_tokens,
            )
            for name, messages in contexts
        ]
        answers = self.policy.generate(requests, self.advance) if requests else []
        return [completions[0] for completions in answers]


def _round(
    asker: _Asker,
    asks: Sequence[_Ask],
    wording: ConstitutionWording,
    kept: Sequence[Principle],
) -> list[tuple[_Ask, Principle | _Refusal]]:
    """For each request, in order: the pair, or why it cannot be kept beside those before it."""
    similar = asker.settings.similar
    named = asker("principle", [(str(a.number), ask_principle(wording, a.topic)) for a in asks])
    found: dict[int, Principle | _Refusal] = {
        ask.number: _named(completion, kept, similar)
        for ask, completion in zip(asks, named, strict=True)
    }
    pairs = [(ask, p) for ask in asks if isinstance(p := found[ask.number], Principle)]
    contexts = [(str(a.number), ask_antithesis(wording, a.topic, p.text)) for a, p in pairs]
    beside = list(kept)
    for (ask, principle), completion in zip(pairs, asker("antithesis", contexts), strict=True):
        refusal = _repeated(principle.text, beside, similar)
        pair = refusal or _opposed(principle, completion, beside, similar)
        found[ask.number] = pair
        if isinstance(pair, Principle):
            beside.append(pair)
    return [(ask, found[ask.number]) for ask in asks]


# What is accepted --------------------------------------------------------------------------------

_MARK = re.compile(
    r"(?:[-*•–]|#+|\(?\d{1,3}[.):])\s+|(?:principle|antithesis)(?:\s*\d{1,3})?\s*:\s*",
    re.IGNORECASE,
)
"""What a writer puts before a principle: a list's mark, a title."""
_QUOTES = ('""', "''", "“”", "‘’", "„“", "«»", "``", "**", "__")


def _named(
    completion: Completion, kept: Sequence[Principle], similar: float
) -> Principle | _Refusal:
    """The principle that a completion words, if it differs from those that are kept."""
    text = _worded(completion, "principle")
    if isinstance(text, _Refusal):
        return text
    return _repeated(text, kept, similar) or Principle(text=text)


def _repeated(text: str, kept: Sequence[Principle], similar: float) -> _Refusal | None:
    for other in kept:
        if _alike(text, other.text, similar):
            return _Refusal("principle repeated", f"“{text}” is like “{other.text}”")
        if _alike(text, other.antithesis, similar):
            return _Refusal("principle is an antithesis", f"“{text}” is like “{other.antithesis}”")
    return None


def _opposed(
    principle: Principle, completion: Completion, others: Sequence[Principle], similar: float
) -> Principle | _Refusal:
    """The principle with the antithesis that a completion words, if it opposes no other principle.

    A short negation resembles its principle, and the negations of similar principles: from those it
    only has to differ in wording.
    """
    text = _worded(completion, "antithesis")
    if isinstance(text, _Refusal):
        return replace(text, detail=f"“{principle.text}”: {text.detail}")
    said = f"“{principle.text}”: “{text}”"
    if principle_key(text) == principle_key(principle.text):
        return _Refusal("antithesis is the principle itself", said)
    for other in others:
        if _alike(text, other.text, similar):
            return _Refusal("antithesis is another principle", f"{said} is like “{other.text}”")
        if principle_key(text) == principle_key(other.antithesis):
            return _Refusal("antithesis repeated", f"{said} is that of “{other.text}”")
    return principle.model_copy(update={"antithesis": text})


def _worded(completion: Completion, what: str) -> str | _Refusal:
    """The text of a principle or antithesis, without what a writer puts around it."""
    if completion.finish == "length":
        return _Refusal(f"{what} not ended", f"cut after {completion.tokens} tokens")
    if completion.finish != "stop":
        return _Refusal(f"{what} not given", NO_ANSWER.get(completion.finish, completion.finish))
    lines = [bare for line in completion.text.splitlines() if (bare := _bare(line))]
    if not any(c.isalnum() for line in lines for c in line):
        return _Refusal(f"{what} empty", f"{completion.text[:LONGEST]!r}")
    if len(lines) > 1:
        return _Refusal(f"{what} of several lines", f"{completion.text[:LONGEST]!r}")
    if len(lines[0]) > LONGEST:
        return _Refusal(f"{what} too long", f"{len(lines[0])} characters: “{lines[0][:80]}…”")
    return lines[0]


def _bare(line: str) -> str:
    """A line with single spaces, without list marks, titles and quotation marks around it."""
    text, before = " ".join(line.split()), None
    while text != before:
        before = text
        text = text[mark.end() :] if (mark := _MARK.match(text)) else text
        inner = text[1:-1].strip()
        if text[:1] + text[-1:] in _QUOTES and text[0] not in inner.strip(text[0]):
            text = inner
    return text


def _alike(one: str, other: str, similar: float) -> bool:
    """Whether two wordings are one principle, by the words that they share in any order."""
    left, right = principle_key(one), principle_key(other)
    return bool(right) and fuzz.token_sort_ratio(left, right) >= 100 * similar


def _too_few(kept: int, rejected: Sequence[Rejected]) -> UserError:
    reasons = Counter(row.reason for row in rejected)
    often = ""
    for reason, times in reasons.most_common(1):
        example = next(row.detail for row in rejected if row.reason == reason)
        often = f"; most often ({times} of {len(rejected)}): {reason}, as in {example}"
    return UserError(
        f"the writer worded {kept} principle{'' if kept == 1 else 's'} with an antithesis{often}",
        where="stage write",
        expected=f"at least {FEWEST}",
        fix="name other topics or another writer, or allow it more attempts",
    )
