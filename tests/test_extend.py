"""`docs/extend.md`: the diff of each section applies to a copy of the project, and works there."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
EXACT = "evaluate.benchmarks.exact.prompts"
COPIED = ("constitutions", "models", "tasks", "flows", "pyproject.toml", "prefect.yaml")


def extended(section: str, place: Path) -> Path:
    """A copy of the project below `place`, with the diff of a section applied."""
    page = (ROOT / "docs/extend.md").read_text("utf-8")
    (text,) = (part for part in page.split("\n## ")[1:] if part.startswith(f"{section}\n"))
    (diff,) = re.findall(r"```diff\n(.*?)```", text, re.DOTALL)
    copy = place / "project"
    copy.mkdir()
    for name in COPIED:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, copy / name)  # with what Python has compiled
        else:
            shutil.copy(source, copy / name)
    subprocess.run(["git", "apply", "-"], cwd=copy, input=diff, text=True, check=True)
    return copy


def python(copy: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Python in the copy, with what it printed."""
    return subprocess.run(
        [sys.executable, *arguments], cwd=copy, capture_output=True, text=True, timeout=300
    )


def staple(copy: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """`staple` in the copy, with what it printed."""
    return python(copy, "-m", "flows.commands.cli", *arguments)


def test_a_world(tmp_path: Path) -> None:
    copy = extended("Add a world", tmp_path)
    code = (
        "from tasks.judging.truth import world_of\n"
        "from tasks.prompts import PromptSettings, prompt_sets\n"
        "settings = PromptSettings(sources='sums', first=3, later=2, held_out=4)\n"
        "sets = [prompt_sets(settings, 0, t).rows for t in range(3)]\n"
        "assert [len(rows) for rows in sets] == [4, 3, 2]\n"
        "assert len({row.prompt_id for rows in sets for row in rows}) == 9\n"
        "assert sets[2][0].source == 'sums/train:4' and world_of(sets[0]).name == 'sums'\n"
        "assert settings.oracle is None and settings.has_golds\n"
    )
    ran = python(copy, "-c", code)
    assert ran.returncode == 0, ran.stderr
    used = staple(copy, "validate", "planted", "--set", "prompts.sources=sums")
    assert used.returncode == 0 and "can be run" in used.stdout, used.stderr
    refused = staple(copy, "validate", "planted", "--set", "prompts.sources=nowhere")
    assert refused.returncode == 2 and "planted, house-style, sums" in refused.stderr
    oracle = ("--set", "prompts.sources=sums", "--set", "evaluate.judge=oracle")
    refused = staple(copy, "validate", "planted", *oracle)
    assert refused.returncode == 2 and "an embedded world" in refused.stderr


SCORED = """
from pathlib import Path
from tasks.record.record import Record
from tasks.record.slot import Slot
from tasks.rows import Candidate, Mined, Scores
from tasks.score import ScoreSettings, score_stage

def candidate(sample, refined):
    return Candidate(
        sample=sample, principle="z", critique="", refined=refined, finish="stop", tokens=1
    )

row = Mined(
    prompt_id="p", prompt=({"role": "user", "content": "Where?"},), gold="the cat sat",
    source="a:1", initial="a dog", initial_finish="stop", initial_tokens=1,
    candidates=(candidate(0, "The cat sat down"), candidate(1, " ")),
)

def compute(work):
    work.write("mined", [row], Mined)
    return {}

slot = Slot(Record("an-experiment", Path("home")), 1, seed=0)
settings = ScoreSettings(similarity="jaccard")
done = score_stage(slot, settings, slot.attempt("mine", settings, {}, compute))
(scored,) = done.read("scored", Scores)
assert (scored.initial_score, *(c.score for c in scored.candidates)) == (0, 0.75, None), scored
"""


def test_a_similarity(tmp_path: Path) -> None:
    copy = extended("Add a similarity", tmp_path)
    (copy / "scoring.py").write_text(SCORED)
    ran = python(copy, "-c", "import scoring")
    assert ran.returncode == 0, ran.stderr
    used = staple(copy, "validate", "planted", "--set", "score.similarity=jaccard")
    assert used.returncode == 0 and "similarity jaccard" in used.stdout, used.stderr
    refused = staple(copy, "validate", "planted", "--set", "score.similarity=jackard")
    assert refused.returncode == 2 and "'python' or 'jaccard'" in refused.stderr


def test_a_stage(tmp_path: Path) -> None:
    copy = extended("Add a stage", tmp_path)
    code = (
        "from flows.experiment import note_settings, open_experiment\n"
        "from flows.settings import load_settings\n"
        "from flows.states import stage_states\n"
        "from tasks.lengths import lengths_stage\n"
        "from tasks.prompts import prompts_stage\n"
        "settings = load_settings('planted', ['experiment=one', 'lengths.unit=characters'])\n"
        "note_settings(settings)\n"
        "e = open_experiment(settings)\n"
        "at, changed = e.slot(1), e.settings_at(1)\n"
        "found = lengths_stage(at, changed.lengths, prompts_stage(at, changed.prompts))\n"
        "assert found.metrics['lengths/gold'] > 20\n"
        "states = stage_states(settings, 1)\n"
        "assert [n for n, t in states if t == 1][:3] == ['prompts', 'lengths', 'mine']\n"
        "assert states['lengths', 1].standing == 'finished'\n"
        "from flows import deployments\n"
        "assert deployments.lengths.name == 'lengths'\n"
    )
    ran = python(copy, "-c", code)
    assert ran.returncode == 0, ran.stderr
    assert "lengths: how long prompts and golds are" in staple(copy, "stage", "--help").stdout
    assert python(copy, "-m", "flows.deployments").returncode == 0
    assert "entrypoint: flows.deployments.lengths" in (copy / "prefect.yaml").read_text()
    refused = staple(copy, "stage", "length", "--experiment", "one", "--iteration", "1")
    assert refused.returncode == 2 and "prompts, lengths, mine" in refused.stderr


def test_a_judge(tmp_path: Path) -> None:
    copy = extended("Add a judge", tmp_path)
    code = (
        "from flows.forms import form_of\n"
        "from models.judges.base import Pair\n"
        "from models.judges.registry import JudgeSettings\n"
        "from tasks.judging.panel import Judges\n"
        "from tasks.score import ScoreSettings\n"
        "settings = JudgeSettings(kind='length', target=4)\n"
        "judges = Judges(str, oracle=None, scoring=ScoreSettings(), seed=0, open_policy=None)\n"
        "judge = judges.judge(settings)\n"
        "def pair(ours, theirs): return Pair(prompt=(), gold='', ours=ours, theirs=theirs)\n"
        "found = judge.compare([pair('four', 'a'), pair('a', 'abc'), pair('abc', 'abcde')])\n"
        "assert [j.outcome for j in found] == [1.0, 0.0, 0.5] and judge.name == 'length:4'\n"
        "assert 'target' in form_of(JudgeSettings).model_fields\n"
    )
    ran = python(copy, "-c", code)
    assert ran.returncode == 0, ran.stderr
    chosen = ("--set", "evaluate.judge.kind=length", "--set", "evaluate.judge.target=200")
    used = staple(copy, "validate", "planted", *chosen)
    assert used.returncode == 0 and "judge length" in used.stdout, used.stderr
    refused = staple(copy, "validate", "planted", "--set", "evaluate.judge.kind=nobody")
    assert refused.returncode == 2 and "'length'" in refused.stderr


def test_a_benchmark(tmp_path: Path) -> None:
    copy = extended("Add a benchmark", tmp_path)
    rows = [{"prompt": f"What is {n} plus 1?", "expected": str(n + 1)} for n in range(4)]
    (copy / "questions.jsonl").write_text("\n".join(map(json.dumps, rows)))
    code = (
        "from types import SimpleNamespace\n"
        "from tasks.benchmarks.registry import BenchmarkSettings, columns\n"
        "from models.judges.registry import JudgeSettings\n"
        "chosen = BenchmarkSettings.model_validate({'exact': {'prompts': 'questions.jsonl'}})\n"
        "exact = chosen.load(JudgeSettings(), guided=True)['exact']\n"
        "said = ['It is 1', '2', 'It is 7', '']\n"
        "answers = [SimpleNamespace(refined=text, finish='stop') for text in said]\n"
        "found = exact.measure(answers, SimpleNamespace(seed=0, resamples=100))\n"
        "assert found['exact/right'] == 0.5, found\n"
        "assert 'exact/right' in [column.metric for column in columns()]\n"
        "assert list(chosen.notes()) == ['file questions.jsonl']\n"
        "assert not list(chosen.judges(JudgeSettings()))\n"
    )
    ran = python(copy, "-c", code)
    assert ran.returncode == 0, ran.stderr
    used = staple(copy, "validate", "planted", "--set", f"{EXACT}=questions.jsonl")
    assert used.returncode == 0 and "also exact" in used.stdout, used.stderr
    refused = staple(copy, "validate", "planted", "--set", f"{EXACT}=nowhere.jsonl")
    assert refused.returncode == 2 and "there is no such file" in refused.stderr
