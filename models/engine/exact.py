"""Finds the fastest engine that samples from a model exactly, and remembers which one it is.

A few random texts go through an engine and, one by one, through a plain forward pass of
transformers; an engine whose numbers differ is not used. `models/engine/local.py` calls
`open_engine` when it loads a model.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import PreTrainedModel

from constitutions.errors import UserError
from models.engine.base import Decoding, Engine, is_out_of_memory
from models.engine.by_length import Way, length_limit, make_engine
from models.engine.comparison import difference, in_few_bits
from models.engine.plain import bare_of_adapter
from models.files import recall, remember
from models.notices import say

Choice = Literal["auto", "shared", "plain"]
WAYS: dict[Choice, tuple[Way, ...]] = {
    "auto": ("shared", "padded", "equal", "single", "recomputed"),
    "shared": ("shared",),
    "plain": ("padded", "equal", "single", "recomputed"),
}
COST: dict[Way, str] = {
    "shared": "",
    "padded": "about 3 times slower",
    "equal": "about 4 times slower (only prompts of equal length go together)",
    "single": "many times slower (one sample at a time)",
    "recomputed": "many times slower (each step computes all tokens anew)",
}
_reported: set[str] = set()


@dataclass(frozen=True, slots=True)
class EngineChoice:
    """The fastest engine that is exact, and why the fastest of all is not; "" where it is."""

    way: Way
    why: str = ""


def open_engine(
    model: PreTrainedModel,
    decoding: Decoding | None = None,
    *,
    choice: Choice = "auto",
    special: Collection[int] = (),
    digest: str | None = None,
) -> Engine:
    """The fastest engine that samples from the model exactly, of those that `choice` allows.

    Args:
        special: token ids that the texts of the check must not contain.
        digest: identifies the model's files; without it the choice is not remembered.

    Raises:
        UserError: none of them gives the numbers of a plain forward pass.
    """
    verdict = _verdict(model, choice, special, digest)
    if verdict.why and choice == "auto":
        _report(model, verdict)
    return make_engine(model, verdict.way, decoding)


def _report(model: PreTrainedModel, verdict: EngineChoice) -> None:
    """Say once in a process why samples are slow."""
    line = (
        f"{_name(model)}: samples come from transformers' own generate, {COST[verdict.way]}, "
        f"because with the fast engine {verdict.why}"
    )
    if line not in _reported:
        _reported.add(line)
        say(line)


def _name(model: Any) -> str:
    return type(bare_of_adapter(model)).__name__


# The check -----------------------------------------------------------------------------------


def find(model: PreTrainedModel, choice: Choice, special: Collection[int] = ()) -> EngineChoice:
    """Try the engines that `choice` allows, the fastest first, and return the first exact one.

    The model's attention is restored afterwards.

    Raises:
        UserError: none of them gives the numbers of a plain forward pass.
    """
    given = model.config._attn_implementation
    by_length = length_limit(model) is not None
    failed: list[str] = []
    for way in (w for w in WAYS[choice] if not (by_length and w == "padded")):
        try:
            wrong = difference(model, way, special)
        except UserError as error:
            if is_out_of_memory(error.__context__):
                raise
            wrong = error.what.replace(f"{_name(model)} ", "it ")
        except Exception as error:
            if is_out_of_memory(error):
                raise
            wrong = f"{type(error).__name__}: {(str(error) or repr(error)).splitlines()[0]}"
        finally:
            model.set_attn_implementation(given)
        if not wrong:
            return EngineChoice(way, failed[0] if failed else "")
        failed.append(wrong)
    raise UserError(
        f"{_name(model)} cannot be sampled from exactly: {failed[-1]}",
        where=f"policy.engine = {choice}",
        expected="the numbers of a plain forward pass of transformers",
        fix="leave policy.engine at auto"
        if choice == "shared"
        else "serve it behind an OpenAI-compatible endpoint",
    )


# Remembered choices --------------------------------------------------------------------------


def _verdict(
    model: PreTrainedModel, choice: Choice, special: Collection[int], digest: str | None
) -> EngineChoice:
    """The result of `find`, computed once for each model, quantisation, type, device and code.

    Whether there is an adapter is part of it, because calls reach the layers through an adapter;
    the adapter's weights are not.
    """
    if digest is None:
        return find(model, choice, special)
    facts = [digest, choice, model.dtype, model.device.type, in_few_bits(model),
             hasattr(model, "peft_config"), _version()]  # fmt: skip
    key = hashlib.sha256("\0".join(map(str, facts)).encode()).hexdigest()
    folder = Path(os.environ.get("STAPLE_HOME") or ".staple").absolute() / "engines"
    way, _, why = recall(folder, key).partition("\n")
    if way in WAYS["auto"]:
        return EngineChoice(way, why)
    verdict = find(model, choice, special)
    remember(folder, key, f"{verdict.way}\n{verdict.why}")
    return verdict


def _version() -> str:
    """The version of the engines' code and of the libraries that they call."""
    import peft
    import transformers

    sources = [file.read_bytes() for file in sorted(Path(__file__).parent.glob("*.py"))]
    code = hashlib.sha256(b"\0".join(sources)).hexdigest()
    return f"{code} {torch.__version__} {transformers.__version__} {peft.__version__}"
