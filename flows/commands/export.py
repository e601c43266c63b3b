"""`staple export`: the policy of an iteration as a directory with a model card, for other programs.

`models/training/export.py` writes the model; this module finds it in the record and fills in the
card, `card.md.jinja`.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

import yaml

from constitutions.constitution import covered, load, markdown
from constitutions.terminal import console
from flows.commands.tables import table
from flows.experiment import Experiment, newest, open_experiment, recorded_settings
from flows.methods import method_of
from flows.publish import rate_text
from flows.schema import ExperimentSettings
from models.training.export import CARD, Exported, check_free, export
from tasks.rows import Prompt

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


def export_policy(
    experiment: str, iteration: int | None = None, *, merge: bool = False, out: Path | None = None
) -> Exported:
    """Write the policy that an iteration trained, compare it with the evaluated one, add a card.

    Args:
        iteration: None is the newest trained one.
        merge: a complete model in bfloat16 instead of a PEFT adapter.
        out: a new or empty directory; by default EXPERIMENT-ITERATION[-merged] in this one.

    Raises:
        UserError: there is no such experiment, no policy is trained yet, or `out` is not empty.
    """
    recorded = recorded_settings(experiment)
    t = newest(recorded, "train", iteration).iteration
    name = f"{recorded.experiment}-{t}{'-merged' if merge else ''}"
    place = out or Path(name)
    check_free(place)
    opened = open_experiment(recorded)
    settings, source = opened.settings_at(t), opened.policy(t)
    assert source.adapter_path is not None, "a trained iteration has one"
    held_out = opened.needs("prompts", 0).read("prompts", Prompt)
    done = export(
        source.model,
        source.settings,
        source.adapter_path,
        place,
        merge=merge,
        prompts=[row.prompt for row in held_out],
    )
    (done.path / CARD).write_text(_card(opened, settings, t, name, done), "utf-8")
    return done


def _card(
    opened: Experiment, settings: ExperimentSettings, t: int, name: str, done: Exported
) -> str:
    """The model card: what the model is, how to load it, what it learned, how good it is."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        undefined=StrictUndefined,
        trim_blocks=True,
        keep_trailing_newline=True,
    )
    method, policy = method_of(settings), settings.policy
    metrics = evaluated.metrics if (evaluated := opened.record.current("evaluate", t)) else {}
    constitution = None
    if method.guided or method.constitutional:
        constitution = load(opened.constitution(t).path("constitution.yaml"))
    return environment.get_template("card.md.jinja").render(
        **{"name": name, "t": t, "settings": settings, "policy": policy},
        **{"method": method, "done": done, "agreements": _agreements(done)},
        yaml=partial(yaml.safe_dump, sort_keys=False, allow_unicode=True),
        front_matter={
            "base_model": policy.model,
            "base_model_relation": "adapter" if done.kind == "adapter" else "finetune",
            "library_name": "peft" if done.kind == "adapter" else "transformers",
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


def _agreements(done: Exported) -> list[tuple[str, str, str, str]]:
    """How each way to load the model differs from the evaluated policy, as texts."""
    return [
        (a.loaded, f"{a.largest:.2g}", f"{a.kl:.2g}", f"{a.same_top:.1%}") for a in done.agreements
    ]


def show_exported(done: Exported) -> None:
    """Print where the policy was written, and how it differs from the evaluated one."""
    size = sum(file.stat().st_size for file in done.path.iterdir()) / 1e6
    console.print(f"Wrote {done.path}, {size:,.1f} MB ({done.kind}).", soft_wrap=True)
    columns = ("loaded with", "max |Δlogit|", "mean KL", "same top token")
    title = f"compared with the evaluated policy on {done.agreements[0].tokens:,} tokens"
    console.print(table(title, columns, _agreements(done), texts=[0]))
