"""The settings of an experiment, read from a preset, YAML and `--set`, and checked.

`load_settings` reports every mistake at once, each with the setting's name and what it expects.
"""

from __future__ import annotations

import difflib
import re
import reprlib
from collections.abc import Iterator, Mapping, Sequence
from itertools import takewhile
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import yaml
from pydantic import ValidationError

from constitutions.errors import REPORTED, UserError, UserErrors
from constitutions.parse import SMALL, parse_yaml, read_text
from constitutions.untrusted import hide_passwords
from flows.methods import method_of
from flows.schema import ExperimentSettings
from models.settings import Settings, is_settings
from models.template_file import TemplateFile
from models.templates import template_names

PRESETS = Path(__file__).parent / "presets"
ANY = object()
_SHARD = (ANY, "one setting holds for all stages: shard_size")
GONE = {
    **{f"{stage}.shard_size": _SHARD for stage in ("mine", "score", "sample", "evaluate")},
    "filter.max_principle_words": (40, "leave it out; a principle has at most 40 words"),
    "filter.leak_words": (6, "leave it out; 6 consecutive words of the gold are a leak"),
    "prompts.sources.max_characters": (20_000, "leave it out; a text has at most 20,000"),
}
"""Settings of earlier versions: their fixed value now (ANY: it changes no result), and what to do.
A record may have them; a user's file may not."""
FREE = "template_arguments"
"""The setting whose parts have names of the user's."""
MOST_PARTS = 16
"""Parts of a setting's name, as in evaluate.judge.policy.model."""


def presets() -> list[str]:
    """Names of the presets that come with the project."""
    return sorted(p.stem for p in PRESETS.glob("*.yaml"))


def about(preset: str) -> str:
    """What a preset is, in the first sentence of its file."""
    lines = (PRESETS / f"{preset}.yaml").read_text("utf-8").splitlines()
    said = (line.removeprefix("#").strip() for line in lines[2:])  # the command, an empty line
    return " ".join(takewhile(bool, said)).partition(". ")[0].rstrip(".")


def completions(begun: str) -> list[str]:
    """What a shell offers for `--set`: names, as "mine.samples="; then the words that a setting may
    be, as "train.update=lora"."""
    name, equals, _ = begun.partition("=")
    leaves = dict(_leaves(ExperimentSettings))
    if equals:
        return [f"{name}={word}" for word in _words(leaves.get(name))]
    return [f"{leaf}=" for leaf in leaves]


def _leaves(model: type[Settings], path: str = "") -> Iterator[tuple[str, Any]]:
    """Every setting that is no part with settings of its own, by its whole name, and its type."""
    for name, field in model.model_fields.items():
        own = [a for a in (field.annotation, *get_args(field.annotation)) if is_settings(a)]
        if own:
            yield from _leaves(own[0], f"{path}{name}.")
        else:
            yield f"{path}{name}", field.annotation


def _words(annotation: Any) -> list[str]:
    """The words that a type allows, beside its other values."""
    if annotation is bool:
        return ["true", "false"]
    if get_origin(annotation) is Literal:
        return [str(word) for word in get_args(annotation)]
    return [word for inner in get_args(annotation) for word in _words(inner)]


def load_settings(
    source: str, overrides: Sequence[str] = (), text: str | None = None, *, recorded: bool = False
) -> ExperimentSettings:
    """Settings from a preset's name or a YAML file, changed by "key.path=value" overrides.

    A file may start from a preset: `extends: planted`. With `text` the YAML is given, and `source`
    only names it; `recorded`: an earlier version may have written it.

    Raises:
        UserErrors: every mistake of the file and of the overrides.
    """
    values = _read(source) if text is None else _mapping(text, source)
    if recorded:
        values = without_gone(values)
    problems: list[UserError] = []
    for override in overrides:
        try:
            _set(values, *parse_override(override))
        except UserError as error:
            problems.append(error)
    return _checked(values, source, problems)


def with_changes(settings: ExperimentSettings, changes: Mapping[str, Any]) -> ExperimentSettings:
    """The settings with some replaced: "cluster.max_principles" → value.

    Raises:
        UserErrors: every name or value that is wrong.
    """
    if not changes:
        return settings
    values = settings.model_dump(mode="json")
    for name, value in changes.items():
        _set(values, name, value)
    return _checked(values, f"experiment {settings.experiment}")


def _checked(
    values: Mapping[str, Any], source: str, problems: Sequence[UserError] = ()
) -> ExperimentSettings:
    """The settings, unless they or earlier `problems` are wrong: then all that is."""
    values, wrong = with_templates(values, source)
    problems = [*problems, *wrong]
    try:
        settings = ExperimentSettings.model_validate(values)
        found = _contradictions(settings, source)
    except ValidationError as error:
        found = explain(error, source)
    if problems or found:
        raise UserErrors([*problems, *found])
    return settings


def with_templates(
    values: Mapping[str, Any], source: str, path: str = ""
) -> tuple[dict[str, Any], list[UserError]]:
    """Settings in which what a file of templates holds replaces its path; and all that is wrong.

    Args:
        source: what messages call the settings; "": they were given as options.
        path: the part of the settings that `values` is.
    """
    kept, problems = dict(values), list[UserError]()
    for name, value in values.items():
        place = f"{path}.{name}" if path else str(name)  # a key may be anything in YAML
        if place.endswith("templates"):
            try:
                kept[name] = _templates(value, f"{source}, setting '{place}'".removeprefix(", "))
            except UserError as error:
                problems.append(error)
                del kept[name]
        elif isinstance(value, Mapping) and name != FREE:
            kept[name], wrong = with_templates(value, source, place)
            problems += wrong
    return kept, problems


def _templates(value: Any, where: str) -> Any:
    """What a setting `templates` is: a name as it stands, or the turns that it holds.

    Raises:
        UserError: the file cannot be read.
        UserErrors: every mistake of the turns.
    """
    known = template_names()
    if value in known or not isinstance(value, str | Mapping):
        return value
    if isinstance(value, str):
        expected = f"one of {', '.join(known)}, or the path of a YAML file with the turns"
        try:
            where, value = value, _mapping(read_text(value, SMALL, expected), value)
        except UserError as error:
            raise UserErrors([error], within=where) from None
    try:
        turns = TemplateFile.model_validate(value)
    except ValidationError as error:
        raise UserErrors(explain(error, where, TemplateFile)) from None
    return turns.model_dump(mode="json", exclude_none=True)


def without_gone(
    values: Mapping[str, Any], path: str = "", *, as_fixed: bool = False
) -> dict[str, Any]:
    """Recorded settings without those of earlier versions (GONE), in `then` as well.

    Args:
        as_fixed: keep those that had another value than is fixed now.
    """

    def inside(value: Any, place: str) -> Any:
        if isinstance(value, list):
            return [inside(item, place) for item in value]
        return without_gone(value, place, as_fixed=as_fixed) if isinstance(value, dict) else value

    kept = {}
    for name, value in values.items():
        place = f"{path}.{name}" if path else str(name)  # a key may be anything in YAML
        fixed, _ = GONE.get(place, (None, ""))
        if place not in GONE or (as_fixed and fixed not in (ANY, value)):
            kept[name] = inside(value, "" if place == "then" else place)
    return kept


def _wrong_succession(settings: ExperimentSettings, source: str) -> Iterator[UserError]:
    """What is wrong in `then`."""
    where = f"{source}, setting 'then'"
    own = [name for name in ("experiment", "method", "after", "then") if name in settings.then]
    if own:
        yield UserError(f"it sets {', '.join(own)}", where=where, expected="none of these")
    if not settings.last:
        yield UserError(
            "the experiment trains nothing", where=where, expected="iterations: 1 or more"
        )
    try:
        if then := following(settings):
            check_succession(settings, then)
    except UserError as error:
        yield UserErrors([error], within=where)


def following(settings: ExperimentSettings) -> ExperimentSettings | None:
    """The SAMI experiment that continues this one, by its setting `then`; None without.

    Raises:
        UserErrors: every name or value in `then` that is wrong.
    """
    if not settings.then:
        return None
    name, prompts = settings.experiment, settings.prompts
    values = dotted(settings.then, whole="templates")
    held_out = values.get("prompts.held_out")
    fewer = prompts.held_out - held_out if isinstance(held_out, int) else 0
    mined = prompts.first + prompts.later * (settings.last - 1) + max(0, fewer)
    own = {
        "experiment": f"{name}.sami",
        "method": "sami",
        "after": name,
        "then": {},
        "review": {},
        "teach": {},
        "prompts.skip": prompts.skip + mined,
    }
    return with_changes(settings, {**values, **own})


BEGUN = ("update", "lora_rank", "lora_alpha", "lora_dropout")
"""Settings of a training that every training after it shares."""


def check_succession(before: ExperimentSettings, then: ExperimentSettings) -> None:
    """Refuse an experiment that cannot continue another one.

    Raises:
        UserErrors: all that does not fit.
    """
    goes_on = then.train.start == "previous"
    one, other = (
        {
            **s.policy.model_dump(include={"model", "revision", "quantization"}),
            "seed": s.seed,
            **({f"train.{n}": getattr(s.train, n) for n in BEGUN} if goes_on else {}),
        }
        for s in (before, then)
    )
    found = [
        UserError(
            f"experiment {before.experiment} has another {name}: {one[name]}",
            where="setting 'after'",
            expected=f"the same {name}, not {other[name]}",
        )
        for name in one
        if one[name] != other[name]
    ]
    if not method_of(before).guided and not then.write.constitution:
        found.append(
            UserError(
                f"experiment {before.experiment} discovers no constitution",
                where="setting 'after'",
                expected="an experiment with method: staple, or a write.constitution of your own",
            )
        )
    if before.prompts.held_out < then.prompts.held_out and then.prompts.corpora:
        found.append(
            UserError(
                f"experiment {before.experiment} mined prompts that would be held out",
                where="setting 'prompts.held_out'",
                expected=f"at most {before.prompts.held_out}",
            )
        )
    if before.experiment == then.experiment:
        found.append(UserError("an experiment cannot continue itself", where="setting 'after'"))
    if found:
        raise UserErrors(found)


def dotted(values: Mapping[str, Any], prefix: str = "", *, whole: str = "") -> dict[str, Any]:
    """{"train": {"epochs": 2}} as {"train.epochs": 2}; a part with the name `whole` is a value."""
    found: dict[str, Any] = {}
    for name, value in values.items():
        path = f"{prefix}{name}"
        several = isinstance(value, dict) and name != whole
        found |= dotted(value, f"{path}.", whole=whole) if several else {path: value}
    return found


def _contradictions(settings: ExperimentSettings, source: str) -> list[UserError]:
    """Settings of different parts that contradict each other."""
    found: list[UserError] = []
    method = method_of(settings)
    if settings.then and not method.constitutional:
        found += _wrong_succession(settings, source)
    if settings.train.update == "full" and settings.policy.quantization != "none":
        found.append(
            UserError(
                f"all weights cannot be trained in {settings.policy.quantization}",
                where=f"{source}, setting 'train.update' = full",
                expected="policy.quantization: none",
                fix="set it, or train.update: lora",
            )
        )
    if settings.iterations == "auto" and settings.review.which == "last":
        found.append(
            UserError(
                "nobody knows which iteration is the last before it has ended",
                where=f"{source}, setting 'review.which' = last",
                expected="each, with iterations: auto",
            )
        )
    if settings.teach.on and settings.after:
        found.append(
            UserError(
                f"experiment {settings.after}, which this one continues, has the skills",
                where=f"{source}, setting 'teach'",
                expected="no examples and no file",
            )
        )
    return [*found, *method.mistakes(settings, source)]


def parse_overrides(overrides: Sequence[str]) -> dict[str, Any]:
    """ "mine.samples=8", … as {"mine.samples": 8}.

    Raises:
        UserError: one has another form.
    """
    return dict(parse_override(override) for override in overrides)


def dump_settings(settings: ExperimentSettings) -> str:
    """YAML that `load_settings` reads back."""
    return yaml.safe_dump(settings.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def _read(source: str, extended: tuple[str, ...] = ()) -> dict[str, Any]:
    """The values of a preset or file, merged into those that it extends.

    Args:
        extended: the files that extend this one, the outermost first.
    """
    known = presets()
    path = PRESETS / f"{source}.yaml" if source in known else Path(source)
    expected = f"one of {', '.join(known)}, or the path of a YAML file"
    values = _mapping(read_text(path, SMALL, expected), source)
    base = values.pop("extends", None)
    if base is None:
        return values
    where = f"{source}, 'extends'"
    if not isinstance(base, str):
        raise UserError(f"got {short(base)}", where=where, expected="one preset or file")
    if base in (*extended, source):
        chain = " → ".join([*extended, source, base])
        raise UserError(f"the file extends itself: {chain}", where=where)
    if len(extended) >= MOST_PARTS:
        raise UserError("more than 16 files extend one another", where=where)
    return _merge(_read(base, (*extended, source)), values)


def _mapping(text: str, source: str) -> dict[str, Any]:
    values = parse_yaml(text, source)
    if not isinstance(values, dict):
        raise UserError("not a mapping", where=source, expected="settings as `name: value` lines")
    return values


def _merge(base: dict[str, Any], change: dict[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in change.items():
        both = isinstance(value, dict) and isinstance(base.get(key), dict)
        merged[key] = _merge(base[key], value) if both else value
    return merged


def parse_override(override: str) -> tuple[str, Any]:
    """ "mine.samples=8" as ("mine.samples", 8).

    Raises:
        UserError: it has another form.
    """
    match = re.fullmatch(r"([A-Za-z_][\w.]*)=(.*)", override, re.DOTALL)
    if not match:
        raise UserError(
            "not an override", where=f"--set {override}", expected="key=value, as in mine.samples=8"
        )
    if match[1].count(".") >= MOST_PARTS:
        raise UserError("the name has more than 16 parts", where=f"--set {match[1]}")
    fix = "put a text that holds ': ', '#' or brackets in quotes of its own"
    return match[1], parse_yaml(match[2], f"--set {match[1]}", fix=fix)


def _set(values: dict[str, Any], name: str, value: Any) -> None:
    *parents, last = name.split(".")
    place = values
    for parent in parents:
        if place.get(parent) is None:  # an optional part that was unset
            place[parent] = {}
        inner = place[parent]
        if not isinstance(inner, dict):
            raise UserError(f"'{parent}' has no parts", where=f"setting '{name}'")
        place = inner
    place[last] = value


def explain(
    error: ValidationError, source: str, settings: type[Settings] = ExperimentSettings
) -> list[UserError]:
    """What is wrong with settings, by name.

    Args:
        source: what messages call the file; "": the settings were given as options.
        settings: the class that was validated.
    """
    found = error.errors(include_url=False, include_context=False)
    errors = [_explain_one(e, source, settings) for e in found[:REPORTED] if not _follows(e, found)]
    if (more := len(found) - REPORTED) > 0:
        errors.append(UserError(f"{more:,} more are wrong", where=source))
    return errors


def _follows(error: Any, found: Sequence[Any]) -> bool:
    """Whether a list is too short only because of wrong entries, which have their own errors."""
    place = error["loc"]
    inside = (e for e in found if e["loc"][: len(place)] == place and len(e["loc"]) > len(place))
    return error["type"] == "too_short" and any(inside)


def _explain_one(error: Any, source: str, settings: type[Settings]) -> UserError:
    *parts, last = map(str, error["loc"] or ("",))
    path = [part for part in parts if part.isidentifier() or part.isdecimal()]  # no union's types
    if error["type"] == "extra_forbidden" or last.isidentifier() or last.isdecimal() or not path:
        path.append(last)  # an unknown setting is named as it was written
    where = f"{f'{source}, ' * bool(source)}setting '{'.'.join(path)}'"
    if error["type"] == "extra_forbidden":
        _, fix = GONE.get(".".join(filter(str.isidentifier, path)), (None, ""))
        if fix:
            return UserError("this is no longer a setting", where=where, fix=fix)
        known = _known(path[:-1], settings)
        close = difflib.get_close_matches(path[-1], known, n=1)
        fix = f"did you mean '{close[0]}'?" if close else ""
        one_of = f"one of {', '.join(known)}"
        return UserError("unknown setting", where=where, expected=one_of, fix=fix)
    if error["type"] == "missing":
        return UserError("it is missing", where=where)
    message = str(error["msg"]).removeprefix("Value error, ").removeprefix("Input should be ")
    return UserError(f"got {short(error['input'])}", where=where, expected=message)


def short(value: Any) -> str:
    """A value, cut to about 80 characters."""
    form = _Short()
    form.maxstring = form.maxother = 80
    return form.repr(value)


class _Short(reprlib.Repr):
    def repr_str(self, x: str, level: int) -> str:
        """Hide passwords before the text is cut: a part of one is not recognised."""
        return super().repr_str(hide_passwords(x[:10_000]), level)


def _known(path: Sequence[str], model: Any) -> list[str]:
    """The settings of a part."""
    for name in filter(str.isidentifier, path):
        field = model.model_fields.get(name)
        model = next(_parts(field.annotation), None) if field else None
        if model is None:
            return []
    return list(model.model_fields)


def _parts(annotation: Any) -> Iterator[type[Settings]]:
    """The settings models in a type."""
    if is_settings(annotation):
        yield annotation
    for inner in get_args(annotation):
        yield from _parts(inner)
