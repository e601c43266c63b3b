"""A constitution: the principles of one iteration, as a YAML file that people read and edit.

`tasks.cluster` makes a constitution, `save` writes it, a person may edit the file
(`constitutions.review`), and `load` reads it. SAMI trains on one that has antitheses
(`tasks.sami.write`).
"""

from __future__ import annotations

import hashlib
import os
import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from constitutions.errors import UserError, UserErrors
from constitutions.parse import LARGE, line_of, parse_yaml, read_text, yaml_tree

Text = Annotated[str, Field(strict=True, pattern=r"\S")]
Count = Annotated[int, Field(strict=True, ge=0)]
Share = Annotated[float, Field(strict=True, ge=0, le=1)]
AT_ONCE = 1_000
"""Principles of a file that are validated together."""
REPORTED = 20
"""Most mistakes of a file that are named."""


class Principle(BaseModel):
    """One principle of a constitution. In a file, only `text` has to be given."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    id: Text = ""
    """It stays when the text is reworded; `principle_id(text)` where none is given."""
    text: Text
    antithesis: Annotated[str, Field(strict=True, pattern=r"^$|\S")] = ""
    """The opposite principle (SAMI); empty where nobody has written one."""
    support: Count = 0
    """The number of trajectories with this principle as their label."""
    share: Share = 0.0
    """Their share, in [0, 1], of the weight of all trajectories."""
    example: Annotated[str, Field(strict=True)] = ""
    """The `prompt_id` of the trajectory that this principle improved most."""
    wordings: Count = 0
    """The number of wordings that were merged into it; at least that of `members`."""
    absent: Count = 0
    """For how many iterations in a row it has had no trajectory, and was carried over."""
    members: tuple[Text, ...] = ()
    """Wordings that were merged into it, most frequent first. `cluster` lists a few of many here,
    and all of them in its table `clusters` (`tasks.clustering.wordings`)."""

    def model_post_init(self, _context: Any) -> None:
        if not self.id:
            object.__setattr__(self, "id", principle_id(self.text))
        if self.wordings < len(self.members):
            object.__setattr__(self, "wordings", len(self.members))

    @property
    def keys(self) -> frozenset[str]:
        """The `principle_key`s of its text and of its members."""
        return frozenset(map(principle_key, (self.text, *self.members)))


class Entry(Principle):
    """A principle as a person edits it."""

    into: Annotated[str, Field(strict=True)] = ""
    """The id of the principle that it is merged into."""


AnyPrinciple = TypeVar("AnyPrinciple", bound=Principle)


class Tail(BaseModel):
    """What a bounded constitution leaves out: rare principles, which label their own trajectories
    in their own words."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    principles: Count
    """Distinct wordings."""
    support: Count
    """Trajectories that keep them."""
    share: Share
    """Their share of the weight of all trajectories."""


def _by_support(principles: tuple[AnyPrinciple, ...]) -> tuple[AnyPrinciple, ...]:
    return tuple(sorted(principles, key=lambda p: (-p.support, p.text)))


class Constitution(BaseModel):
    """The principles of one iteration, ordered by support (descending), then by text."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    experiment: Annotated[str, Field(strict=True)] = ""
    iteration: Count = 0
    tail: Tail | None = None
    """None: there is none, or a person dropped it."""
    principles: Annotated[tuple[Principle, ...], AfterValidator(_by_support)]

    @property
    def texts(self) -> tuple[str, ...]:
        """The principles' texts, in order."""
        return tuple(p.text for p in self.principles)

    @property
    def coverage(self) -> float:
        """The share of the trajectories' weight that one of the principles labels."""
        return min(sum(p.share for p in self.principles), 1.0)

    @property
    def is_opposed(self) -> bool:
        """Whether any principle has an antithesis."""
        return any(p.antithesis for p in self.principles)


class Draft(BaseModel):
    """A constitution as a person edits it."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    experiment: Annotated[str, Field(strict=True)] = ""
    iteration: Count = 0
    tail: Tail | Literal["keep", "drop"] | None = None
    """What becomes of the tail; with its figures it is kept. None: the file does not say."""
    principles: Annotated[tuple[Entry, ...], AfterValidator(_by_support)]


Document = TypeVar("Document", Constitution, Draft)


@dataclass(frozen=True, slots=True)
class Changes:
    """The changes from an old constitution to a new one; pairs are (old, new)."""

    added: tuple[Principle, ...]
    dropped: tuple[Principle, ...]
    reworded: tuple[tuple[Principle, Principle], ...]
    merged: tuple[tuple[Principle, Principle], ...]
    """Old principles that are now a part of a new one."""
    opposed: tuple[tuple[Principle, Principle], ...]
    """Principles that have another antithesis than before, or one where they had none."""
    support_changed: tuple[tuple[Principle, Principle], ...]
    """Principles that have more or fewer trajectories than before."""
    tail: tuple[Tail | None, Tail | None] = (None, None)
    """The old one and the new one."""


@dataclass(frozen=True, slots=True)
class Repetition:
    """A wording or an id that has occurred before, in an earlier principle or in its own."""

    index: int
    """The index of its principle, from 0."""
    field: str
    what: str
    """What it repeats, as the `what` of a UserError."""
    fix: str


def principle_key(text: str) -> str:
    """What all spellings of a principle share: NFC, one case, single spaces, no final mark."""
    plain = " ".join(unicodedata.normalize("NFC", text).casefold().split())
    return plain.rstrip(" .!;:。") or plain


def principle_id(text: str) -> str:
    """A stable id: "p-" and 12 hexadecimal digits of the sha256 of the text's `principle_key`."""
    return "p-" + hashlib.sha256(principle_key(text).encode()).hexdigest()[:12]


def diff(old: Constitution, new: Constitution) -> Changes:
    """The changes from an old constitution to a new one.

    An old principle continues in the new one with the same id. Where there is none (an iteration
    that words it otherwise gives it another id), it continues in a related one: one that has its
    text among its wordings, whose text is among its own, or that shares at least half of the
    shorter list of wordings. Of several, one with its text goes first, then one that shares most
    wordings. Where several old principles continue in one, the old one with its id, else the one
    that shares most wordings, is the same principle, perhaps reworded; the others were merged into
    it. An old principle without a continuation was dropped, a new one without an origin added.
    """
    heirs: defaultdict[str, list[Principle]] = defaultdict(list)
    dropped = []
    find_heir = _heirs_among(new)
    for principle in old.principles:
        heir = find_heir(principle)
        if heir:
            heirs[heir.id].append(principle)
        else:
            dropped.append(principle)
    same = {p.id: max(heirs[p.id], key=_kinship(p)) for p in new.principles if heirs[p.id]}
    pairs = [(same[p.id], p) for p in new.principles if p.id in same]
    return Changes(
        added=tuple(p for p in new.principles if p.id not in same),
        dropped=tuple(dropped),
        reworded=tuple((was, now) for was, now in pairs if was.text != now.text),
        merged=tuple(
            (part, p) for p in new.principles for part in heirs[p.id] if part != same[p.id]
        ),
        opposed=tuple((was, now) for was, now in pairs if was.antithesis != now.antithesis),
        support_changed=tuple((was, now) for was, now in pairs if was.support != now.support),
        tail=(old.tail, new.tail),
    )


def markdown(constitution: Constitution, wordings: int = 3) -> str:
    """The constitution as a Markdown table; antitheses have a column where there are any.

    Args:
        wordings: most merged wordings that a row shows.
    """
    opposed = constitution.is_opposed
    head = [
        f"| # | principle |{' antithesis |' if opposed else ''} share | trajectories "
        "| also worded as |",
        f"|--:|---|{'---|' if opposed else ''}--:|--:|---|",
    ]
    rows = [
        f"| {number} | {markdown_text(p.text)} |"
        f"{f' {markdown_text(p.antithesis)} |' if opposed else ''} {p.share:.1%} | {p.support:,} "
        f"| {_others(p, wordings)} |"
        for number, p in enumerate(constitution.principles, start=1)
    ]
    return "\n".join([*head, *rows]) + "\n"


def markdown_text(text: str) -> str:
    """A foreign text as one line of Markdown that shows the text as it is.

    Its own mark-up, HTML, links and table borders have no effect; invisible characters are removed.
    """
    shown = "".join(c if c.isprintable() or c in "\u200c\u200d" else " " for c in text)
    escaped = re.sub(r"([\\`*_{}\[\]<>()#+|~&@$^!]|(?<=:)//|(?<=www)\.)", r"\\\1", shown)
    return " ".join(escaped.split())


def save(constitution: Constitution, path: str | os.PathLike[str]) -> None:
    """Write the constitution as YAML (UTF-8), from which `load` reads an equal one."""
    document = {
        "experiment": constitution.experiment,
        "iteration": constitution.iteration,
        **({"tail": constitution.tail.model_dump()} if constitution.tail else {}),
        "principles": [_entry(p) for p in constitution.principles],
    }
    body = yaml.safe_dump(document, sort_keys=False, allow_unicode=True, width=100)
    Path(path).write_text(_header(constitution) + body, encoding="utf-8", newline="\n")


def load(path: str | os.PathLike[str]) -> Constitution:
    """Read a constitution that `save` or a person wrote.

    Raises:
        UserError: the file is missing, not UTF-8 or not YAML, or an entry has an unknown key, a
            missing or empty text, a wrong type, a repeated id or text, or an antithesis that is
            another entry's text or antithesis; all such entries at once, each with its line.
    """
    return _load(path, Constitution)


def load_draft(path: str | os.PathLike[str]) -> Draft:
    """`load` a constitution that a person has edited, whose entries may have `into`.

    Raises:
        UserError: as `load`.
    """
    return _load(path, Draft)


def _load(path: str | os.PathLike[str], kind: type[Document]) -> Document:
    source = read_text(path, expected="a YAML file")
    fix = "start each principle with '- '; put a text that holds ': ' or '#' in quotes"
    data = parse_yaml(source, str(path), LARGE, fix=fix)
    if not isinstance(data, dict):
        raise UserError(
            "this is not a constitution", where=str(path), expected="a mapping with 'principles:'"
        )
    constitution = _validated(data, source, path, kind)
    if repeated := list(islice(repetitions(data["principles"]), REPORTED)):
        root = yaml_tree(source)
        raise UserErrors([_repetition(r, root, path) for r in repeated])
    return constitution


def _validated(
    data: dict[str, Any], source: str, path: str | os.PathLike[str], kind: type[Document]
) -> Document:
    """The document, validated some principles at a time, because every mistake takes memory."""
    entries = data.get("principles")
    there = entries if isinstance(entries, list) else []
    found: list[Any] = []
    document: Document | None = None
    for start in range(0, max(len(there), 1), AT_ONCE):
        part = data | {"principles": there[start : start + AT_ONCE]} if there else data
        try:
            document = kind.model_validate(part)
        except ValidationError as error:
            root, mistakes = yaml_tree(source), _of_the_likelier(error.errors(include_url=False))
            named = [_as_user_error(e, start, root, path, kind) for e in mistakes[:REPORTED]]
            raise UserErrors(named, more=len(mistakes) - len(named)) from None
        found += document.principles
    assert document is not None, "there is at least one part"
    return document if len(there) <= AT_ONCE else kind(**data | {"principles": found})


def _of_the_likelier(errors: list[Any]) -> list[Any]:
    """pydantic's errors, those of a draft's tail once: as figures, not as a word too."""
    words = [e for e in errors if e["loc"][:1] == ("tail",) and e["type"] == "literal_error"]
    for error in errors:
        if error["loc"][:2] == ("tail", Tail.__name__):
            error["loc"] = ("tail", *error["loc"][2:])
    return [e for e in errors if e not in words]


def repetitions(entries: Sequence[Mapping[str, Any]]) -> Iterator[Repetition]:
    """The texts, antitheses and ids that have occurred before, in any spelling; texts come first.

    Args:
        entries: the fields of principles, of which `text`, `antithesis` and `id` are read.
    """
    worded: dict[str, tuple[int, str]] = {}
    for field in ("text", "antithesis"):
        for index, key in _keys(entries, field):
            if key not in worded:
                worded[key] = index, field
                continue
            other, what = worded[key]
            if field == "text":
                said, fix = f"the same text as principle {other + 1}", "delete one of them"
            else:
                whose = f"principle {other + 1}" if other != index else "its own principle"
                said, fix = f"the same as the {what} of {whose}", "word the opposite of its text"
            yield Repetition(index, field, said, fix)
    first: dict[str, int] = {}
    for index, key in _keys(entries, "id"):
        if key in first:
            said = f"the same id as principle {first[key] + 1}"
            yield Repetition(index, "id", said, "delete one of them")
        first.setdefault(key, index)


def _keys(entries: Sequence[Mapping[str, Any]], field: str) -> Iterator[tuple[int, str]]:
    given = ((index, entry.get(field, "")) for index, entry in enumerate(entries))
    return ((index, principle_key(value)) for index, value in given if value)


def _repetition(
    found: Repetition, root: yaml.Node | None, path: str | os.PathLike[str]
) -> UserError:
    location = ("principles", found.index, found.field)
    where = f"{path}, line {line_of(root, location)}, {_spelled(location)}"
    return UserError(found.what, where=where, fix=found.fix)


def _heirs_among(new: Constitution) -> Callable[[Principle], Principle | None]:
    """A function from an old principle to the new one that continues it; see `diff`."""
    by_id = {p.id: p for p in new.principles}
    wordings = {p.id: p.keys for p in new.principles}
    holders: defaultdict[str, list[str]] = defaultdict(list)
    for id, words in wordings.items():
        for wording in words:
            holders[wording].append(id)

    def heir(old: Principle) -> Principle | None:
        if old.id in by_id:
            return by_id[old.id]
        own, text = old.keys, principle_key(old.text)
        shared = Counter(id for wording in own for id in holders.get(wording, ()))
        related = [
            id
            for id in by_id
            if id in shared
            and (
                text in wordings[id]
                or principle_key(by_id[id].text) in own
                or 2 * shared[id] >= min(len(own), len(wordings[id]))
            )
        ]
        found = max(related, key=lambda id: (text in wordings[id], shared[id]), default=None)
        return by_id[found] if found else None

    return heir


def _kinship(new: Principle) -> Callable[[Principle], tuple[bool, int]]:
    return lambda old: (old.id == new.id, len(old.keys & new.keys))


def _entry(principle: Principle) -> dict[str, Any]:
    left_out = {"wordings"} if principle.wordings == len(principle.members) else set()
    left_out |= set() if principle.absent else {"absent"}
    entry = principle.model_dump(mode="json", exclude=left_out)
    return {name: value for name, value in entry.items() if value not in ("", [])}


def _header(constitution: Constitution) -> str:
    oppose = (
        "#   oppose   change an 'antithesis': what a response that does the opposite follows\n"
        if constitution.is_opposed
        else ""
    )
    discovered = any(p.support for p in constitution.principles)  # others are not reviewed
    merge = (
        "#   merge    add a line 'into: ID', the id of the principle that it becomes a part of\n"
        if discovered
        else ""
    )
    drop_tail = (
        "#            the tail and its trajectories: write 'tail: drop'\n"
        if constitution.tail
        else ""
    )
    return (
        f"# {covered(constitution)} To edit:\n"
        "#   reword   change a 'text' and keep its 'id'\n"
        f"{oppose}"
        "#   drop     delete the entry\n"
        f"{drop_tail}"
        f"{merge}"
        "#   add      a new entry; 'text' is enough\n"
        "# A changed figure has no effect.\n"
    )


def covered(constitution: Constitution) -> str:
    """How many principles there are, and how many trajectories they label where not all."""
    said, tail = f"{len(constitution.principles):,} principles", constitution.tail
    if tail is None:
        return f"{said}."
    return (
        f"{said} label {constitution.coverage:.1%} of the trajectories. The tail, "
        f"{tail.share:.1%}, keeps its own words: "
        f"{tail.principles:,} principles of {tail.support:,} trajectories."
    )


def _others(principle: Principle, limit: int) -> str:
    others, more = other_wordings(principle, limit)
    return " · ".join(map(markdown_text, others)) + (f" (+{more:,})" if more else "")


def other_wordings(principle: Principle, limit: int) -> tuple[list[str], int]:
    """At most so many of a principle's wordings beside its text, and how many more there are."""
    others = [m for m in principle.members if m != principle.text]
    shown = others[:limit]
    unlisted = principle.wordings - len(principle.members)
    return shown, len(others) - len(shown) + unlisted


def _as_user_error(
    error: Any,
    start: int,
    root: yaml.Node | None,
    path: str | os.PathLike[str],
    document: type[Constitution] | type[Draft],
) -> UserError:
    """pydantic's error as a UserError; `start` is the index of the first validated principle."""
    kind, location = error["type"], error["loc"]
    if location[:1] == ("principles",) and len(location) > 1:
        location = ("principles", location[1] + start, *location[2:])
    where = f"{path}, line {line_of(root, location)}, {_spelled(location)}"
    if kind == "extra_forbidden":
        entry = Entry if document is Draft else Principle
        owners: dict[str, type[BaseModel]] = {"principles": entry, "tail": Tail}
        owner = owners.get(str(location[0]), document) if len(location) > 1 else document
        keys = ", ".join(owner.model_fields)
        return UserError("unknown key", where=where, expected=f"one of {keys}")
    requirement = error["msg"].removeprefix("Input should be ")
    what, expected = _MISTAKES.get(kind, ("wrong value", requirement))
    if location == ("tail",):
        what, expected = "this is not a tail", "its figures as they were"
        expected += ", 'keep' or 'drop'" if document is Draft else ""
    return UserError(what, where=where, expected=expected)


_MISTAKES = {
    "missing": ("it is missing", ""),
    "model_type": ("this is not a principle", "a mapping with 'text:'"),
    "string_pattern_mismatch": ("the text is empty", ""),
    "string_type": ("this is not a text", "a text, in quotes where YAML reads it as another type"),
    "tuple_type": ("this is not a list", "a list, each item after '- '"),
}
"""pydantic's error types in words for the person who edited the file: (what, expected)."""


def _spelled(location: Sequence[str | int]) -> str:
    """("principles", 0, "text") as "principle 1, 'text'"."""
    match location:
        case ("principles", int(index), *rest):
            return ", ".join([f"principle {index + 1}", *(f"'{name}'" for name in rest[:1])])
        case _:
            return f"'{location[0]}'" if location else "the file"
