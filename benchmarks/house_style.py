"""The house-style world with a real model. First part: naming and following before any iteration.

    python -m benchmarks.house_style --model smollm2-135m-instruct --adapter DIR --seeds 100 101 102

For each of the 24 house rules, on held-out requests with the rule's cue: 8 principles hinted by a
gold, a refinement under each of two of them, and two refinements under the rule's own name. Arms:
"chat" and "short" as the model comes (the templates `chat` and the world's own), "shots" with five
lessons in the prompt, "taught" with the adapter of the stage teach. Writes
`benchmarks/house_style_naming.json` (every text) and `benchmarks/house_style_naming.md`.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from models.house_style import HOUSE_STYLE, house, oracle, world
from models.house_style import TEMPLATES as SHORT
from models.house_style.answers import answers
from models.house_style.rules import Rule
from models.policy import Messages, Policy, PolicySettings, Request, assistant, user
from models.prompts import CHAT, Templates, ask_refinement, ask_with_gold

ARMS = ("chat", "short", "shots", "taught")
HERE = Path(__file__).parent
SAMPLES = 8
"""Hinted principles to a prompt."""
FOLLOWED = 2
"""Refinements to a prompt: under so many of its principles, and under the rule's own name."""
TEMPERATURE = 0.5
"""As in the preset; at .9 so small a model says more nonsense."""
SHOTS = 5


@dataclass(frozen=True, kw_only=True)
class Trial:
    """A prompt that calls for one rule, a first answer that does not obey it, and a gold."""

    rule: str
    prompt: str
    initial: str
    gold: str
    same: bool
    """Whether the gold is an edit of this first answer, or of another one to the same request."""
    name: str
    """A wording of the rule."""


@dataclass(kw_only=True)
class Outcome:
    """What a policy said in a trial."""

    trial: Trial
    principles: list[str]
    refined: list[str]
    """Under the first principles, one each."""
    under_name: list[str]
    """Under the rule's own name."""

    @property
    def named(self) -> list[bool]:
        """Of each hinted principle, whether its words mean the rule."""
        return [oracle.behaviour_of(z) == self.trial.rule for z in self.principles]

    @property
    def done(self) -> list[bool]:
        """Of the refinements under hinted principles, whether they obey the rule."""
        return [_rule(self.trial).check(y) for y in self.refined]

    @property
    def followed(self) -> list[bool]:
        """Of the refinements under the rule's own name, whether they obey it."""
        return [_rule(self.trial).check(y) for y in self.under_name]


def _rule(trial: Trial) -> Rule:
    return house.RULES[trial.rule]


def trials(seed: int, each: int) -> Iterator[Trial]:
    """`each` trials of every house rule; every other one has a gold on another answer."""
    rng = random.Random(f"{seed}/trials")
    for name, rule in house.RULES.items():
        fit = [
            (request.text, [a for a in answers()[request.text] if not rule.check(a)])
            for request in world.answered("eval")
        ]
        two = [(text, free) for text, free in fit if len(free) == 2]
        for number, (text, free) in enumerate(rng.sample(two, each)):
            initial, other = rng.sample(free, 2)
            same = number % 2 == 0
            yield Trial(
                rule=name,
                prompt=world.asked(text, [rng.choice(rule.cues)], rng),
                initial=initial,
                gold=rule.edit(initial if same else other, rng),
                same=same,
                name=rng.choice(rule.wordings),
            )


def shots(templates: Templates, *, naming: bool) -> Messages:
    """Lessons as turns before the conversation."""
    turns: list[Any] = []
    for one in HOUSE_STYLE.skill_examples(SHOTS, 0):
        asked: Messages = (user(one.prompt),)
        if naming:
            turns += [*ask_with_gold(templates, asked, one.initial, one.gold)]
            turns.append(assistant(one.principle))
        else:
            turns += [*ask_refinement(templates, asked, one.initial, one.principle)]
            turns.append(assistant(one.refined))
    return tuple(turns)


def outcomes(policy: Policy, arm: str, given: Sequence[Trial], key: str) -> list[Outcome]:
    """What the policy says in each trial."""
    templates = CHAT if arm == "chat" else SHORT
    lead = [shots(templates, naming=naming) if arm == "shots" else () for naming in (False, True)]

    def say(kind: str, turns: Iterable[Messages], n: int, most: int) -> list[list[str]]:
        requests = [
            Request(
                messages=asked,
                key=f"{key}/{kind}/{i}",
                n=n,
                temperature=TEMPERATURE,
                max_tokens=most,
            )
            for i, asked in enumerate(turns)
        ]
        return [[c.text.strip() for c in found] for found in policy.generate(requests)]

    def refinement(trial: Trial, principle: str) -> Messages:
        asked = (user(trial.prompt),)
        return (*lead[0], *ask_refinement(templates, asked, trial.initial, principle))

    hinted = (ask_with_gold(templates, (user(t.prompt),), t.initial, t.gold) for t in given)
    found = say("name", ((*lead[1], *turns) for turns in hinted), SAMPLES, 16)
    principles = [[z.splitlines()[0] if z else "" for z in zs] for zs in found]
    pairs = [(t, z) for t, zs in zip(given, principles, strict=True) for z in zs[:FOLLOWED]]
    refined = [y for (y,) in say("do", (refinement(t, z) for t, z in pairs), 1, 72)]
    under_name = say("follow", (refinement(t, t.name) for t in given), FOLLOWED, 72)
    return [
        Outcome(
            trial=trial,
            principles=principles[i],
            refined=refined[FOLLOWED * i : FOLLOWED * (i + 1)],
            under_name=under_name[i],
        )
        for i, trial in enumerate(given)
    ]


# Figures ----------------------------------------------------------------------------------------


def bootstrap(values: Sequence[float]) -> tuple[float, float]:
    """The 95 % interval of a mean over prompts, which are drawn again a thousand times."""
    rng = random.Random(0)
    means = sorted(fmean(rng.choices(values, k=len(values))) for _ in range(1000))
    return means[25], means[974]


def mean_and_interval(values: Sequence[float]) -> str:
    """A cell of a table: the mean over prompts and its interval; "–" where there are none."""
    if not values:
        return "–"
    low, high = bootstrap(values)
    return f"{fmean(values):.2f} [{low:.2f}, {high:.2f}]"


Reading = Callable[[Outcome], list[bool]]
READINGS: dict[str, Reading] = {
    "named": lambda o: o.named,
    "obeyed under its own principles": lambda o: o.done,
    "followed": lambda o: o.followed,
}


def report(found: dict[str, list[Outcome]]) -> str:
    """The tables: each arm as a whole, then each rule of each arm."""
    lines = ["| arm | " + " | ".join(READINGS) + " | rules named ≥ ½ | rules followed ≥ ½ |"]
    lines.append("|---" * (len(READINGS) + 3) + "|")
    for arm, some in found.items():
        cells = []
        for reading in READINGS.values():
            values = [fmean(reading(o)) for o in some]
            cells.append(mean_and_interval(values))
        often = [
            sum(fmean(_shares(some, name, reading)) >= 0.5 for name in house.RULES)
            for reading in (READINGS["named"], READINGS["followed"])
        ]
        cells += [f"{count} of {len(house.RULES)}" for count in often]
        lines.append(f"| {arm} | " + " | ".join(cells) + " |")
    for arm, some in found.items():
        lines += ["", f"| {arm}: rule | " + " | ".join(READINGS) + " |"]
        lines.append("|---" * (len(READINGS) + 1) + "|")
        for name in house.RULES:
            shares = [_shares(some, name, reading) for reading in READINGS.values()]
            cells = list(map(mean_and_interval, shares))
            lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _shares(some: Iterable[Outcome], rule: str, reading: Reading) -> list[float]:
    """Of each prompt that calls for a rule, the share of its tries."""
    return [fmean(reading(o)) for o in some if o.trial.rule == rule]


def main() -> None:
    """Run the arms on all seeds, write the texts and the tables."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--model", required=True, help="a directory, or a name of policy.model")
    options.add_argument("--adapter", type=Path, help="of the stage teach; for the arm taught")
    options.add_argument("--arms", nargs="+", default=list(ARMS), choices=ARMS)
    options.add_argument("--seeds", type=int, nargs="+", default=[100, 101, 102, 103, 104])
    options.add_argument("--each", type=int, default=4, help="prompts of a rule and a seed")
    options.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    options.add_argument("--out", type=Path, default=HERE / "house_style_naming")
    chosen = options.parse_args()
    if "taught" in chosen.arms and not chosen.adapter:
        options.error("the arm taught needs --adapter")

    from models.engine.local import load_policy

    settings = PolicySettings(
        model=chosen.model, quantization="none", dtype=chosen.dtype, device="cpu", threads=1
    )
    found: dict[str, list[Outcome]] = {}
    for arm in chosen.arms:
        adapter = chosen.adapter if arm == "taught" else None
        policy = load_policy(settings, chosen.model, adapter)
        found[arm] = []
        for seed in chosen.seeds:
            given = list(trials(seed, chosen.each))
            found[arm] += outcomes(policy, arm, given, f"{seed}")
        texts = {name: [asdict(o) for o in some] for name, some in found.items()}
        chosen.out.with_suffix(".json").write_text(json.dumps(texts, indent=1) + "\n")
    chosen.out.with_suffix(".md").write_text(report(found))
    print(report(found))


if __name__ == "__main__":
    main()
