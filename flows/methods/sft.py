"""The baseline of supervised fine-tuning: the policy learns the gold responses.

It has an M-step alone, and its final answer is the first one.
"""

from __future__ import annotations

from flows.methods.base import Method

SFT = Method(
    "sft",
    "SFT on gold",
    frozenset(),
    final="initial_vs_0",
    compared="answers against the initial policy's",
    about="The model is trained on the gold answers themselves.",
)
