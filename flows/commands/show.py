"""What the command line prints: tables and panels, all in one place."""

from __future__ import annotations

import math
import os
import shutil
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.box import SIMPLE_HEAD
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from constitutions.constitution import Changes, Principle, load
from constitutions.terminal import console
from flows.baselines import Run, row
from flows.commands.ask import ConstitutionAnswers, PolicyAnswer
from flows.commands.compare import Compared
from flows.experiment import record_of
from flows.methods import method_of
from flows.plan.cost import GIB
from flows.plan.plan import Iterations, Plan
from flows.publish import iteration_metrics, rate_text
from flows.schema import ExperimentSettings
from flows.states import State, stage_states
from tasks.judging.length_control import LengthControlled
from tasks.judging.winrate import WinRate
from tasks.record.store import Attempt
from tasks.record.work import Metrics
from tasks.sami.draw import pool_of
from tasks.sami.write import Written
from tasks.stages import STAGES

if TYPE_CHECKING:
    from flows.commands.judge import Judged
    from models.training.export import Exported  # torch


def beginning(settings: ExperimentSettings, found: Mapping[str, str]) -> None:
    """What is about to be run."""
    facts = "\n".join(f"{name:<8} {what}" for name, what in found.items())
    of = "" if method_of(settings).constitutional else "EM "
    title = f"experiment {settings.experiment}: {settings.iterations} {of}iterations"
    console.print(Panel(Text(facts), title=Text(title), title_align="left", expand=False))


def ending(settings: ExperimentSettings, done: Sequence[Mapping[str, Attempt]]) -> None:
    """The closing table, and what to try next."""
    history = [iteration_metrics(attempts) for attempts in done]
    console.print(_results(settings, history))
    if method_of(settings).constitutional:
        console.print(_followed(history))
    if any("planted/nmi" in metrics for metrics in history):
        console.print(_truth(history))
    console.print(_seconds(history))
    reused = sum(a.reused for attempts in done for a in attempts.values())
    total = sum(len(attempts) for attempts in done)
    console.print(f"{total - reused} stages computed, {reused} reused from the record.")
    if len(done) > 1 and "train" not in done[-1]:
        _awaits_review(settings.experiment, len(done) - 1)
    else:
        _next_steps(settings)


def baselines(runs: Sequence[Run]) -> None:
    """Methods side by side, and what each of them spent."""
    shown = {
        "experiment": "experiment",
        "best iteration": "best",
        "last iteration": "last",
        "generated tokens": "generated",
        "processed in training": "training",
    }  # what fits on 80 columns
    title = "win rates against the initial policy's own answers; tokens"
    table = _table(title, tuple(shown.values()))
    table.padding = (0, 1, 0, 0)
    table.columns[0].justify, table.columns[0].no_wrap = "left", True
    for cells in map(row, runs):
        table.add_row(*(cells[name] for name in shown))
    console.print(table)
    names = " ".join(run.settings.experiment for run in runs)
    console.print("\nNext:")
    _commands((f"staple report {names}", "one page that shows all of them"))


def status(settings: ExperimentSettings) -> None:
    """Iterations by stages, what is stale and why, what was changed for single iterations."""
    states = stage_states(settings)
    columns = [name for name in STAGES if any(stage == name for stage, _ in states)]
    title = f"experiment {settings.experiment}: seconds, principles, win rate against iteration 0"
    method = method_of(settings)
    sami = method.constitutional
    table = _table(title, ("it.", *columns, "size", "win"))
    table.padding = (0, 1, 0, 0)
    for iteration in range(settings.iterations + 1):
        row = {stage: state for (stage, t), state in states.items() if t == iteration}
        figures = iteration_metrics({k: s.attempt for k, s in row.items() if s.attempt})
        table.add_row(
            str(iteration),
            *(_state_cell(row.get(name)) for name in columns),
            _number(figures, "write/principles" if sami else "constitution_size", ".0f"),
            _number(figures, method.headline if sami else "win_rate/refined_vs_0", ".2f"),
        )
    console.print(table)
    for (name, iteration), state in states.items():
        if state.since:
            why = "; ".join(state.since)
            console.print(Text(f"{name} {iteration} is {state.standing}: {why}"))
        if word := state.accepted:
            changed = ", ".join(word.modules)
            shown = f"{name} {iteration}: {word.by} accepted changed code at {word.when}: {changed}"
            console.print(Text(shown))
    for iteration, changes in record_of(settings.experiment).all_changes().items():
        shown = ", ".join(f"{name}={value}" for name, value in changes.items())
        console.print(Text(f"changed for iteration {iteration} alone: {shown}"))


def attempt(done: Attempt) -> None:
    """One stage's figures."""
    how = "reused from the record" if done.reused else f"computed in {done.seconds:.1f} s"
    table = _table(f"{done.stage}, iteration {done.iteration}: {how}", ("figure", "value"))
    for name, value in done.metrics.items():
        table.add_row(name, f"{value:,.4g}")
    console.print(table)


def constitution(done: Attempt) -> None:
    """The principles of a cluster or review attempt; of write (SAMI), with what is held out."""
    found = load(done.path("constitution.yaml"))
    apart = {p.id for p in pool_of(done).held_out} if done.stage == "write" else set()
    texts = {
        "principle": [p.text for p in found.principles],
        "antithesis": [p.antithesis for p in found.principles],
        "also worded as": [_others(p) for p in found.principles],
        "": ["held out" if p.id in apart else "" for p in found.principles],
    }
    shown = {name: column for name, column in texts.items() if name == "principle" or any(column)}
    columns = ("#", "trajectories", *shown)
    title = f"{found.experiment}, iteration {done.iteration}"
    table = _table(title, columns, left=len(shown))
    for n, entry in enumerate(found.principles):
        cells = [Text(column[n]) for column in shown.values()]
        table.add_row(str(n + 1), str(entry.support or "–"), *cells)
    console.print(table)


def _others(entry: Principle) -> str:
    """Two of a principle's other wordings, and how many more there are."""
    others = [m for m in entry.members if m != entry.text]
    more = f" … {len(others) - 2} more" if len(others) > 2 else ""
    return "; ".join(others[:2]) + more


def written(found: Written) -> None:
    """The pairs of a constitution that was just written, and why others were rejected."""
    columns = ("#", "principle", "antithesis")
    table = _table("constitution", columns, left=2)
    for number, entry in enumerate(found.constitution.principles, start=1):
        table.add_row(str(number), Text(entry.text), Text(entry.antithesis))
    console.print(table)
    reasons = Counter(row.reason for row in found.rejected).most_common()
    why = "".join(f"\n  {times} × {reason}" for reason, times in reasons)
    console.print(f"{len(found.rejected)} rejected{':' if why else '.'}{why}")


def compared(found: Compared) -> None:
    """Settings, figures and principles that differ."""
    left, right = found.left.name, found.right.name
    if found.settings:
        table = _table("settings that differ", ("setting", left, right), left=3)
        for row in found.settings:
            table.add_row(*map(Text, row))
        console.print(table)
    else:
        console.print("Their settings are the same.")
    if found.metrics:
        table = _table("figures that differ, with 95 % intervals", ("figure", left, right))
        table.columns[0].overflow = "fold"
        for row in found.metrics:
            table.add_row(*row)
        console.print(table)
    console.print(f"{found.equal} figures are the same.")
    if found.constitution:
        _changes(found.constitution, f"{left} → {right}")


def _changes(changes: Changes, title: str) -> None:
    table = _table(f"principles, {title}", ("what", "trajectories", "principle"), left=1)
    table.columns[0].justify = "left"
    moved = {was.id for was, _ in changes.reworded}
    for what, pairs in (("reworded", changes.reworded), ("merged", changes.merged)):
        for was, now in pairs:
            count = f"{was.support} → {now.support}"
            table.add_row(what, count, Text(f"{was.text} → {now.text}"))
    for was, now in changes.opposed:
        wordings = f"{was.antithesis or 'none'} → {now.antithesis or 'none'}"
        table.add_row("antithesis", str(now.support), Text(f"{now.text}: {wordings}"))
    for was, now in changes.support_changed:
        if was.id not in moved:
            table.add_row("support", f"{was.support} → {now.support}", Text(now.text))
    for what, principles in (("added", changes.added), ("dropped", changes.dropped)):
        for principle in principles:
            table.add_row(what, str(principle.support), Text(principle.text))
    console.print(table if table.row_count else "Their constitutions are the same.")


def asked(reply: PolicyAnswer) -> None:
    """y1 → z → y2, and why."""
    answer = reply.answer
    console.print(Panel(Text(answer.initial), title="first answer", title_align="left"))
    if answer.principle:
        console.print(Panel(Text(answer.principle), title="principle", title_align="left"))
    console.print(Panel(Text(answer.refined), title="refined answer", title_align="left"))
    if reply.iteration == 0:
        why = "Iteration 0: the initial policy; no constitution yet."
    elif not answer.principle:
        why = f"Iteration {reply.iteration}: this method has no principles."
    elif reply.entry is None:
        why = f"Iteration {reply.iteration}: nothing in its constitution is like this principle."
    else:
        how = "is a wording of" if reply.exact else "comes nearest to"
        why = (
            f"Iteration {reply.iteration}: the principle {how} no. {reply.rank} of the "
            f"constitution, “{reply.entry.text}” ({reply.entry.support} trajectories)."
        )
    console.print(Text(why))


def told(reply: ConstitutionAnswers) -> None:
    """SAMI: a response under principles, beside the one without."""
    principles = "\n".join(f"{n}. {text}" for n, text in enumerate(reply.principles, start=1))
    for title, text in (
        ("told", principles),
        ("answer", reply.response),
        ("answer when it is told nothing", reply.plain),
    ):
        console.print(Panel(Text(text), title=title, title_align="left"))
    which = f"Iteration {reply.iteration}" + ("." if reply.iteration else ": the initial policy.")
    console.print(Text(which))


def judged(found: Judged) -> None:
    """Win rate and lengths of two response files, and what the judge is worth."""
    rate, controlled = found.rate, found.controlled
    title = "who follows the constitution better? 95 % intervals"
    table = _table(title, ("figure", "value"), left=2)
    table.columns[1].overflow = "fold"
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
    rows |= {told: f"{found.orders[n]:.2f}" for n, told in orders.items() if n in found.orders}
    for name, value in rows.items():
        table.add_row(name, Text(value))
    console.print(table)
    if found.rejected:
        console.print(f"{len(found.rejected):,} rows are in no pair:")
    for lone in found.rejected[:10]:
        console.print(Text(f"  {lone.source}: {lone.reason}; {lone.detail}"))
    if len(found.rejected) > 10:
        console.print("  …")


def _interval(rate: WinRate | LengthControlled) -> str:
    return f"{rate.rate:.3f} [{rate.low:.3f}, {rate.high:.3f}]"


def checked(source: str, found: Mapping[str, str]) -> None:
    """A validation that found nothing wrong."""
    console.print(Text(f"{source} can be run.", "green"), soft_wrap=True)
    for name, what in found.items():
        console.print(f"  {name:<9} {what}")


def planned(found: Plan) -> None:
    """Tokens and hours of every stage, memory and disk, and what all of it rests on."""
    what = f"{found.settings.policy.model}, {_count(found.parameters)} parameters"
    titles = ("stage", "it.", "prompts", "samples", "generate", "at most", "prefill", "train")
    figures = ("prompts", "samples", "generated", "at_most", "prefilled", "trained")
    console.print(Text(f"An estimate: {what}, on one {found.gpu.name}. Nothing was loaded."))
    table = _table("tokens and hours, each iteration", (*titles, "hours"))
    table.padding = (0, 1, 0, 0)
    table.columns[0].justify, table.columns[0].no_wrap = "left", True
    for part in found.iterations:
        for work in part.work:
            counts = [_count(getattr(work, figure)) for figure in figures]
            table.add_row(work.stage, _which(part), *counts, _hours(work.hours))
    table.add_section()
    totals = [_count(found.total(figure)) for figure in figures[1:]]
    table.add_row("all", "", "", *totals, _hours(found.total("hours")))
    console.print(table)
    if found.memory:
        console.print(_memory(found))
    for memory in found.memory:
        if memory.remedy:
            told = f"{memory.title}: too much for one {found.gpu.name}; {memory.remedy}"
            console.print(Text(told, "yellow"))
    disk = ", ".join(f"{name} {_size(size)}" for name, size in found.disk.items() if size)
    console.print(Text(f"disk: {disk}"))
    for note in found.notes:
        console.print(Text(f"- {note}", "dim"))


def _memory(found: Plan) -> Table:
    parts = list(dict.fromkeys(part for memory in found.memory for part in memory.parts))
    table = _table(
        f"GPU memory at most, of {found.gpu.memory:g} GiB", ("rows × tokens", *parts, "all")
    )
    table.padding = (0, 1, 0, 0)
    table.columns[0].justify = "left"
    for memory in found.memory:
        cells = [_size(memory.parts[part]) if part in memory.parts else "–" for part in parts]
        table.add_row(memory.title, *cells, _size(memory.bytes))
    return table


def _results(settings: ExperimentSettings, history: Sequence[Metrics]) -> Table:
    if method_of(settings).constitutional:
        return _told(settings, history)
    table = _table(
        f"experiment {settings.experiment}: win rates against iteration 0, 95 % intervals",
        ("iteration", "accepted", "principles", "refined answer", "first answer"),
    )
    for iteration, metrics in enumerate(history):
        table.add_row(
            str(iteration),
            _accepted(metrics),
            _number(metrics, "constitution_size", ".0f"),
            rate_text(metrics, "win_rate/refined_vs_0"),
            rate_text(metrics, "win_rate/initial_vs_0"),
        )
    return table


def _told(settings: ExperimentSettings, history: Sequence[Metrics]) -> Table:
    """SAMI: how a policy follows what it is told, against the initial policy told the same."""
    arms = ("principles", "antitheses", "held_out")
    name = settings.experiment
    table = _table(
        f"experiment {name}: win rates against iteration 0 under the same constitution",
        ("it.", "principles", "antitheses", "held out", "equal lengths"),
    )
    table.padding = (0, 1, 0, 0)
    for iteration, metrics in enumerate(history):
        rates = [rate_text(metrics, f"win_rate/{arm}_vs_0") for arm in arms]
        controlled = rate_text(metrics, "win_rate/constitution_vs_0_length_controlled")
        table.add_row(str(iteration), *rates, controlled)
    return table


def _followed(history: Sequence[Metrics]) -> Table:
    """SAMI: the information, lengths; on the planted world, what is followed, what survives."""
    shown = {
        "mi/per_token": ("I(Y;C|X)", ".3f"),
        "mi/per_token_error": ("±", ".3f"),
        "answers/principles_characters": ("characters", ".0f"),
        "answers/plain_characters": ("untold", ".0f"),
        "planted/obeyed_principles": ("principles", ".2f"),
        "planted/obeyed_antitheses": ("antitheses", ".2f"),
        "planted/core_principles": ("core", ".2f"),
        "planted/core_plain": ("untold", ".2f"),
    }
    there = {n: how for n, how in shown.items() if any(n in metrics for metrics in history)}
    table = _table(
        "information in nats, mean lengths, shares obeyed and kept",
        ("it.", *(title for title, _ in there.values())),
    )
    table.padding = (0, 1, 0, 0)
    for iteration, metrics in enumerate(history):
        cells = [_number(metrics, name, style) for name, (_, style) in there.items()]
        table.add_row(str(iteration), *cells)
    return table


def _seconds(history: Sequence[Metrics]) -> Table:
    ran = [
        s
        for s in STAGES
        if s != "prompts" and any(f"seconds/{s}" in metrics for metrics in history)
    ]
    table = _table("seconds", ("iteration", *ran))
    for iteration, metrics in enumerate(history):
        cells = [_number(metrics, f"seconds/{name}", ".1f") for name in ran]
        table.add_row(str(iteration), *cells)
    return table


def _truth(history: Sequence[Metrics]) -> Table:
    """How well the constitution recovers the planted behaviours."""
    names = ("recall", "precision", "nmi", "ari")
    table = _table("constitution against the planted truth", ("iteration", *names, "faithful"))
    for iteration, metrics in enumerate(history[1:], start=1):
        cells = [_number(metrics, f"planted/{name}", ".2f") for name in names]
        table.add_row(str(iteration), *cells, _number(metrics, "faithfulness/label", ".2f"))
    return table


def _table(title: str, columns: Sequence[str], left: int | None = None) -> Table:
    """Figures stand to the right; the last `left` columns hold text."""
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, pad_edge=False)
    texts = columns[-left:] if left else ()
    for column in columns:
        table.add_column(column, justify="left" if column in texts else "right")
    return table


def _which(part: Iterations) -> str:
    return str(part.first) if part.first == part.last else f"{part.first}–{part.last}"


def _count(number: float) -> str:
    """Three digits and k, M, G; a dash for nothing."""
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            digits = 2 - int(math.log10(number / size))
            return f"{number / size:.{digits}f}{letter}"
    return f"{number:.0f}" if number else "–"


def _size(number: float) -> str:
    return f"{number / GIB:.1f}G" if number >= GIB / 10 else f"{number / 2**20:.1f}M"


def _hours(hours: float | None) -> str:
    if hours is None:
        return "–"
    if hours < 0.01:
        return "<.01"
    return f"{hours:,.{0 if hours >= 10 else 1 if hours >= 1 else 2}f}"


def _accepted(metrics: Metrics) -> str:
    if "prompts_in" not in metrics:
        return "–"
    return f"{metrics['prompts_kept']:,.0f}/{metrics['prompts_in']:,.0f}"


def _number(metrics: Metrics, name: str, style: str) -> str:
    return f"{metrics[name]:{style}}" if name in metrics else "–"


def _state_cell(state: State | None) -> Text | str:
    if state is None:
        return ""
    if state.standing == "finished" and state.attempt:
        seconds = state.attempt.seconds
        return Text.assemble(("✓", "green"), f" {seconds:.{1 if seconds < 10 else 0}f}")
    colour = {"stale": "yellow", "running": "blue"}.get(state.standing, "red")
    return Text(state.standing, colour)


def _awaits_review(name: str, iteration: int) -> None:
    console.print(f"\nIteration {iteration} awaits your review of its constitution:")
    _commands(
        (
            f"staple constitution edit {name} --iteration {iteration}",
            "approve, reword, merge, drop",
        ),
        (f"staple run {name} --resume", "train on what you approved"),
    )


def exported(done: Exported) -> None:
    """Where a policy was written, and how far it is the one that was evaluated."""
    size = sum(file.stat().st_size for file in done.path.iterdir()) / 1e6
    console.print(f"Wrote {done.path}, {size:,.1f} MB ({done.kind}).", soft_wrap=True)
    columns = ("loaded with", "max |Δlogit|", "mean KL", "same top token")
    tokens = done.agreements[0].tokens
    table = _table(f"beside the policy as it was evaluated, on {tokens:,} tokens", columns)
    table.columns[0].justify = "left"
    for a in done.agreements:
        table.add_row(a.loaded, f"{a.largest:.2g}", f"{a.kl:.2g}", f"{a.same_top:.1%}")
    console.print(table)


def _next_steps(settings: ExperimentSettings) -> None:
    name = settings.experiment
    console.print("\nNext:")
    method = method_of(settings)
    discovered = method.guided and settings.iterations
    learned = (f"staple constitution show {name}", "the principles it learned")
    if method_of(settings).constitutional:
        learned = (f"staple constitution show {name}", "what it was taught")
    ask = (f'staple ask {name} "…"', "its answer, the principle, the refined answer")
    if method_of(settings).constitutional:
        ask = (f'staple ask {name} "…" --principle "…"', "its answer when it is told that")
    _commands(
        *([learned] if discovered or method.constitutional else []),
        ask,
        (f"staple status {name}", "every stage of every iteration"),
        ("staple up", "Prefect's and MLflow's pages: every run, iterations side by side"),
    )


def _commands(*commands: tuple[str, str]) -> None:
    for command, why in commands:
        program, _, rest = command.partition(" ")
        shown = (f"  {_callable(program)} {rest}", "bold"), (f"  {why}", "dim")
        console.print(Text.assemble(*shown), soft_wrap=True)


def _callable(program: str) -> str:
    """A program's name, or its path where the virtual environment is not activated."""
    if shutil.which(program):
        return program
    place = Path(sys.executable).parent / program
    return os.path.relpath(place) if place.is_relative_to(Path.cwd()) else str(place)
