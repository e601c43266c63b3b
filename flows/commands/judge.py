"""`staple judge`: two policies' response files (SAMI's format), judged under their constitutions.

The judges, settings and figures are those of `evaluate`. Judgements are kept in $STAPLE_HOME, so
that a killed run continues.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import TypeVar

from rich.text import Text

from constitutions.errors import UserError, UserErrors
from constitutions.terminal import console
from flows.commands.output import check_output
from flows.commands.tables import table
from flows.experiment import home
from flows.schema import ExperimentSettings
from flows.settings import load_settings, parse_override
from models.endpoint.client import Limits
from models.endpoint.probing import check_server
from models.files import file_sha256, text_sha256, write_text
from models.judges.base import Judge
from models.judges.registry import JudgeSettings, kinds_that, open_policy
from models.policy import FINGERPRINT, Policy
from tasks.evaluate import EvaluateSettings
from tasks.judging.judge import check_judge, judge_notes, judge_uses
from tasks.judging.length_control import LengthConfoundedError, LengthControlled
from tasks.judging.pairs import AnswerPair
from tasks.judging.panel import Panel
from tasks.judging.rates import order_metrics, rate_at_equal_lengths, rate_of
from tasks.judging.winrate import WinRate
from tasks.record import locks
from tasks.record.code import code_version
from tasks.record.tables import write_rows
from tasks.record.work import Metrics, Workspace
from tasks.rows import Comparison, Rejected
from tasks.sami.responses import (
    JudgedRow,
    ResponsePairs,
    judged_rows,
    read_responses,
    response_pairs_of,
    with_constitution,
)
from tasks.score import ScoreSettings

T = TypeVar("T")
SETTINGS = ("judge", "max_failed", "resamples", "shard_size")
"""The settings that this command reads: those of `evaluate`, and `shard_size`."""
FORMATS = (".parquet", ".json")
EXAMPLE = "--set judge.kind=pairwise --set judge.policy.model=NAME --set judge.endpoint=URL"


@dataclass(frozen=True, kw_only=True)
class Judged:
    """The outcome of judging two response files."""

    ours: Path
    theirs: Path
    judge: str
    rows: Sequence[JudgedRow]
    rejected: Sequence[Rejected]
    """Rows without a partner."""
    rate: WinRate
    controlled: LengthControlled | None
    confounded: str
    """Why there is no length-controlled rate; empty where there is one."""
    lengths: tuple[float, float]
    """Mean characters of the first policy's answers, and of the second's."""
    orders: Metrics
    """`judge/bias`, `judge/consistency` of a judge that reads both orders; else empty."""


def judge_files(
    ours: Path,
    theirs: Path,
    overrides: Sequence[str] = (),
    *,
    seed: int = 0,
    out: Path | None = None,
    force: bool = False,
) -> Judged:
    """Judge every pair of responses to the same question under the same constitution.

    An LLM judge says which response follows the constitution better; the rubric "principle"
    replaces one that shows no principle. A reward model reads the constitution in the prompt.

    Args:
        overrides: settings of `evaluate` as "judge.kind=pairwise"; see SETTINGS.
        seed: of the bootstrap, and of a sampled judge.
        out: a .parquet or .json file for the comparisons.
        force: judge all pairs again.

    Raises:
        UserErrors: all mistakes in settings, judge, files and `out`, before anything is judged.
        UserError: the judge cannot be opened, or more than `max_failed` of its judgements failed.
    """
    problems: list[UserError] = []

    def attempt(look: Callable[[], T]) -> T | None:
        try:
            return look()
        except UserError as error:
            problems.append(error)
        return None

    chosen = attempt(lambda: judging_settings(overrides))
    left, right = (attempt(partial(read_responses, path)) for path in (ours, theirs))
    pairs = attempt(partial(response_pairs_of, left, right)) if left and right else None
    if out:
        attempt(partial(check_output, out, FORMATS))
    if problems or chosen is None or pairs is None:
        raise UserErrors(problems)
    settings = chosen.evaluate
    rows = _judged(settings, pairs, (ours, theirs), seed, force, chosen.shard_size)
    found = _measured(settings, pairs, rows, seed, (ours, theirs))
    if out:
        _write(out, found.rows)
    return found


def judging_settings(overrides: Sequence[str]) -> ExperimentSettings:
    """Settings with a judge (`evaluate.judge`) that needs only a constitution.

    Raises:
        UserErrors: wrong names and values, settings that have no effect here, a judge that needs
            the gold, or one whose model does not exist.
    """
    problems = [p for override in overrides if (p := _without_effect(override))]
    if problems:
        raise UserErrors(problems)
    try:
        named = [o if o.startswith("shard_size=") else f"evaluate.{o}" for o in overrides]
        settings = load_settings("staple judge", named, text="{}")
    except UserErrors as error:
        raise UserErrors([_as_given(e) for e in error.errors], more=error.more) from None
    judge = settings.evaluate.judge
    if not _able(judge.judge_type):
        raise UserError(
            f"a judge of kind '{judge.kind}' needs a gold response or an embedded world's prompts, "
            "and response files have neither",
            where="setting 'judge.kind'",
            expected=kinds_that(_able),
            fix=f"for instance {EXAMPLE}",
        )
    if judge.show_gold:
        raise UserError("response files have no gold to show", where="setting 'judge.show_gold'")
    check_judge(judge)
    evaluate = settings.evaluate.model_copy(update={"judge": judge.about_principles()})
    return settings.model_copy(update={"evaluate": evaluate})


def _able(judge: type[Judge]) -> bool:
    """Whether a kind of judge needs neither a gold response nor an embedded world."""
    kind = judge.on(oracle=None)
    return not (kind.needs_gold or kind.needs_oracle)


def _without_effect(override: str) -> UserError | None:
    try:
        name, _ = parse_override(override)
    except UserError as error:
        return error
    if name.partition(".")[0] in SETTINGS:
        return None
    return UserError(
        "this setting has no effect on judging files",
        where=f"--set {override}",
        expected=f"one of {', '.join(SETTINGS)} or their parts",
    )


def _as_given(error: UserError) -> UserError:
    """The error with the setting's name as the user wrote it."""
    where = error.where.replace("setting 'evaluate.", "setting '")
    return UserError(error.what, where=where, expected=error.expected, fix=error.fix)


# Judging ------------------------------------------------------------------------------------


def _judged(
    settings: EvaluateSettings,
    pairs: ResponsePairs,
    paths: tuple[Path, Path],
    seed: int,
    force: bool,
    shard_size: int,
) -> list[Comparison]:
    """A row for every pair; what an earlier run judged is reused."""
    policy, what = settings.judge.policy, f"staple judge {paths[0].name} {paths[1].name}"
    folder = home() / "judged" / _digest(settings, paths, seed)
    with locks.held(folder.with_suffix(".lock"), what):
        if force:
            shutil.rmtree(folder, ignore_errors=True)
        with locks.device(policy.answers_on if policy else "cpu", what):
            return _compared(settings, pairs.pairs, Workspace(folder, shard_size), seed)


def _digest(settings: EvaluateSettings, paths: tuple[Path, Path], seed: int) -> str:
    """Identifies files, judge and seed, but not where the files are."""
    dump = settings.judge.model_dump(mode="json", context=FINGERPRINT)
    facts = {
        "files": [(path.name, file_sha256(path)) for path in paths],  # the record has the names
        "judge": dump | judge_notes(settings.judge, home()),
        "seed": seed,
        "code": code_version(
            "tasks.judging.panel", "tasks.sami.responses", *judge_uses(settings.judge)
        ),
    }
    return text_sha256(json.dumps(facts, sort_keys=True))


def _compared(
    settings: EvaluateSettings, pairs: Sequence[AnswerPair], work: Workspace, seed: int
) -> list[Comparison]:
    if not settings.judge.judge_type.reads_principle:
        pairs = [with_constitution(pair) for pair in pairs]
    with Panel(
        oracle=None,
        scoring=ScoreSettings(),
        model="ours",
        work=work,
        iteration=0,
        seed=seed,
        resamples=settings.resamples,
        max_failed=settings.max_failed,
        open_policy=_open,
    ) as panel:
        (rows,) = panel.compare("comparisons", pairs, [settings.judge])
    return rows


def _open(judge: JudgeSettings) -> Policy:
    """The judge's model; an endpoint that does not answer is reported within seconds."""
    if judge.policy and judge.policy.endpoint:
        check_server(judge.policy, adapters=False, limits=Limits(start=10))
    return open_policy(judge)


# Figures ------------------------------------------------------------------------------------


def _measured(
    settings: EvaluateSettings,
    pairs: ResponsePairs,
    rows: Sequence[Comparison],
    seed: int,
    paths: tuple[Path, Path],
) -> Judged:
    how: dict[str, int] = {"seed": seed, "resamples": settings.resamples}
    rate = rate_of(rows, "win rate", max_failed=settings.max_failed, **how)
    controlled: LengthControlled | None = None
    confounded = ""
    try:
        controlled = rate_at_equal_lengths(rows, **how)
    except LengthConfoundedError as error:
        confounded = str(error)
    return Judged(
        ours=paths[0],
        theirs=paths[1],
        judge=rows[0].judge,
        rows=judged_rows(pairs, rows),
        rejected=pairs.rejected,
        rate=rate,
        controlled=controlled,
        confounded=confounded,
        lengths=(fmean(len(r.ours) for r in rows), fmean(len(r.theirs) for r in rows)),
        orders=order_metrics("judge", rows),
    )


def _write(out: Path, rows: Sequence[JudgedRow]) -> None:
    if out.suffix == ".json":
        write_text(out, json.dumps([asdict(row) for row in rows], indent=1))
        return
    write_rows(out, rows, JudgedRow)


def show_judged(found: Judged) -> None:
    """Print the win rate and lengths of two response files, and the judge's position bias."""
    rate, controlled = found.rate, found.controlled
    rows = {
        "ours": found.ours.name,
        "theirs": found.theirs.name,
        "judge": found.judge,
        "pairs judged": f"{rate.n:,}",
        "wins / ties / losses": f"{rate.wins:,} / {rate.ties:,} / {rate.losses:,}",
        "failed": f"{rate.failed:,}",
        "win rate": f"{_interval(rate)}, sign test p = {rate.p_value:.2g}",
        "length-controlled": _interval(controlled) if controlled else f"– ({found.confounded})",
        "mean characters": f"{found.lengths[0]:,.1f} ours, {found.lengths[1]:,.1f} theirs",
    }
    orders = {"judge/bias": "position bias", "judge/consistency": "consistency of orders"}
    rows |= {name: f"{found.orders[n]:.2f}" for n, name in orders.items() if n in found.orders}
    title = "which policy follows the constitution better? 95 % intervals"
    cells = [(name, Text(value)) for name, value in rows.items()]
    console.print(table(title, ("figure", "value"), cells, texts=range(2)))
    if found.rejected:
        console.print(f"{len(found.rejected):,} rows are in no pair:")
    for row in found.rejected[:10]:
        console.print(Text(f"  {row.source}: {row.reason}; {row.detail}"))
    if len(found.rejected) > 10:
        console.print("  …")


def _interval(rate: WinRate | LengthControlled) -> str:
    return f"{rate.rate:.3f} [{rate.low:.3f}, {rate.high:.3f}]"
