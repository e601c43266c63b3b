"""The embedded worlds that there are. A new one is a folder of its own and a line in `WORLDS`."""

from __future__ import annotations

from models.house_style import HOUSE_STYLE
from models.planted import PLANTED
from models.worlds.base import World

WORLDS: dict[str, World] = {world.name: world for world in (PLANTED, HOUSE_STYLE)}
"""By the name that `prompts.sources` has."""
WORLD_MODELS: dict[str, World] = {model: w for w in WORLDS.values() for model in w.models}
"""The world of each model that `policy.model` may name without a directory or a download."""
