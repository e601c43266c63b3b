"""The report in a real browser without a network: it asks for nothing, its map answers."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import small_loop

from constitutions.constitution import load, save
from flows.commands.report import gather, packages, write_report
from flows.experiment import note_settings, open_experiment, record_of, recorded_settings
from flows.schema import ExperimentSettings
from flows.settings import load_settings, with_changes
from models.settings import Settings
from tasks.record.record import Attempt, Record
from tasks.record.work import Metrics, Workspace
from tasks.report.document import page
from tasks.report.exhibits import best_examples
from tasks.rows import Answer, ClusterRow, Comparison, Labelled, Prompt

CHROMIUM = shutil.which("chromium") or ""
pytestmark = pytest.mark.skipif(not CHROMIUM, reason="there is no chromium: apt install chromium")

HOSTILE = (
    "</script><script>alert(1)</script><img src=http://203.0.113.9/x onerror=alert(2)>"
    '"><svg onload=alert(3)> {{ 7 * 7 }} </pre></details> <!-- \u202e evil'
)
"""A principle, a response, a prompt that tries to leave its place."""


REFUSED = """count => new Promise(done => {
    const end = Date.now() + 10000;
    const look = () => refused.length >= count || Date.now() > end ? done(refused) : setTimeout(look, 20);
    look();
})"""
"""What the page's policy refused, once it is so many things (or ten seconds later)."""


class Nothing(Settings):
    """The stand-ins for stages have no settings."""


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory, small: Path) -> Iterator[Path]:
    """A folder with the report of two experiments: one that is real, one whose texts are hostile."""
    folder = tmp_path_factory.mktemp("report")
    small_loop.copy_finished(small, folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("STAPLE_HOME", str(folder / ".staple"))
        settings = load_settings("small.yaml")
        note_settings(settings)
        write_report(["small"], folder / "small.html")
        spoil(settings)
        write_report(["small", "hostile"], folder / "both.html")
        yield folder


def spoil(settings: ExperimentSettings) -> None:
    """The experiment once more, every text of it replaced by `HOSTILE` and a number."""
    hostile = with_changes(settings, {"experiment": "hostile", "iterations": 1})
    note_settings(hostile)
    honest = record_of("small")

    def numbered(number: int) -> str:
        return f"{HOSTILE} {number}"

    def put(stage: str, t: int, rows: dict[str, tuple[list[Any], type]]) -> None:
        found = honest.needs(stage, t)

        def compute(work: Workspace) -> Metrics:
            for name, (written, row_type) in rows.items():
                work.write(name, written, row_type)
            if stage == "cluster":
                principles = load(found.path("constitution.yaml"))
                entries = (p.model_copy(update={"text": numbered(n), "members": (numbered(n),)})
                           for n, p in enumerate(principles.principles))  # fmt: skip
                save(principles.model_copy(update={"principles": tuple(entries)}), work.outputs / "constitution.yaml")  # fmt: skip
            return dict(found.metrics)

        open_experiment(hostile).slot(t).attempt(stage, Nothing(), {}, compute)

    prompts = [
        replace(row, prompt=({"role": "user", "content": numbered(n)},), source=numbered(n))
        for n, row in enumerate(honest.needs("prompts", 0).read("prompts", Prompt))
    ]
    put("prompts", 0, {"prompts": (prompts, Prompt)})
    for t in (0, 1):
        evaluated = honest.needs("evaluate", t)
        answers = [
            replace(row, initial=numbered(n), principle=numbered(n), refined=numbered(n + 1))
            for n, row in enumerate(evaluated.read("answers", Answer))
        ]
        compared = [
            replace(row, outcome=None, failure=HOSTILE, judge=HOSTILE)
            for row in evaluated.read("comparisons", Comparison)
        ]
        put("evaluate", t, {"answers": (answers, Answer), "comparisons": (compared, Comparison)})
    clustered = honest.needs("cluster", 1)
    rows = clustered.read("clusters", ClusterRow)
    renamed = {row.principle: numbered(n) for n, row in enumerate(rows)}
    clusters = [
        replace(row, principle=renamed[row.principle], representative=HOSTILE) for row in rows
    ]
    labelled = [
        replace(row, principle=renamed.get(row.principle, HOSTILE), initial=HOSTILE, refined=f"{HOSTILE} new")
        for row in clustered.read("labelled", Labelled)
    ]  # fmt: skip
    put("cluster", 1, {"clusters": (clusters, ClusterRow), "labelled": (labelled, Labelled)})


@dataclass
class Watched:
    """A page, and all that it did."""

    page: Any
    requests: list[str] = field(default_factory=list)
    said: list[str] = field(default_factory=list)
    """Console messages, errors and dialogs."""


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM)
        yield browser
        browser.close()


def opened(browser: Any, file: Path, width: int = 1280, **how: Any) -> Watched:
    """The file in a fresh window without a network; every request is noted, none but its own
    is let through."""
    context = browser.new_context(viewport={"width": width, "height": 800}, offline=True, **how)
    page = context.new_page()
    page.set_default_timeout(120_000)
    watched = Watched(page)
    context.on("request", lambda request: watched.requests.append(request.url))
    page.on("console", lambda message: watched.said.append(message.text))
    page.on("pageerror", lambda error: watched.said.append(str(error)))
    page.on("dialog", lambda dialog: (watched.said.append(dialog.message), dialog.dismiss()))  # type: ignore[func-returns-value]  # fmt: skip
    page.route("**/*", lambda route: route.continue_() if route.request.url == file.as_uri() else route.abort())  # fmt: skip
    page.goto(file.as_uri())
    return watched


def asked(watched: Watched) -> list[str]:
    """What the page asked for, other than what it holds itself."""
    return [url for url in watched.requests if not url.startswith("data:")]


def in_view(watched: Watched, name: str = "e1") -> Any:
    """The map that is shown."""
    return watched.page.locator(f"#{name}-map .map:not([hidden])")


def unfold(watched: Watched) -> None:
    watched.page.evaluate("document.querySelectorAll('details').forEach(it => it.open = true)")


def shown(text: str) -> str:
    return " ".join(text.split())


STAYED_AND_ADDED = """text => [...text.children]
    .filter(piece => piece.tagName !== "DEL").map(piece => piece.textContent).join("")"""
"""What the card shows of a refinement: all but what was removed from the first response."""


def squeezed(text: str) -> str:
    """A text without white space: a difference never shows where that has changed."""
    return "".join(text.split())


def in_order(parts: list[str], text: str) -> bool:
    """Whether all parts stand in a text, one after the other."""
    return re.fullmatch(".*".join(["", *map(re.escape, parts), ""]), text) is not None


def clustered(home: Path, t: int) -> Attempt:
    return Record("small", home / ".staple", f"sqlite:///{home / 'mlflow.db'}").needs("cluster", t)


def test_nothing_leaves_the_page_and_nothing_is_wrong(browser: Any, home: Path) -> None:
    for scheme in ("light", "dark"):
        watched = opened(browser, home / "small.html", color_scheme=scheme)
        in_view(watched).locator(".dot").first.hover(force=True)
        watched.page.mouse.wheel(0, 20_000)
        unfold(watched)
        pictures = watched.page.locator(".pictures img")
        assert pictures.count() == 6
        for number in range(6):
            assert pictures.nth(number).evaluate(
                "image => image.complete && image.naturalWidth > 300"
            )
        assert asked(watched) == [(home / "small.html").as_uri()]
        assert watched.said == []
        ground = watched.page.evaluate("getComputedStyle(document.body).backgroundColor")
        assert ground == ("rgb(255, 255, 255)" if scheme == "light" else "rgb(20, 23, 27)")
    assert (home / "small.html").stat().st_size < 600_000


def test_a_request_would_be_forbidden(browser: Any, home: Path) -> None:
    page = opened(browser, home / "small.html").page
    attempts = {
        "connect-src": "fetch('https://203.0.113.9/').catch(() => 0)",
        "img-src": "document.body.append(Object.assign(new Image(), {src: 'https://203.0.113.9/a.png'}))",
        "script-src-elem": "{ const it = document.createElement('script'); it.textContent = 'window.ran = 1'; document.body.append(it); }",
        "style-src-elem": "{ const it = document.createElement('style'); it.textContent = '* { color: red }'; document.body.append(it); }",
        "frame-src": "document.body.append(Object.assign(document.createElement('iframe'), {src: 'https://203.0.113.9/'}))",
        "form-action": "{ const it = Object.assign(document.createElement('form'), {action: 'https://203.0.113.9/'}); document.body.append(it); it.submit(); }",
    }
    page.evaluate(
        "window.refused = []; document.addEventListener('securitypolicyviolation', "
        "event => window.refused.push(event.effectiveDirective))"
    )
    for code in attempts.values():
        page.evaluate(f"() => {{ {code} }}")
    refused = page.evaluate(REFUSED, len(attempts))
    assert set(refused) == set(attempts)
    assert page.evaluate("window.ran") is None


def test_the_map_tells_what_it_is_pointed_at(browser: Any, home: Path) -> None:
    watched = opened(browser, home / "small.html")
    rows = {row.principle: row for row in clustered(home, 2).read("clusters", ClusterRow)}
    kept = best_examples(clustered(home, 2).read("labelled", Labelled))
    shown_map = in_view(watched)
    dots, card = shown_map.locator(".dot"), shown_map.locator(".card")
    assert dots.count() == len(rows) > 20
    assert card.inner_text() == "No principle chosen."
    told = set()
    for number in range(0, dots.count(), 9):
        dots.nth(number).hover(force=True)
        chosen = shown_map.locator(".dot.chosen")
        row = rows[chosen.get_attribute("aria-label")]
        text = shown(card.inner_text())
        assert row.principle in text
        assert f"Kept in {row.support} trajector" in text
        assert f"Cluster {row.cluster + 1}, represented by: {row.representative}" in text
        example = kept[row.principle.rstrip(" .")]
        assert card.locator("ins, del").count(), "a refinement that improved is another text"
        stretches = card.locator(".text").last.evaluate(STAYED_AND_ADDED).split("…")
        assert in_order([squeezed(part) for part in stretches], squeezed(example.refined))
        assert shown_map.locator(".dot:not(.far)").count() == sum(
            other.cluster == row.cluster for other in rows.values()
        )
        told.add(row.principle)
    assert len(told) > 2


def test_the_map_answers_the_keyboard(browser: Any, home: Path) -> None:
    watched = opened(browser, home / "small.html")
    page, shown_map = watched.page, in_view(watched)
    radio = page.get_by_role("radio", name="2")
    radio.focus()
    page.keyboard.press("Tab")
    focused = "document.activeElement.getAttribute('aria-label')"
    first = page.evaluate(focused)
    assert first and first in shown_map.locator(".card").inner_text()
    page.keyboard.press("ArrowRight")
    second = page.evaluate(focused)
    assert second != first and second in shown_map.locator(".card").inner_text()
    page.keyboard.press("ArrowLeft")
    assert page.evaluate(focused) == first
    assert shown_map.locator(".dot[tabindex='0']").count() == 1, "one stop on the way by Tab"


def test_another_iteration_is_chosen(browser: Any, home: Path) -> None:
    watched = opened(browser, home / "small.html")
    assert "Iteration 2" in in_view(watched).locator("h4").inner_text()
    watched.page.get_by_role("radio", name="1").check()
    assert "Iteration 1" in in_view(watched).locator("h4").inner_text()
    in_view(watched).locator(".dot").nth(3).hover(force=True)
    label = in_view(watched).locator(".chosen").get_attribute("aria-label")
    assert label in {row.principle for row in clustered(home, 1).read("clusters", ClusterRow)}
    assert watched.page.locator(".map:not([hidden])").count() == 1


def test_colour_is_not_the_only_sign(browser: Any, home: Path) -> None:
    rows = clustered(home, 2).read("clusters", ClusterRow)
    signs = (
        in_view(opened(browser, home / "small.html"))
        .locator(".dot")
        .evaluate_all("dots => dots.map(dot => [dot.getAttribute('href'), dot.classList[1]])")
    )
    assert len({tuple(sign) for sign in signs}) == min(len({row.cluster for row in rows}), 40)
    assert len({shape for shape, _ in signs}) == 5


def test_hostile_texts_are_texts(browser: Any, home: Path) -> None:
    watched = opened(browser, home / "both.html")
    page = watched.page
    dots = in_view(watched, "e2").locator(".dot")
    dots.nth(5).hover(force=True)
    card = in_view(watched, "e2").locator(".card").inner_text()
    assert "</script><script>alert(1)</script><img src=http://203.0.113.9/x" in card
    assert card.count("<svg onload=alert(3)>") == 2, "of principle and representative"
    assert in_view(watched, "e2").locator(".card ins").inner_text() == "new"
    section = page.locator("#e2-examples").inner_text()
    for part in ("onerror=alert(2)>", "{{ 7 * 7 }}", "</pre></details> <!--"):
        assert part in section
    assert HOSTILE.split()[0] in page.locator("#e2-movement").inner_text()
    assert page.locator("img:not([src^='data:image/svg+xml;base64,'])").count() == 0
    assert page.locator("script").count() == 1 + page.locator(".map").count()
    assert page.locator("[onload], [onerror]").count() == 0
    assert page.locator("#packages").is_visible()
    assert asked(watched) == [(home / "both.html").as_uri()]
    assert watched.said == []


CUT = """[...document.querySelectorAll("body *")]
    .filter(it => it.clientWidth && it.scrollWidth > it.clientWidth + 1)
    .filter(it => getComputedStyle(it).display !== "inline" && !it.closest("thead, svg"))
    .map(it => `${it.tagName} ${it.textContent.slice(0, 80)}`)"""
"""What shows less than it holds: the reader would have to scroll sideways."""
BESIDE = "cell => getComputedStyle(cell, '::before').content"


def test_the_head_says_what_was_found(browser: Any, home: Path) -> None:
    """The first screen, on a desk and on a telephone; what is stale is said before the figures."""
    note_settings(with_changes(load_settings("small.yaml"), {"train.epochs": 7}))
    (home / "stale.html").write_text(page([gather(recorded_settings("small"))], packages()))
    note_settings(load_settings("small.yaml"))
    found = record_of("small").needs("evaluate", 2).metrics["win_rate/refined_vs_initial_0"]
    for width in (1280, 400):
        window = opened(browser, home / "small.html", width).page
        head = window.locator("header")
        caveat = head.locator(".summary p").last.bounding_box()
        assert caveat["y"] + caveat["height"] < 800, "without scrolling"
        text = shown(head.inner_text())
        assert f"After iteration 2, refined answers against the initial policy's first ones have a win rate of {100 * found:.1f} %" in text  # fmt: skip
        assert "Judge oracle Data the embedded world “planted”: 160 prompts to learn from, 20 held out" in text  # fmt: skip
        assert "current" not in text
        assert "Not all of it is current" in opened(browser, home / "stale.html", width).page.locator("header").inner_text()  # fmt: skip
        assert window.locator("#results tbody tr").count() == 3, "every iteration"


@pytest.mark.parametrize("file", ["small.html", "both.html"])
def test_it_fits_a_narrow_window(browser: Any, home: Path, file: str) -> None:
    watched = opened(browser, home / file, width=400)
    unfold(watched)
    assert watched.page.evaluate("document.documentElement.scrollWidth") == 400
    assert watched.page.evaluate(CUT) == []
    for cell in watched.page.locator("#results tbody td").all()[:4]:
        assert cell.get_attribute("data-label") in cell.evaluate(BESIDE), "its column's title"
    in_view(watched).locator(".dot").nth(8).hover(force=True)
    assert in_view(watched).locator(".dot.chosen").count() == 1


def test_print_has_every_part(browser: Any, home: Path) -> None:
    page = opened(browser, home / "small.html").page
    assert page.locator("details[open]").count() < page.locator("details").count()
    assert len(re.findall(rb"/Type\s*/Page\b", page.pdf())) > 3
    assert page.locator("details[open]").count() == page.locator("details").count()
