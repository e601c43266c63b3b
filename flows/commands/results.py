"""What `staple run`, `baselines`, `stage` and `status` print."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from rich.panel import Panel
from rich.text import Text

from constitutions.terminal import console
from flows.commands.listing import Overview
from flows.commands.tables import by_iteration, figure, next_commands, rate, table
from flows.experiment import record_of
from flows.methods import method_of
from flows.mlflow_page import table_url
from flows.publish import iteration_metrics
from flows.schema import ExperimentSettings
from flows.settings import without_gone
from flows.states import State, stage_states
from models.worlds.registry import WORLDS
from tasks.record.record import Attempt
from tasks.record.work import Metrics
from tasks.stages import STAGES

if TYPE_CHECKING:
    from flows.baselines import Run

History = Mapping[int, Metrics]


def show_beginning(settings: ExperimentSettings, found: Mapping[str, str]) -> None:
    """The experiment that is about to run."""
    facts = "\n".join(f"{name:<8} {what}" for name, what in found.items())
    title = f"experiment {settings.experiment}: {iterations(settings)}"
    console.print(Panel(Text(facts), title=Text(title), title_align="left", expand=False))


def iterations(settings: ExperimentSettings) -> str:
    """ "3 EM iterations", "1 iteration", "at most 10 EM iterations"."""
    of = "" if method_of(settings).constitutional else "EM "
    upto = "at most " if settings.iterations == "auto" else ""
    return f"{upto}{settings.last} {of}iteration{'s' * (settings.last != 1)}"


def show_ending(settings: ExperimentSettings, done: Sequence[Mapping[str, Attempt]]) -> None:
    """The tables of results, and the commands to try next."""
    history = {t: iteration_metrics(attempts) for t, attempts in enumerate(done)}
    if method_of(settings).constitutional:
        _show_sami(settings, history)
    else:
        _show_em(settings, history)
    if found := method_of(settings).found(settings, history):
        console.print(str(found))
    _show_decisions(history)
    for world in WORLDS:
        if any(f"{world}/nmi" in metrics for metrics in history.values()):
            _show_truth(world, history)
    measured = {name for metrics in history.values() for name in metrics}
    seconds = [
        (stage, figure(f"seconds/{stage}", ".1f"))
        for stage in STAGES
        if stage != "prompts" and f"seconds/{stage}" in measured
    ]
    console.print(by_iteration("seconds", seconds, history))
    reused = sum(a.reused for attempts in done for a in attempts.values())
    total = sum(len(attempts) for attempts in done)
    console.print(f"{total - reused} stages computed, {reused} reused from the record.")
    if len(done) > 1 and "train" not in done[-1]:
        _ask_for_review(settings.experiment, len(done) - 1)
    else:
        _show_next(settings)


def _show_em(settings: ExperimentSettings, history: History) -> None:
    method = method_of(settings)
    columns = [
        ("accepted", _accepted),
        ("principles", figure("constitution_size", ".0f")),
        ("final answer", rate(method.headline)),
        ("equal lengths", rate(f"{method.headline}_length_controlled")),
        ("first answer", rate("win_rate/initial_vs_0")),
    ]
    title = (
        f"experiment {settings.experiment}: win rates against the initial policy's first answers"
    )
    console.print(by_iteration(title, columns, history, first="it."))
    if said := method.first_answers(settings):
        console.print(said)


def _accepted(metrics: Metrics) -> str:
    if "prompts_in" not in metrics:
        return "–"
    return f"{metrics['prompts_kept']:,.0f}/{metrics['prompts_in']:,.0f}"


def _show_decisions(history: History) -> None:
    """How each iteration met the champion, where it was decided."""
    columns = [(name, figure(f"champion/{name}", ".0f")) for name in ("wins", "losses", "ties")]
    columns += [("p", figure("champion/p", ".2g")), ("at most", figure("champion/level", ".2g"))]
    columns.append(("champion", _champion))
    decided = {t: metrics for t, metrics in history.items() if "champion/accepted" in metrics}
    if decided:
        title = "against the champion, on prompts that no decision has used"
        console.print(by_iteration(title, columns, decided, first="it."))


def _champion(metrics: Metrics) -> str:
    return "yes" if metrics["champion/accepted"] else "no"


def _show_sami(settings: ExperimentSettings, history: History) -> None:
    """How the policy follows a constitution, and how long and how informative its answers are."""
    rates = {
        "principles": "principles_vs_0",
        "antitheses": "antitheses_vs_0",
        "held out": "held_out_vs_0",
        "equal lengths": "constitution_vs_0_length_controlled",
    }
    title = "win rates against iteration 0 under the same constitution"
    title = f"experiment {settings.experiment}: {title}"
    columns = [(name, rate(f"win_rate/{metric}")) for name, metric in rates.items()]
    console.print(by_iteration(title, columns, history, first="it."))
    tables = {
        "information in nats per token; mean characters of the answers": (
            ("I(Y;C|X)", "mi/per_token", ".3f"),
            ("±", "mi/per_token_error", ".3f"),
            ("with constitution", "answers/principles_characters", ".0f"),
            ("without constitution", "answers/plain_characters", ".0f"),
        )
    }
    for world in WORLDS:
        tables[f"{world} world: share of principles followed, of the prompt's content kept"] = (
            ("principles", f"{world}/obeyed_principles", ".2f"),
            ("antitheses", f"{world}/obeyed_antitheses", ".2f"),
            ("content with constitution", f"{world}/core_principles", ".2f"),
            ("content without constitution", f"{world}/core_plain", ".2f"),
        )
    measured = {name for metrics in history.values() for name in metrics}
    for title, figures in tables.items():
        columns = [(name, figure(metric, f)) for name, metric, f in figures if metric in measured]
        if columns:
            console.print(by_iteration(title, columns, history, first="it."))


def _show_truth(world: str, history: History) -> None:
    """How well the constitution names the behaviours of an embedded world."""
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
        (f"staple run {name} --resume", "train on the approved constitution"),
    )


def _show_next(settings: ExperimentSettings) -> None:
    name, method = settings.experiment, method_of(settings)
    show, ask = f"staple constitution show {name}", f'staple ask {name} "…"'
    commands = [(ask, "its first answer, its principle, its refined answer")]
    if method.constitutional:
        commands = [
            (show, "the constitution of its training"),
            (f'{ask} --principle "…"', "its answers with and without this constitution"),
        ]
    elif method.guided and settings.last:
        commands.insert(0, (show, "the principles that it learned"))
    console.print("\nNext:")
    next_commands(
        *commands,
        (f"staple status {name}", "every stage of every iteration"),
        ("staple up", "all runs and experiments in Prefect's and MLflow's pages"),
    )
    record = record_of(name)
    if record.tracking_uri.startswith("http"):
        url = table_url(record.tracking_uri, record)
        console.print(f"\nIts iterations in MLflow: {url}", soft_wrap=True)


def show_baselines(runs: Sequence[Run]) -> None:
    """The methods' win rates and tokens, on 80 columns."""
    from flows.baselines import row  # with Prefect, which the other commands need not import

    shown = {
        "experiment": "experiment",
        "best iteration": "best",
        "last iteration": "last",
        "generated tokens": "generated",
        "processed in training": "training",
    }
    title = "win rates against the initial policy's own answers; tokens"
    rows = [[cells[name] for name in shown] for cells in map(row, runs)]
    console.print(table(title, list(shown.values()), rows, texts=[0]))
    console.print("\nNext:")
    names = " ".join(run.settings.experiment for run in runs)
    next_commands((f"staple report {names}", "one page with all of them"))


def show_attempt(done: Attempt) -> None:
    """One stage's figures."""
    how = "reused from the record" if done.reused else f"computed in {done.seconds:.1f} s"
    rows = [(name, f"{value:,.4g}") for name, value in done.metrics.items()]
    title = f"{done.stage}, iteration {done.iteration}: {how}"
    console.print(table(title, ("figure", "value"), rows))


def status_facts(settings: ExperimentSettings) -> dict[str, object]:
    """What `show_status` prints, for a program."""
    found = Overview(settings, stage_states(settings))
    return {
        **found.facts(),
        "stages": [
            {
                "stage": stage,
                "iteration": t,
                "standing": state.standing,
                "since": state.since,
                "seconds": state.attempt and state.attempt.seconds,
                "figures": state.attempt and state.attempt.metrics,
                "accepted": state.accepted and state.accepted._asdict(),
            }
            for (stage, t), state in found.states.items()
        ],
        "changes": record_of(settings.experiment).all_changes(),
    }


def show_status(settings: ExperimentSettings) -> None:
    """A line for each iteration; then why stages are stale, and settings of single iterations."""
    states = stage_states(settings)
    columns = [name for name in STAGES if any(stage == name for stage, _ in states)]
    title = f"experiment {settings.experiment}: seconds of each stage; principles; win rate"
    method = method_of(settings)
    size = figure("write/principles" if method.constitutional else "constitution_size", ".0f")
    win = figure(method.headline, ".2f")
    rows = []
    for iteration in range(1 + max(t for _, t in states)):
        row = {stage: state for (stage, t), state in states.items() if t == iteration}
        figures = iteration_metrics({k: s.attempt for k, s in row.items() if s.attempt})
        cells = [_state_cell(row.get(name)) for name in columns]
        rows.append([str(iteration), *cells, size(figures), win(figures)])
    console.print(table(title, ("it.", *columns, "size", "win"), rows))
    found = Overview(settings, states)
    if found.headline:
        console.print(" ".join(filter(None, (str(found.headline), found.outdated))))
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
