"""Can it be read from the house-style policy whether a prompt calls for anything that it learned?

    python -m benchmarks.house_style_gate --seeds 101 102 --set iterations=2

After `benchmarks.house_style_loop`, with the same folder and settings. p(z | x, y1) over all
principles of the constitutions, for each held-out prompt and its recorded first answer; its mean
over the prompts is the usual p(z). Prints, for each figure, how well it tells prompts that call for
a learned rule from others, and refined answers that win from those that lose (area under the ROC
curve; .5: not at all).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from sklearn.metrics import roc_auc_score

from benchmarks.house_style_loop import loop_options
from benchmarks.house_style_turns import outcome
from benchmarks.planted_runs import enter, iterated, table
from constitutions.constitution import load
from models.house_style import oracle
from models.policy import Policy, user
from models.prompts import Templates, ask
from tasks.rows import Answer, Prompt


def figures(logprobs: np.ndarray) -> dict[str, np.ndarray]:
    """By name, a figure for each prompt; higher: more is called for.

    Args:
        logprobs: (prompts, principles), log p(z | x, y1) in nats.
    """
    p = np.exp(logprobs - logprobs.max(axis=1, keepdims=True))
    p /= p.sum(axis=1, keepdims=True)
    over_usual = np.log(p / p.mean(axis=0))
    likeliest = p.argmax(axis=1)[:, None]
    return {
        "p of the likeliest": p.max(axis=1),
        "the same, over its usual p": np.take_along_axis(over_usual, likeliest, 1)[:, 0],
        "KL from the usual": (p * over_usual).sum(axis=1),
    }


def asked(
    policy: Policy,
    templates: Templates,
    prompts: Sequence[str],
    initial: Sequence[str],
    principles: Sequence[str],
) -> np.ndarray:
    """(prompts, principles): log p(z | x, y1)."""
    turns = [ask(templates, (user(x),), y1) for x, y1 in zip(prompts, initial, strict=True)]
    found = policy.logprobs([(turn, z) for turn in turns for z in principles])
    return np.array([s.logprob for s in found]).reshape(len(turns), len(principles))


def measured(folder: Path, seed: int, changes: Sequence[str]) -> Iterator[list[str]]:
    """A line of the table for each figure."""
    enter(folder / f"seed-{seed}")
    e, made = iterated("house-style", [f"seed={seed}", *changes])
    prompts = made[0]["prompts"].read("prompts", Prompt)
    first = {row.prompt_id: row.initial for row in made[0]["evaluate"].rows("answers", Answer)}
    last = {row.prompt_id: row for row in made[-1]["evaluate"].rows("answers", Answer)}
    texts = [load(each["cluster"].path("constitution.yaml")).texts for each in made[1:]]
    principles = list(dict.fromkeys(z for some in texts for z in some))
    learned = set(map(oracle.behaviour_of, principles)) - {None}
    asks = [row.prompt[-1]["content"] for row in prompts]
    answers = [last[row.prompt_id] for row in prompts]
    source = e.policy(e.settings.last)
    initial = [answer.initial for answer in answers]
    logprobs = asked(source.load(), source.templates, asks, initial, principles)
    called = np.array([bool(oracle.needed(x) & learned) for x in asks])
    won = np.array(
        [
            outcome(x, answer.refined, first[answer.prompt_id])
            for x, answer in zip(asks, answers, strict=True)
        ]
    )
    decided = won != 0.5
    for name, figure in figures(logprobs).items():
        tells = roc_auc_score(called, figure)
        wins = roc_auc_score(won[decided] == 1, figure[decided])
        yield [f"{seed}", name, f"{tells:.2f}", f"{wins:.2f}"]


def main() -> None:
    """Measure each seed's policy, and print the table."""
    chosen = loop_options(__doc__).parse_args()
    folder = chosen.folder.absolute()
    rows = [row for seed in chosen.seeds for row in measured(folder, seed, chosen.set)]
    print("\n".join(table(["seed", "figure", "learned rule called for", "wins or loses"], rows)))


if __name__ == "__main__":
    main()
