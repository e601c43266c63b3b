"""`staple`: run an experiment, re-run a stage, look at what came out.

Only Typer is imported here; each command imports what it needs, so that `--help` is quick.
"""

from __future__ import annotations

import errno
import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from constitutions.errors import UserError

app = typer.Typer(
    name="staple",
    help="A language model improves itself by principles that it discovers (STaPLe).",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)
constitutions = typer.Typer(no_args_is_help=True, help="Look at discovered constitutions.")
app.add_typer(constitutions, name="constitution")

Set = Annotated[
    list[str] | None,
    typer.Option("--set", help="Change a setting, as in --set mine.samples=8. Repeatable."),
]
Force = Annotated[bool, typer.Option("--force", help="Compute again what the record has.")]
Name = Annotated[str, typer.Argument(help="The experiment's name.")]


@app.command()
def run(
    source: Annotated[str, typer.Argument(help="A preset's name or a YAML file.")] = "planted",
    set_: Set = None,
    force: Force = False,
) -> None:
    """Run an experiment: T EM iterations, then a table. What the record has is not recomputed."""
    from flows.settings import load_settings

    settings = load_settings(source, set_ or [])
    from flows import show
    from flows.em import em_experiment
    from flows.preflight import check

    show.beginning(settings, check(settings))
    show.ending(settings, em_experiment(settings, force))


@app.command()
def stage(
    name: Annotated[str, typer.Argument(help="mine, score, filter, cluster, train or evaluate.")],
    experiment: Annotated[str, typer.Option(help="The experiment's name.")],
    iteration: Annotated[int, typer.Option(min=0, help="The EM iteration.")],
    set_: Set = None,
    force: Force = False,
) -> None:
    """Run one stage by itself, from the recorded outputs of the stages before it."""
    from flows import show
    from flows.experiment import recorded_settings
    from flows.stages import run_stage

    settings = recorded_settings(experiment, set_ or [])
    show.attempt(run_stage(settings, name, iteration, force))
    show.status(settings)


@app.command()
def status(experiment: Name) -> None:
    """Iterations by stages: finished, stale (and since which change), failed or missing."""
    from flows import show
    from flows.experiment import recorded_settings

    show.status(recorded_settings(experiment))


@constitutions.command("show")
def constitution_show(
    experiment: Name,
    iteration: Annotated[int | None, typer.Option(min=1, help="Default: the newest.")] = None,
) -> None:
    """Print the principles that the policy discovered, the best supported first."""
    from flows import show
    from flows.experiment import newest, recorded_settings

    settings = recorded_settings(experiment)
    show.constitution(newest(settings, "cluster", iteration))


@app.command()
def ask(
    experiment: Name,
    prompt: Annotated[str, typer.Argument(help="What to ask the policy.")],
    iteration: Annotated[int | None, typer.Option(min=0, help="Default: the newest.")] = None,
) -> None:
    """Ask the newest policy: its first answer, the principle it finds, its refined answer."""
    from flows import show
    from flows.ask import ask_policy
    from flows.experiment import recorded_settings

    show.asked(ask_policy(recorded_settings(experiment), prompt, iteration))


@app.command()
def validate(
    file: Annotated[str, typer.Argument(help="An experiment's YAML, a preset, or a data file.")],
    set_: Set = None,
) -> None:
    """Check settings, data and model before anything is computed; report every mistake."""
    from flows import show
    from flows.preflight import check, check_data

    if Path(file).suffix in (".yaml", ".yml") or not Path(file).suffix:
        from flows.settings import load_settings

        show.checked(file, check(load_settings(file, set_ or [])))
    else:
        show.checked(file, check_data(file))


def main() -> None:
    """Entry point: a user's mistake is one message and exit code 2, never a traceback."""
    _environment()
    try:
        app()
    except UserError as error:
        _fail(str(error), 2)
    except KeyboardInterrupt:
        _fail("stopped; what was finished is kept, the same command goes on from there", 130)
    except Exception as error:
        if not _disk_is_full(error):
            raise
        _fail("the disk is full; free some space, then run the same command again", 1)


def _disk_is_full(error: BaseException | None) -> bool:
    """Whether a full disk is behind an error: the system's, or SQLite's through its wrappers."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            return True
        if "database or disk is full" in str(error):
            return True
        error = error.__cause__ or error.__context__
    return False


def _environment() -> None:
    """Nothing phones home; Prefect's server may take its time on a slow first start."""
    defaults = {
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "DO_NOT_TRACK": "1",
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "MLFLOW_LOGGING_LEVEL": "WARNING",
        "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
        "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": "120",
        "PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL": "CRITICAL",
        "TOKENIZERS_PARALLELISM": "false",
        "TRANSFORMERS_VERBOSITY": "error",
        "HF_HUB_DISABLE_TELEMETRY": "1",
    }
    for name, value in defaults.items():
        os.environ.setdefault(name, value)


def _fail(message: str, code: int) -> None:
    from rich.console import Console
    from rich.text import Text

    Console(stderr=True).print(Text.assemble(("staple: ", "bold red"), message), soft_wrap=True)
    sys.exit(code)


if __name__ == "__main__":
    main()
