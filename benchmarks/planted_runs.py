"""Many variants of the planted experiment on many seeds, for the tables of this folder.

The loop without its orchestrator: `flows.em.steps`, the wiring that users run, in processes of
their own. All variants of a seed share one record, so that what they have in common, such as the
first iteration's mining, is computed once.
"""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from math import sqrt
from multiprocessing import get_context
from pathlib import Path
from statistics import fmean, stdev
from typing import TYPE_CHECKING, Any

from tasks.judging.gate import GatePoint
from tasks.record.record import Attempt

if TYPE_CHECKING:
    from flows.experiment import Experiment

Overrides = Sequence[str]
"""Settings that differ from the preset, as `--set` takes them."""
History = list[dict[str, float]]
"""The metrics of each iteration, from 0."""
Runs = dict[str, dict[str, History]]
"""Variant → seed → metrics by iteration."""
After = Callable[["Experiment"], dict[str, float]]
KEPT = re.compile(
    r"win_rate/((planted|house-style)-held/)?(refined_vs_initial_0|initial_vs_0)(_low|_high)?"
    r"|train/(tokens|trained_tokens)|(planted|house-style)/(nmi|ari|(obeyed|core)_.+)"
    r"|(planted|house-style)/((recall|precision)(_by_effect)?|(invented|kept|hinted)_right)"
    r"|faithfulness/(label|answers)"
    r"|generated_tokens|constitution_size|discovery_rate|refinement_rate|prompts_kept"
    r"|win_rate/(constitution|principles|antitheses|held_out|plain)_vs_0"
    r"(_length_controlled)?(_low|_high)?|mi/.+|answers/.+_characters"
    r"|answers/tokens|gate/.+"
)
"""What the files beside this one hold of an iteration's metrics."""


def keep(found: Mapping[str, Any], file: Path) -> None:
    """Write what was measured, a line for each variant."""
    lines = [f"{json.dumps(name)}: {json.dumps(seeds)}" for name, seeds in sorted(found.items())]
    file.write_text("{\n" + ",\n".join(lines) + "\n}\n")


def add(found: Mapping[str, Mapping[str, Any]], file: Path) -> None:
    """Write what was measured beside what the file has of other variants and seeds."""
    there = json.loads(file.read_text()) if file.exists() else {}
    keep(there | {name: there.get(name, {}) | part for name, part in found.items()}, file)


def run_all(
    variants: Mapping[str, Overrides],
    seeds: Sequence[int],
    folder: Path,
    jobs: int = 2,
    preset: str = "planted",
    after: After | None = None,
) -> Runs:
    """Every variant of a preset on every seed; a seed is one process's work, `jobs` at a time.

    Args:
        after: measures something more of each finished experiment; it goes to the last iteration.
    """
    runs: Runs = {name: {} for name in variants}
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
        waiting = {
            seed: pool.submit(run_seed, seed, dict(variants), folder.absolute(), preset, after)
            for seed in seeds
        }
        for seed, future in waiting.items():
            for name, history in future.result().items():
                runs[name][str(seed)] = history
    return runs


def run_seed(
    seed: int,
    variants: Mapping[str, Overrides],
    folder: Path,
    preset: str = "planted",
    after: After | None = None,
) -> dict[str, History]:
    """Every variant on one seed, one after the other.

    In an override "{model}" is the seed model's folder, "{critic}" that of a seed model which was
    also taught to write critiques, "{unsure}" of one that without gold names the right principle a
    third as often.
    """
    enter(folder / f"seed-{seed}")
    found = {}
    for name, overrides in variants.items():
        filled = [_filled(text, seed) for text in overrides]
        found[name] = _run(preset, [f"seed={seed}", *filled], after)
        print(f"seed {seed}, {name}: done", file=sys.stderr, flush=True)
    return found


def enter(place: Path) -> None:
    """Work in this folder, with a home and a database of its own."""
    from flows.commands.cli import _environment

    place.mkdir(parents=True, exist_ok=True)
    os.chdir(place)
    os.environ["STAPLE_HOME"] = str(place / ".staple")
    os.environ["MLFLOW_TRACKING_URI"] = f"sqlite:///{place}/mlflow.db"
    _environment()


def _filled(override: str, seed: int) -> str:
    """An override with the folders of the models that it names."""
    from models.planted.pretrain import Recipe, Skill, planted_model

    recipes = {
        "{model}": Recipe(),
        "{critic}": Recipe(critiques=0.5),
        "{unsure}": Recipe(final=Skill(names=0.5, follows=0.6, prior=0.1)),
    }
    for name, recipe in recipes.items():
        if name in override:
            override = override.replace(
                name, str(planted_model(Path("models"), seed, None, recipe))
            )
    return override


def _run(preset: str, overrides: Overrides, after: After | None) -> History:
    from flows.publish import iteration_metrics

    experiment, attempts = iterated(preset, overrides)
    history = [_kept(iteration_metrics(made) | _curve(made["evaluate"])) for made in attempts]
    if after:
        history[-1] |= after(experiment)
    return history


def iterated(preset: str, overrides: Overrides) -> tuple[Experiment, list[dict[str, Attempt]]]:
    """An experiment of this place, and the attempts of each iteration, which are now current: found
    in the record, or computed."""
    from flows.em import steps
    from flows.experiment import open_experiment
    from flows.settings import load_settings

    settings = load_settings(preset, ["cluster.picture=none", *overrides])
    experiment = open_experiment(settings)
    iterations = range(settings.last + 1)
    return experiment, [{a.stage: a for a in steps(experiment, t)} for t in iterations]


def _curve(evaluated: Attempt) -> dict[str, float]:
    """The points of a gate's curve, flat: "gate/0/threshold" and so on."""
    if "gate/win_rate" not in evaluated.metrics:
        return {}
    points = map(asdict, evaluated.read("gate", GatePoint))
    return {f"gate/{n}/{name}": value for n, p in enumerate(points) for name, value in p.items()}


def _kept(metrics: Mapping[str, float]) -> dict[str, float]:
    return {name: round(value, 4) for name, value in metrics.items() if KEPT.fullmatch(name)}


def mean_cell(values: Sequence[float | None], digits: int = 2) -> str:
    """The mean over seeds and half its 95 % t-interval, as a table shows them."""
    from scipy.stats import t as student

    found = [value for value in values if value is not None]
    if not found:
        return "–"
    if len(found) == 1:
        return f"{found[0]:.{digits}f}"
    margin = student.ppf(0.975, len(found) - 1) * stdev(found) / sqrt(len(found))
    return f"{fmean(found):.{digits}f} ± {margin:.{digits}f}"


def table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a Markdown table; the first column is text, the others are figures."""
    rule = "|".join([":--", *("--:" for _ in columns[1:])])
    lines = [f"| {' | '.join(row)} |" for row in (columns, *rows)]
    return [lines[0], f"|{rule}|", *lines[1:]]
