"""Hostile command lines: names, numbers, paths and `--set` values."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from hostile.cases import ODD_NAMES, SECRET, Case, fifo, folder

BIG = "9" * 5_000
NAMED: dict[str, Callable[[str], tuple[str, ...]]] = {
    "status": lambda name: ("status", "--", name),
    "constitution show": lambda name: ("constitution", "show", "--", name),
    "constitution edit": lambda name: ("constitution", "edit", "--", name),
    "export": lambda name: ("export", "--", name),
    "ask": lambda name: ("ask", "--", name, "Why?"),
    "report": lambda name: ("report", "--", name),
    "compare": lambda name: ("compare", "--", name, f"{name}:1"),
    "stage": lambda name: ("stage", "mine", f"--experiment={name}", "--iteration", "1"),
    "resume": lambda name: ("run", "--resume", "--", name),
    "from": lambda name: ("run", "--from", "cluster:1", "--", name),
    "run": lambda name: ("run", "--", name),
    "validate": lambda name: ("validate", "--", name),
    "plan": lambda name: ("plan", "--", name),
    "plan like": lambda name: ("plan", "planted", f"--like={name}"),
    "write from": lambda name: ("constitution", "write", f"--from={name}"),
}
"""Commands that take the name of an experiment or a file. An empty --like, --from is none."""


def names() -> Iterator[Case]:
    """Each odd name goes to five of the commands, in turn."""
    commands = list(NAMED)
    for n, (what, name) in enumerate(ODD_NAMES.items()):
        for step in range(5):
            command = commands[(4 * n + 3 * step) % len(commands)]
            if name or command not in ("plan like", "write from"):
                yield Case(f"{command}: {what}", NAMED[command](name))


NUMBERS = {
    "negative": "-1",
    "5,000 digits": BIG,
    "a power": "²",
    "a fraction": "1.5",
    "no number": "nan",
    "without end": "inf",
    "nothing": "",
    "red": "\x1b[31m1",
    "thousands": "100_000_000_000",
}
COUNTED = {
    "stage": ("stage", "mine", "--experiment", "x", "--iteration"),
    "show": ("constitution", "show", "x", "--iteration"),
    "export": ("export", "x", "--iteration"),
    "port": ("up", "--port"),
    "mlflow port": ("up", "--mlflow-port"),
    "principles": ("constitution", "write", "--principles"),
    "seed": ("judge", "a.json", "b.json", "--seed"),
    "filled": ("plan", "planted", "--filled"),
    "accepted": ("plan", "planted", "--accepted"),
}


def numbers() -> Iterator[Case]:
    fine = {("filled", "a fraction"), ("accepted", "a fraction")}
    wanted = list(COUNTED)
    for n, (what, number) in enumerate(NUMBERS.items()):
        for step in range(4):
            option = wanted[(n + 2 * step) % len(wanted)]
            if (option, what) not in fine:
                yield Case(f"--{option}: {what}", (*COUNTED[option], number))
    yield Case("--port: 99999", ("up", "--port", "99999"), says="65535")
    yield Case("--port: 0", ("up", "--port", "0"), says="--port")
    yield Case("--filled: no number", ("plan", "planted", "--filled", "nan"), says="filled")


SETTINGS = {
    "an open bracket": "iterations=[1",
    "a mapping": "experiment='a: b'",
    "a mapping within": "experiment=a: b",
    "two colons": "experiment=a: b: c",
    "an open quote": "experiment='a",
    "a date": "experiment=2024-01-01",
    "a 13th month": "experiment=2024-13-45",
    "a tag": "experiment=!!python/object/apply:os.system [id]",
    "no int": "seed=!!int abc",
    "no float": "mine.temperature=!!float abc",
    "binary": "experiment=!!binary xx",
    "a set": "experiment=!!set {a, b}",
    "5,000 digits": f"seed={BIG}",
    "66 bits": "seed=73786976294838206464",
    "a negative seed": "seed=-1",
    "40 bits": "seed=1099511627776",
    "infinity": "mine.temperature=.inf",
    "no number": "mine.temperature=.nan",
    "a list of lists": "iterations=" + "[" * 5_000,
    "a list in lists": "iterations=" + "[" * 80 + "]" * 80,
    "an unhashable key": "then={[a]: b}",
    "a mapping as key": "then={{a: b}: c}",
    "a key twice": "then={seed: 1, seed: 2}",
    "an alias": "experiment=*a",
    "an alias of itself": "then=&a {b: *a}",
    "a merge of a number": "then={<<: 3}",
    "then held out without end": "then={prompts: {held_out: .inf}}",
    "then held out in words": "then={prompts: {held_out: many}}",
    "then held out as a list": "then={prompts: {held_out: [1]}}",
    "then a number": "then=5",
    "then of itself": "then={then: {}}",
    "then unknown": "then={promts: {first: 1}}",
    "then with number keys": "then={1: 2}",
    "then with a dotted key": "then={prompts..first: 2}",
    "then with prompts as a number": "then={prompts: 5}",
    "then with many names": "then={" + ", ".join(f"a{n}: 1" for n in range(2_000)) + "}",
    "no name": "=5",
    "no value sign": "mine.samples",
    "a name with a dash": "mine-samples=5",
    "dots": "mine..samples=5",
    "a part of a number": "seed.x=5",
    "5,000 parts": ".".join(["then"] + ["a"] * 5_000) + "=1",
    "a long name": "a" * 100_000 + "=1",
    "a long value": "experiment=" + "a" * 100_000,
    "a red value": "experiment=\x1b[31mred",
    "a red name": "\x1b[31mred=1",
    "a red setting": '"mine.\x1b[31m"=1',
    "an escaped red value": 'experiment="\\e[31mred"',
    "a NUL": 'policy.model="a\\0b"',
    "half a character": 'policy.model="\\ud800"',
    "half a byte": "policy.model=\udcff",
    "markup": "experiment=[/green]",
    "a port beyond": "policy.endpoint=http://127.0.0.1:99999",
    "a port of letters": "policy.endpoint=http://127.0.0.1:abc/",
    "port 0": "policy.endpoint=http://127.0.0.1:0/",
    "a password": f"policy.endpoint=http://user:{SECRET}@host/",
    "a password in the query": f"policy.endpoint=http://host/?password={SECRET}",
    "no scheme": "policy.endpoint=host:80",
    "another scheme": "policy.endpoint=file:///etc/passwd",
    "an address of two lines": 'policy.endpoint="http://a\\nb"',
    "a bracket in an address": "policy.endpoint=http://[::1",
    "a million million prompts": "prompts.first=1000000000000",
    "a hundred million prompts": "prompts.first=100000000",
    "many held out": "prompts.held_out=100000000",
    "many skipped": "prompts.skip=90000000",
    "many later": "prompts.later=1000000000",
    "a bool for a number": "iterations=yes please",
    "a list for a number": "iterations=[1]",
    "null for a name": "experiment=null",
    "a judge as a list": "evaluate.judge=[a]",
    "a judge of itself": "evaluate.judge={policy: {endpoint: {}}}",
    "a model of 5,000 letters": "policy.model=" + "x" * 5_000,
    "a model above": "policy.model=../../../../etc/passwd",
    "a red model": 'policy.model="\\e]0;x\\a./no"',
    "sources as a word": "prompts.sources=here",
    "sources as a number": "prompts.sources=5",
    "a source of nothing": "prompts.sources=[{}]",
    "a source with a password": f"prompts.sources=[{{path: 'http://u:{SECRET}@h/a.jsonl'}}]",
    "a device as source": "prompts.sources=[{path: /dev/zero}]",
    "no sources": "prompts.sources=[]",
}


def sets() -> Iterator[Case]:
    for what, override in SETTINGS.items():
        yield Case(f"--set: {what}", ("validate", "planted", "--set", override))


def at(place: str) -> Case:
    """`--from` as it is read once the settings are."""

    def parse() -> Any:
        from flows.experiment import parse_place
        from flows.settings import load_settings

        return parse_place(place, load_settings("planted"))

    return Case(f"--from: {place[:20]!r}", call=parse, says="no such stage")


PLACES = (
    "cluster:²",
    "cluster:-1",
    "cluster:٣",
    f"cluster:{BIG}",
    "cluster:1:2",
    ":1",
    "\x1b[2J:1",
)

PATHS = [
    Case(
        "out: long",
        ("constitution", "write", "--out", "x" * 5_000),
    ),
    Case("out: a folder", ("constitution", "write", "--out", "d"), files={"d": folder}),
    Case("out: no folder", ("constitution", "write", "--out", "no/such/c.yaml")),
    Case("judge: nothing", ("judge", "no.json", "no.json", "--set", "judge.kind=pairwise")),
    Case(
        "judge: a FIFO",
        ("judge", "f.json", "f.json", "--set", "judge.kind=pairwise"),
        files={"f.json": fifo},
        says="no regular file",
    ),
    Case("judge: long names", ("judge", "x" * 5_000, "y" * 5_000)),
    Case("judge: a device", ("judge", "/dev/zero", "/dev/zero"), says="no regular file"),
    Case("judge: an odd out", ("judge", "a.json", "b.json", "--out", "a\x1b[31m.exe")),
    Case("validate: a FIFO", ("validate", "f.yaml"), files={"f.yaml": fifo}, says="regular"),
    Case("validate: a folder", ("validate", "d.yaml"), files={"d.yaml": folder}, says="directory"),
    Case("validate: a device", ("validate", "/dev/zero"), says="regular"),
    Case("validate: a tty", ("run", "/dev/tty")),
    Case("validate: markup", ("validate", "a[/green].yaml"), says="a[/green].yaml"),
    Case("run: a FIFO", ("run", "f.yaml"), files={"f.yaml": fifo}, says="regular"),
]

USAGE = [
    Case("usage: no such command", ("\x1b[31mrun",)),
    Case("usage: no such option", ("run", "--\x1b[31mfoo")),
    Case("usage: markup", ("[/green]",), says="[/green]"),
    Case("usage: a long command", ("x" * 100_000,)),
    Case("usage: too many", ("status", "a", "b")),
    Case("usage: a lack", ("stage", "mine")),
    Case("usage: a red path", ("judge", "a")),
    Case("usage: half a character", ("\udcff",)),
    Case("usage: no value", ("run", "--set")),
    Case("usage: an unknown GPU", ("plan", "planted", "--gpu", "\x1b[31mh100"), says="h100"),
    Case("usage: an unknown baseline", ("baselines", "--only", "a\x1b[31m")),
    Case("usage: a baseline's setting", ("baselines", "--set", "x\x1b[31m:mine.samples=8")),
    Case("usage: help", ("run", "--help"), code=0),
    Case(
        "usage: half a character is asked",
        ("ask", "never-run", "\udcff\ud800"),
        says="never-run",
    ),
]


def at_work(what: str, call: Callable[[], Any], says: str) -> Case:
    return Case(f"text: {what}", call=call, says=says)


def asked(prompt: str, *principles: str) -> Callable[[], Any]:
    def ask() -> Any:
        from flows.commands.ask import ask_policy
        from flows.settings import load_settings

        if principles:
            return ask_policy(load_settings("planted-sami"), prompt, 0, principles)
        return ask_policy(load_settings("planted"), prompt, 0)

    return ask


def reviewed(**how: Any) -> Callable[[], Any]:
    def decide() -> Any:
        from constitutions.constitution import Constitution, Principle
        from constitutions.review import Decision, apply

        there = Constitution(principles=(Principle(id="a", text="be kind"),))
        return apply(there, [Decision(id="a", **how)], how.get("added", ()))

    return decide


TEXTS = [
    at_work("half a character is asked", asked("a\udcff"), "half a character"),
    at_work("nothing is asked", asked(" \n"), "empty"),
    at_work("half a principle", asked("Why?", "a\ud800"), "half a character"),
    at_work("half a wording", reviewed(action="reword", text="a\ud800"), "half a character"),
    at_work("no wording", reviewed(action="reword", text=" "), "empty"),
    at_work("merged into red", reviewed(action="merge", into="\x1b[31m"), "not there"),
]
ENVIRONMENT = {
    "no store": {"MLFLOW_TRACKING_URI": "foo://bar"},
    "no address": {"MLFLOW_TRACKING_URI": "sqlite:[1"},
    "an open bracket": {"MLFLOW_TRACKING_URI": "http://[::1"},
    "a port beyond": {"MLFLOW_TRACKING_URI": "http://127.0.0.1:99999"},
    "a database that is none": {"MLFLOW_TRACKING_URI": f"nosql://u:{SECRET}@h/db"},
    "a long home": {"STAPLE_HOME": "x" * 5_000},
    "a home in a file": {"STAPLE_HOME": "/dev/null/x"},
}


def surroundings() -> Iterator[Case]:
    for what, env in ENVIRONMENT.items():
        yield Case(f"environment: {what}", ("status", "x"), env=env)


CASES = [*names(), *numbers(), *sets(), *map(at, PLACES), *PATHS, *USAGE, *TEXTS, *surroundings()]
