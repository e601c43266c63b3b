"""`staple export --trajectories` and `--constitution`: what was learned, for other programs.

The rows are those that an iteration trained on, in the columns that TRL, Axolotl and LLaMA-Factory
read. Golds and thoughts are not among them.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal, get_args

import yaml
from pydantic import ValidationError

from constitutions.constitution import Constitution, load, markdown
from constitutions.errors import UserError
from flows.commands.output import check_output
from flows.experiment import Experiment, newest, open_experiment, recorded_settings
from flows.methods import method_of
from models.judges.rubrics import Rubric, constitution_rubric
from models.policy import Message, assistant, user
from models.prompts import CHAT_CONSTITUTION, under_constitution
from tasks.rows import Labelled, Trajectory

Kind = Literal["sft", "dpo", "kto"]
KINDS: tuple[Kind, ...] = get_args(Kind)
Reader = Literal["trl", "llama-factory"]
READERS: tuple[Reader, ...] = get_args(Reader)
"""Axolotl reads what TRL reads."""
Row = dict[str, Any]
Rows = Iterable[Trajectory]


def export_trajectories(
    experiment: str,
    kind: str,
    iteration: int | None = None,
    *,
    reader: str = "trl",
    out: Path | None = None,
) -> tuple[Path, int]:
    """Write an iteration's trajectories as JSON lines.

    Args:
        kind: "sft": y2 answers x. "dpo": y2 is chosen over y1. "kto": y2 is desirable, y1 is not.
        iteration: None is the newest trained one.
        reader: whose columns; "llama-factory" differs in "dpo" and "kto".
        out: a new .jsonl file; by default EXPERIMENT-ITERATION-KIND.jsonl in this directory.

    Returns:
        The file, and its number of rows.

    Raises:
        UserError: there is no such kind, experiment or iteration; its method keeps no trajectories;
            or the file exists.
    """
    check_choice("--trajectories", kind, KINDS)
    check_choice("--for", reader, READERS)
    recorded = recorded_settings(experiment)
    if not method_of(recorded).mines:
        raise UserError(
            f"method {recorded.method} keeps no trajectories",
            where=f"experiment {experiment}",
            expected="an experiment with method: staple or star",
        )
    t = newest(recorded, "train", iteration).iteration
    path = _free(out or Path(f"{experiment}-{t}-{kind}.jsonl"), (".jsonl",))
    rows = LAYOUTS[kind](_trained_on(open_experiment(recorded), t))
    if reader == "llama-factory":
        rows = map(_for_llama_factory, rows)
    return path, _write_lines(path, rows)


def export_constitution(
    experiment: str, form: str, iteration: int | None = None, out: Path | None = None
) -> Path:
    """Write an iteration's constitution, as it was trained on, for another program.

    Args:
        form: a key of `FORMS`.
        iteration: None is the newest trained one.
        out: a new file; by default EXPERIMENT-ITERATION-FORM in this directory.

    Raises:
        UserError: there is no such form, experiment, iteration or constitution; it is too long for
            a rubric; or the file exists.
    """
    check_choice("--constitution", form, tuple(FORMS))
    recorded = recorded_settings(experiment)
    method = method_of(recorded)
    if not (method.guided or method.constitutional):
        raise UserError(
            f"method {method.name} has no constitution",
            where=f"experiment {experiment}",
            expected="an experiment with method: staple or sami",
        )
    t = newest(recorded, "train", iteration).iteration
    name = f"{experiment}-{t}"
    write, suffix = FORMS[form]
    path = _free(out or Path(f"{name}-{form}{suffix}"))
    constitution = load(open_experiment(recorded).constitution(t).path("constitution.yaml"))
    path.write_text(write(name, constitution), "utf-8")
    return path


def check_choice(option: str, given: str, known: tuple[str, ...]) -> None:
    """Raises UserError: an option names none of its values."""
    if given not in known:
        raise UserError(
            "there is no such form",
            where=f"{option} {given}",
            expected=f"one of {', '.join(known)}",
        )


def _free(path: Path, suffixes: tuple[str, ...] = ()) -> Path:
    check_output(path, suffixes)
    if path.exists():
        raise UserError(
            "there is such a file already", where=f"--out {path}", fix="choose another file"
        )
    return path


# Trajectories ----------------------------------------------------------------------------------


def _trained_on(experiment: Experiment, t: int) -> Rows:
    if method_of(experiment.settings).guided:
        return experiment.constitution(t).rows("labelled", Labelled)
    return experiment.needs("filter", t).rows("trajectories", Trajectory)


def _sft(rows: Rows) -> Iterator[Row]:
    """x answered by y2."""
    for row in rows:
        yield {"messages": [*row.prompt, assistant(row.refined)], **_facts(row)}


def _dpo(rows: Rows) -> Iterator[Row]:
    """y2 chosen over y1."""
    for row in rows:
        yield {
            "prompt": list(row.prompt),
            "chosen": [assistant(row.refined)],
            "rejected": [assistant(row.initial)],
            **_facts(row),
        }


def _kto(rows: Rows) -> Iterator[Row]:
    """Each y2 desirable; y1 not, once for all trajectories of its prompt."""
    seen = set[str]()
    for row in rows:
        yield _judged(row, row.refined, desirable=True)
        if row.prompt_id not in seen:
            seen.add(row.prompt_id)
            yield _judged(row, row.initial, desirable=False)


def _judged(row: Trajectory, answer: str, *, desirable: bool) -> Row:
    completion = [assistant(answer)]
    return {
        "prompt": list(row.prompt), "completion": completion, "label": desirable, **_facts(row)
    }  # fmt: skip


LAYOUTS: Mapping[str, Callable[[Rows], Iterator[Row]]] = {"sft": _sft, "dpo": _dpo, "kto": _kto}


def _facts(row: Trajectory) -> Row:
    """The columns that trainers leave alone: the principle as it was trained on, and what is known
    of the trajectory. `weight`s of one prompt's trajectories sum to 1."""
    return {
        "principle": row.label if isinstance(row, Labelled) else row.principle,
        "prompt_id": row.prompt_id,
        "weight": row.weight,
        "score": row.score,
        "initial_score": row.initial_score,
    }


def _for_llama_factory(row: Row) -> Row:
    """The same in its columns: the conversation is `messages`, a ranked answer is one message."""
    prompt: list[Message] = row.pop("prompt", [])
    if "completion" in row:
        return {"messages": [*prompt, *row.pop("completion")], **row}
    if "chosen" in row:
        return {
            "messages": prompt,
            **row,
            "chosen": row["chosen"][0],
            "rejected": row["rejected"][0],
        }
    return row


def _write_lines(path: Path, rows: Iterable[Row]) -> int:
    """Write JSON lines, all or none; their number."""
    partial, written = path.with_name(f".{path.name}.partial"), 0
    try:
        with partial.open("w", encoding="utf-8") as file:
            for written, row in enumerate(rows, start=1):  # noqa: B007
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
        os.replace(partial, path)
    finally:
        with suppress(FileNotFoundError):
            partial.unlink()
    return written


# Constitutions ---------------------------------------------------------------------------------


def _system_prompt(name: str, constitution: Constitution) -> str:
    system, _ = under_constitution(CHAT_CONSTITUTION, constitution.texts, (user(""),))
    return system["content"] + "\n"


def _asked(name: str, constitution: Constitution) -> Rubric:
    try:
        return constitution_rubric(name, constitution.texts)
    except ValidationError as error:
        raise UserError(
            "the constitution does not fit into a rubric",
            where=name,
            expected=error.errors()[0]["msg"].removeprefix("Value error, "),
            fix="bound it: cluster.constitution_size",
        ) from None


def _rubric(name: str, constitution: Constitution) -> str:
    """As `evaluate.judge.rubric` takes it."""
    rubric = _asked(name, constitution).model_dump(mode="json")
    return yaml.safe_dump(rubric, sort_keys=False, allow_unicode=True, width=100)


def _make_judge(name: str, constitution: Constitution) -> str:
    """The instructions of MLflow's `make_judge`; what looks like its variables is broken."""
    asked = _asked(name, constitution)
    scores = "\n".join(f"{n}: {text}" for n, text in enumerate(asked.scores, start=1))
    said = f"{asked.criterion}\n\nAnswer with a whole number:\n{scores}\n".replace("{{", "{ {")
    return f"{said}\nThe request:\n{{{{ inputs }}}}\n\nThe response:\n{{{{ outputs }}}}\n"


FORMS: Mapping[str, tuple[Callable[[str, Constitution], str], str]] = {
    "system-prompt": (_system_prompt, ".txt"),
    "markdown": (lambda name, constitution: markdown(constitution), ".md"),
    "rubric": (_rubric, ".yaml"),
    "make-judge": (_make_judge, ".txt"),
}
"""Form to what writes it, and the file's type."""
