"""Judged pairs as rates: the flat figures that MLflow charts.

A figure that is undefined is left out: never NaN, never 0.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress

from constitutions.errors import UserError
from tasks.judging.length_control import LengthConfoundedError, LengthControlled, length_controlled
from tasks.judging.winrate import (
    BothOrders,
    Mean,
    NoOutcomeError,
    TooManyFailedError,
    WinRate,
    agreement,
    order_effect,
    win_rate,
)
from tasks.rows import Comparison, Prompt


def win_rates(
    comparisons: Iterable[Comparison],
    *,
    seed: int,
    resamples: int = 10_000,
    max_failed: float = 1.0,
) -> dict[str, WinRate]:
    """The win rate of every kind of comparison, by name.

    The names: "refined_vs_0", "refined_vs_previous", "initial_vs_0", "initial_vs_previous" (like
    against like), "refined_vs_initial_0" and "refined_vs_own_initial". At iteration 1 the previous
    policy is iteration 0, and both names are given.

    Raises:
        UserError: too many judgements of one kind failed (see `rate_of`).
    """
    how = {"seed": seed, "resamples": resamples}
    return {
        name: rate_of(rows, f"win rate {name}", max_failed=max_failed, **how)
        for name, rows in _kinds(comparisons).items()
    }


def _kinds(comparisons: Iterable[Comparison]) -> dict[str, list[Comparison]]:
    kinds: dict[str, list[Comparison]] = {}
    for row in comparisons:
        for name in _names(row):
            kinds.setdefault(name, []).append(row)
    return kinds


def _names(row: Comparison) -> list[str]:
    first, own, previous = row.against == 0, row.against == row.iteration, row.iteration - 1
    if row.answer != row.reference:
        names = {"refined_vs_initial_0": first, "refined_vs_own_initial": own}
    else:
        names = {
            f"{row.answer}_vs_0": first,
            f"{row.answer}_vs_previous": row.against == previous,
        }
    return [name for name, fits in names.items() if fits] or [f"{row.answer}_vs_{row.against}"]


def rate_of(
    rows: Sequence[Comparison],
    what: str,
    *,
    seed: int,
    resamples: int = 10_000,
    max_failed: float = 1.0,
) -> WinRate:
    """The win rate of comparisons of one kind.

    Raises:
        UserError: every judgement failed, or more than the share `max_failed`: with the counts,
            the commonest reason, the judge, and `what` was compared.
    """
    try:
        return win_rate(
            [row.outcome for row in rows], seed=seed, resamples=resamples, max_failed=max_failed
        )
    except (NoOutcomeError, TooManyFailedError) as error:
        failures = [row.failure or "" for row in rows if row.outcome is None]
        judge = rows[0].judge if rows else "none"
        raise too_many_failed(failures, len(rows), what, judge, max_failed) from error


def too_many_failed(
    failures: Sequence[str], of: int, what: str, judge: str, max_failed: float
) -> UserError:
    """The error where too many judgements failed: how many, mostly why, and what to do."""
    (reason, count), *_ = Counter(failures).most_common(1) or [("nothing was judged", 0)]
    some = f"{len(failures)} of {of}" if len(failures) < of else f"all {of}"
    return UserError(
        f"{some} judgements failed; {count} of them: {reason}",
        where=f"{what}, judge {judge}",
        expected=f"a judge that can grade these prompts, with at most {max_failed:.0%} failures",
        fix="choose another judge, or accept more with evaluate.max_failed",
    )


def win_rate_metrics(rates: Mapping[str, WinRate]) -> dict[str, float]:
    """Each rate in [0, 1] with its interval, p-value and failed judgements, as flat figures."""
    figures: dict[str, float] = {}
    for name, rate in rates.items():
        figures |= rate_metrics(f"win_rate/{name}", rate)
    return figures


def rate_metrics(name: str, rate: WinRate) -> dict[str, float]:
    """A rate under its name, and what belongs to it."""
    more = {f"{name}_p": rate.p_value, f"{name}_failed": float(rate.failed)}
    return interval_metrics(name, rate) | more


def length_metrics(
    comparisons: Iterable[Comparison], *, seed: int, resamples: int = 1_000
) -> dict[str, float]:
    """What every win rate would be at equal lengths: `win_rate/<name>_length_controlled`.

    The names are those of `win_rates`, each with its interval in [0, 1]. A kind of comparison of
    which every judgement failed, or one side is always longer, has no such figure.

    Args:
        resamples: bootstrap samples; each is a fit, so that these cost more than a win rate's.
    """
    figures: dict[str, float] = {}
    for name, rows in _kinds(comparisons).items():
        with suppress(NoOutcomeError, LengthConfoundedError):
            found = rate_at_equal_lengths(rows, seed=seed, resamples=resamples)
            figures |= interval_metrics(f"win_rate/{name}_length_controlled", found)
    return figures


def rate_at_equal_lengths(
    rows: Sequence[Comparison], *, seed: int, resamples: int = 1_000
) -> LengthControlled:
    """The length-controlled win rate of comparisons of one kind; lengths are in characters.

    Raises:
        NoOutcomeError: every judgement failed.
        LengthConfoundedError: one side is longer in every judged pair.
    """
    return length_controlled(
        [row.outcome for row in rows],
        [len(row.ours) for row in rows],
        [len(row.theirs) for row in rows],
        seed=seed,
        resamples=resamples,
    )


def interval_metrics(name: str, rate: WinRate | LengthControlled | Mean) -> dict[str, float]:
    """A figure under its name, with its interval under `<name>_low` and `<name>_high`."""
    return {name: rate.rate, f"{name}_low": rate.low, f"{name}_high": rate.high}


def source_metrics(
    comparisons: Iterable[Comparison],
    prompts: Sequence[Prompt],
    *,
    seed: int,
    resamples: int = 10_000,
) -> dict[str, float]:
    """Win rates against iteration 0 for each source of prompts, when there are several.

    A source is what stands before the row number in `Prompt.source`: a corpus of a mixture, or
    "planted/seen" and "planted/held", the combinations that were and were never mined. A source
    whose judgements all failed has no rate; they count as failures in the rate over all sources.
    """
    sources = {p.prompt_id: p.source.rpartition(":")[0] or p.source for p in prompts}
    groups: dict[str, list[Comparison]] = {}
    for row in comparisons:
        if row.against == 0:
            groups.setdefault(sources[row.prompt_id], []).append(row)
    figures: dict[str, float] = {}
    for source, rows in groups.items() if len(groups) > 1 else ():
        judged = [row for row in rows if row.outcome is not None]
        rates = win_rates(judged, seed=seed, resamples=resamples)
        for name in ("refined_vs_0", "initial_vs_0", "refined_vs_initial_0"):
            if name in rates:
                figures |= interval_metrics(f"win_rate/{plain(source)}/{name}", rates[name])
    return figures


def plain(name: str) -> str:
    """A name as MLflow allows it within a metric's."""
    return re.sub(r"[^\w. -]+", "-", name).strip("-")


# How good the judges are --------------------------------------------------------------------


def order_metrics(name: str, rows: Iterable[Comparison]) -> dict[str, float]:
    """Bias, consistency and failures of a judge that read pairs in both orders; else nothing."""
    both = [_both_orders(row) for row in rows if row.verdicts]
    return order_figures(name, both)


def order_figures(name: str, both: Sequence[BothOrders]) -> dict[str, float]:
    """`<name>/bias` in [-1, 1], `<name>/consistency` and `<name>/failed_share` in [0, 1]."""
    if not both:
        return {}
    failed = sum(None in pair for pair in both) / len(both)
    figures = {f"{name}/failed_share": failed}
    if failed < 1:
        effect = order_effect(both)
        figures |= {f"{name}/bias": effect.bias, f"{name}/consistency": effect.consistency}
    return figures


def _both_orders(row: Comparison) -> BothOrders:
    ours, theirs = sorted(row.verdicts, key=lambda v: not v.ours_first)
    return BothOrders(ours.outcome, theirs.outcome)


def agreement_metrics(
    first: Sequence[Comparison], others: Sequence[Comparison]
) -> dict[str, float]:
    """Cohen's κ of each further judge with the first, over the pairs that both were asked about.

    `judge/kappa/<judge>` (left out where chance alone would agree on everything) and
    `judge/agreement/<judge>`, the share in [0, 1] on which both say the same. Pairs that need no
    judge (an empty answer, the same text twice) are left out: all judges agree there.
    """
    outcomes = {_place(row): row.outcome for row in first}
    judges: dict[str, list[Comparison]] = {}
    for row in others:
        if row.asked:
            judges.setdefault(row.judge, []).append(row)
    figures: dict[str, float] = {}
    for judge, rows in judges.items():
        with suppress(NoOutcomeError):
            found = agreement([outcomes[_place(r)] for r in rows], [r.outcome for r in rows])
            figures[f"judge/agreement/{plain(judge)}"] = found.observed
            if found.kappa is not None:
                figures[f"judge/kappa/{plain(judge)}"] = found.kappa
    return figures


def _place(row: Comparison) -> tuple[str, str, int, str]:
    return row.prompt_id, row.answer, row.against, row.reference
