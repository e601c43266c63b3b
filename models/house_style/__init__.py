"""The house-style world as a `World`: real English for a real model; imports no torch.

Everyday requests whose golds are a small chat model's own answers, edited by the rules of a house
that nobody tells the policy; see `models.house_style.world`.
"""

from __future__ import annotations

from typing import Any, ClassVar

from models.prompts import Templates
from models.worlds.base import Oracle, SkillExample, World, WorldPrompt

TEMPLATES = Templates(
    version="house-style-1",
    hint="A better answer: {gold}\nWhat does the better answer do?",
    propose="What would a better answer do?",
    critique="Where does your answer not do so?",
    refine="Answer again. {principle}",
    improve="Answer again, and better.",
    keep="Keep the answer.",
)
"""Short turns: what a model of a hundred million parameters can be taught within minutes."""


class HouseStyle(World):
    """Everyday requests whose cues call for rules of style; see `models.house_style.world`."""

    name = "house-style"
    truth = "models.house_style.oracle"
    policy: ClassVar = {
        "templates": "house-style",
        "dtype": "float32",
        "device": "cpu",
        "quantization": "none",
        "threads": 1,
    }
    principle = "Mention the price."
    templates = TEMPLATES

    def mined(self, n: int, seed: int) -> list[WorldPrompt]:
        """See `World.mined`; of the combinations of rules that are "seen"."""
        return _prompts("train", n, seed, "train", "seen")

    def held_out(self, n: int, seed: int) -> list[WorldPrompt]:
        """See `World.held_out`; half are of combinations that are never mined ("held")."""
        half = n // 2
        seen = _prompts("seen", n - half, seed, "eval", "seen")
        return seen + _prompts("held", half, seed, "eval", "held")

    def skill_examples(self, n: int, seed: int) -> list[SkillExample]:
        """See `World.skill_examples`; on the rules of `models.house_style.skills`."""
        from models.house_style.lessons import sample_lessons

        return [
            SkillExample(
                prompt=lesson.prompt,
                initial=lesson.initial,
                gold=lesson.gold,
                principle=lesson.principle,
                refined=lesson.refined,
                source=f"{lesson.rule}:{i}",
            )
            for i, lesson in enumerate(sample_lessons(n, seed), start=1)
        ]

    @property
    def wording(self) -> str:
        """See `World.wording`: its own templates."""
        t = TEMPLATES
        return " ".join((t.hint, t.propose, t.critique, t.refine, t.improve))

    @property
    def oracle(self) -> Oracle:
        """See `World.oracle`; it reads the rules back from texts."""
        from models.house_style import oracle

        return oracle


def _prompts(source: str, n: int, seed: int, *which: Any) -> list[WorldPrompt]:
    from models.house_style.world import sample_examples

    return [
        WorldPrompt(prompt=e.prompt, gold=e.gold, other_golds=e.other_golds, source=f"{source}:{i}")
        for i, e in enumerate(sample_examples(n, seed, *which), start=1)
    ]


HOUSE_STYLE = HouseStyle()
