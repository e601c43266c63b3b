"""The report: experiments as one HTML file that opens without a network.

`flows.report` gathers what the record has (`Recorded`); `page` shows it. Nothing is computed again.
Texts are a model's or a stranger's: the template escapes all of them, the page may run no script
but its own, and its policy forbids every request.
"""

from __future__ import annotations

import base64
import hashlib
import json
import shlex
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

from constitutions.constitution import Constitution, load
from tasks.cluster import ClusterRow
from tasks.records import Answer, Comparison, Labelled, Prompt
from tasks.report.exhibits import MAP_HEIGHT, MAP_WIDTH, Example, Map, examples, principle_map
from tasks.report.figures import History, figures, stage_seconds, stage_tokens, svg
from tasks.report.movement import movement
from tasks.store import Attempt

PAGE = Path(__file__).parent / "page"
"""The template with its style and script."""
SHOWN = 60
"""Lines of a table of principles at most."""


@dataclass(frozen=True)
class Stage:
    """A stage of an iteration as the record has it."""

    name: str
    iteration: int
    standing: str
    """ "finished", "stale", "running", "failed" or "missing"."""
    since: str
    """Which changes made it stale, or why it failed."""
    attempt: Attempt | None


@dataclass(frozen=True)
class Recorded:
    """One experiment as its record has it."""

    name: str
    method: str
    headline: str
    """The win rate that methods are compared by: the method's final answer against the initial
    policy's first one."""
    settings: str
    """YAML, as `staple run` reads it."""
    seed: int
    iterations: int
    stages: Sequence[Stage]
    """All that the experiment asks for, in the loop's order."""
    attempts: Mapping[int, Mapping[str, Attempt]]
    """Iteration → stage → what it wrote."""
    history: History
    changes: Mapping[int, Mapping[str, Any]]
    """Settings that were changed for single iterations."""

    @property
    def tuned(self) -> bool:
        """Whether the final answer is the policy's first one: it was tuned on golds."""
        return self.headline.rpartition("/")[2].startswith("initial")

    def why_missing(self, name: str) -> str:
        """Why no iteration has finished a stage."""
        asked = [stage for stage in self.stages if stage.name == name and stage.iteration]
        if not self.iterations:
            return "The experiment has no iteration (iterations = 0): nothing is mined or trained."
        if not asked:
            return f"The method, {self.method}, has no stage “{name}”."
        first = asked[0]
        said = f": {first.since}" if first.since else ""
        return f"Stage “{name}” of iteration {first.iteration} is {first.standing}{said}."

    def unfinished(self) -> list[str]:
        """Every stage that is not as the settings ask for, in words."""
        return [
            f"{s.name} of iteration {s.iteration} is {s.standing}"
            + (f": {s.since}" * bool(s.since))
            for s in self.stages
            if s.standing != "finished"
        ]


def page(experiments: Sequence[Recorded], packages: Mapping[str, str]) -> str:
    """The whole report as HTML.

    Args:
        packages: name → version, of where the report is written.
    """
    from jinja2 import Environment, FileSystemLoader, StrictUndefined
    from markupsafe import Markup

    environment = Environment(
        loader=FileSystemLoader(PAGE),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"number": _number, "percent": _percent, "short": _short}
    style, script = ((PAGE / name).read_text("utf-8") for name in ("report.css", "report.js"))
    return environment.get_template("report.html").render(
        policy=_content_policy(style, script),
        style=Markup(style),
        script=Markup(script),
        title=_title(experiments),
        columns=columns(experiments),
        results=results(experiments),
        budgets=[budget(e) for e in experiments],
        chapters=[_chapter(number, e) for number, e in enumerate(experiments, start=1)],
        packages=packages,
        several=len(experiments) > 1,
        shown=SHOWN,
        map_size=(MAP_WIDTH, MAP_HEIGHT),
    )


# The table of methods by benchmarks --------------------------------------------------------------


class Column(NamedTuple):
    """A figure of the table."""

    title: str
    metric: str
    form: Literal["percent", "score", "count"] = "percent"
    """A share in [0, 1] is shown as percent."""


HEADLINE = "win_rate/{final}"
"""`Recorded.headline`, whichever it is."""
COLUMNS = (
    Column("Held-out win rate", HEADLINE),
    Column("… combinations never mined", HEADLINE.replace("/", "/planted-held/")),
    Column("MT-Bench", "mt_bench/score", form="score"),
    Column("MT-Bench, turn 2", "mt_bench/turn_2", form="score"),
    Column("AlpacaEval win rate", "alpaca_eval/win_rate"),
    Column("AlpacaEval, length-controlled", "alpaca_eval/length_controlled"),
    Column("IFEval principle-following", "ifeval/principle_win_rate"),
    Column("IFEval, strict prompt", "ifeval/prompt_strict"),
)
"""The paper's benchmarks in its order, after our own held-out prompts."""


class Cell(NamedTuple):
    """A figure and its 95 % interval, in words."""

    value: str
    interval: str = ""


@dataclass(frozen=True)
class Result:
    """A line of the table: an experiment at one of its iterations."""

    experiment: str
    method: str
    iteration: int
    marks: tuple[str, ...]
    """Of "initial", "best" and "last"."""
    cells: tuple[Cell, ...]
    """One for each of `columns`."""


def columns(experiments: Iterable[Recorded]) -> list[Column]:
    """Those that any iteration of any experiment has."""
    known = [(e, metrics) for e in experiments for metrics in e.history.values()]
    return [c for c in COLUMNS if any(_metric(e, c) in metrics for e, metrics in known)]


def results(experiments: Sequence[Recorded]) -> list[Result]:
    """Of every experiment its initial policy, its best and its last evaluated iteration."""
    shown = columns(experiments)
    return [
        Result(e.name, e.method, t, marks, tuple(_cell(e, t, column) for column in shown))
        for e in experiments
        for t, marks in _chosen(e).items()
    ]


def table(experiments: Sequence[Recorded]) -> list[dict[str, str]]:
    """The table as rows of text, for Prefect."""
    titles = [column.title for column in columns(experiments)]
    return [
        {
            "method": row.method,
            "experiment": row.experiment,
            "iteration": f"{row.iteration} ({', '.join(row.marks)})",
            **{
                title: f"{cell.value} {cell.interval}".strip()
                for title, cell in zip(titles, row.cells, strict=True)
            },
        }
        for row in results(experiments)
    ]


def best_iteration(e: Recorded) -> int | None:
    """The trained iteration with the highest headline, the earliest of equals; None without."""
    rates = {t: m[e.headline] for t, m in sorted(e.history.items()) if t and e.headline in m}
    return max(rates, key=lambda t: rates[t], default=None)


def _chosen(e: Recorded) -> dict[int, tuple[str, ...]]:
    """Iteration → why it has a line; only what was evaluated has one."""
    evaluated = [t for t, stages in e.attempts.items() if "evaluate" in stages]
    last = max((t for t in evaluated if t), default=None)
    lines = {"initial": 0, "best": best_iteration(e), "last": last}
    return {
        t: tuple(mark for mark, line in lines.items() if line == t)
        for t in sorted(evaluated)
        if t in lines.values()
    }


def _metric(e: Recorded, column: Column) -> str:
    return column.metric.format(final=e.headline.removeprefix("win_rate/"))


def _cell(e: Recorded, t: int, column: Column) -> Cell:
    metrics, metric = e.history.get(t, {}), _metric(e, column)
    if metric not in metrics:
        return Cell("–")
    show = {"percent": _percent, "score": _score, "count": _number}[column.form]
    ends = [metrics.get(f"{metric}_{end}") for end in ("low", "high")]
    low, high = (None if end is None else show(end).removesuffix("\u00a0%") for end in ends)
    interval = "" if low is None or high is None else f"[{low}, {high}]"
    return Cell(show(metrics[metric]), interval)


class Budget(NamedTuple):
    """What an experiment spent, all iterations together."""

    experiment: str
    method: str
    prompts: float
    """Prompts that were mined, or of which the golds were learned."""
    generated: float
    """Tokens that were generated to mine."""
    trained: float
    """Tokens with loss, over all steps."""
    read: float
    """Tokens of all training steps, context included."""
    answered: float
    """Tokens generated for the held-out prompts."""
    seconds: float


def budget(e: Recorded) -> Budget:
    """Sums over the experiment's iterations."""

    def total(name: str) -> float:
        return sum(metrics.get(name, 0) for t, metrics in e.history.items() if t)

    tokens, seconds = stage_tokens(e.history), stage_seconds(e.history)
    return Budget(
        experiment=e.name,
        method=e.method,
        prompts=total("prompts"),
        generated=total("generated_tokens"),
        trained=total("train/trained_tokens"),
        read=total("train/tokens"),
        answered=sum(parts.get("evaluate", 0) for parts in tokens.values()),
        seconds=sum(sum(parts.values()) for parts in seconds.values()),
    )


# A chapter: one experiment -----------------------------------------------------------------------


def _chapter(number: int, e: Recorded) -> dict[str, Any]:
    """What the template shows of one experiment."""
    constitutions = _constitutions(e)
    lines, steps = movement(constitutions)
    return {
        "e": e,
        "id": f"e{number}",
        "headline": _headline(e),
        "figures": _pictures(e),
        "rates": list(_rates(e)),
        "costs": list(_costs(e)),
        "judge": _judge(e),
        "maps": _maps(e),
        "lines": lines,
        "steps": steps,
        "iterations": sorted(constitutions),
        "largest": max(
            (p.support for c in constitutions.values() for p in c.principles), default=0
        ),
        "examples": _examples(e),
        "base": _base(e),
        "provenance": list(_provenance(e)),
        "commands": _commands(e),
    }


def _headline(e: Recorded) -> str:
    last = max(_chosen(e), default=0)
    cell = _cell(e, last, COLUMNS[0])
    if cell.value == "–":
        return ""
    when = f"After iteration {last}" if last else "Without training"
    held_out = e.history.get(0, {}).get("prompts", 0)
    return (
        f"{when}, the method's final answer has a win rate of {cell.value} {cell.interval} "
        f"against the initial policy's first answer on {held_out:,.0f} held-out prompts; "
        "50\u00a0% is parity."
    )


class Picture(NamedTuple):
    """A figure as a data URI; or why there is none."""

    uri: str
    text: str


_ALT = {
    "win_rate": "Win rates against iteration 0, by iteration.",
    "previous": "Win rates against the previous iteration's policy, by iteration.",
    "constitution": "Refinement rate, discovery rate and constitution size, by iteration.",
    "costs": "Seconds and tokens of every stage, by iteration.",
}
_NEEDS = {"win_rate": "evaluate", "previous": "evaluate", "constitution": "filter"}


def _pictures(e: Recorded) -> list[Picture]:
    """The figures; where the stage that makes the numbers is missing, the reason."""
    there = {name for t, stages in e.attempts.items() if t for name in stages}
    found = []
    for name, figure in figures(e.history).items():
        needed = _NEEDS.get(name)
        if needed and needed not in there:
            found.append(Picture("", f"{_ALT[name]} Not drawn. {e.why_missing(needed)}"))
        else:
            image = base64.b64encode(svg(figure)).decode()
            found.append(Picture(f"data:image/svg+xml;base64,{image}", _ALT[name]))
    return found


_FIGURES = (
    Column("refined vs initial policy's first", "win_rate/refined_vs_initial_0"),
    Column("refined vs iteration 0 refined", "win_rate/refined_vs_0"),
    Column("refined vs previous refined", "win_rate/refined_vs_previous"),
    Column("first vs iteration 0 first", "win_rate/initial_vs_0"),
    Column("refinement rate", "refinement_rate"),
    Column("discovery rate", "discovery_rate"),
    Column("constitution size", "constitution_size", form="count"),
)


def _rates(e: Recorded) -> Iterator[tuple[str, list[Cell]]]:
    """The pictures' numbers: a line a figure, a cell an iteration."""
    for column in _FIGURES:
        if any(column.metric in metrics for metrics in e.history.values()):
            yield column.title, [_cell(e, t, column) for t in sorted(e.history)]


def _costs(e: Recorded) -> Iterator[tuple[str, list[tuple[str, str]]]]:
    """A line a stage: of each iteration its seconds and tokens."""
    seconds, tokens = stage_seconds(e.history), stage_tokens(e.history)
    in_order = sorted(e.stages, key=lambda stage: stage.iteration == 0)  # 0 has two of them alone
    for name in dict.fromkeys(stage.name for stage in in_order):
        spent = [seconds[t].get(name) for t in sorted(e.history)]
        counts = [tokens[t].get(name) for t in sorted(e.history)]
        yield (
            name,
            [
                ("–" if s is None else f"{s:,.1f}\u00a0s", f"{n:,.0f}" if n else "")
                for s, n in zip(spent, counts, strict=True)
            ],
        )


def _judge(e: Recorded) -> tuple[str, list[tuple[str, str]]]:
    """Who judged, and what is known of how well; of the last evaluated iteration."""
    last = max((t for t, stages in e.attempts.items() if "evaluate" in stages), default=None)
    if last is None:
        return "", []
    rows = e.attempts[last]["evaluate"].read("comparisons", Comparison)
    known = {k: v for k, v in sorted(e.history[last].items()) if k.startswith("judge/")}
    failed = sum(row.outcome is None for row in rows)
    figures = [("judgements", f"{len(rows):,}"), ("of them failed", f"{failed:,}")]
    figures += [(name.removeprefix("judge/"), f"{value:.3f}") for name, value in known.items()]
    return ", ".join(sorted({row.judge for row in rows})), figures


def _constitutions(e: Recorded) -> dict[int, Constitution]:
    """What each iteration trained on: as a person approved it, else as it was clustered."""
    found = {t: stages.get("review") or stages.get("cluster") for t, stages in e.attempts.items()}
    return {t: load(a.path("constitution.yaml")) for t, a in sorted(found.items()) if a}


def _maps(e: Recorded) -> list[tuple[Map, list[dict[str, Any]]]]:
    """The maps, each with what its script shows of every dot."""
    found = []
    for t, stages in sorted(e.attempts.items()):
        if clustered := stages.get("cluster"):
            rows = clustered.read("clusters", ClusterRow)
            drawn = principle_map(t, rows, clustered.read("labelled", Labelled))
            found.append((drawn, _dots(drawn)))
    return found


def _dots(drawn: Map) -> list[dict[str, Any]]:
    return [
        {
            "principle": dot.row.principle,
            "support": dot.row.support,
            "cluster": dot.row.cluster + 1,
            "representative": dot.row.representative,
            "example": drawn.examples.get(dot.row.principle, []),
        }
        for dot in drawn.dots
    ]


def _examples(e: Recorded) -> tuple[int, int, list[Example]]:
    """(iteration, its answers in all, the chosen ones) of the last evaluated iteration."""
    last = max((t for t, stages in e.attempts.items() if "evaluate" in stages), default=None)
    held_out = e.attempts.get(0, {}).get("prompts")
    if last is None or held_out is None:
        return 0, 0, []
    evaluated = e.attempts[last]["evaluate"]
    answers = evaluated.read("answers", Answer)
    compared = evaluated.read("comparisons", Comparison)
    prompts = held_out.read("prompts", Prompt)
    final: Literal["refined", "initial"] = "initial" if e.tuned else "refined"
    return last, len(answers), examples(answers, compared, prompts, final)


class Made(NamedTuple):
    """A stage's attempt: what it was made from and where it is kept."""

    stage: Stage
    run_id: str
    fingerprint: str
    code: str
    digest: str
    seconds: str


def _provenance(e: Recorded) -> Iterator[Made]:
    for stage in e.stages:
        if (a := stage.attempt) is None:
            yield Made(stage, "", "", "", "", "")
        else:
            code = a.derivation().code
            yield Made(stage, a.run_id, a.fingerprint, code, a.digest, f"{a.seconds:,.1f}")


def _base(e: Recorded) -> str:
    """The digest of the base model, as the attempts noted it."""
    attempts = (a for stages in e.attempts.values() for a in stages.values())
    digests = (a.derivation().notes.get("base") for a in attempts)
    return next((digest for digest in digests if digest), "")


def _commands(e: Recorded) -> list[str]:
    """What to type, once the settings are in a file."""
    single = [
        f"staple stage {_stage_of(name)} --experiment {e.name} --iteration {t} "
        f"--set {shlex.quote(f'{name}={json.dumps(value)}')}"
        for t, changes in sorted(e.changes.items())
        for name, value in changes.items()
    ]
    again = [f"staple run {e.name} --resume"] if single else []
    return [f"staple run {e.name}.yaml", *single, *again, f"staple report {e.name}"]


def _stage_of(name: str) -> str:
    """The stage that reads a setting which was changed for one iteration."""
    stage = name.partition(".")[0]
    return "evaluate" if stage == "policy" else stage


# How things are written --------------------------------------------------------------------------


def _title(experiments: Sequence[Recorded]) -> str:
    return ", ".join(e.name for e in experiments)


def _content_policy(style: str, script: str) -> str:
    """Nothing is fetched; only this style, this script and images in the page itself."""
    return (
        f"default-src 'none'; img-src data:; style-src '{_hash(style)}'; "
        f"script-src '{_hash(script)}'; base-uri 'none'; form-action 'none'"
    )


def _hash(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def _percent(value: float) -> str:
    return f"{100 * value:.1f}\u00a0%"


def _score(value: float) -> str:
    return f"{value:.2f}"


def _number(value: float) -> str:
    return f"{value:,.0f}"


def _short(text: str) -> str:
    return text[:12]
