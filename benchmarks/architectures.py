"""`python -m benchmarks.architectures`: which engine samples from which architecture, as a table.

Every architecture has tiny random weights, wide enough for sharp distributions, and the sizes in
architectures.yaml. The table goes to docs/models.md; tests/models/test_architectures.py asserts it.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import yaml

SIZES = Path(__file__).with_suffix(".yaml")


@cache
def architectures() -> Mapping[str, Mapping[str, Any]]:
    """Name to its configuration class, sizes, and the engine that samples from it exactly."""
    read = yaml.safe_load(SIZES.read_text("utf-8"))
    found = {}
    for name, entry in read["architectures"].items():
        sizes: dict[str, Any] = {}
        for part in entry.get("parts", ()):
            sizes |= read["parts"][part]
        found[name] = {**entry, "sizes": sizes | entry.get("sizes", {})}
    return found


def build(name: str) -> Any:
    """The architecture with random weights, the same at every call."""
    import torch
    import transformers

    chosen = architectures()[name]
    config = getattr(transformers, f"{chosen['class']}Config")(**chosen["sizes"])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(config).float().eval()
        with torch.no_grad():
            for parameter in model.parameters():  # what begins as nothing or one is noticed, too
                if parameter.ndim == 1:
                    parameter += 0.1 * torch.randn_like(parameter)
    return model
