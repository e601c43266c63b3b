"""The report: experiments as one HTML file that opens without a network.

`flows.commands.report` gathers what the record has (`Recorded`); `page` shows it. No stage is run
again. Models' and strangers' texts are not trusted: the template escapes them, the page may run no
script but its own, and its content policy forbids every request.
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

from constitutions.constitution import Constitution
from models.worlds.registry import WORLDS
from tasks.benchmarks.base import Column
from tasks.benchmarks.registry import columns as benchmark_columns
from tasks.clustering.wordings import with_wordings
from tasks.judging.gate import GatePoint
from tasks.report import sami
from tasks.report.exhibits import MAP_HEIGHT, MAP_WIDTH, AnswerExhibit, Map, examples, principle_map
from tasks.report.figures import figures, stage_seconds, stage_tokens, svg
from tasks.report.movement import movement
from tasks.report.recorded import Cell, Recorded, cell, cells, number
from tasks.rows import Answer, ClusterRow, Comparison, Labelled, Prompt
from tasks.stages import STAGES

PAGE = Path(__file__).parent / "page"
"""The template with its style and script."""
SHOWN = 60
"""The most lines of a table of principles."""


def page(experiments: Sequence[Recorded], packages: Mapping[str, str], written: str = "") -> str:
    """The whole report as HTML.

    Args:
        packages: name → version, of where the report is written.
        written: the date.
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
    environment.filters |= {"number": number, "short": lambda digest: digest[:12]}
    style, script = ((PAGE / name).read_text("utf-8") for name in ("report.css", "report.js"))
    return environment.get_template("report.html").render(
        policy=_content_policy(style, script),
        style=Markup(style),
        script=Markup(script),
        title=", ".join(e.name for e in experiments),
        made=", ".join(filter(None, (written, _version(packages)))),
        columns=columns(experiments),
        truths=[column.title for column in TRUTHS],
        named=any(e.guided for e in experiments),
        results=results(experiments),
        budgets=[budget(e) for e in experiments],
        chapters=[_chapter(number, e) for number, e in enumerate(experiments, start=1)],
        packages=packages,
        several=len(experiments) > 1,
        shown=SHOWN,
        map_size=(MAP_WIDTH, MAP_HEIGHT),
    )


# The table of methods by benchmarks --------------------------------------------------------------


TRUTHS = tuple(
    Column(f"{title} ({world} world)", f"{world}/{metric}")
    for world in WORLDS
    for title, metric in (("Recall", "recall"), ("Precision", "precision"))
)
"""What an embedded world knows of the constitution."""
COLUMNS = (
    Column("Held-out win rate", "win_rate/{final}"),
    Column("Held-out win rate at equal lengths", "win_rate/{final}_length_controlled"),
    Column("Held-out win rate, combinations never mined", "win_rate/planted-held/{final}"),
    Column("Follows its constitution", "win_rate/constitution_vs_0"),
    Column("… at equal lengths", "win_rate/constitution_vs_0_length_controlled"),
    Column("… of held-out principles", "win_rate/held_out_vs_0"),
    *TRUTHS,
    *benchmark_columns(),
)
"""The paper's benchmarks in its order, after our own held-out prompts, SAMI's measure and what an
embedded world knows of the constitution; {final} is of `Recorded.held_out_rate`."""


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
    """The columns that any iteration of any experiment has a figure for."""
    known = [(e, metrics) for e in experiments for metrics in e.history.values()]
    return [c for c in COLUMNS if any(_metric(e, c) in metrics for e, metrics in known)]


def results(experiments: Sequence[Recorded]) -> list[Result]:
    """A line for each iteration of each experiment that was evaluated."""
    shown = columns(experiments)
    return [
        Result(e.name, e.method, t, marks, tuple(_cell(e, t, column) for column in shown))
        for e in experiments
        for t, marks in _evaluated(e).items()
    ]


def table(experiments: Sequence[Recorded]) -> list[dict[str, str]]:
    """The table as rows of text, for Prefect."""
    titles = [column.title for column in columns(experiments)]
    return [
        {
            "method": row.method,
            "experiment": row.experiment,
            "iteration": f"{row.iteration} ({', '.join(row.marks)})".removesuffix(" ()"),
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


def _evaluated(e: Recorded) -> dict[int, tuple[str, ...]]:
    """Iteration → the marks of its line; only iterations that were evaluated have one."""
    evaluated = sorted(t for t, stages in e.attempts.items() if "evaluate" in stages)
    last = max((t for t in evaluated if t), default=None)
    lines = {"initial": 0, "best": best_iteration(e), "last": last}
    return {t: tuple(mark for mark, line in lines.items() if line == t) for t in evaluated}


def _metric(e: Recorded, column: Column) -> str:
    return column.metric.format(final=e.held_out_rate.removeprefix("win_rate/"))


def _cell(e: Recorded, t: int, column: Column) -> Cell:
    return cell(e.history.get(t, {}), _metric(e, column), column.form)


class Budget(NamedTuple):
    """What an experiment spent, all iterations together."""

    experiment: str
    method: str
    prompts: float
    """Prompts that were mined, sampled for, or of which the golds were learned."""
    generated: float
    """Tokens that were generated to mine, or to sample."""
    trained: float | None
    """Tokens with loss, over all steps; None of SAMI, which counts a response C times."""
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
        trained=None if e.constitutional else total("train/trained_tokens"),
        read=total("train/tokens"),
        answered=sum(parts.get("evaluate", 0) for parts in tokens.values()),
        seconds=sum(sum(parts.values()) for parts in seconds.values()),
    )


# A chapter: one experiment -----------------------------------------------------------------------


def _chapter(number: int, e: Recorded) -> dict[str, Any]:
    """What the template shows of one experiment, for every method and for its own."""
    return {
        "e": e,
        "id": f"e{number}",
        "figures": _pictures(e),
        "costs": list(_costs(e)),
        "judge": _judge(e),
        "base": _base(e),
        "commands": _commands(e),
        "summary": _summary(e),
        **(sami.parts(e) if e.constitutional else _parts(e)),
    }


def _parts(e: Recorded) -> dict[str, Any]:
    """The principles' map and movement, refinements; `sami.parts` has the same of SAMI."""
    constitutions = _constitutions(e)
    lines, steps = movement(constitutions)
    gate = _gate(e)
    return {
        "kind": "staple",
        "sections": {
            "map": "The map",
            "movement": "Movement",
            **({"gate": "The gate"} if gate else {}),
            "examples": "Before and after",
        },
        "gate": gate,
        "rates": cells(e, _FIGURES),
        "maps": _maps(e),
        "lines": lines,
        "steps": steps,
        "iterations": sorted(constitutions),
        "largest": max(
            (p.support for c in constitutions.values() for p in c.principles), default=0
        ),
        "examples": _examples(e),
    }


def _summary(e: Recorded) -> list[str]:
    """What the experiment is, what it found, and what that does not say: a sentence or two each."""
    idle = "" if e.iterations else "Nothing is trained here: the initial policy is measured."
    found = sami.beside(e) if e.constitutional else _first_answers(e)
    return [
        " ".join(filter(None, said))
        for said in ((e.about, idle, e.lessons), (_headline(e), found), (e.caveat,))
    ]


def _headline(e: Recorded) -> str:
    """The headline of the command line as a sentence, with percentages as the tables have them."""
    if e.found is None:
        return "No policy was evaluated yet."
    t, metrics = e.found.iteration, e.history[e.found.iteration]
    when = f"After iteration {t}" if t else "Without training"
    same = cell(metrics, f"{e.headline}_length_controlled")
    controlled = "" if same.value == "–" else f" ({same.value} {same.interval} at equal lengths)"
    held_out = e.history.get(0, {}).get("prompts", 0)
    return (
        f"{when}, {e.found.compared} have a win rate of {' '.join(cell(metrics, e.headline))}"
        f"{controlled} on {held_out:,.0f} held-out prompts, by the judge {e.found.judge}; "
        "50\u00a0% is parity."
    )


def _first_answers(e: Recorded) -> str:
    """The same of the policy's first answers, where training does not teach them."""
    last = e.last_evaluated
    rate = cell(e.history.get(last or 0, {}), "win_rate/initial_vs_0")
    if not last or not e.first_answers or rate.value == "–":
        return ""
    return f"Its first answers alone: {rate.value} {rate.interval}. {e.first_answers}"


class Picture(NamedTuple):
    """A figure as a data URI; or why there is none."""

    uri: str
    text: str


_ALT = {
    "win_rate": "Win rates against iteration 0, by iteration.",
    "previous": "Win rates against the previous iteration's policy, by iteration.",
    "mined": "Refinement rate and discovery rate, by iteration.",
    "constitution": "The constitution's principles, by iteration.",
    "seconds": "Seconds of every stage, by iteration.",
    "tokens": "Tokens of every stage, by iteration.",
    "information": "The estimated mutual information of constitution and response, by iteration.",
    "lengths": "Mean length of the responses under each kind of constitution, by iteration.",
}
_NEEDS = {"win_rate": "evaluate", "previous": "evaluate", "mined": "filter"}


def _pictures(e: Recorded) -> list[Picture]:
    """The figures; where the stage that makes the numbers is missing, the reason."""
    there = {name for t, stages in e.attempts.items() if t for name in stages}
    found = []
    for name, figure in figures(e.history, constitutional=e.constitutional).items():
        needed = _NEEDS.get(name)
        if needed and needed not in there:
            found.append(Picture("", f"{_ALT[name]} Not drawn. {e.why_missing(needed)}"))
        else:
            image = base64.b64encode(svg(figure)).decode()
            found.append(Picture(f"data:image/svg+xml;base64,{image}", _ALT[name]))
    return found


_FIGURES = (
    Column("refined vs iteration 0's first", "win_rate/refined_vs_initial_0"),
    Column("refined vs iteration 0's refined", "win_rate/refined_vs_0"),
    Column("refined vs previous refined", "win_rate/refined_vs_previous"),
    Column("first vs iteration 0's first", "win_rate/initial_vs_0"),
    Column("refinement rate", "refinement_rate"),
    Column("discovery rate", "discovery_rate"),
    Column("constitution size", "constitution_size", form="count"),
)


def _costs(e: Recorded) -> Iterator[tuple[str, list[Cell]]]:
    """A line a stage: of each iteration its seconds and tokens."""
    seconds, tokens = stage_seconds(e.history), stage_tokens(e.history)
    there = {stage.name for stage in e.stages}
    for name in (name for name in STAGES if name in there):
        spent = [(seconds[t].get(name), tokens[t].get(name)) for t in sorted(e.history)]
        yield (
            name,
            [
                Cell(
                    "–" if s is None else f"{s:,.1f}\u00a0s",
                    f"{number(n)}\u00a0tokens" if n else "",
                )
                for s, n in spent
            ],
        )


def _judge(e: Recorded) -> tuple[str, list[tuple[str, str]]]:
    """The judges of the last evaluated iteration, and figures on how well they judged."""
    last = e.last_evaluated
    if last is None or (e.constitutional and not last):  # iteration 0 is compared with nothing
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
    return {t: with_wordings(a) for t, a in sorted(found.items()) if a}


def _maps(e: Recorded) -> list[tuple[Map, list[dict[str, Any]]]]:
    """The maps, each with what its script shows of every dot."""
    found = []
    for t, stages in sorted(e.attempts.items()):
        if clustered := stages.get("cluster"):
            rows = clustered.read("clusters", ClusterRow)
            size = int(clustered.metrics["constitution_size"])
            drawn = principle_map(t, rows, clustered.read("labelled", Labelled), size)
            found.append((drawn, _dots(drawn)))
    return found


def _dots(drawn: Map) -> list[dict[str, Any]]:
    return [
        {
            "principle": dot.row.principle,
            "support": dot.row.support,
            "cluster": None if dot.in_tail else dot.row.cluster + 1,
            "representative": dot.row.representative,
            "example": drawn.examples.get(dot.row.principle, []),
        }
        for dot in drawn.dots
    ]


def _gate(e: Recorded) -> list[GatePoint]:
    """The curve of the last evaluated iteration's gate; nothing where it has none."""
    last = e.last_evaluated
    if last is None or "gate/win_rate" not in e.history[last]:
        return []
    return e.attempts[last]["evaluate"].read("gate", GatePoint)


def _examples(e: Recorded) -> tuple[int, int, list[AnswerExhibit]]:
    """(iteration, its answers in all, the chosen ones) of the last evaluated iteration."""
    last = e.last_evaluated
    held_out = e.attempts.get(0, {}).get("prompts")
    if last is None or held_out is None:
        return 0, 0, []
    evaluated = e.attempts[last]["evaluate"]
    answers = evaluated.read("answers", Answer)
    compared = evaluated.read("comparisons", Comparison)
    prompts = held_out.read("prompts", Prompt)
    final: Literal["refined", "initial"] = "initial" if e.tuned else "refined"
    return last, len(answers), examples(answers, compared, prompts, final)


def _base(e: Recorded) -> str:
    """The digest of the base model, as the attempts noted it."""
    attempts = (a for stages in e.attempts.values() for a in stages.values())
    digests = (a.provenance().notes.get("base") for a in attempts)
    return next((digest for digest in digests if digest), "")


def _commands(e: Recorded) -> list[str]:
    """The commands that repeat the experiment, once its settings are in a file."""
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


def _version(packages: Mapping[str, str]) -> str:
    return f"staple {packages['staple']}" if "staple" in packages else ""


def _content_policy(style: str, script: str) -> str:
    """Nothing is fetched; only this style, this script and images in the page itself."""
    return (
        f"default-src 'none'; img-src data:; style-src '{_hash(style)}'; "
        f"script-src '{_hash(script)}'; base-uri 'none'; form-action 'none'"
    )


def _hash(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
