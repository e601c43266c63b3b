"""How long each file of tests takes: measured on request, kept in docs/test-durations.md.

    STAPLE_TEST_DURATIONS=docs/test-durations.md make test

Of a run over some files, these alone have new figures.
Files that take longest begin first, and those above `SLOW` are left out of `make test-quick`.
"""

from __future__ import annotations

import functools
import gc
import math
import os
import re
import subprocess
from collections import Counter, defaultdict
from collections.abc import Generator
from pathlib import Path
from typing import cast

import pytest

ROOT = Path(__file__).parent.parent
TABLE = ROOT / "docs" / "test-durations.md"
SLOW = 5.0
"""Processor seconds of a file from which on it is slow."""
HEAD = """# How long the tests take

Processor seconds of each file, those of its child processes included, and the seconds that passed.
Written by `STAPLE_TEST_DURATIONS=docs/test-durations.md make test`, which takes the longest files
first; `make test-quick` leaves out those above {slow:g} processor seconds, and those not in this table.

{total:,.0f} processor seconds in all, {tests:,} tests.

| file | processor | passed | tests |
|---|--:|--:|--:|
"""


def kept(table: Path = TABLE) -> dict[str, tuple[float, float, int]]:
    """File → processor seconds, seconds that passed and tests; the longest first."""
    text = table.read_text("utf-8") if table.exists() else ""
    row = r"^\| (\S+\.py) \| ([\d.]+) \| ([\d.]+) \| (\d+) \|"
    found = re.findall(row, text, re.MULTILINE)
    return {file: (float(a), float(b), int(n)) for file, a, b, n in found}


@functools.cache
def seconds(file: Path) -> float:
    """Processor seconds that a file took; infinite where it is not in the table."""
    return kept().get(file.relative_to(ROOT).as_posix(), (math.inf, 0.0, 0))[0]


def used() -> float:
    """Processor seconds of this process and of its children that have ended."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


class Durations:
    """Measures in each worker; the process that started them adds up and writes the table."""

    def __init__(self, out: Path) -> None:
        self.out, self.file, self.before = out, "", used()
        self.processor, self.passed = defaultdict[str, float](float), defaultdict[str, float](float)
        self.tests = Counter[str]()

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        file = nodeid.partition("::")[0]
        if file != self.file:  # processes of the file before count when somebody collects them
            gc.collect()
            subprocess._cleanup()  # type: ignore[attr-defined]
        self.file, self.before = file, used()

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self) -> Generator[None, pytest.TestReport, pytest.TestReport]:
        report = yield
        before, self.before = self.before, used()
        report.user_properties.append(("processor", self.before - before))
        return report

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        file = report.nodeid.partition("::")[0]
        self.processor[file] += cast(float, dict(report.user_properties).get("processor", 0.0))
        self.passed[file] += report.duration
        self.tests[file] += report.when == "call"

    def pytest_sessionfinish(self) -> None:
        if "PYTEST_XDIST_WORKER" in os.environ:
            return
        found = {file: row for file, row in kept(self.out).items() if (ROOT / file).exists()}
        for file, seconds in self.processor.items():
            found[file] = (seconds, self.passed[file], self.tests[file])
        rows = sorted(found.items(), key=lambda row: -row[1][0])
        total, tests = sum(row[0] for _, row in rows), sum(row[2] for _, row in rows)
        lines = [f"| {file} | {a:.1f} | {b:.1f} | {n} |\n" for file, (a, b, n) in rows]
        self.out.write_text(HEAD.format(slow=SLOW, total=total, tests=tests) + "".join(lines))
