"""What pays at inference? The house-style world's last policy, and other ways to answer.

    python -m benchmarks.house_style_turns --seeds 100 101 102 103 104

After `benchmarks.house_style_loop`, with the same folder and settings. Each way's answers are
compared, by the rules' checkers, with the first answers of the policy of iteration 0. "oracle" is
given a rule that the prompt calls for: it says what better naming would be worth, and is no way to
answer. "Three" ways cost as many turns as a principle and a refinement. "if a majority" keeps the
first answer where no principle is said by more than half of eight, as `evaluate.votes` does.
Puts each seed into `benchmarks/house_style_turns.json`, and prints a table.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from statistics import fmean

from benchmarks.house_style import mean_and_interval
from benchmarks.house_style_loop import loop_options
from benchmarks.planted_runs import add, enter, iterated, table
from models.house_style import house, oracle, skills
from models.policy import Messages, Policy, Request, user
from models.prompts import Templates, ask, ask_refinement

FILE = Path(__file__).with_suffix(".json")
FILLER = (
    "Say it as it is said, here and now.",
    "Be as you are, and so on.",
    "Go on with it, then.",
)
"""Principles that name nothing."""
Figures = tuple[float, int, int]
"""Of an answer: the outcome, how many rules that are called for it obeys, and how many others."""
RESPONSE, PRINCIPLE = 96, 16
"""Most tokens, as in the preset."""
VOTES = 8
"""Principles of which the commonest is taken."""


@dataclass(frozen=True, kw_only=True)
class Answers:
    """A way to answer, and what it says to each prompt."""

    way: str
    principles: Sequence[str]
    """What each answer was refined under; "" for none."""
    texts: Sequence[str]


class Asker:
    """Asks one policy, all prompts at a time."""

    def __init__(self, policy: Policy, templates: Templates, prompts: Sequence[str], key: str):
        self.policy, self.templates, self.key = policy, templates, key
        self.asked: list[Messages] = [(user(prompt),) for prompt in prompts]

    def say(self, kind: str, turns: Sequence[Messages], most: int, n: int = 1) -> list[list[str]]:
        """n samples to each conversation, as in evaluation."""
        requests = [
            Request(messages=m, key=f"{self.key}/{kind}/{i}", n=n, temperature=0.5, max_tokens=most)
            for i, m in enumerate(turns)
        ]
        return [[c.text.strip() for c in found] for found in self.policy.generate(requests)]

    def one(self, kind: str, turns: Sequence[Messages], most: int = RESPONSE) -> list[str]:
        """One sample to each conversation."""
        return [text for (text,) in self.say(kind, turns, most)]

    def refined(self, way: str, initial: Sequence[str], principles: Sequence[str]) -> Answers:
        """The refinements under given principles."""
        given = zip(self.asked, initial, principles, strict=True)
        turns = [ask_refinement(self.templates, x, y1, z) for x, y1, z in given]
        return Answers(way=way, principles=principles, texts=self.one(way, turns))

    def improved(self, way: str, initial: Sequence[str]) -> Answers:
        """The refinements without a principle."""
        bare = self.templates.unguided()
        turns = [ask_refinement(bare, x, y1, "") for x, y1 in zip(self.asked, initial, strict=True)]
        return Answers(way=way, principles=[""] * len(turns), texts=self.one(way, turns))

    def likeliest(self, responses: Sequence[Sequence[str]]) -> list[str]:
        """Of several responses to each prompt, that of the highest mean log-probability."""
        pairs = [(x, y) for x, ys in zip(self.asked, responses, strict=True) for y in ys]
        means = iter([s.logprob / s.tokens for s in self.policy.logprobs(pairs)])
        return [max(zip(islice(means, len(ys)), ys, strict=True))[1] for ys in responses]


def refined_where(better: Answers, initial: Sequence[str], way: str, chosen: list[bool]) -> Answers:
    """The refinement of some prompts, and of the others the first answer."""
    rows = list(zip(chosen, better.principles, better.texts, initial, strict=True))
    return Answers(
        way=way,
        principles=[z if refine else "" for refine, z, _, _ in rows],
        texts=[y if refine else y1 for refine, _, y, y1 in rows],
    )


def first_line(text: str) -> str:
    """The principle in what a policy said; "" for none."""
    return text.splitlines()[0] if text else ""


def ways(asker: Asker, prompts: Sequence[str], seed: int) -> list[Answers]:
    """Every way to answer the prompts."""
    rng = random.Random(f"{seed}/turns")
    three = asker.say("first", asker.asked, RESPONSE, n=3)
    initial = [ys[0] for ys in three]
    asks = [ask(asker.templates, x, y) for x, y in zip(asker.asked, initial, strict=True)]
    own = [first_line(z) for z in asker.one("propose", asks, PRINCIPLE)]
    said = asker.say("vote", asks, PRINCIPLE, n=VOTES)
    polled = [Counter(map(first_line, zs)).most_common(1)[0] for zs in said]
    by_vote = asker.refined("the commonest of eight", initial, [z for z, _ in polled])
    needed = [sorted(oracle.needed(prompt)) for prompt in prompts]
    told = [rng.choice(house.RULES[rng.choice(names)].wordings) for names in needed]
    other = own[1:] + own[:1]
    foreign = [rng.choice(rng.choice(list(skills.RULES.values())).wordings) for _ in prompts]
    empty = [rng.choice(FILLER) for _ in prompts]
    none = [""] * len(prompts)
    once = asker.improved("one refinement without a principle", initial)
    twice = asker.improved("twice", once.texts)
    return [
        Answers(way="first answer", principles=none, texts=initial),
        Answers(
            way="best of three first answers, by likelihood",
            principles=none,
            texts=asker.likeliest(three),
        ),
        once,
        asker.improved("three refinements without a principle", twice.texts),
        asker.refined("its own principle", initial, own),
        by_vote,
        refined_where(by_vote, initial, "if a majority", [2 * n > VOTES for _, n in polled]),
        asker.refined("another prompt's principle", initial, other),
        asker.refined("a skill rule at random", initial, foreign),
        asker.refined("filler", initial, empty),
        asker.refined("oracle: a rule that is called for", initial, told),
    ]


def outcome(prompt: str, response: str, reference: str, *, cost: float = 0.0) -> float:
    """1 where the response is better than the reference by the checkers, .5 where neither is.

    Args:
        cost: taken from the response's score.
    """
    ours, theirs = oracle.score(prompt, response) - cost, oracle.score(prompt, reference)
    return 0.5 + (ours > theirs) / 2 - (ours < theirs) / 2


def report(found: Sequence[dict[str, list[Figures]]]) -> str:
    """Each way's win rate, and how many rules its answers obey, over the prompts of all seeds."""
    rows = []
    for way in found[0]:
        won, called, uncalled = zip(*(row for seed in found for row in seed[way]), strict=True)
        rows.append([way, mean_and_interval(won), f"{fmean(called):.2f}", f"{fmean(uncalled):.2f}"])
    headings = ["answer", "win rate", "called-for rules obeyed", "others obeyed"]
    return "\n".join(table(headings, rows))


def measured(folder: Path, seed: int, changes: Sequence[str]) -> dict[str, list[Figures]]:
    """By way, for each held-out prompt."""
    from tasks.rows import Answer, Prompt

    enter(folder / f"seed-{seed}")
    e, _ = iterated("house-style", [f"seed={seed}", *changes])
    rows = list(e.record.needs("prompts", 0).rows("prompts", Prompt))
    first = {a.prompt_id: a.initial for a in e.record.needs("evaluate", 0).rows("answers", Answer)}
    prompts = [row.prompt[0]["content"] for row in rows]
    source = e.policy(e.settings.last)
    asker = Asker(source.load(), source.templates, prompts, f"{seed}/turns")
    found = {}
    for answers in ways(asker, prompts, seed):
        found[answers.way] = [
            (
                outcome(x, y, first[row.prompt_id]),
                len(oracle.shown(y) & oracle.needed(x)),
                len(oracle.shown(y) - oracle.needed(x)),
            )
            for x, y, row in zip(prompts, answers.texts, rows, strict=True)
        ]
    return found


def main() -> None:
    """Measure each seed's policy, and print the table."""
    chosen = loop_options(__doc__).parse_args()
    folder = chosen.folder.absolute()
    found = [measured(folder, seed, chosen.set) for seed in chosen.seeds]
    add({str(s): ways for s, ways in zip(chosen.seeds, found, strict=True)}, FILE)
    print(report(found))


if __name__ == "__main__":
    main()
