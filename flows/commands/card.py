"""The card of a policy: what it is, how to load it, what it learned, how good it is.

`staple export` writes it beside the model (`flows.commands.export`), and MLflow shows it with the
logged one (`flows.registry`). Its text is `card.md.jinja`.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path

import yaml

from constitutions.constitution import covered, load, markdown
from flows.experiment import Experiment
from flows.methods import method_of
from flows.publish import rate_text

HEADLINES = (
    "win_rate/refined_vs_initial_0",
    "win_rate/refined_vs_0",
    "win_rate/initial_vs_0",
    "win_rate/refined_vs_previous",
    "win_rate/principles_vs_0",
    "win_rate/antitheses_vs_0",
    "win_rate/held_out_vs_0",
    "win_rate/constitution_vs_0_length_controlled",
)


def card(
    opened: Experiment,
    t: int,
    name: str,
    *,
    kind: str = "adapter",
    agreements: Sequence[Sequence[str]] = (),
    tokens: int = 0,
) -> str:
    """Markdown with YAML in its head, as hubs read it.

    Args:
        t: the iteration.
        name: what the card calls the model.
        kind: as `models.training.export.Exported.kind`.
        agreements: the rows of the table of agreement with the evaluated policy; without any, the
            card has none.
        tokens: on how many tokens it was measured.
    """
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        undefined=StrictUndefined,
        trim_blocks=True,
        keep_trailing_newline=True,
    )
    settings = opened.settings_at(t)
    method, policy = method_of(settings), settings.policy
    metrics = evaluated.metrics if (evaluated := opened.record.current("evaluate", t)) else {}
    constitution = None
    if method.guided or method.constitutional:
        constitution = load(opened.constitution(t).path("constitution.yaml"))
    return environment.get_template("card.md.jinja").render(
        **{"name": name, "t": t, "settings": settings, "policy": policy, "method": method},
        **{"kind": kind, "agreements": agreements, "tokens": tokens},
        yaml=partial(yaml.safe_dump, sort_keys=False, allow_unicode=True),
        front_matter={
            "base_model": policy.model,
            "base_model_relation": "adapter" if kind == "adapter" else "finetune",
            "library_name": "peft" if kind == "adapter" else "transformers",
            "pipeline_tag": "text-generation",
            "tags": ["staple", "self-improvement"],
        },
        constitution=constitution and markdown(constitution),
        covered=constitution and covered(constitution),
        win_rates={name: rate_text(metrics, name) for name in HEADLINES if name in metrics},
        training={
            "seed": settings.seed,
            "policy": policy.model_dump(include={"model", "revision", "quantization", "dtype"}),
            "train": settings.train.model_dump(mode="json", exclude={"processes"}),
        },
    )
