"""The planted world, the embedded default, as a `World`; imports no torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

from models.worlds.base import Oracle, Steps, World, WorldPrompt


def _config(hidden: int, layers: int, heads: int, intermediate: int, words: int) -> dict[str, Any]:
    return {
        "model_type": "llama",
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "intermediate_size": intermediate,
        "vocab_size": words,
        "max_position_embeddings": 512,
        "tie_word_embeddings": True,
    }


class Planted(World):
    """Prompts whose chores and circumstances call for behaviours; see `models.planted.world`."""

    name = "planted"
    models: ClassVar = {  # as `pretrain.RECIPES` makes them
        "planted": _config(128, 3, 4, 384, 358),
        "planted-misled": _config(128, 3, 4, 384, 358),
        "planted-sami": _config(128, 3, 4, 384, 359),
        "planted-sami-small": _config(64, 2, 2, 192, 359),
    }
    pretraining = "models.planted.pretrain"
    truth = "models.planted.oracle"
    policy: ClassVar = {
        "templates": "terse",
        "dtype": "float32",
        "device": "cpu",
        "quantization": "none",
        "threads": 1,
    }
    principle = "greet people before noise"

    @property
    def topics(self) -> tuple[str, ...]:
        """The words that fill in a principle's wording."""
        from models.planted.world import OBJECTS

        return OBJECTS

    def mined(self, n: int, seed: int) -> list[WorldPrompt]:
        """See `World.mined`; of the combinations of chore and circumstance that are "seen"."""
        return _sample("train", n, seed, "train", "seen")

    def held_out(self, n: int, seed: int) -> list[WorldPrompt]:
        """See `World.held_out`; half are of combinations that are never mined ("held")."""
        half = n // 2
        seen = _sample("seen", n - half, seed, "eval", "seen")
        return seen + _sample("held", half, seed, "eval", "held")

    @property
    def wording(self) -> str:
        """See `World.wording`: the terse templates."""
        from models.prompts import TERSE, TERSE_CONSTITUTION

        return f"{TERSE} {TERSE_CONSTITUTION}"

    @property
    def oracle(self) -> Oracle:
        """See `World.oracle`; it reads the truth back from texts."""
        from models.planted import oracle

        return oracle

    def pretrain(self, model: str, seed: int, cache: Path, progress: Steps) -> Path:
        """See `World.pretrain`; a small Llama, trained from scratch on the world's dialogues."""
        from models.planted.pretrain import RECIPES, planted_model

        return planted_model(cache / self.name, seed, progress, RECIPES[model])


def _sample(source: str, n: int, seed: int, *which: Any) -> list[WorldPrompt]:
    from models.planted.world import sample_examples

    return [
        WorldPrompt(prompt=e.prompt, gold=e.gold, source=f"{source}:{i}")
        for i, e in enumerate(sample_examples(n, seed, *which), start=1)
    ]


PLANTED = Planted()
