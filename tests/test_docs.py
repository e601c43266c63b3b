"""README and docs/: links, names, commands, settings and figures are those of this tree."""

from __future__ import annotations

import ast
import json
import re
import tomllib
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml
from pages import (
    ALL,
    COMMANDS,
    PAGES,
    README,
    ROOT,
    Command,
    anchors,
    codes,
    fences,
    links,
    name,
    shell_lines,
    tokens,
)  # fmt: skip

PACKAGES = ("flows", "tasks", "models", "constitutions")
PART = "# part of an experiment's YAML"
"""Opens a fence whose settings go into an experiment of one's own."""

each_page = pytest.mark.parametrize("page", ALL, ids=name)


# The pages by themselves ---------------------------------------------------------------------


def test_the_readme_is_short() -> None:
    assert README.stat().st_size < 9_000


@each_page
def test_links_resolve(page: Path) -> None:
    for path, anchor in links(page):
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), path
        assert not anchor or anchor in anchors(target), f"{path}#{anchor}"


@each_page
def test_fences_are_closed(page: Path) -> None:
    lines = page.read_text("utf-8").splitlines()
    for token in tokens(page):
        if token.type == "fence":
            assert token.map is not None
            assert lines[token.map[1] - 1].strip() == token.markup, f"line {token.map[0] + 1}"


def test_every_page_is_reached_from_the_readme() -> None:
    reached, todo = set[Path](), [README]
    while todo:
        page = todo.pop()
        reached.add(page)
        found = {(page.parent / path).resolve() for path, _ in links(page) if path.endswith(".md")}
        todo += found - reached - set(todo)
    assert set(PAGES) <= reached


# Names of the tree ---------------------------------------------------------------------------

NAMED = re.compile(
    r"((?:flows|tasks|models|constitutions|docker|tests|benchmarks|docs)/[\w./*-]*)(?:: ([\w., ]+))?"
)


@cache
def defined(file: Path) -> set[str]:
    """The names that a module defines at its top, and what its classes hold: "Class.name"."""
    found = set[str]()
    for node in ast.parse(file.read_text("utf-8")).body:
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        found |= {t.id for t in targets if isinstance(t, ast.Name)}
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found.add(node.name)
        if isinstance(node, ast.ClassDef):
            found |= {f"{node.name}.{part}" for part in defined_in(node)}
    return found


def defined_in(node: ast.ClassDef) -> set[str]:
    functions = {n.name for n in node.body if isinstance(n, ast.FunctionDef)}
    values = {n.target.id for n in node.body if isinstance(n, ast.AnnAssign) and isinstance(n.target, ast.Name)}  # fmt: skip
    return functions | values


def assert_exists(code: str) -> None:
    """`tasks/filter.py` is a file of the tree, `tasks/filter.py: weights` what it defines."""
    match = NAMED.fullmatch(code)
    assert match and list(ROOT.glob(match[1])), code
    for symbol in filter(None, re.split(r"[, ]+", match[2] or "")):
        assert symbol in defined(ROOT / match[1]), code


@pytest.mark.parametrize("page", [p for p in PAGES if p.name != "names.md"], ids=name)
def test_named_paths_and_functions_exist(page: Path) -> None:
    for code in codes(page):
        if NAMED.fullmatch(code):
            assert_exists(code)


def test_new_names_exist() -> None:
    """The right column of docs/names.md: modules, and what they define."""
    lines = (ROOT / "docs/names.md").read_text("utf-8").splitlines()
    rows = [line.split("|")[1:-1] for line in lines if line.startswith("| `")]
    assert len(rows) > 50
    for old, new in rows:
        assert old.strip() != new.strip()
        for code in re.findall(r"`([\w/]+\.py[^`]*)`", new):
            assert_exists(code)


def test_settings_that_are_gone_are_told() -> None:
    from flows.settings import GONE

    page = (ROOT / "docs/names.md").read_text("utf-8")
    assert all(f"`{setting}`" in page for setting in GONE)


def readme_map() -> set[str]:
    """The paths of the README's map; a line's indentation says in which folder it is."""
    (text,) = fences(README, "text")
    above: list[tuple[int, str]] = []
    found = set[str]()
    for line in text.splitlines():
        indent = len(line) - len(line.lstrip())
        while above and above[-1][0] >= indent:
            above.pop()
        parent = above[-1][1] if above else ""
        first = re.split(r" {2,}", line.strip())[0]
        found |= {parent + part for part in first.split(", ")}
        above.append((indent, parent + first))
    return found


def test_the_map_is_the_tree() -> None:
    found = readme_map()
    for path in found:
        assert (ROOT / path).exists(), path
    rooms = {
        f"{package}/{folder.name}/"
        for package in PACKAGES
        for folder in (ROOT / package).iterdir()
        if list(folder.glob("*.py"))
    }
    assert rooms <= found


# Commands ------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", COMMANDS, ids=str)
def test_commands_parse(command: Command) -> None:
    """Typer reads every command of the pages: subcommands, options and types exist."""
    from typer.main import get_command

    from flows.commands.cli import app

    group: Any = get_command(app)
    context: Any = group.make_context("staple", list(command.words))
    while hasattr(group, "resolve_command"):
        rest = [*context._protected_args, *context.args]
        called, group, rest = group.resolve_command(context, rest)
        try:
            context = group.make_context(called, rest, parent=context)
        except Exception as error:
            if command.written or type(error).__name__ != "MissingParameter":
                raise
            return  # a sentence may name a command by its first words: `staple validate`


def test_changed_settings_exist() -> None:
    """Each `--set` of a command with a preset is a setting of that preset."""
    from flows.settings import load_settings, presets

    checked = 0
    for command in COMMANDS:
        source = command.words[1] if len(command.words) > 1 else ""
        changes = [v for w, v in zip(command.words, command.words[1:], strict=False) if w == "--set"]  # fmt: skip
        if command.words[0] in ("run", "plan") and source in presets() and "…" not in str(changes):
            load_settings(source, changes)
            checked += bool(changes)
    assert checked >= 3


def test_make_targets_exist() -> None:
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text("utf-8"), re.MULTILINE))
    for page in ALL:
        quoted = [code.split() for code in codes(page) if code.startswith("make ")]
        for words in [*shell_lines(page), *quoted]:
            if words and words[0] == "make":
                assert words[1] in targets, f"{name(page)}: {words}"


# Settings ------------------------------------------------------------------------------------

YAML = [(page, text) for page in ALL for text in fences(page, "yaml")]


@pytest.mark.parametrize(("page", "text"), YAML, ids=[f"{name(p)}-{i}" for i, (p, _) in enumerate(YAML)])  # fmt: skip
def test_yaml_examples_load(page: Path, text: str, tmp_path: Path) -> None:
    from constitutions.reference import load_pairs
    from flows.settings import load_settings

    file = tmp_path / "given.yaml"
    file.write_text(text)
    if text.startswith("# antworten.yaml"):
        load_settings("planted", [f"policy.templates={file}"])
        return
    if text.startswith("# pairs.yaml"):
        assert len(load_pairs(file).principles) == 2
        return
    if text.startswith(PART):
        given = yaml.safe_load(text)
        base = "planted-sami" if given.get("method") == "sami" else "llama-3.1-8b"
        file.write_text(yaml.safe_dump({"extends": base, **given}))
    else:
        assert text.startswith("# mine.yaml")
    load_settings(str(file))


# Messages and figures ------------------------------------------------------------------------


@cache
def templates() -> str:
    """Every text of the code, with … for what it fills in."""

    def told(node: ast.AST) -> str:
        if isinstance(node, ast.JoinedStr):
            return "".join(told(v) for v in node.values)
        return str(node.value) if isinstance(node, ast.Constant) else "…"

    nodes = [n for p in PACKAGES for f in (ROOT / p).rglob("*.py") for n in ast.walk(ast.parse(f.read_text("utf-8")))]  # fmt: skip
    return "\n".join(told(n) for n in nodes if isinstance(n, ast.JoinedStr | ast.Constant))


def test_quoted_messages_are_the_codes() -> None:
    found = tokens(ROOT / "docs/troubleshooting.md")
    headings = [found[i + 1] for i, t in enumerate(found) if t.type == "heading_open" and t.tag == "h3"]  # fmt: skip
    assert len(headings) >= 20
    for heading in headings:
        (quoted,) = heading.children or []
        assert quoted.type == "code_inline"
        assert quoted.content in templates(), quoted.content


def test_the_picture_has_the_benchmarks_figures() -> None:
    """The curves of docs/loop.svg are the means of benchmarks/learning.md."""
    picture = (ROOT / "docs/loop.svg").read_text("utf-8")
    table = (ROOT / "benchmarks/learning.md").read_text("utf-8")
    means = [re.findall(r"\*\*([\d.]+)\*\*", line)[:3] for line in table.splitlines() if line.startswith("| **mean**")]  # fmt: skip
    for rates in means[:2]:
        heights = [200 - 160 * float(rate) for rate in ["0.5", *rates]]
        xs = (650, 715, 780, 845)
        assert " ".join(f"{x} {y:g}" for x, y in zip(xs, heights, strict=True)) in picture


def test_the_row_of_the_method_page() -> None:
    """Scores, weights, fates and the trained conversation follow from the mined row that it quotes."""
    from filtered import filter_rows

    from models.prompts import TEMPLATES
    from tasks.filter import FilterSettings
    from tasks.rows import Candidate, Mined, Scored, fields
    from tasks.score import ScoreSettings, score
    from tasks.similarity.registry import open_similarity
    from tasks.train import TrainSettings, training_conversation

    page = ROOT / "docs/method.md"
    (quoted,) = map(json.loads, fences(page, "json"))
    candidates = tuple(
        Candidate(sample=i, principle=z, critique="", refined=y2, finish="stop", tokens=9)
        for i, (z, y2) in enumerate(quoted["candidates"])
    )
    asked: Any = ({"role": "user", "content": quoted["prompt"]},)
    mined = Mined(
        prompt_id="id", prompt=asked, gold=quoted["gold"], source="planted",
        initial=quoted["initial"], initial_finish="stop", initial_tokens=8, candidates=candidates,
    )  # fmt: skip
    scored = Scored.of(mined, *score(open_similarity(ScoreSettings()), [mined]))
    text = page.read_text("utf-8")
    assert f"y1 scores {scored.initial_score:.4f}" in text
    (best,), rejected = filter_rows([scored], FilterSettings(), "0/1")
    soft, _ = filter_rows([scored], FilterSettings(selection="soft"), "0/1")
    weights = {row.sample: f"{row.weight:.4f}" for row in soft}
    reasons = {row.sample: row.reason for row in rejected}
    for c in scored.candidates:
        assert c.score is not None and scored.initial_score is not None
        fate = f"rejected | {reasons[c.sample]}" if c.sample in reasons else "kept |"
        gain = c.score - scored.initial_score
        shown = f"| {c.sample} | {c.score:.4f} | {gain:.4f} | {weights.get(c.sample, 0)} | {fate}"
        assert shown in text
    assert best.weight == 1

    label = "support health with references"
    learned = training_conversation(best, label, TEMPLATES["terse"], TrainSettings())
    (drawn,) = (f for f in fences(page, "text") if "← loss" in f)
    lines = [re.split(r" {2,}", line) for line in drawn.splitlines()]
    assert [(m["role"], m["content"]) for m in learned.messages] == [(w[0], w[1]) for w in lines]
    assert learned.turns == tuple(i for i, w in enumerate(lines) if w[-1] == "← loss")
    assert not any(quoted["gold"] in str(value) for value in fields(learned).values())


def test_one_version_and_date_everywhere() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text("utf-8"))
    newest = re.search(r"^## (\S+) — (\S+)$", (ROOT / "CHANGELOG.md").read_text("utf-8"), re.M)
    assert newest
    assert newest[1] == project["version"] == citation["version"]
    assert newest[2] == str(citation["date-released"])


def test_the_workflow_runs_what_the_makefile_has() -> None:
    """CI and the hooks call targets and tools of this tree."""
    workflow = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text("utf-8"))
    steps = [step.get("run", "") for step in workflow["jobs"]["test"]["steps"]]
    assert {"make lint", "make test"} <= set(steps)
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text("utf-8"))
    for hook in hooks["repos"][0]["hooks"]:
        for word in hook["entry"].split():
            assert not word.startswith("tests/") or (ROOT / word).exists()
    for form in (ROOT / ".github/ISSUE_TEMPLATE").glob("*.yml"):
        assert yaml.safe_load(form.read_text("utf-8"))
