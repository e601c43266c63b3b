"""Who wins at equal training tokens? The house-style world's methods, prompt by prompt.

    python -m benchmarks.house_style_methods --seeds 105 106 --set policy.dtype=bfloat16

After `benchmarks.house_style_loop`, with the same folder, settings and arms. Win rates are by the
rules' checkers, against the first answers of iteration 0; the prompts of all seeds are drawn again
for the intervals. "final" is what a method answers in the end: the refinement, or of SFT, which
does not refine, the first answer. The checkers do not see a sentence that obeys no rule at all
("My aunt is good."). Two columns do: where "idle words cost half a rule", as much as obeying a rule
that is not called for, and "nearer to a gold", by the similarity that the loop learns from. A
prompt calls for a learned rule where one of STaPLe's constitution is among those that it calls for.
Prints a table for each iteration.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.house_style import mean_and_interval
from benchmarks.house_style_loop import ARMS, loop_options
from benchmarks.house_style_turns import outcome
from benchmarks.planted_runs import enter, iterated, table
from constitutions.constitution import load
from models.house_style import oracle
from tasks.record.record import Attempt
from tasks.rows import Answer, Prompt
from tasks.similarity.base import Similarity
from tasks.similarity.registry import open_similarity

IDLE = 0.5
"""What a final answer loses that is longer than its first one and obeys no rule more."""
REFERENCE = "STaPLe"
"""The method with which the others are compared, and whose constitution says what was learned."""


@dataclass(frozen=True, kw_only=True)
class Figures:
    """What one method answers to one held-out prompt: 1 wins, .5 ties, 0 loses."""

    first: float
    final: float
    charged: float = 0.5
    """The final answer, where idle words cost `IDLE`."""
    nearer: float = 0.5
    """The final answer by its similarity to the nearest gold."""
    called: bool = False
    """Whether the prompt calls for a rule that STaPLe learned."""


def answered(
    made: Sequence[Mapping[str, Attempt]],
    iteration: int,
    final: str,
    similarity: Similarity[Any],
) -> list[Figures]:
    """The outcomes of an iteration, by prompt in the record's order.

    Args:
        final: the field of an answer that is the method's last word: "initial" or "refined".
    """
    rows = {row.prompt_id: row for row in made[0]["prompts"].rows("prompts", Prompt)}
    before = {a.prompt_id: a.initial for a in made[0]["evaluate"].rows("answers", Answer)}
    after = {a.prompt_id: a for a in made[iteration]["evaluate"].rows("answers", Answer)}
    learned = _learned(made[iteration])
    found = []
    for name, row in rows.items():
        # a text that cannot be compared, such as an empty one, is as far from the gold as can be
        prompt, given = row.prompt[-1]["content"], getattr(after[name], final)
        cost = IDLE * is_idle(after[name].initial, given)
        ours, theirs = (
            score.value or 0.0 for score in similarity.best(row.golds, [given, before[name]])
        )
        found.append(
            Figures(
                first=outcome(prompt, after[name].initial, before[name]),
                final=outcome(prompt, given, before[name]),
                charged=outcome(prompt, given, before[name], cost=cost),
                nearer=0.5 + (ours > theirs) / 2 - (ours < theirs) / 2,
                called=bool(oracle.needed(prompt) & learned),
            )
        )
    return found


def is_idle(initial: str, final: str) -> bool:
    """Whether an answer was made longer, and obeys no rule that it did not obey before."""
    longer = len(final.split()) > len(initial.split())
    return longer and oracle.shown(final) <= oracle.shown(initial)


def _learned(stages: Mapping[str, Attempt]) -> set[str | None]:
    """The rules that the constitution means; none where a method has no constitution."""
    if "cluster" not in stages:
        return set()
    texts = load(stages["cluster"].path("constitution.yaml")).texts
    return set(map(oracle.behaviour_of, texts)) - {None}


def report(found: Mapping[str, Sequence[Figures]]) -> str:
    """A line for each method, STaPLe's first; prompts stand in one order in all."""
    reference = found[REFERENCE]
    rows = []
    for arm, figures in found.items():
        final = [f.final for f in figures]
        called = [f.final for f, ours in zip(figures, reference, strict=True) if ours.called]
        others = [f.final for f, ours in zip(figures, reference, strict=True) if not ours.called]
        ahead = [ours.final - f.final for f, ours in zip(figures, reference, strict=True)]
        charged, nearer = [f.charged for f in figures], [f.nearer for f in figures]
        cells = [[f.first for f in figures], final, called, others, charged, nearer]
        less = "–" if arm == REFERENCE else mean_and_interval(ahead)
        rows.append([arm, *map(mean_and_interval, cells), less])
    headings = ["first answers", "final answers", "a learned rule is called for", "elsewhere"]
    headings += ["idle words cost half a rule", "nearer to a gold"]
    return "\n".join(table(["method", *headings, f"{REFERENCE} is ahead by"], rows))


def measured(
    folder: Path, seeds: Sequence[int], arms: Sequence[str], changes: Sequence[str]
) -> list[dict[str, list[Figures]]]:
    """For each iteration from 1, by method, the outcomes over the prompts of all seeds."""
    found: list[dict[str, list[Figures]]] = []
    for seed in seeds:
        enter(folder / f"seed-{seed}")
        for arm in arms:
            e, made = iterated("house-style", [f"seed={seed}", *changes, *ARMS[arm]])
            similarity = open_similarity(e.settings.score)
            final = "initial" if "method=sft" in ARMS[arm] else "refined"
            for t in range(1, len(made)):
                if len(found) < t:
                    found.append({name: [] for name in arms})
                found[t - 1][arm] += answered(made, t, final, similarity)
    return found


def main() -> None:
    """Measure what the loop made, and print the tables."""
    options = loop_options(__doc__)
    options.add_argument("--arms", nargs="+", default=list(ARMS), choices=list(ARMS))
    chosen = options.parse_args()
    arms = sorted({REFERENCE, *chosen.arms}, key=list(ARMS).index)
    found = measured(chosen.folder.absolute(), chosen.seeds, arms, chosen.set)
    for t, methods in enumerate(found, start=1):
        print(f"Iteration {t}:\n\n{report(methods)}\n")


if __name__ == "__main__":
    main()
