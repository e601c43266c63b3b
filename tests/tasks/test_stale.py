"""Which stages does a change make stale? Each change is made in a copy of the project's files.

The table of docs/resume.md is the same: it is held against what is found here.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys

import pytest
from fingerprints import EXPERIMENTS, ROOT, Fingerprints

CHANGES: dict[str, tuple[str, str, str]] = {
    "a comment": ("tasks/mine.py", "from __future__", "# a comment\nfrom __future__"),
    "a docstring": ("tasks/score.py", '"""', '"""In other words: '),
    "the message of an error": ("constitutions/errors.py", "REPORTED = 50", "REPORTED = 49"),
    "a figure's colour": ("tasks/stages.py", "#0072B2", "#0072B3"),
    "the command line": ("flows/commands/cli.py", "Compute again", "Please compute again"),
    "the export of a policy": ("models/training/export.py", "TOKENS = 128", "TOKENS = 129"),
    "how results are recorded": ("tasks/record/work.py", '".png", ".html"', '".png"'),
    "the pool of workers": ("models/pools/ray_cluster.py", "LOSSES = 3", "LOSSES = 4"),
    "one more similarity": (
        "tasks/similarity/registry.py",
        '"rouge_l": R',
        '"same": RougeL,\n"rouge_l": R',
    ),
    "how corpora are read": ("tasks/corpus/files.py", "annotations\n", "annotations\nX = 1\n"),
    "the planted world": ("models/planted/world.py", '"red", "old"', '"red", "new"'),
    "the planted world's oracle": ("models/planted/oracle.py", "__all__ = [", "X = 1\n__all__ = ["),
    "how the planted model is pretrained": ("models/planted/pretrain.py", '"before."', '"ago."'),
    "the turns of mine": ("tasks/mine.py", "annotations\n", "annotations\nX = 1\n"),
    "a word of the chat templates": ("models/prompts.py", "Rewrite your", "Write your"),
    "a word of the terse templates": ("models/prompts.py", 'propose="why?"', 'propose="but why?"'),
    "how a judge is opened": ("models/judges/registry.py", '" or ".join', '" and ".join'),
    "a CUDA graph": ("models/engine/graphs.py", "SETTLED = 2", "SETTLED = 3"),
    "how tokens are drawn": ("models/engine/sampling.py", "0x9E37", "0x9E38"),
    "an endpoint's retry": ("models/endpoint/client.py", "sleep(pause)", "sleep(2 * pause)"),
    "ROUGE's tokenizer": ("tasks/similarity/rouge.py", "A-Za-z0-9", "A-Za-z"),
    "the sentence embedder": ("models/embedders.py", "BATCH = 64", "BATCH = 32"),
    'a word of the rubric "helpfulness"': (
        "models/judges/rubrics.py",
        "correctly and",
        "rightly and",
    ),
    "an LLM judge's prompt": ("models/judges/llm.py", "an instruction (might", "a task (might"),
    "the filter": ("tasks/filter.py", "annotations\n", "annotations\nX = 1\n"),
    "clustering": ("tasks/clustering/agglomeration.py", "annotations\n", "annotations\nX = 1\n"),
    "the training loop": ("models/training/loop.py", "STEPS = 50", "STEPS = 40"),
    "SAMI's loss": (
        "models/training/sami.py",
        "Tensor = torch.Tensor",
        "Tensor = torch.Tensor\nX = 1",
    ),
    "IFEval's checks": ("tasks/benchmarks/ifeval/data.py", "My answer is maybe.", "Maybe."),
    "AlpacaEval": ("tasks/benchmarks/alpaca_eval/data.py", "annotations\n", "annotations\nX = 1\n"),
}
"""What changes → the file, a text in it, and what stands there then."""


@pytest.fixture(scope="module")
def found() -> dict[str, list[str]]:
    """Change → for each experiment the stages that it makes stale, as a table's cells."""
    edits = {"nothing": ("tasks/mine.py", "", ""), **CHANGES}
    ran = subprocess.run(
        [sys.executable, "-W", "ignore", str(ROOT / "tests" / "fingerprints.py")],
        input=json.dumps(edits),
        env={**os.environ, "PREFECT_LOGGING_LEVEL": "CRITICAL"},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    all_found: dict[str, Fingerprints] = json.loads(ran.stdout)
    before = all_found.pop("nothing")
    return {
        change: [_stale(before[name], after[name]) for name in EXPERIMENTS]
        for change, after in all_found.items()
    }


def _stale(before: dict[str, list[str]], after: dict[str, list[str]]) -> str:
    return ", ".join(stage for stage in before if before[stage] != after[stage]) or "–"


def test_the_table_of_the_documentation_is_what_is_found(found: dict[str, list[str]]) -> None:
    text = (ROOT / "docs" / "resume.md").read_text("utf-8")
    rows = [re.split(r"\s*\|\s*", line.strip("| \n")) for line in text.splitlines()]
    told = {row[0]: row[1:] for row in rows if len(row) == 1 + len(EXPERIMENTS)}
    assert {change: told.get(change) for change in found} == found
