"""The user's prompts and gold responses, as `Prompt` rows; bad input is refused before any compute.

The flows call `load_corpus` first of all, and `split` to give every EM iteration and the evaluation
prompts of their own. A row that cannot be used is an error or a `Rejected` row, never just missing.
"""

from __future__ import annotations

import hashlib
import itertools
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, model_validator

from constitutions.errors import UserError, UserErrors
from models.policy import Message
from models.settings import Settings
from tasks.corpus.files import checked_file, file_records, hub_data
from tasks.corpus.formats import ADAPTERS, Columns, Format, Golds, detected
from tasks.corpus.rows import Records, RowError
from tasks.rows import Prompt, Rejected, prompt_id

REPORTED = 20
"""Bad rows that are named; the rest are counted."""
MOST_BAD_ROWS = {"stop": 1_000, "reject": 10_000}
"""Bad rows after which reading stops; with "reject", only while no row is good."""


LONGEST = 20_000
"""Characters of the longest prompt, and of the longest gold response, that is accepted."""


class CorpusSettings(Settings):
    """One source of prompts with gold responses: a file, or a data set by its hub name."""

    path: str | None = None
    """JSONL, JSON, CSV (each also gzipped) or Parquet file."""
    name: str | None = None
    """Name of a data set for the `datasets` library, in place of a path."""
    subset: str | None = None
    """Configuration of the named data set, where it has several."""
    split: str = "train"
    """Split of the named data set."""
    revision: str | None = None
    """Commit or tag of the named data set; the newest when empty."""
    format: Literal["auto", Format] = "auto"
    """The format of the columns; "auto" detects it row by row, by names and types of the values."""
    prompt_column: str = "prompt"
    """Column with the prompt, as text or chat messages (plain format)."""
    gold_column: str = "gold"
    """Column with the gold response, or with a list of several, of which the nearest to a response
    counts (plain format). Empty: there are none, which SAMI does not need."""
    rows: int | None = Field(default=None, ge=1)
    """Use so many rows of this source, drawn by the seed; all when empty."""
    on_bad_row: Literal["stop", "reject"] = "stop"
    """Refuse the whole source at a bad row, or reject the row with its reason and go on."""

    @model_validator(mode="after")
    def _one_source(self) -> CorpusSettings:
        if (self.path is None) == (self.name is None):
            raise ValueError("give either a path or the name of a data set")
        return self

    @property
    def label(self) -> str:
        """What rows call their source: the file's name or the data set's."""
        return Path(self.path).name if self.path else str(self.name)


@dataclass(frozen=True, slots=True, kw_only=True)
class Corpus:
    """The usable rows of all sources in their order, and the rejected ones."""

    rows: list[Prompt]
    rejected: list[Rejected]


def load_corpus(sources: Sequence[CorpusSettings], seed: int = 0) -> Corpus:
    """Read and check every source; a prompt that occurs twice counts as a bad row.

    Args:
        seed: draws the rows of the sources that are limited to a number of `rows`.

    Raises:
        UserErrors: everything that is wrong with any source, the first bad rows named.
    """
    corpus, seen = Corpus(rows=[], rejected=[]), dict[str, str]()
    errors, more = list[UserError](), 0
    for source in sources:
        try:
            rows, problems = _load(source, seen)
            if problems and source.on_bad_row == "stop":
                named = problems[: 1 if _all_alike(rows, problems) else REPORTED]
                errors += [_error(source, *problem) for problem in named]
                more += len(problems) - len(named)
                if len(problems) == MOST_BAD_ROWS["stop"]:
                    what = f"reading stopped after {len(problems):,} bad rows"
                    errors.append(UserError(what, where=str(source.path or source.name)))
                continue
            corpus.rows.extend(_drawn(rows, source.rows, seed))
            corpus.rejected.extend(_rejected(source, *problem) for problem in problems)
        except UserError as error:
            errors.append(error)
    if errors:
        raise UserErrors(errors, more=more)
    return corpus


def split(rows: Sequence[Prompt], sizes: Sequence[int], seed: int) -> list[list[Prompt]]:
    """Disjoint sets of prompts of the given sizes, for the evaluation and the EM iterations.

    The order is that of hash(seed, prompt_id): one row more or less moves at most one row across
    each border, and mixed sources are mixed alike in every set.

    Raises:
        UserError: there are fewer rows than the sizes need together.
    """
    if sum(sizes) > len(rows):
        raise UserError(
            f"the corpus has {len(rows):,} usable prompts, the experiment needs {sum(sizes):,}",
            expected=f"at least {' + '.join(f'{size:,}' for size in sizes)} disjoint prompts",
            fix="add prompts, or lower the numbers of prompts or iterations",
        )
    order = iter(sorted(rows, key=lambda row: _draw(seed, row.prompt_id)))
    return [list(itertools.islice(order, size)) for size in sizes]


def shuffle_golds(rows: Sequence[Prompt], seed: int) -> list[Prompt]:
    """The control experiment: the same prompts in their order, each with another prompt's gold.

    No prompt keeps a gold text: with equal golds side by side, a rotation by the size of the
    largest group leaves none in place. Of several golds those that the prompt has itself are left
    out.

    Raises:
        UserError: more than half of the rows share one gold, so that some would have to keep it; or
            all golds of a prompt are among those of the one that they would go to.
    """
    largest = max(Counter(row.gold for row in rows).values(), default=0)
    if 2 * largest > len(rows):
        raise UserError(
            f"the gold responses of {len(rows)} rows cannot be shuffled: {largest} are the same",
            expected="no gold response on more than half of the rows",
        )
    order = sorted(rows, key=lambda row: (_draw(seed, row.gold), _draw(seed, row.prompt_id)))
    moved = order[largest:] + order[:largest]
    dealt = {row.prompt_id: _dealt(row, other) for row, other in zip(order, moved, strict=True)}
    return [dealt[row.prompt_id] for row in rows]


def _dealt(row: Prompt, other: Prompt) -> Prompt:
    """The prompt with another one's golds, without its own."""
    golds = [gold for gold in other.golds if gold not in row.golds]
    if not golds:
        raise UserError(
            "the gold responses cannot be shuffled: a prompt has all those of another one",
            where=f"{row.source} and {other.source}",
            expected="golds of their own for every prompt",
        )
    return replace(row, gold=golds[0], other_golds=tuple(golds[1:]))


def source_digests(sources: Sequence[CorpusSettings]) -> dict[str, str]:
    """What the rows came from, by "source/<label>": sha256 of a file, a data set's fingerprint.

    Raises:
        UserError: a source cannot be read.
    """
    return {f"source/{i}/{s.label}": _source_digest(s) for i, s in enumerate(sources)}


def _source_digest(source: CorpusSettings) -> str:
    if source.path is None:
        return str(_hub_data(source)._fingerprint)
    try:
        with checked_file(Path(source.path)).open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        what = f"the file cannot be read: {error.strerror}"
        raise UserError(what, where=source.path) from None


def _draw(seed: int, text: str) -> bytes:
    return hashlib.blake2b(f"{seed}|{text}".encode(), digest_size=16).digest()


# Bad rows

Problems = list[tuple[int, RowError]]
"""Each bad row's number, and what is wrong with it."""


def _error(source: CorpusSettings, row: int, problem: RowError) -> UserError:
    where = f"{source.path or source.name}, row {row}"
    return UserError(
        problem.detail,
        where=f"{where}, field {problem.field!r}" if problem.field else where,
        expected=problem.expected,
        fix="mend the row, or leave bad rows out (on_bad_row: reject)",
    )


def _rejected(source: CorpusSettings, row: int, problem: RowError) -> Rejected:
    field = f"field {problem.field!r}: " if problem.field else ""
    return Rejected(
        prompt_id=problem.row_id,
        sample=None,
        source=f"{source.label}:{row}",
        reason=problem.reason,
        detail=field + problem.detail,
    )


def _all_alike(rows: Sequence[Prompt], problems: Problems) -> bool:
    """Every row has the same problem, such as a wrong column name: once is enough."""
    return not rows and len({(p.field, p.detail) for _, p in problems}) == 1


# One source


def _load(source: CorpusSettings, seen: dict[str, str]) -> tuple[list[Prompt], Problems]:
    """The good rows and the bad; `seen` maps the prompt ids of all sources to where they were."""
    rows, problems, number = list[Prompt](), Problems(), 0
    most = MOST_BAD_ROWS[source.on_bad_row]
    columns = Columns(source.prompt_column, source.gold_column)
    usual: Format | None = None if source.format == "auto" else source.format
    for number, record in _records(source):
        try:
            if isinstance(record, RowError):
                raise record
            found = detected(record, columns) if source.format == "auto" else usual
            usual = usual or found  # for a later row that lacks the column that shows the format
            adapt = ADAPTERS[found or usual or "plain"]
            where = f"{source.label}:{number}"
            rows.append(_prompt(*adapt(record, columns), columns, where, seen))
        except RowError as problem:
            problem.__traceback__ = None  # it would keep the row
            problems.append((number, problem))
        if len(problems) == most and (source.on_bad_row == "stop" or not rows):
            break
    if not number:
        raise UserError("there are no rows", where=str(source.path or source.name))
    if len(problems) == most and not rows and source.on_bad_row == "reject":
        what = f"none of the first {most:,} rows can be used: {problems[0][1].detail}"
        raise UserError(what, where=str(source.path or source.name))
    return rows, problems


def _drawn(rows: list[Prompt], limit: int | None, seed: int) -> list[Prompt]:
    if limit is None or limit >= len(rows):
        return rows
    drawn = {row.prompt_id for row in split(rows, [limit], seed)[0]}
    return [row for row in rows if row.prompt_id in drawn]


def _prompt(
    prompt: tuple[Message, ...], golds: Golds, columns: Columns, where: str, seen: dict[str, str]
) -> Prompt:
    """The row, checked for its length and against the prompts that were `seen`."""
    row_id = prompt_id(prompt)
    characters = sum(len(message["content"]) for message in prompt)
    longest = max(map(len, golds), default=0)
    for field, length in ((columns.prompt, characters), (columns.gold, longest)):
        if length > LONGEST:
            raise RowError(
                "too long",
                f"the text has {length:,} characters",
                field=field,
                expected=f"at most {LONGEST:,}",
                row_id=row_id,
            )
    if row_id in seen:
        raise RowError(
            "duplicate",
            f"the same prompt as {seen[row_id]}",
            field=columns.prompt,
            expected="every prompt once",
            row_id=row_id,
        )
    seen[row_id] = where
    gold, *others = dict.fromkeys(golds) or ("",)
    return Prompt(
        prompt_id=row_id, prompt=prompt, gold=gold, source=where, other_golds=tuple(others)
    )


def _records(source: CorpusSettings) -> Records:
    if source.path is None:
        return iter(enumerate(_hub_data(source), start=1))
    return file_records(Path(source.path))


def _hub_data(source: CorpusSettings) -> Any:
    return hub_data(str(source.name), source.subset, source.split, source.revision)
