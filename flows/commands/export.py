"""`staple export`: the policy of an iteration as a directory with a model card, for other programs.

`models/training/export.py` writes the model; this module finds it in the record.
"""

from __future__ import annotations

from pathlib import Path

from constitutions.terminal import console
from flows.commands.card import card
from flows.commands.tables import table
from flows.experiment import newest, open_experiment, recorded_settings
from models.training.export import CARD, Exported, check_free, export
from tasks.rows import Prompt


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
    source = opened.policy(t)
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
    tokens = done.agreements[0].tokens
    text = card(opened, t, name, kind=done.kind, agreements=_agreements(done), tokens=tokens)
    (done.path / CARD).write_text(text, "utf-8")
    return done


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
