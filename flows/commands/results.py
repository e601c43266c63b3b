"""What `staple run`, `baselines`, `stage` and `status` print."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rich.panel import Panel
from rich.text import Text

from constitutions.terminal import console
from flows.baselines import Run, row
from flows.commands.tables import by_iteration, figure, next_commands, rate, table
from flows.experiment import record_of
from flows.methods import method_of
from flows.publish import iteration_metrics
from flows.schema import ExperimentSettings
from flows.settings import without_gone
from flows.states import State, stage_states
from models.worlds.registry import WORLDS
from tasks.record.record import Attempt
from tasks.record.work import Metrics
from tasks.stages import STAGES

History = Mapping[int, Metrics]


def show_beginning(settings: ExperimentSettings, found: Mapping[str, str]) -> None:
    """What is about to be run."""
    facts = "\n".join(f"{name:<8} {what}" for name, what in found.items())
    of = "" if method_of(settings).constitutional else "EM "
    title = f"experiment {settings.experiment}: {settings.iterations} {of}iterations"
    console.print(Panel(Text(facts), title=Text(title), title_align="left", expand=False))


def show_ending(settings: ExperimentSettings, done: Sequence[Mapping[str, Attempt]]) -> None:
    """The closing tables, and what to try next."""
    history = {t: iteration_metrics(attempts) for t, attempts in enumerate(done)}
    if method_of(settings).constitutional:
        _show_sami(settings, history)
    else:
        _show_em(settings, history)
    for world in WORLDS:
        if any(f"{world}/nmi" in metrics for metrics in history.values()):
            _show_truth(world, history)
    timed = {name for metrics in history.values() for name in metrics}
    ran = [s for s in STAGES if s != "prompts" and f"seconds/{s}" in timed]
    seconds = [(stage, figure(f"seconds/{stage}", ".1f")) for stage in ran]
    console.print(by_iteration("seconds", seconds, history))
    reused = sum(a.reused for attempts in done for a in attempts.values())
    total = sum(len(attempts) for attempts in done)
    console.print(f"{total - reused} stages computed, {reused} reused from the record.")
    if len(done) > 1 and "train" not in done[-1]:
        _ask_for_review(settings.experiment, len(done) - 1)
    else:
        _show_next(settings)


def _show_em(settings: ExperimentSettings, history: History) -> None:
    columns = [
        ("accepted", _accepted),
        ("principles", figure("constitution_size", ".0f")),
        ("refined answer", rate("win_rate/refined_vs_0")),
        ("first answer", rate("win_rate/initial_vs_0")),
    ]
    title = f"experiment {settings.experiment}: win rates against iteration 0, 95 % intervals"
    console.print(by_iteration(title, columns, history))


def _accepted(metrics: Metrics) -> str:
    if "prompts_in" not in metrics:
        return "–"
    return f"{metrics['prompts_kept']:,.0f}/{metrics['prompts_in']:,.0f}"


def _show_sami(settings: ExperimentSettings, history: History) -> None:
    """How a policy follows a constitution, against the initial policy under the same one; then the
    information, mean lengths, and what an embedded world's oracle knows of the answers."""
    columns = {
        "principles": "principles_vs_0",
        "antitheses": "antitheses_vs_0",
        "held out": "held_out_vs_0",
        "equal lengths": "constitution_vs_0_length_controlled",
    }
    rates = [(title, rate(f"win_rate/{name}")) for title, name in columns.items()]
    title = "win rates against iteration 0 under the same constitution"
    title = f"experiment {settings.experiment}: {title}"
    console.print(by_iteration(title, rates, history, first="it.", narrow=True))
    shown = [
        ("I(Y;C|X)", "mi/per_token", ".3f"),
        ("±", "mi/per_token_error", ".3f"),
        ("characters", "answers/principles_characters", ".0f"),
        ("untold", "answers/plain_characters", ".0f"),
    ]
    for world in WORLDS:
        shown += [
            ("principles", f"{world}/obeyed_principles", ".2f"),
            ("antitheses", f"{world}/obeyed_antitheses", ".2f"),
            ("core", f"{world}/core_principles", ".2f"),
            ("untold", f"{world}/core_plain", ".2f"),
        ]
    there = {name for metrics in history.values() for name in metrics}
    figures = [(title, figure(name, style)) for title, name, style in shown if name in there]
    title = "information in nats, mean lengths, shares obeyed and kept"
    console.print(by_iteration(title, figures, history, first="it.", narrow=True))


def _show_truth(world: str, history: History) -> None:
    """How well the constitution recovers the behaviours of an embedded world."""
    names = ("recall", "precision", "nmi", "ari")
    columns = [(name, figure(f"{world}/{name}", ".2f")) for name in names]
    columns.append(("faithful", figure("faithfulness/label", ".2f")))
    trained = {t: metrics for t, metrics in history.items() if t}
    console.print(by_iteration(f"constitution against the {world} truth", columns, trained))


def _ask_for_review(name: str, iteration: int) -> None:
    console.print(f"\nIteration {iteration} awaits your review of its constitution:")
    edit = f"staple constitution edit {name} --iteration {iteration}"
    next_commands(
        (edit, "approve, reword, merge, drop"),
        (f"staple run {name} --resume", "train on what you approved"),
    )


def _show_next(settings: ExperimentSettings) -> None:
    name, method = settings.experiment, method_of(settings)
    console.print("\nNext:")
    commands = {f"staple constitution show {name}": "the principles it learned"}
    if not (method.guided and settings.iterations):
        commands = {}
    commands[f'staple ask {name} "…"'] = "its answer, the principle, the refined answer"
    if method.constitutional:
        commands = {
            f"staple constitution show {name}": "what it was taught",
            f'staple ask {name} "…" --principle "…"': "its answer when it is told that",
        }
    next_commands(
        *commands.items(),
        (f"staple status {name}", "every stage of every iteration"),
        ("staple up", "Prefect's and MLflow's pages: every run, iterations side by side"),
    )


def show_baselines(runs: Sequence[Run]) -> None:
    """Methods side by side, and what each of them spent: what fits on 80 columns."""
    shown = {
        "experiment": "experiment",
        "best iteration": "best",
        "last iteration": "last",
        "generated tokens": "generated",
        "processed in training": "training",
    }
    title = "win rates against the initial policy's own answers; tokens"
    rows = [[cells[name] for name in shown] for cells in map(row, runs)]
    made = table(title, list(shown.values()), rows, texts=[0], narrow=True)
    made.columns[0].no_wrap = True
    console.print(made)
    console.print("\nNext:")
    names = " ".join(run.settings.experiment for run in runs)
    next_commands((f"staple report {names}", "one page that shows all of them"))


def show_attempt(done: Attempt) -> None:
    """One stage's figures."""
    how = "reused from the record" if done.reused else f"computed in {done.seconds:.1f} s"
    rows = [(name, f"{value:,.4g}") for name, value in done.metrics.items()]
    title = f"{done.stage}, iteration {done.iteration}: {how}"
    console.print(table(title, ("figure", "value"), rows))


def show_status(settings: ExperimentSettings) -> None:
    """Iterations by stages, what is stale and why, what was changed for single iterations."""
    states = stage_states(settings)
    columns = [name for name in STAGES if any(stage == name for stage, _ in states)]
    title = f"experiment {settings.experiment}: seconds, principles, win rate against iteration 0"
    method = method_of(settings)
    given = method.constitutional
    size = figure("write/principles" if given else "constitution_size", ".0f")
    win = figure(method.headline if given else "win_rate/refined_vs_0", ".2f")
    rows = []
    for iteration in range(settings.iterations + 1):
        row = {stage: state for (stage, t), state in states.items() if t == iteration}
        figures = iteration_metrics({k: s.attempt for k, s in row.items() if s.attempt})
        cells = [_state_cell(row.get(name)) for name in columns]
        rows.append([str(iteration), *cells, size(figures), win(figures)])
    console.print(table(title, ("it.", *columns, "size", "win"), rows, narrow=True))
    for (name, iteration), state in states.items():
        if state.since:
            why = "; ".join(state.since)
            console.print(Text(f"{name} {iteration} is {state.standing}: {why}"))
        if word := state.accepted:
            changed = ", ".join(word.modules)
            shown = f"{name} {iteration}: {word.by} accepted changed code at {word.when}: {changed}"
            console.print(Text(shown))
    for iteration, changes in record_of(settings.experiment).all_changes().items():
        if shown := ", ".join(f"{n}={value}" for n, value in without_gone(changes).items()):
            console.print(Text(f"changed for iteration {iteration} alone: {shown}"))


def _state_cell(state: State | None) -> Text | str:
    if state is None:
        return ""
    if state.standing == "finished" and state.attempt:
        seconds = state.attempt.seconds
        return Text.assemble(("✓", "green"), f" {seconds:.{1 if seconds < 10 else 0}f}")
    colour = {"stale": "yellow", "running": "blue"}.get(state.standing, "red")
    return Text(state.standing, colour)
