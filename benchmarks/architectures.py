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
PAGE = Path(__file__).parent.parent / "docs" / "models.md"


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


def verdict(name: str) -> str:
    """The engine that samples from the architecture exactly, or "refused"."""
    from constitutions.errors import UserError
    from models.engine.exact import find

    try:
        return find(build(name), "auto").way
    except UserError:
        return "refused"


ENGINES = {
    "shared": "the fast engine",
    "padded": "`generate`, rows of any length together",
    "equal": "`generate`, rows of equal length together",
    "single": "`generate`, one row at a time",
    "recomputed": "`generate` without a cache",
    "refused": "none: refused by name",
}


def page(found: Mapping[str, str]) -> str:
    """The table of docs/models.md."""
    rows = [
        f"| {name} | {architectures()[name]['class']} | {ENGINES[way]} |"
        for name, way in found.items()
    ]
    return "\n".join([HEAD, *rows]) + "\n"


HEAD = """# Which models run, and how fast

`python -m benchmarks.architectures` makes this page, with transformers 5.23. Every architecture
gets tiny random weights; its samples come from the fastest engine whose greedy tokens and
log-probabilities are those of a plain forward pass of transformers (`models/engine/comparison.py`).

The same check runs with a model's own weights when it is first loaded. Its result is kept in
the folder `engines` of `$STAPLE_HOME`. `policy.engine: shared` or `plain` asks for one engine; an
engine with wrong numbers is refused even then. A log-probability may differ by 0.001 nats in
float32, and by 0.1 on average in 16 bits and in NF4.

`generate` is slower: for 16 samples of 64 tokens from prompts of 200 it takes 3.4 times as long as
the fast engine if rows of any length are batched, and 4.1 times if only a prompt's own samples are
(`make bench`: generation_vs_batched, generation_vs_sequential). One row at a time takes longer
still, and without a cache each step computes all tokens again: enough for a trial, not for a run.

With longrope all positions of a pass depend on its longest text. The fast engine samples texts up
to the length that such a model was first trained on, `generate` longer ones, and each text gets the
numbers that it would get alone.

| architecture | class | samples come from |
|---|---|---|"""


def main() -> None:
    """Try all architectures, and write the page."""
    found = {}
    for name, entry in architectures().items():
        found[name] = verdict(name)
        differs = "" if found[name] == entry["engine"] else f", not {entry['engine']}"
        print(f"{name}: {found[name]}{differs}", flush=True)
    PAGE.write_text(page(found), "utf-8")


if __name__ == "__main__":
    main()
