"""An iteration's stages with what a person is told of them: where the run is, what was finished."""

from __future__ import annotations

from collections.abc import Iterator

from flows.em import steps
from flows.experiment import Experiment
from flows.methods import method_of
from tasks.record.progress import duration, tell, working
from tasks.record.record import Attempt
from tasks.stages import STAGES


def announced_steps(e: Experiment, t: int) -> Iterator[Attempt]:
    """`flows.em.steps`; says where the run is, and what each stage has made."""
    names = method_of(e.settings).asked(e.settings_at(t), t)
    upto = "at most " * (e.settings.iterations == "auto")
    stages = steps(e, t)
    for number, name in enumerate(names, start=1):
        where = f"iteration {t} of {upto}{e.settings.last}, stage {number} of {len(names)}"
        with working(f"{where}: {name}"):
            attempt = next(stages, None)
        if attempt is None:
            return  # a person has to review first
        if e.only in (None, (t, name)):
            tell(line(attempt))
        yield attempt


def line(attempt: Attempt) -> str:
    """ "✓ mine 2 · 7.5 s · 2,000 candidates"."""
    took = "reused" if attempt.reused else duration(attempt.seconds)
    parts = [f"✓ {attempt.stage} {attempt.iteration}", took]
    for metric, words in STAGES[attempt.stage].tells.items():
        if metric in attempt.metrics:
            parts.append(words.format(attempt.metrics[metric]))
            break
    return " · ".join(parts)
