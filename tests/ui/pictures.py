"""The pictures of the documentation, of an experiment that has run; not a test.

    PYTHONPATH=.:tests:tests/ui python tests/ui/pictures.py FOLDER house-style

In the folder's record it clusters iteration 1 once more, from Prefect's form; the last picture is of a
review that it then leaves. Writes `docs/*.png`.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from playwright.sync_api import Page, sync_playwright
from test_ui import CHROMIUM, ROOT, Place, choose, sign_in, submit, up

from tasks.record.record import Record

LONGEST = 600_000
"""Milliseconds that a stage may take."""


def keep(page: Page, name: str, part: Any = None) -> None:
    """Write what the page shows, or a part of it."""
    page.wait_for_timeout(1_000)
    (part or page).screenshot(path=ROOT / "docs" / f"{name}.png")


def custom_run(page: Page, place: Place, deployment: str) -> None:
    """Open the form of a deployment."""
    page.goto(f"{place.prefect}/v2/deployments")
    page.get_by_role("link", name=deployment).first.click()
    page.get_by_role("button", name="Run", exact=True).click()
    page.get_by_role("menuitem", name="Custom run").click()


def cluster_again(page: Page, place: Place, experiment: str) -> None:
    """The form of one stage, and its new attempt beside the old one in MLflow."""
    custom_run(page, place, "cluster")
    choose(page, page.get_by_label("Select experiment"), experiment)
    page.get_by_label("iteration").first.fill("1")
    page.get_by_label("distance_threshold").fill("0.5")
    page.get_by_label("min_prompts").fill("2")
    page.get_by_label("distance_threshold").evaluate("it => it.scrollIntoView({block: 'center'})")
    keep(page, "prefect_form")
    submit(page)
    page.get_by_text("Completed").first.wait_for(timeout=LONGEST)
    record = Record(experiment, place.folder / ".staple", place.mlflow)
    page.goto(f"{place.mlflow}/#/experiments/{record.experiment_id}/runs")
    iteration = page.get_by_role("row").filter(has_text="iteration 1").first
    iteration.get_by_role("button").first.click()
    page.get_by_text("mine 1", exact=True).wait_for()
    if (close := page.get_by_role("button", name="Close")).count():
        close.first.click()
    keep(page, "mlflow_runs")


def review(page: Page, place: Place, experiment: str) -> None:
    """The constitution in a form, for a person to word, merge or drop."""
    custom_run(page, place, "experiment")
    page.get_by_label("source").first.fill(experiment)
    page.get_by_label("iterations").first.fill("1")
    choose(page, page.get_by_label("Select enabled"), "yes")
    submit(page)
    page.get_by_role("button", name="View run").click()
    page.get_by_text("Suspended").first.wait_for(timeout=LONGEST)
    page.reload()
    page.get_by_role("button", name="Open menu").click()
    page.get_by_role("menuitem", name="Resume").click()
    form = page.get_by_role("dialog")
    form.get_by_label("Your name").fill("Ada")
    form.get_by_label("Drop it").nth(1).click()
    form.get_by_label("Wording").nth(0).evaluate("it => it.scrollIntoView({block: 'center'})")
    keep(page, "prefect_review", form)  # the log behind it names folders of this machine


def report_map(page: Page, place: Place, experiment: str) -> None:
    """The report's map of principles, pointed at one of them."""
    place.staple("report", experiment, "--out", "report.html")
    page.goto((place.folder / "report.html").as_uri())
    part: Any = page.locator(".map").first
    part.scroll_into_view_if_needed()
    part.locator(".dot").nth(0).hover(force=True)
    part.evaluate("it => it.parentElement.scrollIntoView()")
    keep(page, "report_map")


def main(folder: Path, experiment: str) -> None:
    """Take all pictures."""
    with up(folder) as place, sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM)
        page = browser.new_page(viewport={"width": 1280, "height": 800})
        page.set_default_timeout(120_000)
        report_map(page, place, experiment)
        sign_in(page, place)
        cluster_again(page, place, experiment)
        review(page, place, experiment)
        browser.close()


if __name__ == "__main__":
    main(Path(sys.argv[1]).absolute(), sys.argv[2])
