"""`staple export`: the policy of an iteration as a directory with a model card, for other programs.

`models/training/export.py` writes the model; this module finds it in the record and describes it.
"""

from __future__ import annotations

from pathlib import Path

import yaml

from constitutions.constitution import load, markdown
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
    """Write the policy that an iteration trained, check it against the evaluated one, describe it.

    Args:
        iteration: None is the newest that was trained.
        merge: a complete model in bfloat16 instead of a PEFT adapter.
        out: an absent or empty directory; by default EXPERIMENT-ITERATION[-merged], here.

    Raises:
        UserError: there is no such experiment, nothing was trained yet, or `out` holds something.
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
    """The model card: what it is, how to load it, what it learned, how good it is."""
    parts = [
        _front_matter(settings, done),
        f"# {name}",
        _origin(settings, t),
        "The licence and the terms of use of the base model hold for this model, too.",
        "## Load it",
        _loading(settings, done),
        "## Is it the policy that was evaluated?",
        _agreement(done),
        *_principles(opened, t),
        "## Figures",
        _figures(opened, t),
        "## Training",
        f"```yaml\n{_training(settings)}```",
    ]
    return "\n\n".join(parts) + "\n"


def _origin(settings: ExperimentSettings, t: int) -> str:
    """Which base, and what was done with it."""
    iterations = f"iteration{'s'[: t > 1]}"
    method = method_of(settings)
    if method.constitutional:
        after = f", which had gone through the experiment {settings.after}" * bool(settings.after)
        return (
            f"`{settings.policy.model}`{after}, after {t} {iterations} of SAMI (arXiv 2404.14313): "
            "taught to follow the constitution below, told to it as a system turn."
        )
    return (
        f"`{settings.policy.model}` after {t} EM {iterations} of self-improvement by latent "
        f"principles ({method.title(settings)}; arXiv 2505.16927)."
    )


def _front_matter(settings: ExperimentSettings, done: Exported) -> str:
    values = {
        "base_model": settings.policy.model,
        "base_model_relation": "adapter" if done.kind == "adapter" else "finetune",
        "library_name": "peft" if done.kind == "adapter" else "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["staple", "self-improvement"],
    }
    return f"---\n{yaml.safe_dump(values, sort_keys=False, allow_unicode=True)}---"


def _loading(settings: ExperimentSettings, done: Exported) -> str:
    if done.kind != "adapter":
        return "A complete model with its tokenizer, for `transformers`, vLLM and the like."
    base = f"The adapter belongs on `{settings.policy.model}`"
    if settings.policy.revision:
        base += f", revision `{settings.policy.revision}`"
    if settings.policy.quantization == "nf4":
        base += (
            " in 4-bit NF4 (bitsandbytes), without double quantisation, computing in "
            f"{settings.policy.dtype}: so it was trained"
        )
    return f"{base}. `peft.PeftModel.from_pretrained(base, folder)`; or vLLM's `--lora-modules`."


def _agreement(done: Exported) -> str:
    head = [
        "| loaded with | max \\|Δlogit\\| | mean KL, nats | same top token |",
        "|---|--:|--:|--:|",
    ]
    rows = [
        f"| {a.loaded} | {a.largest:.2g} | {a.kl:.2g} | {a.same_top:.1%} |" for a in done.agreements
    ]
    note = f"On {done.agreements[0].tokens:,} tokens of held-out prompts."
    if done.kind == "merged":
        note += (
            " The adapter was added to the dequantised base, against which it was trained, and the "
            "sum rounded to bfloat16: the table says what that changed."
        )
    return "\n".join([note, "", *head, *rows])


def _principles(opened: Experiment, t: int) -> list[str]:
    method = method_of(opened.settings)
    if not (method.guided or method.constitutional):
        return []
    return ["## Constitution", markdown(load(opened.constitution(t).path("constitution.yaml")))]


def _figures(opened: Experiment, t: int) -> str:
    evaluated = opened.record.current("evaluate", t)
    if evaluated is None:
        return "It was never evaluated."
    rows = [
        f"| {name} | {rate_text(evaluated.metrics, name)} |"
        for name in HEADLINES
        if name in evaluated.metrics
    ]
    return "\n".join(["| held-out win rate | 95 % interval |", "|---|--:|", *rows])


def _training(settings: ExperimentSettings) -> str:
    policy = settings.policy.model_dump(include={"model", "revision", "quantization", "dtype"})
    train = settings.train.model_dump(mode="json", exclude={"processes"})
    values = {"seed": settings.seed, "policy": policy, "train": train}
    return str(yaml.safe_dump(values, sort_keys=False, allow_unicode=True))


def show_exported(done: Exported) -> None:
    """Print where a policy was written, and how far it is the one that was evaluated."""
    size = sum(file.stat().st_size for file in done.path.iterdir()) / 1e6
    console.print(f"Wrote {done.path}, {size:,.1f} MB ({done.kind}).", soft_wrap=True)
    columns = ("loaded with", "max |Δlogit|", "mean KL", "same top token")
    title = f"beside the policy as it was evaluated, on {done.agreements[0].tokens:,} tokens"
    rows = [
        (a.loaded, f"{a.largest:.2g}", f"{a.kl:.2g}", f"{a.same_top:.1%}") for a in done.agreements
    ]
    console.print(table(title, columns, rows, texts=[0]))
