"""What the benchmarks share: reading their published files, and a mean with its uncertainty.

Each benchmark describes the rows of its files as pydantic models; this module reads them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any, TypeVar

import numpy as np
from pydantic import AfterValidator, BaseModel, ValidationError

from constitutions.errors import UserError, UserErrors
from models.policy import Message
from tasks.corpus.files import file_records, hub_data
from tasks.corpus.rows import Record, Records, RowError
from tasks.judging.winrate import CONFIDENCE, Mean
from tasks.rows import Prompt, prompt_id

Row = TypeVar("Row")
Model = TypeVar("Model", bound=BaseModel)
Source = Path | str
"""Where a benchmark's rows are: see `records`."""
HUB = "hub:"

REPORTED = 20
"""Bad rows that an error names; the rest are counted."""
MOST_BAD_ROWS = 10_000
"""After so many a file is read no further."""


def _encodable(text: str) -> str:
    text.encode()  # of a lone surrogate: UnicodeEncodeError, a ValueError that pydantic reports
    return text


ValidText = Annotated[str, AfterValidator(_encodable)]
"""Text that can be written as UTF-8; it may be empty."""


def clustered_mean(groups: Sequence[tuple[float, int]], *, seed: int, resamples: int) -> Mean:
    """The mean of values that come in groups, with a bootstrap interval over the groups.

    What belongs to one prompt (the instructions of a response, the turns of a dialogue) fails
    together: to resample the values one by one would make the interval too narrow.

    Args:
        groups: (sum of the values, their number) of each group; at least one number is not 0.
        seed: seeds the bootstrap.
        resamples: bootstrap samples of the groups.
    """
    kinds = Counter(group for group in groups if group[1])
    sums, counts = np.array(list(kinds), dtype=float).T
    times = np.array(list(kinds.values()))
    # A resample is how often each kind of group is drawn: the same distribution, and quicker.
    n = int(times.sum())
    draws = np.random.default_rng(seed).multinomial(n, times / n, size=resamples)
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile((draws @ sums) / (draws @ counts), [tail, 1 - tail])
    return Mean(float(times @ sums) / float(times @ counts), float(low), float(high))


def records(source: Source) -> Records:
    """The rows of a file, or of a data set on the hub.

    Args:
        source: the path of a file of any kind that `tasks.corpus.files` reads, or
            "hub:NAME[:SUBSET]:SPLIT[@REVISION]", as `datasets` knows it; the split may be left
            out where it is "train".

    Raises:
        UserError: there is no such file or data set, or it cannot be read.
    """
    if str(source).startswith(HUB):
        return enumerate(_hub(str(source)), start=1)
    return file_records(Path(source))


def _hub(source: str) -> Any:
    name, _, revision = source.removeprefix(HUB).partition("@")
    name, *rest = name.split(":")
    if not name or len(rest) > 2:
        raise UserError(
            "this is no data set's name",
            where=source,
            expected="hub:NAME[:SUBSET]:SPLIT[@REVISION]",
        )
    subset, split = rest[0] if len(rest) == 2 else None, rest[-1] if rest else "train"
    return hub_data(name, subset, split, revision or None)


def read_records(
    source: Source,
    parse: Callable[[Record], Row],
    identity: Callable[[Row], Hashable] | None = None,
) -> list[Row]:
    """Every row of a benchmark's file, parsed, in its order; row 1 is the first (below a header).

    Args:
        source: see `records`.
        parse: a record's row; it may raise RowError or pydantic's ValidationError.
        identity: what no two rows share, so that answers can be joined by it.

    Raises:
        UserError: there is no such file, it has no row, or it cannot be read.
        UserErrors: some rows are not what they should be. A benchmark with rows left out would
            give a number that compares with nobody's, so one bad row is enough.
    """
    rows, seen, errors = list[Row](), set[Hashable](), list[UserError]()
    for number, record in records(source):
        where = f"{source}, row {number}"
        try:
            row = _parsed(record, parse, where)
            if identity and identity(row) in seen:
                raise UserError(f"{str(identity(row))[:80]} occurs a second time", where=where)
            if identity:
                seen.add(identity(row))
            rows.append(row)
        except UserError as error:
            errors.append(error)
            if len(errors) == MOST_BAD_ROWS:
                break
    if errors:
        raise UserErrors(errors[:REPORTED], more=max(len(errors) - REPORTED, 0))
    if not rows:
        raise UserError("there are no rows", where=str(source), expected="at least one")
    return rows


def _parsed(record: Record | RowError, parse: Callable[[Record], Row], where: str) -> Row:
    """The record as a row; raises UserError with all that is wrong with it."""
    try:
        if isinstance(record, RowError):
            raise record
        return parse(record)
    except RowError as problem:
        place = f"{where}, field {problem.field!r}" if problem.field else where
        raise UserError(str(problem), where=place, expected=problem.expected) from None
    except ValidationError as error:
        found = [
            f"field '{'.'.join(map(str, e['loc']))}': {e['msg'].removeprefix('Value error, ')}"
            for e in error.errors(include_url=False)
        ]
        raise UserError("; ".join(found), where=where) from None


def read_rows(
    source: Source, row_type: type[Model], identity: Callable[[Model], Hashable] | None = None
) -> list[Model]:
    """Every row of a file whose rows pydantic describes; columns that it does not name are ignored.

    Raises:
        UserError: see `read_records`.
    """
    return read_records(source, row_type.model_validate, identity)


def spread(rows: Sequence[Row], limit: int | None) -> list[Row]:
    """At most `limit` rows, evenly spaced: a benchmark's first rows are all of one kind."""
    if limit is None or limit >= len(rows):
        return list(rows)
    return [rows[i * len(rows) // limit] for i in range(limit)]


def single_turns(texts: Iterable[str], source: str) -> list[Prompt]:
    """Requests of one turn as prompts without gold; the same text twice is one prompt."""
    prompts = dict[str, Prompt]()
    for number, text in enumerate(texts, start=1):
        row = single_turn(text, f"{source}:{number}")
        prompts.setdefault(row.prompt_id, row)
    return list(prompts.values())


def single_turn(text: str, source: str) -> Prompt:
    """A request of one turn as a prompt without gold."""
    turns = (Message(role="user", content=text),)
    return Prompt(prompt_id=prompt_id(turns), prompt=turns, gold="", source=source)


def write_lines(path: Path, lines: Iterable[str]) -> None:
    """Write JSON Lines into a benchmark's folder among a stage's outputs."""
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
