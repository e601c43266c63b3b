"""What a person sees first in MLflow: the iterations and their figures, then the rows of a stage.

A recorded experiment, MLflow's own server, Chromium.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import small_loop
from servers import mlflow_server

from flows.experiment import open_experiment, writing
from flows.loop import publish
from flows.mlflow_page import table_url
from flows.settings import load_settings

CHROMIUM = shutil.which("chromium") or ""
pytestmark = pytest.mark.skipif(not CHROMIUM, reason="there is no chromium: apt install chromium")


def test_the_printed_address_opens_on_the_answer(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from playwright.sync_api import sync_playwright

    small_loop.copy_finished(small, tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("STAPLE_HOME", str(tmp_path / ".staple"))
    with writing("small", "a test"):
        e = open_experiment(load_settings("small.yaml"))
        for t in range(3):
            publish.fn(e, t, e.current(t))
    filtered = e.record.needs("filter", 2)
    shutil.copy("mlflow.db", "server.db")
    with mlflow_server(tmp_path) as server, sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM)
        page = browser.new_page(viewport={"width": 1280, "height": 800})
        page.set_default_timeout(150_000)
        page.goto(table_url(server.url, e.record))
        page.get_by_text("iteration 2", exact=True).first.wait_for()
        page.get_by_text("constitution_size").first.wait_for()
        page.get_by_text("Win rate 0.", exact=False).first.wait_for()  # the description
        if close := page.get_by_role("button", name="Close").all():
            close[0].click()
        page.screenshot(path=tmp_path / "table.png")
        assert page.get_by_text("10ms").count() == 0, "the duration is its stages'"
        page.goto(f"{table_url(server.url, e.record)}&compareRunsMode=CHART")
        page.get_by_text("Main figures").first.wait_for()
        page.get_by_text("refinement_rate").first.wait_for()
        page.screenshot(path=tmp_path / "charts.png")
        shown = page.get_by_test_id("experiment-view-compare-runs-card").all_inner_texts()
        assert "refined_vs_initial_0" in shown[0], "the win rate is the first chart"
        run = f"#/experiments/{e.record.experiment_id}/runs/{filtered.run_id}/artifacts"
        page.goto(f"{server.url}/{run}/trajectories.json")
        page.get_by_text("View as table").wait_for()
        page.get_by_text("principle", exact=True).first.wait_for()
        browser.close()
