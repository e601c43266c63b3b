"""What the users of the house-style world ask for: everyday tasks, each in several wordings.

Every object belongs to one pool: the lessons of the skills use "skills", prompts to mine use
"train", prompts of evaluation use "eval". So no pool sees another's requests.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, get_args

Pool = Literal["skills", "train", "eval"]
POOLS: tuple[Pool, ...] = get_args(Pool)

LENGTH = "Be brief: two short sentences."
"""Ends every prompt, so that answers have some 25 to 50 tokens."""

KINDS = ("How do I {}?", "What is a good way to {}?", "Please tell me how to {}.")
"""The wordings of a request; {} is the task."""

_TASKS: dict[str, str] = {
    "clean | choose | look after": (
        "a carpet | a bicycle | a backpack | a guitar | a tent | a sofa | a kettle | a mirror | "
        "a laptop | leather boots | an umbrella | a wooden table | a lawn mower | a camera | "
        "a fridge | a mattress | a lamp | a raincoat | a toaster | a piano | a fish tank | "
        "a pair of glasses | a kitchen knife | a woollen sweater | a coffee machine"
    ),
    "cook | store | serve": (
        "rice | potatoes | a pumpkin | fresh fish | mushrooms | beans | a chicken | pasta | "
        "vegetable soup | apples | eggs | cheese | carrots | lentils | cabbage | pancakes | "
        "spinach | sweet corn | bread | berries"
    ),
    "plant | water | prune": (
        "roses | tomatoes | an apple tree | herbs | lavender | strawberries | a hedge | "
        "sunflowers | a fig tree | ivy | a grape vine | peppers | raspberries | a lemon tree | "
        "basil"
    ),
    "learn | practise | teach": (
        "swimming | drawing | chess | the flute | typing | Spanish | singing | dancing | "
        "photography | knitting | juggling | tennis | skating | pottery | public speaking"
    ),
}  # fmt: skip
"""Verbs → the objects that each of them takes."""

_POOL_OF_FIFTH: tuple[Pool, ...] = ("skills", "train", "skills", "train", "eval")


@dataclass(frozen=True, slots=True, kw_only=True)
class BaseRequest:
    """A request without any cue."""

    text: str
    task: str
    pool: Pool


def base_requests() -> Iterator[BaseRequest]:
    """Every request, in a fixed order: each verb with each of its objects, in each wording."""
    for verbs, objects in _TASKS.items():
        for i, thing in enumerate(objects.split(" | ")):
            for verb in verbs.split(" | "):
                for kind in KINDS:
                    task = f"{verb} {thing}"
                    yield BaseRequest(text=kind.format(task), task=task, pool=_POOL_OF_FIFTH[i % 5])
