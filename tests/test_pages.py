"""Every page of the site in a real browser with no network, on a laptop and on a phone: `make test-browser`.

Nothing is cut off, nothing comes from elsewhere, and axe-core finds no fault: some minutes. Screenshots in build/pages.
"""

import subprocess
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import pytest
from kit import KIT, part

pytestmark = pytest.mark.browser
ROOT = Path(__file__).resolve().parents[1]
SITE, SHOTS = ROOT / "build" / "site", ROOT / "build" / "pages"
LAPTOP, PHONE = (1280, 900), (390, 844)
SHOWN = ("index", "01_intro", "03_federated", "07_analysis", "course")
HERE = ("file:", "data:", "blob:", "about:")
EVERYTHING = {"resultTypes": ["violations"]}  # WCAG 2.1 A and AA, and what axe calls best practice
CONTRAST = EVERYTHING | {"runOnly": ["color-contrast"]}

# What is out of sight, with all folds open: on a laptop nothing scrolls sideways, on a phone a box may, and no page.
CUT = """laptop => {
    document.querySelectorAll("details").forEach(fold => { fold.open = true; });
    const article = document.querySelector("article") ?? document.body, faults = [];
    const edge = document.documentElement.clientWidth;
    for (let one = article; one; one = one.parentElement)
        if ((one === document.documentElement || getComputedStyle(one).overflowX !== "visible")
            && one.scrollWidth > one.clientWidth) faults.push(`${one.tagName} scrolls: ${one.scrollWidth} pixels`);
    const boxes = new Set();
    for (const one of article.querySelectorAll("*:not(mjx-container *, svg *)")) {
        const what = `${one.tagName} ${one.textContent.trim().slice(0, 60)}`;
        const overflow = getComputedStyle(one).overflowX;
        if (overflow !== "visible" && one.clientWidth) {
            boxes.add(one);
            if (one.scrollWidth > one.clientWidth + 1 && (laptop || !/auto|scroll/.test(overflow)))
                faults.push(`${what}: ${one.scrollWidth} pixels in ${one.clientWidth}`);
        }
        let box = one;
        while (box && !boxes.has(box)) box = box.parentElement;
        if (!box && one.getBoundingClientRect().right > edge + 1) faults.push(`${what}: beyond the edge`);
    }
    return faults;
}"""


@dataclass(frozen=True)
class Visit:
    """What was seen of one page: addresses from elsewhere, what was cut, and axe's faults as `rule: selector`."""

    name: str
    elsewhere: list[str]
    cut: list[str]
    faults: list[str]


@pytest.fixture(scope="module")
def pages():
    """Every page of the site, newly built."""
    pytest.importorskip("sphinx", reason="the extra `site` is not installed")
    command = [sys.executable, str(ROOT / "docs" / "site.py")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    found = sorted(path for path in SITE.rglob("*.html") if "_static" not in path.parts)
    sources = [*(ROOT / "notebooks").glob("*.ipynb"), *(ROOT / "docs").rglob("*.md")]
    assert {path.stem for path in sources} | {"index", "names", "search"} == {path.stem for path in found}
    return found


def visit(browser, path, size, colours="light", options=EVERYTHING):
    """One page with the network off, looked at as a whole; photographed where it is one of those to be shown."""
    from axe_playwright_python.sync_playwright import Axe

    context = browser.new_context(viewport=dict(zip(("width", "height"), size, strict=True)), color_scheme=colours)
    context.set_offline(True)
    page, asked = context.new_page(), []
    page.on("request", lambda request: asked.append(request.url))
    page.goto(path.as_uri())
    page.wait_for_load_state("networkidle")
    if path.stem in SHOWN and colours == "light":
        SHOTS.mkdir(parents=True, exist_ok=True)
        page.screenshot(path=SHOTS / f"{path.stem}_{size[0]}.png", full_page=True)
    cut = page.evaluate(CUT, size == LAPTOP)
    page.evaluate("() => new Promise(drawn => requestAnimationFrame(() => setTimeout(drawn)))")
    violations = Axe().run(page, options=options).response["violations"] if options else []
    context.close()
    faults = [f"{one['id']}: {node['target'][0]}" for one in violations for node in one["nodes"]]
    elsewhere = [url for url in asked if not url.startswith(HERE)]
    return Visit(f"{path.stem} at {size[0]}, {colours}", elsewhere, cut, faults)


@pytest.fixture(scope="module")
def visits(browser, pages):
    """Each page on a laptop and on a phone, and on a laptop in dark colours."""
    seen = [visit(browser, path, size) for path in pages for size in (LAPTOP, PHONE)]
    return seen + [visit(browser, path, LAPTOP, "dark", CONTRAST) for path in pages]


def test_no_page_asks_for_anything_from_elsewhere(visits):
    assert {one.name: one.elsewhere for one in visits if one.elsewhere} == {}


def test_no_page_cuts_code_a_table_or_an_interval(visits):
    assert {one.name: one.cut for one in visits if one.cut} == {}


def test_axe_finds_no_fault_on_any_page(visits):
    counts = Counter(fault.split(":")[0] for one in visits for fault in one.faults)
    assert {one.name: one.faults[:5] for one in visits if one.faults} == {}, counts


def test_no_deck_asks_for_anything_from_elsewhere(browser, tmp_path):
    pytest.importorskip("sphinx_revealjs", reason="the extra `site` is not installed")
    decks = sorted((KIT / "slides").glob("*.yaml"))
    assert part("decks").main([], tmp_path) == 0
    seen = [visit(browser, path, LAPTOP, options=None) for path in sorted(tmp_path.glob("*.html"))]
    assert len(seen) == len(decks) and [one.elsewhere for one in seen] == [[] for _ in decks]


BROKEN = """<!doctype html><html lang="en"><title>x</title><main><article><h1>x</h1>
<img src="https://example.org/badge.svg"><p style="color: #bbb">pale</p>
<pre style="overflow: auto">{line}</pre><pre style="overflow: hidden">{line}</pre>
<table style="width: 2000px"><tr><td>x</table></article></main></html>"""


@pytest.mark.parametrize("size", [LAPTOP, PHONE], ids=["laptop", "phone"])
def test_a_broken_page_is_told(browser, tmp_path, size):
    path = tmp_path / "broken.html"
    path.write_text(BROKEN.format(line="x" * 400))
    seen = visit(browser, path, size)
    assert seen.elsewhere == ["https://example.org/badge.svg"]
    assert {fault.split(":")[0] for fault in seen.faults} >= {"image-alt", "color-contrast"}
    told = [fault.split()[0] for fault in seen.cut]
    assert told.count("PRE") == (2 if size == LAPTOP else 1), "on a phone, a box may scroll"
    assert "TABLE" in told and "HTML" in told
